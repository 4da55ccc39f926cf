"""Anthropic's messages: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from tpimpi.serving.server.answering import Usage
from tpimpi.serving.server.exchange import (
    CallBegan,
    CallMore,
    Ended,
    Event,
    ReasoningMore,
    TextMore,
    ToolChoice,
    Wanted,
)
from tpimpi.serving.server.openai_fields import check_stops, refuse
from tpimpi.serving.server.problems import ApiError, bad_field, json_response
from tpimpi.serving.server.tool_fields import call_of, check_tools, function_tool, schema_grammar
from tpimpi.serving.server.wire import Chat, Grammar, Ready, Sampling

MESSAGES = "/v1/messages"  # where errors have a form of their own
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
_STOPS = {"end": "end_turn", "stop": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use"}
_REFUSED = ("container", "mcp_servers", "context_management")


class MessagesRequest(msgspec.Struct, kw_only=True):
    """What a client sends; `max_tokens` is needed for an answer. The fields from `container` on are refused."""

    model: str | None = None
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None

    def wanted(self) -> Wanted:
        """Raises ApiError for what cannot be done."""
        if self.max_tokens is None or self.max_tokens < 1:
            raise bad_field("max_tokens", "it is needed, and must be 1 or more")
        return Wanted(
            prompt=self.chat(),
            sampling=self._sampling(),
            max_tokens=self.max_tokens,
            stops=check_stops("stop_sequences", self.stop_sequences or []),
            tool_choice=_choice(self.tool_choice),
            grammar=_grammar(self.output_format or (self.output_config or {}).get("format")),
        )

    def chat(self) -> Chat:
        """The conversation; where it ends with words of the assistant, the answer goes on with them."""
        refuse(self, _REFUSED)
        if not self.messages:
            raise bad_field("messages", "it is empty; give one message or more")
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system, "system")})
        for place, message in enumerate(self.messages):
            messages += _messages(message, f"messages[{place}]")
        if not messages:
            raise bad_field("messages", "they have no content; give some text")
        begun = ""
        last = messages[-1]
        if last["role"] == "assistant" and not last.get("tool_calls"):
            messages.pop()
            begun = (last["content"] or "").rstrip()
        return Chat(messages, self._tools(), self._options(), begun)

    def _sampling(self) -> Sampling:
        if self.temperature is not None and not 0 <= self.temperature <= 1:
            raise bad_field("temperature", f"it is {self.temperature}, must be from 0 to 1")
        given = {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(self, name)) is not None
        }
        return Sampling(**given)

    def _options(self) -> dict[str, Any]:
        """Whether there is to be reasoning, for templates that ask."""
        kind = (self.thinking or {}).get("type")
        if kind not in (None, "enabled", "disabled", "adaptive"):
            raise bad_field("thinking.type", "it must be enabled, adaptive or disabled")
        options: dict[str, Any] = {} if kind is None else {"enable_thinking": kind != "disabled"}
        if isinstance(effort := (self.output_config or {}).get("effort"), str):
            options["reasoning_effort"] = effort
        return options

    def _tools(self) -> list[dict[str, Any]]:
        tools = []
        for place, tool in enumerate(self.tools or ()):
            if tool.get("type", "custom") != "custom":
                raise bad_field(f"tools[{place}].type", "it must be 'custom'; this server has no tools of its own")
            tools.append(function_tool({**tool, "parameters": tool.get("input_schema")}, f"tools[{place}]"))
        return check_tools(tools)


def _choice(given: dict[str, Any] | None) -> ToolChoice:
    kind = (given or {}).get("type", "auto")
    parallel = not (given or {}).get("disable_parallel_tool_use")
    modes: dict[str, Literal["auto", "none", "required"]] = {"auto": "auto", "none": "none", "any": "required"}
    if isinstance(kind, str) and kind in modes:
        return ToolChoice(modes[kind], parallel=parallel)
    if kind == "tool" and isinstance((given or {}).get("name"), str):
        return ToolChoice("named", (given or {})["name"], parallel=parallel)
    raise bad_field("tool_choice", "its type must be auto, any, none, or tool with a name")


def _grammar(given: Any) -> Grammar | None:
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        raise bad_field("output_config.format", "it must be of type json_schema, with a schema")
    return schema_grammar(given["schema"])


def _text(content: Any, where: str) -> str:
    """A text, or blocks of text."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    return "\n".join(_text_of_block(block, f"{where}[{place}]") for place, block in enumerate(blocks))


def _text_of_block(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    text = block.get("text") if kind == "text" else None
    if not isinstance(text, str):
        what = f"is of type {str(kind)[:40]!r}, which this server does not take here; it takes text"
        raise bad_field(where, what, code="unsupported_content")
    return text


def _messages(message: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A message in the form of chat completions: results of tools become messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad_field(f"{where}.role", "it must be user or assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise bad_field(f"{where}.content", "it must be a text, or a list of blocks")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        at = f"{where}.content[{place}]"
        if kind == "tool_result" and role == "user":
            result = _text(block.get("content") or "", f"{at}.content")
            yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": result}
        elif kind == "tool_use" and role == "assistant":
            if not isinstance(block.get("name"), str):
                raise bad_field(f"{at}.name", "it is missing")
            calls.append(call_of(str(block.get("id", "")), block["name"], block.get("input") or {}))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(_text_of_block(block, at))
    if texts or calls or (role == "assistant" and not thoughts):
        made: dict[str, Any] = {"role": role, "content": "\n".join(texts) if texts or not calls else None}
        made |= {"tool_calls": calls} if calls else {}
        yield made | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic writes it."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: ApiError, path: str) -> Response:
    """What a request to this path is answered with where it cannot be done."""
    if path.startswith(MESSAGES):
        return json_response(error_body(error), error.status, error.headers)
    return error.response()


def usage_of(usage: Usage, output: int) -> dict[str, Any]:
    """Tokens that were kept from earlier prompts count apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": output,
    }


class MessagesForm:
    """The objects of one answer: a list of blocks, each whole before the next begins."""

    def __init__(self, request: MessagesRequest) -> None:
        self.streams = bool(request.stream)
        self._id, self._model = f"msg_{secrets.token_hex(12)}", request.model or ""
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []  # of the call that is open
        self._is_open = False
        self._ended: Ended | None = None

    def use_model(self, ready: Ready) -> None:
        self._model = ready.model

    def begin(self, usage: Usage) -> Iterator[bytes]:
        message = self._message([], None, None, usage_of(usage, 0))
        yield _sent({"type": "message_start", "message": message})
        yield _sent({"type": "ping"})

    def event(self, index: int, event: Event) -> Iterator[bytes]:
        match event:
            case TextMore(text=text) if text:
                yield from self._more("text", text, {"text": ""}, {"type": "text_delta", "text": text})
            case ReasoningMore(text=text) if text:
                more = {"type": "thinking_delta", "thinking": text}
                yield from self._more("thinking", text, {"thinking": "", "signature": ""}, more)
            case CallBegan():
                yield from self._close()
                yield from self._open({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
            case CallMore():
                self._arguments.append(event.arguments)
                yield self._delta({"type": "input_json_delta", "partial_json": event.arguments})
            case Ended():
                yield from self._close()
                self._ended = event

    def end(self, usage: Usage) -> Iterator[bytes]:
        reason, stop = self._why()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        yield _sent({"type": "message_delta", "delta": delta, "usage": usage_of(usage, usage.completion_tokens)})
        yield _sent({"type": "message_stop"})

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield _sent(error_body(error))

    def whole(self, usage: Usage) -> Any:
        return self._message(self._blocks, *self._why(), usage_of(usage, usage.completion_tokens))

    def _why(self) -> tuple[str, str | None]:
        assert self._ended is not None
        reason = _STOPS[self._ended.why]
        if reason == "stop_sequence" and not self._ended.stop:
            reason = "end_turn"
        return reason, self._ended.stop or None

    def _message(
        self, blocks: list[Any], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        about = {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": blocks}
        return {**about, "stop_reason": reason, "stop_sequence": stop, "usage": usage}

    def _more(self, kind: str, text: str, empty: dict[str, Any], delta: dict[str, Any]) -> Iterator[bytes]:
        """More of a block of text, which begins unless one of its kind is open."""
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._close()
            yield from self._open({"type": kind, **empty})
        self._blocks[-1][kind] += text
        yield self._delta(delta)

    def _open(self, block: dict[str, Any]) -> Iterator[bytes]:
        self._blocks.append(block)
        self._is_open, self._arguments = True, []
        yield _sent({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _sent({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})

    def _close(self) -> Iterator[bytes]:
        if not self._is_open:
            return
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _object("".join(self._arguments))
        yield _sent({"type": "content_block_stop", "index": len(self._blocks) - 1})


def _object(arguments: str) -> dict[str, Any]:
    """Arguments as an object; what is none, as of a call that was cut, is nothing."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sent(value: dict[str, Any]) -> bytes:
    """One event of a stream, under its name."""
    return f"event: {value['type']}\ndata: ".encode() + msgspec.json.encode(value) + b"\n\n"

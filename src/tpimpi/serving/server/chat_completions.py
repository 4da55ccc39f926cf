"""OpenAI's chat completions: `/v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tpimpi.serving.server.answering import Usage, server_sent
from tpimpi.serving.server.exchange import CallBegan, CallMore, Ended, Event, ReasoningMore, TextMore, Wanted
from tpimpi.serving.server.openai_fields import Common, chat_logprob, check_logprobs, check_tokens, refuse
from tpimpi.serving.server.problems import ApiError, bad_field, not_supported
from tpimpi.serving.server.tool_fields import check_calls, choice_of, grammar_of, tools_of
from tpimpi.serving.server.wire import Chat, Ready

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
REFUSED = ("audio", "functions", "function_call", "prediction", "web_search_options")
FINISH = {"end": "stop", "stop": "stop", "length": "length", "tool_calls": "tool_calls"}


class ChatRequest(Common, kw_only=True):
    """What a client sends. The fields from `audio` on are refused where they are given: they would change the answer."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    prediction: Any = None
    web_search_options: Any = None

    def wanted(self) -> Wanted:
        """Raises ApiError for what cannot be done."""
        refuse(self, REFUSED)
        if self.modalities and set(self.modalities) != {"text"}:
            raise not_supported("modalities", "other than text are not supported by this server")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_field("top_logprobs", "it needs logprobs")
        most = check_tokens("max_completion_tokens", self.max_completion_tokens)
        return Wanted(
            prompt=Chat(messages_of(self.messages), tools_of(self.tools), self._options()),
            sampling=self.sampling(),
            max_tokens=most or check_tokens("max_tokens", self.max_tokens),
            stops=self.stops(),
            choices=self.choices(),
            logprobs=check_logprobs("top_logprobs", self.top_logprobs or 0) if self.logprobs else None,
            tool_choice=choice_of(self.tool_choice, parallel=self.parallel_tool_calls),
            grammar=grammar_of(self.response_format, "response_format"),
        )

    def _options(self) -> dict[str, Any]:
        """Variables of the template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}


def messages_of(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text for content. Raises ApiError for what is not text, by its name."""
    if not given:
        raise bad_field("messages", "it is empty; give one message or more")
    messages = []
    for place, message in enumerate(given):
        where, role = f"messages[{place}]", message.get("role")
        if role not in ROLES:
            raise bad_field(f"{where}.role", f"it must be one of {', '.join(ROLES)}")
        content = text_of(message.get("content"), f"{where}.content")
        if content is None and role != "assistant":
            raise bad_field(f"{where}.content", "it is missing; give some text")
        if message.get("tool_calls") is not None:
            check_calls(message["tool_calls"], f"{where}.tool_calls")
        messages.append({**message, "role": "system" if role == "developer" else role, "content": content})
    return messages


def text_of(content: Any, where: str) -> str | None:
    """Content of a message as a text. Raises ApiError for what is no text, by its name."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_field(where, "it must be a text, or a list of parts")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
        if not isinstance(text, str):
            what = f"is of type {str(kind)[:40]!r}, which this server does not take; it takes text"
            raise bad_field(f"{where}[{place}]", what, code="unsupported_content")
        texts.append(text)
    return "\n".join(texts)


class _Choice:
    """An answer, as far as it has come."""

    def __init__(self) -> None:
        self.text, self.reasoning, self.finish = [""], [""], "stop"
        self.logprobs: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []


class ChatForm:
    """The objects of one answer."""

    def __init__(self, request: ChatRequest, wanted: Wanted) -> None:
        self.streams = bool(request.stream)
        self._usage, self._has_logprobs = request.include_usage, wanted.logprobs is not None
        self._choices = [_Choice() for _ in range(wanted.choices)]
        self._about: dict[str, Any] = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        self._model = request.model or ""

    def use_model(self, ready: Ready) -> None:
        self._model = ready.model

    def begin(self, usage: Usage) -> Iterator[bytes]:
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def event(self, index: int, event: Event) -> Iterator[bytes]:
        choice = self._choices[index]
        match event:
            case TextMore():
                logprobs = [chat_logprob(one) for one in event.logprobs]
                if self.streams:
                    yield self._chunk(index, {"content": event.text}, logprobs=logprobs)
                else:
                    choice.text.append(event.text)
                    choice.logprobs += logprobs
            case ReasoningMore():
                if self.streams:
                    yield self._chunk(index, {"reasoning_content": event.text})
                else:
                    choice.reasoning.append(event.text)
            case CallBegan():
                call = {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
                choice.calls.append(call)
                if self.streams:
                    yield self._chunk(index, {"tool_calls": [{"index": event.index, **call}]})
            case CallMore():
                if self.streams:
                    more = {"index": event.index, "function": {"arguments": event.arguments}}
                    yield self._chunk(index, {"tool_calls": [more]})
                else:
                    choice.calls[event.index]["function"]["arguments"] += event.arguments
            case Ended():
                choice.finish = FINISH[event.why]
                if self.streams:
                    yield self._chunk(index, {}, finish=choice.finish)

    def end(self, usage: Usage) -> Iterator[bytes]:
        if self._usage:
            yield server_sent({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.as_openai()})
        yield b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield server_sent(error.body())

    def whole(self, usage: Usage) -> Any:
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.text)
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if choice.calls else "")}
            message |= {"refusal": None}
            if reasoning := "".join(choice.reasoning):
                message["reasoning_content"] = reasoning
            if choice.calls:
                message["tool_calls"] = choice.calls
            logprobs = {"content": choice.logprobs, "refusal": None} if self._has_logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish})
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.as_openai()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {**self._about, "object": kind, "model": self._model}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: Sequence[dict[str, Any]] = (),
        finish: str | None = None,
    ) -> bytes:
        found = {"content": logprobs, "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": finish}
        usage = {"usage": None} if self._usage else {}
        return server_sent({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

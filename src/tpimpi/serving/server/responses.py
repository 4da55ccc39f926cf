"""OpenAI's responses, as far as text and tools go: `/v1/responses`. What was answered before is not kept here."""

from __future__ import annotations

from typing import Any

import msgspec

from tpimpi.serving.server.chat_completions import text_of
from tpimpi.serving.server.exchange import Wanted
from tpimpi.serving.server.openai_fields import check_tokens, refuse
from tpimpi.serving.server.problems import bad_field, not_supported
from tpimpi.serving.server.tool_fields import call_of, check_tools, choice_of, function_tool, grammar_of
from tpimpi.serving.server.wire import Chat, Sampling

# Of these each would change the answer: what was kept, what runs elsewhere.
_REFUSED = ("previous_response_id", "conversation", "prompt", "background", "store", "top_logprobs", "max_tool_calls")


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """What a client sends. The fields from `store` on are refused where they are given, and not false."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    user: str | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None

    def wanted(self) -> Wanted:
        """Raises ApiError for what cannot be done."""
        refuse(self, _REFUSED)
        if self.truncation not in (None, "disabled"):
            raise not_supported("truncation", "other than disabled is not supported by this server")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise bad_field("temperature", f"it is {self.temperature}, must be from 0 to 2")
        given = {name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None}
        return Wanted(
            prompt=Chat(self._messages(), self._tools(), self._options()),
            sampling=Sampling(**given),
            max_tokens=check_tokens("max_output_tokens", self.max_output_tokens),
            tool_choice=choice_of(self.tool_choice, parallel=self.parallel_tool_calls),
            grammar=grammar_of((self.text or {}).get("format"), "text.format"),
        )

    def _messages(self) -> list[dict[str, Any]]:
        begin = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*begin, {"role": "user", "content": self.input}]
        if not self.input:
            raise bad_field("input", "it is empty; give a text, or one item or more")
        return [*begin, *_messages_of(self.input)]

    def _tools(self) -> list[dict[str, Any]]:
        tools = []
        for place, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                raise bad_field(f"tools[{place}].type", "it must be 'function'; this server has no tools of its own")
            tools.append(function_tool(tool, f"tools[{place}]"))
        return check_tools(tools)

    def _options(self) -> dict[str, Any]:
        """Variables of the template."""
        effort = (self.reasoning or {}).get("effort")
        if effort is None:
            return {}
        return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


def _messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items in the form of chat completions: calls, and the reasoning before them, are of the message of the assistant that
    they stand beside."""
    messages: list[dict[str, Any]] = []
    thoughts = ""

    def assistant() -> dict[str, Any]:
        """The message of the assistant that goes on here."""
        nonlocal thoughts
        if thoughts or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        if thoughts:
            messages[-1]["reasoning_content"], thoughts = thoughts, ""
        return messages[-1]

    for place, item in enumerate(items):
        where, kind = f"input[{place}]", item.get("type", "message")
        match kind:
            case "message":
                role, content = item.get("role"), text_of(item.get("content"), f"{where}.content")
                if role not in ("user", "assistant", "system", "developer") or content is None:
                    raise bad_field(
                        where, "a message must have a role (user, assistant, system, developer) and content"
                    )
                if role != "assistant":
                    messages.append({"role": "system" if role == "developer" else role, "content": content})
                    continue
                message = assistant()
                before = message["content"]
                message["content"] = content if before is None else f"{before}\n{content}"
            case "function_call":
                if not isinstance(item.get("name"), str) or not isinstance(item.get("arguments"), str):
                    raise bad_field(where, "a call must have a name, and arguments as text")
                call = call_of(str(item.get("call_id", "")), item["name"], item["arguments"])
                assistant().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = text_of(item.get("output"), f"{where}.output")
                if output is None:
                    raise bad_field(f"{where}.output", "it is missing")
                messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output})
            case "reasoning":
                parts = item.get("content") or item.get("summary") or []
                if not isinstance(parts, list):
                    raise bad_field(where, "what is reasoned must be a list of parts")
                thoughts += "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
            case _:
                raise bad_field(f"{where}.type", f"it is {str(kind)[:40]!r}, which this server does not take")
    return messages

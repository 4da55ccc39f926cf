"""Messages of a chat as templates take them: what is content in them, and the forms that some templates insist on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from tpimpi.errors import InputError

Messages = Sequence[Mapping[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
_ID_LENGTH = 9  # of a call, where a template insists on it
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for it

# An exchange with a call, to see what a template does with it.
PROBED_KEY, PROBED_TOOL = "needle", "probed_tool"
PROBED = {
    "type": "function",
    "function": {
        "name": PROBED_TOOL,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {PROBED_KEY: {"type": "string", "description": "Text."}}},
    },
}
PROBE: Messages = (
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": PROBED_TOOL, "arguments": {PROBED_KEY: "x"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": PROBED_TOOL, "content": "x"},
)


def texts_of(value: Any) -> Iterator[str]:
    """All strings in messages, tools and the like, names of their fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from texts_of(key)
            yield from texts_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_of(one)


def with_content(value: Any, marking: Callable[[str], str], *, names: bool) -> Any:
    """The same, `marking` applied to its strings: to names of fields only with `names`, or where they are no words."""
    if isinstance(value, str):
        return marking(value)
    if isinstance(value, Mapping):
        return {
            (marking(key) if isinstance(key, str) and (names or not key.isidentifier()) else key): with_content(
                one, marking, names=names
            )
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [with_content(one, marking, names=names) for one in value]
    return value


def messages_with_content(messages: Messages, marking: Callable[[str], str], *, names: bool) -> list[dict[str, Any]]:
    """As `with_content`, save the role, which is no content (see `checked`)."""
    return [
        {
            name: value if name == "role" else with_content(value, marking, names=names)
            for name, value in message.items()
        }
        for message in messages
    ]


def checked(messages: Messages) -> Messages:
    """The messages. Raises InputError for a role that no template knows."""
    for message in messages:
        if message.get("role") not in ROLES:
            raise InputError(f"the role of a message is {message.get('role')!r}, must be one of {', '.join(ROLES)}")
    return messages


def variants(messages: Messages, *, as_text: bool, developer: bool) -> Iterator[list[dict[str, Any]]]:
    """The messages in forms that templates insist on, the usual one first.

    Arguments of calls are objects, or JSON with `as_text`. Where a message has no content that is None, or "", or the field
    is left out; ids of calls are what they are, or nine letters and digits. Without `developer` that role is "system".
    """
    made = [_usual(message, as_text=as_text, developer=developer) for message in messages]
    lacking = any("content" in message and message["content"] is None for message in made)
    calling = any(message.get("tool_calls") or message.get("tool_call_id") for message in made)
    for ids in (False, True) if calling else (False,):
        of_ids = [_with_short_ids(message) for message in made] if ids else made
        yield of_ids
        if lacking:
            yield [{**m, "content": ""} if m.get("content") is None else m for m in of_ids]
            yield [{k: v for k, v in m.items() if k != "content" or v is not None} for m in of_ids]


def with_descriptions(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools with all that templates ask for, which clients may leave out."""
    filled: list[Mapping[str, Any]] = []
    for tool in tools:
        usual = {"description": "", "parameters": {"type": "object", "properties": {}}}
        given = {name: value for name, value in tool.get("function", {}).items() if value is not None}
        filled.append({**tool, "function": {**usual, **given}})
    return filled


def _usual(message: Mapping[str, Any], *, as_text: bool, developer: bool) -> dict[str, Any]:
    made = {**message, "content": message.get("content")}
    if made["role"] == "developer" and not developer:
        made["role"] = "system"
    if message.get("tool_calls"):
        made["tool_calls"] = [_usual_call(call, as_text=as_text) for call in message["tool_calls"]]
    elif "tool_calls" in made:
        del made["tool_calls"]  # some templates ask only whether it is there
    reasoning = next((made[name] for name in _REASONING if made.get(name)), None)
    if reasoning is not None:
        made |= dict.fromkeys(_REASONING, reasoning)
    return made


def _usual_call(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = dict(call.get("function", {}))
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what a model wrote need not be JSON
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
    return {**call, "function": function}


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        made["tool_call_id"] = short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        made["tool_calls"] = [{**call, "id": short_id(str(call.get("id", "")))} for call in message["tool_calls"]]
    return made


def short_id(call_id: str) -> str:
    """Nine letters and digits that stand for an id."""
    if len(call_id) == _ID_LENGTH and call_id.isascii() and call_id.isalnum():
        return call_id
    return xxhash.xxh3_128_hexdigest(call_id.encode("utf-8", "replace"))[:_ID_LENGTH]

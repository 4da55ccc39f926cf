"""How models call tools: what they write for a call, by the family that a chat template belongs to.

    hermes        <tool_call>{"name": …, "arguments": {…}}</tool_call>            Hermes, Qwen, Granite 4
    qwen3-coder   <tool_call><function=NAME><parameter=KEY>…                      Qwen3-Coder, Qwen3.5, Nemotron 3
    glm           <tool_call>NAME<arg_key>KEY</arg_key><arg_value>…               GLM-4.5, GLM-4.7
    llama3        {"name": …, "parameters": {…}}, also behind <|python_tag|>      Llama 3
    mistral       [TOOL_CALLS][{"name": …, "arguments": {…}}]                     Mistral
    mistral-args  [TOOL_CALLS]NAME[ARGS]{…}                                       newer ones
    harmony       a message on the channel "commentary" to=functions.NAME         gpt-oss

A template that shows no tools to its model gets them in the system prompt, as text, in the form of Hermes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

# Control tokens of calls, which are told beside the text of an answer where they are no text themselves.
MARKS = frozenset(
    {
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    }
)
RECIPIENT_MARK, CALLED_MARK = "to=", "<|call|>"  # of harmony: the first has the recipient's name behind it

_DESCRIBED = """You can call functions to help with what the user asks. Here are their signatures:
<tools>
{tools}
</tools>
For each call of a function write a JSON object with its name and arguments, like this:
<tool_call>
{{"name": "NAME", "arguments": {{…}}}}
</tool_call>"""


def family_of(source: str | None, control: Collection[str]) -> str:
    """The family of a template's `source`, in a vocabulary with these `control` tokens; "" where it is not known."""
    if source is None:
        return ""
    if {"<|channel|>", "<|call|>"} <= set(control) and "<|channel|>" in source:
        return "harmony"
    if "[TOOL_CALLS]" in source and "[TOOL_CALLS]" in control:
        return "mistral-args" if "[ARGS]" in source and "[ARGS]" in control else "mistral"
    if "<tool_call>" in source:
        if "<arg_key>" in source:
            return "glm"
        return "qwen3-coder" if "<function=" in source else "hermes"
    if '"parameters": ' in source and "<|start_header_id|>" in source:
        return "llama3"
    return ""


def told_as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Message]:
    """Messages for a template that knows no tools: these, calls and results are text. Without `system` the template has no
    place for a system prompt, and the first message of the user has it."""
    told = list(_results_as_users(map(_call_as_text, messages)))
    if not tools:
        return told
    described = _DESCRIBED.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    role = "system" if system else "user"
    at = next((place for place, message in enumerate(told) if message["role"] == role), None)
    if at is None:
        return [{"role": "system", "content": described}, *told] if system else told
    before = told[at].get("content") or ""
    told[at] = {**told[at], "content": f"{before}\n\n{described}" if system else f"{described}\n\n{before}"}
    return told


def _call_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message.get("content") or ""]
    for call in calls:
        function = call.get("function", call)
        called = {"name": function.get("name"), "arguments": function.get("arguments")}
        texts.append(f"<tool_call>\n{json.dumps(called, ensure_ascii=False)}\n</tool_call>")
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(text for text in texts if text)}


def _results_as_users(messages: Iterable[Message]) -> Iterable[Message]:
    """Results of tools as the user's messages, those that follow each other as one."""
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message.get('content') or ''}\n</tool_response>")
            continue
        if results and message["role"] == "user":
            message = {**message, "content": "\n".join([*results, message.get("content") or ""])}  # noqa: PLW2901
        elif results:
            yield {"role": "user", "content": "\n".join(results)}
        results = []
        yield message
    if results:
        yield {"role": "user", "content": "\n".join(results)}

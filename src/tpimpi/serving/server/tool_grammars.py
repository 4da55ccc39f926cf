"""Which calls of tools an answer has to have, or may have, as a grammar in the family's own form.

tool_choice required, or a name    the answer is calls of these tools, with arguments by their schemas
auto, and a tool is strict         text as it likes; a call that begins is by the schema
auto, and response_format          calls, or what the format says
otherwise                          no grammar: the model is free
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from tpimpi.serving.server.exchange import Wanted
from tpimpi.serving.server.lark import json_rule, literal, special_name
from tpimpi.serving.server.wire import Chat, Grammar, Ready

_ANY = r"/(.|\n)*/"
_THOUGHT = (
    rf'thought: <|channel|> ("analysis" | "commentary") <|message|> {_ANY} <|end|> <|start|> "assistant"'  # of harmony
)
_MARK = '"<tool_call>'  # of a rule that begins with it
_TOOL_CALLS, _ARGS = special_name("[TOOL_CALLS]"), special_name("[ARGS]")


def with_tools(wanted: Wanted, ready: Ready) -> Wanted:
    """What is wanted, with the grammar that its tools ask for. Raises ValueError, in one line, where its choice names none
    of them."""
    if not isinstance(wanted.prompt, Chat) or not wanted.prompt.tools:
        if wanted.tool_choice.mode in ("required", "named"):
            raise ValueError("tool_choice asks for a call, and there are no tools")
        return wanted
    choice = wanted.tool_choice
    functions = [tool["function"] for tool in wanted.prompt.tools]
    if choice.mode == "none":
        return replace(wanted, prompt=replace(wanted.prompt, tools=[]))
    if choice.mode == "named":
        functions = [function for function in functions if function["name"] == choice.name]
        if not functions:
            raise ValueError(f"tool_choice names {choice.name!r}, which is none of the tools")
    forced = choice.mode != "auto"
    strict = any(function.get("strict") for function in functions)
    answer = wanted.grammar
    if not forced and not strict and answer is None:
        return wanted
    if not forced and answer is not None and answer.kind != "json_schema":
        return wanted  # which leaves no room for a call
    if not forced and answer is not None and ready.family == "llama3":
        return replace(wanted, grammar=_json_of_either(functions, answer))
    rules = _Rules(ready.family, functions, strict_only=not forced)
    if forced:
        return replace(wanted, grammar=rules.forced(several=choice.parallel and choice.mode == "required"))
    return replace(wanted, grammar=rules.free(answer, several=choice.parallel))


def _json_of_either(functions: Sequence[Mapping[str, Any]], answer: Grammar) -> Grammar:
    """An answer of JSON that is a call, or by a schema; by the schema alone where parts of it refer to others."""
    schemas = [json.loads(answer.text)]
    for function in functions:
        parameters = function.get("parameters") or {"type": "object"}
        fields = {"name": {"const": function["name"]}, "parameters": parameters}
        call = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
        schemas.append(call)
    text = json.dumps({"anyOf": schemas})
    return answer if '"$ref"' in text else Grammar("json_schema", text)


class _Rules:
    """The rules of a family for calls of functions."""

    def __init__(self, family: str, functions: Sequence[Mapping[str, Any]], *, strict_only: bool) -> None:
        """`strict_only`: only the arguments of strict functions are by their schema."""
        self._family = family
        self._lines = [_THOUGHT] if family == "harmony" else []
        names = []
        for number, function in enumerate(functions):
            follows = function.get("strict") or not strict_only
            schema = (function.get("parameters") if follows else None) or {"type": "object"}
            names.append(f"call_{number}")
            self._lines += self._call(names[-1], function["name"], schema)
        self._lines.append(f"call: {' | '.join(names)}")

    def forced(self, *, several: bool) -> Grammar:
        """An answer of calls alone."""
        return self._grammar(f"start: {self._calls(several=several)}")

    def free(self, answer: Grammar | None, *, several: bool) -> Grammar:
        """An answer of calls, or by another grammar; or of text in which there may be calls."""
        calls = self._calls(several=several)
        if answer is not None:
            self._lines.append(f"answer: {json_rule(json.loads(answer.text))}")
        if self._family == "harmony":
            last = "answer" if answer is not None else _ANY
            return self._grammar(f'start: {calls} | thought* <|channel|> "final" <|message|> {last}')
        if answer is not None:
            return self._grammar(f"start: {calls} | answer")
        if self._family.startswith("mistral"):
            return self._grammar(f"start: {_ANY} | {_ANY} {calls}")
        if self._family == "llama3":
            return self._grammar(rf"start: /([^{{\s](.|\n)*)?/ | {calls}")
        # Text up to the mark of a call, which is part of the call's own text else.
        self._lines = [line.replace(f": {_MARK}", ': "', 1) for line in self._lines]
        self._lines += [r"before[lazy]: /(.|\n)*<tool_call>/", f"after: {_ANY}"]
        return self._grammar(f"start: (before call){'*' if several else '?'} after")

    def _grammar(self, start: str) -> Grammar:
        return Grammar("lark", "\n".join([start, *self._lines]), whole=self._family == "harmony")

    def _calls(self, *, several: bool) -> str:
        match self._family:
            case "mistral":
                more = "(/, ?/ call)*" if several else ""
                return f'{_TOOL_CALLS} "[" call {more} "]"'
            case "mistral-args":
                return "call+" if several else "call"
            case "llama3":
                return "call"
            case "harmony":
                return "thought* call"
        return r"call (/\n/ call)*" if several else "call"

    def _call(self, rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
        """The rules of a call of one function."""
        field = "parameters" if self._family == "llama3" else "arguments"
        begun = literal(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{field}": ')
        match self._family:
            case "llama3" | "mistral":
                return [f'{rule}: {begun} {json_rule(schema)} "}}"']
            case "mistral-args":
                return [f"{rule}: {_TOOL_CALLS} {literal(name)} {_ARGS} {json_rule(schema)}"]
            case "harmony":
                header = literal(f"commentary to=functions.{name} ")
                return [f'{rule}: <|channel|> {header} <|constrain|> "json" <|message|> {json_rule(schema)}']
            case "qwen3-coder":
                return _tagged(
                    *(rule, f"<tool_call>\n<function={name}>\n", schema),
                    *("<parameter={key}>\n", "\n</parameter>\n", "</function>\n</tool_call>"),
                )
            case "glm":
                return _tagged(
                    *(rule, f"<tool_call>{name}\n", schema),
                    *("<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>"),
                )
        opening, closing = literal("<tool_call>\n"), literal("}\n</tool_call>")
        return [f"{rule}: {opening} {begun} {json_rule(schema)} {closing}"]


def _tagged(rule: str, opening: str, schema: Mapping[str, Any], before: str, behind: str, closing: str) -> list[str]:
    """A call whose arguments stand between tags: strings as they are, up to the tag, all else as JSON."""
    lines, parts = [], []
    required = schema.get("required") or []
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}  # which values refer to
    for number, (key, value) in enumerate((schema.get("properties") or {}).items()):
        name = f"{rule}_{number}"
        start = literal(before.format(key=key))
        if isinstance(value, Mapping) and value.get("type") == "string" and "enum" not in value:
            tag = behind.replace("/", r"\/").replace("\n", r"\n")
            lines += [f"{name}_text[lazy]: /(.|\\n)*{tag}/", f"{name}: {start} {name}_text"]
        elif isinstance(value, Mapping) and value.get("type") == "string":
            texts = [literal(str(one)) for one in value["enum"]]
            lines.append(f"{name}: {start} ({' | '.join(texts)}) {literal(behind)}")
        else:
            kind = {**shared, **value} if isinstance(value, Mapping) else {}
            lines.append(f"{name}: {start} {json_rule(kind)} {literal(behind)}")
        parts.append(name if key in required else f"{name}?")
    return [f"{rule}: {literal(opening)} {' '.join(parts)} {literal(closing)}", *lines]

"""Tools, calls and the form of an answer, as clients give them: checked, in the form of chat completions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpimpi.serving.server.exchange import ToolChoice
from tpimpi.serving.server.problems import bad_field, not_supported
from tpimpi.serving.server.wire import Grammar

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')


def function_tool(function: Any, where: str) -> dict[str, Any]:
    """A tool that is a function with `name`, and maybe `description`, `parameters` and `strict`."""
    if not isinstance(function, dict):
        raise bad_field(where, "it must be an object with a name")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_field(f"{where}.name", "it must be 1 to 128 letters, digits, _, . and -")
    if not isinstance(parameters, dict | None):
        raise bad_field(f"{where}.parameters", "it must be a JSON schema, an object")
    _check_schema(parameters or {}, f"{where}.parameters")
    if not isinstance(function.get("description"), str | None):
        raise bad_field(f"{where}.description", "it must be a text")
    kept = {
        key: function[key] for key in ("name", "description", "parameters", "strict") if function.get(key) is not None
    }
    return {"type": "function", "function": kept}


def _check_schema(parameters: dict[str, Any], where: str) -> None:
    """What forms of calls are made of has the kinds that JSON Schema gives it."""
    properties = parameters.get("properties", {})
    if not isinstance(properties, dict) or not all(isinstance(one, dict | bool) for one in properties.values()):
        raise bad_field(f"{where}.properties", "it must be an object of schemas")
    if not isinstance(parameters.get("required", []), list):
        raise bad_field(f"{where}.required", "it must be a list of names")
    if any(isinstance(one, dict) and not isinstance(one.get("enum", []), list) for one in properties.values()):
        raise bad_field(f"{where}.properties", "enum must be a list")


def check_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools. Raises ApiError where they are too many, or two have one name."""
    if len(tools) > MAX_TOOLS:
        raise bad_field("tools", f"there are {len(tools)}, at most {MAX_TOOLS} are taken")
    names = [tool["function"]["name"] for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise bad_field("tools", f"two have the name {twice[0]!r}")
    return list(tools)


def tools_of(given: Any) -> list[dict[str, Any]]:
    """The `tools` of chat completions. Raises ApiError for those that are no functions."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise bad_field("tools", "it must be a list")
    tools = []
    for place, tool in enumerate(given):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise bad_field(f"tools[{place}].type", "it must be 'function'; this server has no tools of its own")
        tools.append(function_tool(tool.get("function"), f"tools[{place}].function"))
    return check_tools(tools)


def choice_of(given: Any, *, parallel: bool | None) -> ToolChoice:
    """The `tool_choice` of OpenAI's APIs; the name of a function stands in its `function`, or beside its type."""
    both = parallel is not False
    if given is None or given == "auto":
        return ToolChoice("auto", parallel=both)
    if given in ("none", "required"):
        return ToolChoice(given, parallel=both)
    if isinstance(given, dict) and given.get("type") == "function":
        inner = given.get("function", given)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            return ToolChoice("named", inner["name"], parallel=both)
        raise bad_field("tool_choice", "it must have the name of a function")
    if isinstance(given, dict):
        raise not_supported("tool_choice", f"of type {str(given.get('type'))[:40]!r} is not supported by this server")
    raise bad_field("tool_choice", "it must be none, auto, required, or a function")


def grammar_of(given: Any, where: str) -> Grammar | None:
    """What `response_format`, or `text.format`, asks of the answer. The schema stands in its `json_schema`, or beside it."""
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    if kind != "json_schema":
        raise bad_field(f"{where}.type", "it must be text, json_object or json_schema")
    inner = given.get("json_schema", given)
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise bad_field(
            f"{where}.json_schema.schema" if "json_schema" in given else f"{where}.schema", "it must be an object"
        )
    return schema_grammar(schema)


def schema_grammar(schema: Mapping[str, Any]) -> Grammar:
    """An answer that is JSON by this schema."""
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


def check_calls(calls: Any, where: str) -> None:
    """Raise ApiError for `tool_calls` of a message that are none."""
    if not isinstance(calls, list):
        raise bad_field(where, "it must be a list")
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_field(f"{where}[{place}].function", "it must have a name")
        if not isinstance(function.get("arguments", ""), str | dict):
            raise bad_field(f"{where}[{place}].function.arguments", "it must be JSON, as text")


def call_of(call_id: str, name: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
    """A call, in a message of the assistant."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}

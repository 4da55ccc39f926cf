"""What the shape of a grammar tells: which are plain, and which are refused where none can be tried."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tpimpi.serving.schema_limits import is_plain, too_costly
from tpimpi.serving.server.lark import json_rule

TREE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "a pattern, 3600000 multipleOf", "maxLength": 100000},
        "kind": {"type": "string", "enum": [f"kind {number}" for number in range(200)]},
        "when": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}], "default": None, "title": "t"},
        "price": {"type": "number", "minimum": 0.01, "maximum": 10**9},
        "one": {"$ref": "#/$defs/node", "description": "as pydantic writes it"},
        "old": {"allOf": [{"$ref": "#/$defs/node"}], "default": {}},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
    "$defs": {"node": {"type": "array", "items": {"$ref": "#"}, "maxItems": 100}},
}
NOT_PLAIN: dict[str, Any] = {
    "a pattern": {"properties": {"a": {"pattern": "^a$"}}},
    "patterns of names": {"patternProperties": {"^a": {}}},
    "a multiple": {"items": [{"multipleOf": 2}]},
    "in what refers to an example": {"examples": [{"multipleOf": 7}], "$ref": "#/examples/0"},
    "required beside alternatives": {"required": ["a"], "anyOf": [{}, {}]},
    "two kinds of alternatives": {"anyOf": [{}], "oneOf": [{}]},
    "all of two": {"allOf": [{"type": "object"}, {"properties": {"a": {}}}]},
    "a reference beside something": {"$ref": "#/$defs/a", "required": ["b"], "$defs": {"a": {}}},
    "many fields beside many values": {"required": ["a"] * 200, "enum": [{}] * 200},
    "a long one": {"enum": ["a" * 20000]},
}


def test_ordinary_schemas_are_plain() -> None:
    assert is_plain("json_schema", json.dumps(TREE)) and is_plain("json_schema", "{}")
    call = f'start: call+\ncall: "<tool_call>{{" {json_rule(TREE)} "}}" /(.|\\n)*/'
    assert is_plain("lark", call)
    assert is_plain("regex", "[a-z]+@[a-z]+")


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_may_multiply_is_not_plain(name: str) -> None:
    schema = NOT_PLAIN[name]
    assert not is_plain("json_schema", json.dumps(schema))
    assert not is_plain("lark", f'start: "%json [" | a\na: {json_rule(schema)}')


def test_a_counted_repetition_is_not_plain() -> None:
    assert not is_plain("regex", "a{1,30}") and not is_plain("regex", "a?" * 200)
    assert not is_plain("lark", f"start: a | {json_rule({})}\na: /b{{1,30}}/")


COSTLY: list[tuple[str, Any, str]] = [
    ("regex", "a?" * 30000, "60000 characters, at most 8192"),
    ("json_schema", {"type": "string", "pattern": f"^x{'a?' * 60000}y$", "maxLength": 50000}, "at most 8192"),
    ("json_schema", {"enum": ["%json {"], "anyOf": [{"patternProperties": {"a?" * 30000: {}}}]}, "60000 characters"),
    ("json_schema", {"allOf": [{"type": "integer", "multipleOf": m} for m in (9973, 9967)]}, "common multiple"),
    ("json_schema", {"allOf": [{"type": "number", "multipleOf": m} for m in (43683, 1e-5)]}, "common multiple"),
    ("json_schema", {"$ref": "#", "anyOf": [{"multipleOf": 1e300}, {"multipleOf": 1e-300}]}, "common multiple"),
    ("json_schema", {"patternProperties": {f"a{n}$": {} for n in range(400)}}, "400 patternProperties are compared"),
    ("json_schema", {"type": "integer", "multipleOf": 10**4000}, "common multiple"),
    ("json_schema", {"required": [f"a{n}" for n in range(8000)], "enum": [{}] * 9000}, "8000 fields may be"),
    ("json_schema", {"enum": [{}] * 9000, "$ref": "#", "required": ["a"] * 999}, "alternatives"),
    ("lark", f'start: "%json [" | %json {json.dumps({"multipleOf": 12345.678})}', "common multiple"),
]


@pytest.mark.parametrize("number", range(len(COSTLY)))
def test_what_takes_minutes_or_gigabytes_is_told_by_its_shape(number: int) -> None:
    kind, value, expected = COSTLY[number]
    problem = too_costly(kind, value if isinstance(value, str) else json.dumps(value))
    assert problem is not None and expected in problem and "\n" not in problem


def test_what_is_ordinary_is_not_costly() -> None:
    patterns = {"properties": {"a": {"type": "string", "pattern": "^[A-Z]{3}$"}, "b": {"multipleOf": 0.01}}}
    for schema in (TREE, patterns):
        assert too_costly("json_schema", json.dumps(schema)) is None

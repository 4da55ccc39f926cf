"""What a grammar's shape tells of what llguidance takes to compile it: which are plain, so that they take little for sure;
and, where none can be tried (see grammar_trial), which are likely to take minutes, or all memory.

Measured with llguidance 1.9.1 on a desktop. Of a pattern of n optional letters memory goes by the square of n ("a?" * n with
a maxLength: 8000 128 MB, 60000 6.9 GB); several patterns for one text multiply (20 of ".*a.{9}b": 27 s, 2.3 GB); numbers
that are multiples of m take a state for each remainder (999983: 7 s, 340 MB), and of two m together one for each of their
least common multiple (9973 and 9967: minutes), but few where it is made of small primes (3600000: 0.1 s). What stands beside
alternatives is copied into each (1500 names and 2500 empty alternatives: 1.8 s, 330 MB), so that objects in objects double
(12 with oneOf [{}, {}]: 210 MB, 20: all memory), and patternProperties are compared with each other (400: 6 s and more).
Without these, of 10000 random schemas of up to 16 KiB none took over 0.07 s and 11 MB: for bounds of lengths, numbers and
lists, formats and references llguidance has limits of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

# Plain grammars
PLAIN_BYTES = 1 << 14
PLAIN_REGEX_CHARACTERS = 256
PLAIN_COPIES = 10_000  # of fields into alternatives, see MAX_COPIES
_MULTIPLYING = frozenset(("pattern", "patternProperties", "multipleOf"))
# What may stand beside anyOf or $ref, and has nothing to be merged with it.
_REMARKS = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$defs", "definitions", "$schema", "$id", "$comment"),
    )
)

# Where none can be tried
MAX_PATTERN_CHARACTERS = 1 << 13  # of one pattern; of several the root of the sum of their squares
MAX_MULTIPLE = 100_000  # of what multipleOf says, as a whole number of its last decimal place; see _multiple
MAX_COPIES = 5_000_000  # of fields into alternatives: all fields, times all alternatives and references
MAX_TRIED = 20_000_000  # characters of patterns, times all alternatives and references
MAX_PAIRS = 100_000  # of patterns of fields, and fields or other patterns that they are compared with
_FIELDS = ("required", "properties")
_ALTERNATIVES = ("anyOf", "oneOf", "allOf", "enum")
_MERGED = ("anyOf", "oneOf", "allOf", "$ref")  # by these a value is to follow several schemas


def is_plain(kind: str, text: str) -> bool:
    """Whether this grammar is small, and has nothing that may multiply. Raises RecursionError."""
    if kind == "regex":
        return len(text) <= PLAIN_REGEX_CHARACTERS and "{" not in text
    if len(text) > PLAIN_BYTES:
        return False
    schemas, rest = _schemas_of(kind, text)
    parts = list(_objects(schemas))
    fields, alternatives = _counts(parts)
    return (
        fields * alternatives <= PLAIN_COPIES
        and not any(_MULTIPLYING & part.keys() or _is_merged(part) for part in parts)
        and re.search(r"\{\d", rest) is None  # a counted repetition
    )


def too_costly(kind: str, text: str) -> str | None:
    """Why this grammar is not compiled where it cannot be tried before; None where it may be. Raises RecursionError."""
    if kind == "regex":
        return _too_long(len(text))
    parts = list(_objects(_schemas_of(kind, text)[0]))
    patterns, named = list[int](), 0
    for part in parts:
        if isinstance(pattern := part.get("pattern"), str):
            patterns.append(len(pattern))
        if isinstance(by_pattern := part.get("patternProperties"), dict):
            patterns += map(len, by_pattern)
            named += len(by_pattern)
    fields, alternatives = _counts(parts)
    if fields * alternatives > MAX_COPIES:
        return f"{fields} fields may be copied into {alternatives} alternatives; leave some out"
    if sum(patterns) * alternatives > MAX_TRIED:
        return f"patterns of {sum(patterns)} characters may be tried with {alternatives} alternatives; leave some out"
    if named * (named + fields) > MAX_PAIRS:
        return f"{named} patternProperties are compared with {fields} fields and with each other; leave some out"
    if _multiple(parts) > MAX_MULTIPLE:
        return f"its multipleOf, or their least common multiple, are over {MAX_MULTIPLE}; leave some out"
    return _too_long(math.isqrt(sum(length**2 for length in patterns)))


def _is_merged(part: dict[str, Any]) -> bool:
    """Whether a value is to follow several schemas here."""
    merged = [name for name in _MERGED if name in part]
    if not merged:
        return False
    several = part.keys() - _REMARKS - set(merged) or len(merged) > 1
    return bool(several) or (merged == ["allOf"] and not (isinstance(part["allOf"], list) and len(part["allOf"]) < 2))


def _counts(parts: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Of all fields, and of all alternatives and references, that these have."""
    fields = sum(len(part[name]) for part in parts for name in _FIELDS if isinstance(part.get(name), (list, dict)))
    listed = sum(len(part[name]) for part in parts for name in _ALTERNATIVES if isinstance(part.get(name), list))
    return fields, listed + sum("$ref" in part for part in parts)


def _multiple(parts: Sequence[dict[str, Any]]) -> int:
    """Of what a number has to be a multiple, at most: where schemas are merged the least common multiple of all, in the last
    decimal place that one of them has; else the largest."""
    digits = [found for part in parts if (found := _decimal(part.get("multipleOf"))) is not None]
    places = [max(0, -int(one.as_tuple().exponent)) for one in digits]
    if any(name in part for part in parts for name in _MERGED):
        places = [max(places, default=0)] * len(digits)
        return math.lcm(*(int(one.scaleb(place)) for one, place in zip(digits, places, strict=True)))
    return max((int(one.scaleb(place)) for one, place in zip(digits, places, strict=True)), default=1)


def _too_long(characters: int) -> str | None:
    """Why regular expressions of so many characters are not compiled; None where they may be."""
    if characters <= MAX_PATTERN_CHARACTERS:
        return None
    return f"its patterns have {characters} characters, at most {MAX_PATTERN_CHARACTERS} are taken; make them shorter"


def _schemas_of(kind: str, text: str) -> tuple[list[Any], str]:
    """The JSON schemas of a grammar, as JSON is read, and the rest of its text: in llguidance's Lark also what looks like a
    schema within a text. Raises RecursionError."""
    if kind == "json_schema":
        return [json.loads(text)], ""
    schemas, rest, end = list[Any](), "", 0
    for found in re.finditer("%json ", text):
        with contextlib.suppress(ValueError):  # within a text: ours are JSON
            schema, behind = json.JSONDecoder().raw_decode(text, found.end())
            schemas.append(schema)
            rest += text[end : found.start()]
            end = max(end, behind)
    return schemas, rest + text[end:]


def _objects(values: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """All JSON objects, however deep."""
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _decimal(number: Any) -> Decimal | None:
    """A number without its sign, as JSON has it; None for what is none, or 0."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number:
        return None
    if isinstance(number, float) and not math.isfinite(number):  # which Python's JSON has
        return None
    return abs(Decimal(number if isinstance(number, int) else repr(number))).normalize()

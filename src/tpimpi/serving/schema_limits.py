"""What a JSON schema may ask of llguidance, beside its size: some short schemas take it minutes, or all memory.

Measured with llguidance 1.9.1: a pattern of n optional letters, "^x" + "a?" * n + "y$" with a maxLength, takes memory by the
square of n (8000: 128 MB, 0.5 s; 60000: 6.9 GB, 30 s); numbers that are multiples of m take a state for each remainder
(99991: 51 MB, 0.5 s), and of two m together one for each of their least common multiple (9973 and 9967: minutes); what is
required beside alternatives is copied into each (8000 names and 15000 values: all memory), and compared with each of
patternProperties (1000 with 200: 4 s).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from json import JSONDecoder
from typing import Any

MAX_PATTERN_CHARACTERS = 1 << 13  # of one pattern; of several the root of the sum of their squares
MAX_MULTIPLE = 100_000  # of what multipleOf says, as a whole number of its last decimal place; see _multiple
MAX_COPIES = 5_000_000  # of fields into alternatives: all fields, times all alternatives and references
MAX_TRIED = 20_000_000  # characters of patterns, times all alternatives and references
MAX_PAIRS = 100_000  # of patterns of fields, and fields or other patterns that they are compared with
_FIELDS = ("required", "properties")
_ALTERNATIVES = ("anyOf", "oneOf", "allOf", "enum")
_MERGED = ("anyOf", "oneOf", "allOf", "$ref")  # by these a value is to follow several schemas


def too_costly(schemas: Iterable[Any]) -> str | None:
    """Why these schemas of one grammar, as JSON is read, are not compiled; None where they may be."""
    parts = list(_objects(schemas))
    patterns, named, fields, alternatives = list[int](), 0, 0, 0
    for part in parts:
        if isinstance(pattern := part.get("pattern"), str):
            patterns.append(len(pattern))
        if isinstance(by_pattern := part.get("patternProperties"), dict):
            patterns += map(len, by_pattern)
            named += len(by_pattern)
        fields += sum(len(part[name]) for name in _FIELDS if isinstance(part.get(name), (list, dict)))
        alternatives += sum(len(part[name]) for name in _ALTERNATIVES if isinstance(part.get(name), list))
        alternatives += "$ref" in part
    if fields * alternatives > MAX_COPIES:
        return f"{fields} fields may be copied into {alternatives} alternatives; leave some out"
    if sum(patterns) * alternatives > MAX_TRIED:
        return f"patterns of {sum(patterns)} characters may be tried with {alternatives} alternatives; leave some out"
    if named * (named + fields) > MAX_PAIRS:
        return f"{named} patternProperties are compared with {fields} fields and with each other; leave some out"
    if _multiple(parts) > MAX_MULTIPLE:
        return f"its multipleOf, or their least common multiple, are over {MAX_MULTIPLE}; leave some out"
    return too_long(math.isqrt(sum(length**2 for length in patterns)))


def _multiple(parts: Sequence[dict[str, Any]]) -> int:
    """Of what a number has to be a multiple, at most: where schemas are merged the least common multiple of all, in the last
    decimal place that one of them has; else the largest."""
    digits = [found for part in parts if (found := _decimal(part.get("multipleOf"))) is not None]
    places = [max(0, -int(one.as_tuple().exponent)) for one in digits]
    if any(name in part for part in parts for name in _MERGED):
        places = [max(places, default=0)] * len(digits)
        return math.lcm(*(int(one.scaleb(place)) for one, place in zip(digits, places, strict=True)))
    return max((int(one.scaleb(place)) for one, place in zip(digits, places, strict=True)), default=1)


def too_long(characters: int) -> str | None:
    """Why regular expressions of so many characters are not compiled; None where they may be."""
    if characters <= MAX_PATTERN_CHARACTERS:
        return None
    return f"its patterns have {characters} characters, at most {MAX_PATTERN_CHARACTERS} are taken; make them shorter"


def schemas_in(lark: str) -> Iterator[Any]:
    """The JSON schemas in a grammar in llguidance's Lark, and what looks like one within a text. Raises RecursionError."""
    for found in re.finditer("%json ", lark):
        with contextlib.suppress(ValueError):  # within a text: ours are JSON
            yield JSONDecoder().raw_decode(lark, found.end())[0]


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

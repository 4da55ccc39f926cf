"""Changes of an input that keep most of its structure: of JSON a value, a key or a whole part; of bytes a few of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

SEPARATOR = b"\n==== next file ====\n"  # between the files of an input that is several


def _deep(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + "1" + closing * levels


# What takes the place of a value, as JSON.
ODD = [
    *("null", "true", "false", '""', "[]", "{}", "0", "-1", "1", "0.5", "-0.0", "1e-320", "1e999", "NaN", "-Infinity"),
    *(str(2**power + more) for power in (7, 8, 15, 16, 31, 32, 53, 62, 63, 64) for more in (-1, 0)),
    *(str(10**30), "9" * 5000, "-" + "9" * 400),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[2J\\n"', '"\\u202e"', json.dumps("a" * 5000), json.dumps("😀" * 50)),
    *(_deep(90), _deep(900), _deep(90, '{"a":', "}"), _deep(900, '{"a":', "}"), _deep(20_000)),
    *('[{"type": []}]', '[[], {}, null, "", 0]', "[" + "1," * 3000 + "1]", '{"type": {}}', '"../../etc/passwd"'),
]
# What takes the place of bytes.
ODD_BYTES = [
    *(b"\0", b"\xff", b"\x80", b"\n", b" ", b'"', b"\\", b"{", b"[", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n"),
    *((2**power - 1).to_bytes(8, "little") for power in (0, 8, 16, 31, 32, 48, 63, 64)),
    *((2**power - 1).to_bytes(4, "little") for power in (8, 16, 31, 32)),
]
_HOLE = "@@ here @@"


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """A few bytes changed, put in, taken out or repeated; or the end cut off."""
    at = random.randrange(len(data) + 1)
    size = random.choice((1, 1, 2, 4, 8, 8, 64))
    match random.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + size :]
        case 2:
            return data[:at] + data[at : at + size] * random.choice((2, 3, 1000)) + data[at + size :]
        case 3:
            return data[:at] + random.randbytes(size) + data[at + size :]
        case 4:
            odd = random.choice(ODD_BYTES)
            return data[:at] + odd + data[at + len(odd) :]
        case 5:
            return data[:at] + random.choice(ODD_BYTES) + data[at:]
    return data[:at] + bytes(b ^ (1 << random.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]


def mutate_json(data: bytes, random: Random) -> bytes:
    """A value, a key or a part of the JSON is another; bytes of it, now and then, or where it is none."""
    if random.randrange(10) == 0:
        return mutate_bytes(data, random)
    try:
        value = json.loads(data)
        odd = mutate_value(value, random)
        text = json.dumps(value)
    except (ValueError, OverflowError, RecursionError):
        return mutate_bytes(data, random)
    return (text.replace(json.dumps(_HOLE), odd) if odd else text).encode()


def mutate_value(value: Any, random: Random) -> str:
    """Change something in `value`, which is of dicts and lists. Returns what stands, as JSON, where `_HOLE` is; "" where
    nothing does."""
    places = list(_places(value))
    if not places:
        return ""
    inner, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del inner[key]
        case 1:
            _, (other, its) = inner[key], random.choice(places)
            inner[key] = copy.deepcopy(other[its])
        case 2 if isinstance(inner, list):
            inner[key:key] = [copy.deepcopy(inner[key])] * random.choice((1, 2, 300))
        case 2:
            inner[random.choice(["", "a", "\ud800", *(str(k) for k in inner)])] = inner.pop(key)
        case 3 if isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
            inner[key] = random.choice((inner[key] + 1, inner[key] - 1, inner[key] * 2, -inner[key], inner[key] / 2))
        case 3 if isinstance(inner[key], str):
            text = inner[key]
            at = random.randrange(len(text) + 1)
            inner[key] = (
                text[:at] + random.choice(("", " ", "\0", "é", "\ud800", "%", "{{", "[", "9" * 30)) + text[at + 1 :]
            )
        case 4 if isinstance(inner, dict):
            inner[random.choice(("type", "a", "", "note", "$ref"))] = _HOLE
            return random.choice(ODD)
        case _:
            inner[key] = _HOLE
            return random.choice(ODD)
    return ""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside of it, as (what holds it, its key or index)."""
    left = [value]
    while left:
        inner = left.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            yield inner, key
            left.append(inner[key])


def mutate_files(*mutators: Mutator) -> Mutator:
    """Of an input that is several files: one of them is changed, each by its own mutator; or it takes another's place."""

    def mutate(data: bytes, random: Random) -> bytes:
        files = files_in(data, len(mutators))
        at = random.randrange(len(files))
        if random.randrange(20) == 0:
            files[at] = random.choice(files)
        else:
            files[at] = mutators[at](files[at], random)
        return joined(files)

    return mutate


def files_in(data: bytes, count: int) -> list[bytes]:
    """The `count` files that an input is; those that it does not have are empty."""
    found = data.split(SEPARATOR, count - 1)
    return [*found, *[b""] * (count - len(found))]


def joined(files: Sequence[bytes]) -> bytes:
    return SEPARATOR.join(files)

"""Requests that mean harm, for a server of ours: what is no HTTP or asks for what is not there, bodies with odd values, and
JSON schemas that explode."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY = "sk-hostile-0123456789"  # which the server knows

# HTTP

BODY = b'{"prompt": "a", "max_tokens": 1}'
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def http(
    target: bytes = b"/health",
    *,
    method: bytes = b"GET",
    host: bytes = b"Host: localhost\r\n",
    headers: bytes = b"",
    body: bytes = b"",
) -> bytes:
    auth = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
    return method + b" " + target + b" HTTP/1.1\r\n" + host + auth + headers + b"\r\n" + body


def post(headers: bytes, body: bytes) -> bytes:
    return http(b"/v1/completions", method=b"POST", headers=headers, body=body)


HTTP = {
    "two lengths": (post(b"Content-Length: 3\r\nContent-Length: %d\r\n" % len(BODY), BODY), 400),
    "a length and chunks": (post(b"Content-Length: 5\r\n" + CHUNKED, CHUNKS), 400),
    "chunks and a length": (post(CHUNKED + b"Content-Length: %d\r\n" % len(CHUNKS), CHUNKS), 400),
    "another encoding": (post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS), 400),
    "an odd encoding": (post(b"Transfer-Encoding: xchunked\r\n", CHUNKS), 400),
    "a negative length": (post(b"Content-Length: -1\r\n", BODY), 400),
    "a signed length": (post(b"Content-Length: +5\r\n", BODY), 400),
    "a huge length": (post(b"Content-Length: 99999999999999999999\r\n", BODY), 413),
    "a length of many digits": (post(b"Content-Length: " + b"9" * 5000 + b"\r\n", BODY), 400),
    "a chunk of no length": (post(CHUNKED, b"zz\r\n"), 400),
    "a chunk of a huge length": (post(CHUNKED, b"f" * 100 + b"\r\n"), 400),
    "a chunk's extension without end": (post(CHUNKED, b"1;" + b"a" * (1 << 18)), 400),
    "trailers without end": (post(CHUNKED, CHUNKS[:-2] + b"X: " + b"a" * (1 << 18)), 400),
    "a chunked body without end": (post(CHUNKED, (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 9), 413),
    "a header without end": (http(headers=b"X: " + b"a" * (1 << 18)), 400),
    "headers without end": (http(headers=b"X: a\r\n" * (1 << 16)), 400),
    "CR in a value": (http(headers=b"X: a\rY: b\r\n"), 400),
    "NUL in a value": (http(headers=b"X: a\0b\r\n"), 400),
    "a blank before the colon": (http(headers=b"Content-Length : 5\r\n"), 400),
    "no colon": (http(headers=b"X\r\n"), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a method": (http(method=b"FLY"), 405),
    "a method in small letters": (http(method=b"get"), 405),
    "TRACE": (http(method=b"TRACE"), 405),
    "OPTIONS": (http(method=b"OPTIONS"), 405),
    "OPTIONS *": (http(b"*", method=b"OPTIONS"), 404),
    "CONNECT": (http(b"evil.example:80", method=b"CONNECT"), 404),
    "DELETE": (http(b"/v1/models", method=b"DELETE"), 405),
    "..": (http(b"/../../../../etc/passwd"), 404),
    "%2e%2e": (http(b"/%2e%2e/%2e%2e/%2e%2e/etc/passwd"), 404),
    "%2e%2e of %2e%2e": (http(b"/%252e%252e/etc/passwd"), 404),
    "..%2f": (http(b"/vendor/..%2f..%2f..%2f..%2fkeys.py"), 404),
    "backslashes": (http(b"/..\\..\\keys.py"), 404),
    "//": (http(b"//evil.example/health"), 404),
    "//etc": (http(b"//etc/passwd"), 404),
    "%00": (http(b"/index.html%00.txt"), 404),
    "NUL": (http(b"/\0"), 400),
    "no UTF-8": (http(b"/%ff%fe"), 404),
    "bytes above 127": (http(b"/\xff"), 400),
    "a line end in a path": (http(b"/v1/models/%0d%0aX:%20a"), 404),
    "a long path": (http(b"/" + b"a" * 60000), 404),
    "an address in full": (http(b"http://evil.example/health"), 404),
    "no path": (http(b""), 400),
    "two hosts": (http(headers=b"Host: localhost\r\n"), 400),
    "no host": (http(host=b""), 400),
    "another host": (http(host=b"Host: evil.example\r\n"), 403),
    "a host that begins as ours": (http(host=b"Host: localhost.evil.example\r\n"), 403),
    "a host behind a port": (http(host=b"Host: localhost:80.evil.example\r\n"), 403),
    "a host behind a user": (http(host=b"Host: localhost@evil.example\r\n"), 403),
    "a host that is none": (http(host=b"Host: [\r\n"), 403),
    "another origin": (http(headers=b"Origin: http://evil.example\r\n"), 403),
    "an origin that is none": (http(headers=b"Origin: http://[\r\n"), 403),
    "no origin": (http(headers=b"Origin: null\r\n"), 403),
    "two origins": (http(headers=b"Origin: http://localhost\r\nOrigin: http://evil.example\r\n"), 403),
    "an origin with a user": (http(headers=b"Origin: http://localhost@evil.example\r\n"), 403),
}


# Bodies

# A path, and a body with all fields that it takes.
BODIES: list[tuple[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("hostile_bodies.json").read_text())


def deep(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + "1" + closing * levels


# What takes the place of a value in a body, as JSON.
ODD = {
    "a kind that is a list": '[{"type": []}]',
    "a kind that is an object": '{"type": {}}',
    "an empty list": "[]",
    "true": "true",
    "a number of 100 bits": str(10**30),
    "a number of many digits": "9" * 6000,
    "a number that is too large": "1e999",
    "a number that is none": "NaN",
    "deep lists": deep(900),
    "deep objects": deep(900, '{"a":', "}"),
    "deeper than any stack": deep(100_000),
    "deep JSON in a text": json.dumps(deep(100_000)),
    "half a character": '"\\ud800"',
    "NUL": '"\\u0000"',
}

# Where such a value made an internal error once, or ended the run: the number of the body, the place in it, the value.
FAULTS: list[tuple[int, tuple[Any, ...], str]] = [
    (0, ("chat_template_kwargs", "a"), "deep lists"),
    (0, ("messages", 2, "tool_calls", 0, "function", "arguments"), "deep JSON in a text"),
    (0, ("messages", 1, "content"), "a kind that is a list"),
    (0, ("top_k",), "a number of 100 bits"),
    (0, ("messages", 3, "tool_call_id"), "a number of 100 bits"),
    (3, ("input", 1, "summary"), "true"),
    (4, ("tool_choice",), "a kind that is an object"),
    (5, ("messages", 0, "content"), "an empty list"),
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of a body and all that is in it."""
    yield place
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*place, key))


def with_odd(body: Any, place: tuple[Any, ...], odd: str) -> str:
    if not place:
        return odd
    found = copy.deepcopy(body)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "@@"
    return json.dumps(found).replace('"@@"', odd)


# Schemas


def doubling(kind: str) -> dict[str, Any]:
    """A schema of a few lines that is a billion when it is written out."""
    parts = {f"d{place}": {kind: [{"$ref": f"#/$defs/d{place + 1}"}] * 2} for place in range(30)}
    return {"$defs": {**parts, "d30": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


def nested(levels: int) -> dict[str, Any]:
    """Objects in objects, which double where each has two alternatives."""
    schema: dict[str, Any] = {"type": "object", "properties": {"z": {}}}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "oneOf": [{}, {}]}
    return schema


SCHEMAS: dict[str, Any] = {
    **{f"doubling {kind}": doubling(kind) for kind in ("anyOf", "allOf", "oneOf")},
    "deep": json.loads(deep(45, '{"type": "array", "items": ', "}").replace("1", '{"type": "integer"}')),
    "a long text": {"type": "string", "maxLength": 10**9},
    "a text that is never long enough": {"type": "string", "minLength": 10**9},
    "a long list": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a regex that tries all ways": text("^(a+)+$"),
    "a regex of many states": text("^((((a{0,99}){0,99}){0,99}){0,99})$"),
    "a long regex": text("(x+x+)+y" * 2000),
    "a regex of optional letters": {"type": "string", "pattern": "^x" + "a?" * 60_000 + "y$", "maxLength": 50_000},
    "two steps": {"allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]},
    "a regex that looks around": text("(?=a)b(?<!c)\\1"),
    "no regex": text("((("),
    "elsewhere": {"$ref": "http://127.0.0.1:9/schema"},
    "a file": {"$ref": "file:///etc/passwd"},
    "elsewhere, by its base": {"$id": "http://127.0.0.1:9/", "$ref": "other.json"},
    "itself": {"$ref": "#"},
    "a circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "many values": {"enum": [f"v{number}" for number in range(10_000)]},
    "many fields": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}},
    "many of all": {
        "allOf": [{"type": "object", "properties": {f"p{one}": {"type": "integer"}}} for one in range(500)]
    },
    "products": {
        "allOf": [{"anyOf": [{"type": "object", "properties": {f"p{a}_{b}": {}}} for b in range(4)]} for a in range(12)]
    },
    "nothing": {"type": "integer", "minimum": 5, "maximum": 1},
    "a tiny step": {"type": "number", "multipleOf": 1e-300},
    "objects in objects": nested(20),
    "patterns at once": {"allOf": [text(f".*{chr(97 + n)}.{{{n}}}b") for n in range(20)]},
    "names by patterns": {"patternProperties": {f"a{n}$": {} for n in range(400)}},
    "fields of alternatives": {"required": [f"a{n}" for n in range(8000)], "enum": [{}] * 9000},
}

"""The bodies of requests: read within limits, and turned into the objects that they are said to be."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from tpimpi.serving.server.problems import ApiError

MOST_BODY_BYTES = 8 << 20
BODY_TIME_S = 30.0
MOST_DEPTH = 100  # of arrays and objects in each other: less than what Python's stack has room for, here and on rank 0
MOST_PARTS = 100_000  # arrays and objects: each takes far more memory than its two bytes
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # or what is left behind a quotation mark
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

T = TypeVar("T")


async def read_body(request: Request) -> bytes:
    """All of the body. Raises ApiError where it is too large, or too slow to come."""
    too_large = ApiError(413, f"the body has more than {MOST_BODY_BYTES} bytes", code="request_too_large")
    too_large.headers["Connection"] = "close"
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME_S):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        headers = {"Connection": "close"}
        raise ApiError(408, f"the body did not come within {BODY_TIME_S:.0f} s", headers=headers) from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client has gone") from error
    return bytes(body)


async def read_json(request: Request, kind: type[T]) -> T:
    """The body as an object of this kind; fields that it does not know are left out. Raises ApiError."""
    body = await read_body(request)
    _check_nesting(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        raise ApiError(400, f"{param or 'the body'}: {problem}", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error


def _check_nesting(body: bytes) -> None:
    """Raise ApiError for JSON with too many arrays and objects, or too deep ones, before anything is made of it."""
    brackets = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * MOST_PARTS:
        raise ApiError(400, f"the body has more than {MOST_PARTS} arrays and objects", code="invalid_json")
    if max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MOST_DEPTH:
        raise ApiError(
            400, f"the body has more than {MOST_DEPTH} arrays and objects in each other", code="invalid_json"
        )

"""The bodies of requests: read within limits, and turned into the objects that they are said to be."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from tpimpi.serving.server.kept import HEADER
from tpimpi.serving.server.problems import ApiError, queue_full

BODY_DIGEST = "tpimpi.body"  # in the scope, once the body of a request with an Idempotency-Key was read
MAX_BODY_BYTES = 8 << 20
SMALL_BODY_BYTES = 1 << 18
MAX_HELD_BYTES = 1 << 28  # of all bodies that are not whole
BODY_TIME_S = 30.0
MAX_DEPTH = 100  # of arrays and objects in each other: less than what Python's stack has room for, here and on rank 0
MAX_PARTS = 100_000  # arrays and objects: each takes far more memory than its two bytes
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # or what is left behind a quotation mark
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

T = TypeVar("T")


class Bodies:
    """Reads the bodies of a server's requests. What has come of those that are not whole has a limit for all together; small
    ones are always taken."""

    def __init__(self) -> None:
        self._held = 0  # bytes

    async def json(self, request: Request, kind: type[T]) -> T:
        """The body as an object of this kind; fields that it does not know are left out. Raises ApiError."""
        body = await self._read(request)
        if HEADER in request.headers:
            request.scope[BODY_DIGEST] = hashlib.sha256(body).hexdigest()
        _check_nesting(body)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            problem, _, path = str(error).partition(" - at `$")
            param = path.rstrip("`").lstrip(".") or None
            raise ApiError(400, f"{param or 'the body'}: {problem}", param=param) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error

    async def _read(self, request: Request) -> bytes:
        """All of the body. Raises ApiError where it is too large, or too slow to come."""
        closing = {"Connection": "close"}
        said = f"the body has more than {MAX_BODY_BYTES} bytes"
        too_large = ApiError(413, said, code="request_too_large", headers=closing)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIME_S):
                async for part in request.stream():
                    body += part
                    self._held += len(part)
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large
                    if len(body) > SMALL_BODY_BYTES and self._held > MAX_HELD_BYTES:
                        full = queue_full("bodies of other requests that come now are too large together")
                        full.headers |= closing
                        raise full
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {BODY_TIME_S:.0f} s", headers=closing) from error
        except ClientDisconnect as error:
            raise ApiError(400, "the client has gone") from error
        finally:
            self._held -= len(body)
        return bytes(body)


def _check_nesting(body: bytes) -> None:
    """Raise ApiError for JSON with too many arrays and objects, or too deep ones, before anything is made of it."""
    brackets = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * MAX_PARTS:
        raise ApiError(400, f"the body has more than {MAX_PARTS} arrays and objects", code="invalid_json")
    if max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise ApiError(400, f"the body has more than {MAX_DEPTH} arrays and objects in each other", code="invalid_json")

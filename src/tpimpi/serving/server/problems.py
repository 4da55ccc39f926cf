"""What a request is answered with where it cannot be done: OpenAI's form of errors, and the right status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

INVALID = "invalid_request_error"
RETRY_AFTER_S = 2  # where the queue is full


class ApiError(Exception):
    """What goes to the client in place of an answer. `param` is the field that is wrong, `code` OpenAI's word for why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers=dict(headers or {}), media_type="application/json")


def bad_field(param: str, problem: str, *, code: str | None = None) -> ApiError:
    """A field has a value that cannot be used."""
    return ApiError(400, f"{param}: {problem}", param=param, code=code)


def not_supported(param: str, why: str = "is not supported by this server") -> ApiError:
    """A field that would change the answer, and is not done."""
    return ApiError(400, f"{param} {why}; leave it out", param=param, code="unsupported_parameter")


def queue_full(why: str) -> ApiError:
    return ApiError(
        429,
        f"{why}; try again later",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def unavailable(message: str, code: str, status: int = 503) -> ApiError:
    return ApiError(status, message, kind="server_error", code=code)

"""The server's endpoints, in one table, and the application that has them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpimpi.serving.server.anthropic import MESSAGES, MessagesRequest, error_response
from tpimpi.serving.server.chat_completions import ChatRequest
from tpimpi.serving.server.completions import CompletionRequest
from tpimpi.serving.server.front_options import FrontOptions
from tpimpi.serving.server.guard import Guard, KeyGuard
from tpimpi.serving.server.kept import Kept
from tpimpi.serving.server.keys import Keys
from tpimpi.serving.server.link import RankLink
from tpimpi.serving.server.metrics import Metrics
from tpimpi.serving.server.openapi import describe
from tpimpi.serving.server.problems import ApiError, json_response
from tpimpi.serving.server.responses import ResponsesRequest
from tpimpi.serving.server.service import DetokenizeRequest, Service, TokenizeRequest

PAGE = Path(__file__).parent / "page"  # what stands at /
# The page loads its own files and talks to its own server; nothing written into it, an answer say, can run or load anything.
# Where the browser knows trusted types, text becomes elements by the sanitiser alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
PAGE_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"cache-control", b"no-cache"),  # asked for again each time, and answered by 304 where it is the same
    (b"x-dns-prefetch-control", b"off"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]

Handler = Callable[[Request], Awaitable[Any]]


@dataclass(frozen=True)
class Endpoint:
    """One of the API: `body` is what a client sends, None where that is nothing; `kept`: it takes an Idempotency-Key."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type | None = None
    kept: bool = False


def endpoints(service: Service) -> list[Endpoint]:
    """All of them."""
    return [
        Endpoint("POST", "/v1/chat/completions", service.chat_completions, "Answer a chat", ChatRequest, kept=True),
        Endpoint("POST", "/v1/completions", service.completions, "Continue a text", CompletionRequest, kept=True),
        Endpoint(
            "POST", "/v1/responses", service.responses, "Answer, in OpenAI's newer form", ResponsesRequest, kept=True
        ),
        Endpoint("POST", MESSAGES, service.messages, "Answer a chat, in Anthropic's form", MessagesRequest, kept=True),
        Endpoint("POST", f"{MESSAGES}/count_tokens", service.count_tokens, "Tokens of such a chat", MessagesRequest),
        Endpoint("GET", "/v1/models", service.models, "The model that is here"),
        Endpoint("GET", "/v1/models/{name:path}", service.models, "A model by its name"),
        Endpoint("POST", "/tokenize", service.tokenize, "Token ids of a text or a chat", TokenizeRequest),
        Endpoint("POST", "/detokenize", service.detokenize, "The text of token ids", DetokenizeRequest),
        Endpoint("GET", "/health", service.health, "Loading (503), or ready (200)"),
        Endpoint("GET", "/cluster", service.cluster, "How the ranks are"),
        Endpoint("GET", "/metrics", service.metrics, "Figures for Prometheus"),
    ]


def application(options: FrontOptions, link: RankLink, kept: Kept, metrics: Metrics, keys: Keys | None) -> ASGIApp:
    """The whole server."""
    table = endpoints(Service(options, link, kept, metrics))
    description = describe(table, has_keys=keys is not None)

    async def openapi(request: Request) -> Response:
        return json_response(description)

    routes: list[BaseRoute] = [Route(one.path, _endpoint(one.handler), methods=[one.method]) for one in table]
    routes += [
        Route("/openapi.json", openapi, methods=["GET"]),
        Mount("/", _Page({one.path: one.method for one in table})),
    ]
    middleware = [Middleware(Guard, options)]
    if options.allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
        middleware.append(cors)
    middleware += [Middleware(_Counting, metrics, {one.path for one in table}), Middleware(KeyGuard, keys)]
    handlers: dict[Any, Any] = {ApiError: _problem, HTTPException: _http_problem, Exception: _internal}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _endpoint(handler: Handler) -> Handler:
    async def endpoint(request: Request) -> Any:
        return await handler(request)

    return endpoint


async def _problem(request: Request, error: ApiError) -> Response:
    return error_response(error, request.scope["path"])


async def _http_problem(request: Request, error: HTTPException) -> Response:
    """Starlette's own: what is not there, or another method."""
    said = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.method} is not a method of {request.url.path[:200]}",
    }
    message = said.get(error.status_code, HTTPStatus(error.status_code).phrase)
    code = "not_found" if error.status_code == 404 else None
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers), request.scope["path"])


async def _internal(request: Request, error: Exception) -> Response:
    problem = ApiError(500, f"internal error: {type(error).__name__}", kind="server_error")
    return error_response(problem, request.scope["path"])


class _Page:
    """The files of the page; anything else that is asked there does not exist, or is an endpoint, of another method."""

    def __init__(self, methods: dict[str, str]) -> None:
        """`methods` of the endpoints, by their paths."""
        self._methods = methods
        self._files = StaticFiles(directory=PAGE, html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (method := self._methods.get(scope["path"])) is not None:
            raise HTTPException(405, headers={"Allow": method})
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *PAGE_HEADERS]}
            await send(message)

        # Whole files alone: they are small, and what is wrong with a range would be told in another form than other errors.
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await self._files({**scope, "headers": headers}, receive, sending)


class _Counting:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, sending)

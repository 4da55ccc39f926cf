"""What a request has to be before anything else is looked at: to a host that is ours, from no other site, with a key."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpimpi.serving.server.anthropic import error_response
from tpimpi.serving.server.front_options import LOOPBACK, FrontOptions
from tpimpi.serving.server.keys import Keys, given_key
from tpimpi.serving.server.problems import ApiError

OWNER = "tpimpi.owner"  # in the scope: whose key the request has, "" where there are no keys
API_PATHS = ("/v1/", "/tokenize", "/detokenize", "/metrics", "/cluster")  # what takes a key
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:/@\[\]]+))(?::\d*)?")
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Checks Host and Origin. A page of another site could else use a server on the reader's own machine: by a name of its
    own that leads here (DNS rebinding), or by requests that browsers send to anywhere."""

    def __init__(self, app: ASGIApp, options: FrontOptions) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*LOOPBACK, *options.allow_hosts)}
        self._checks_host = options.is_local or bool(options.allow_hosts)
        self._hosts |= set() if options.is_local else {options.host.lower()}
        self._origins = frozenset(options.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await _refuse_others(scope, send)
        problem = self._problem(Headers(scope=scope))
        app: ASGIApp = self._app if problem is None else error_response(problem, scope["path"])
        await app(scope, receive, _with_headers(send))

    def _problem(self, headers: Headers) -> ApiError | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            return ApiError(400, "a request has one Host header")
        if (
            "transfer-encoding" in headers and "content-length" in headers
        ):  # what is between may take another for the end
            said = "a request has Transfer-Encoding or Content-Length, not both"
            return ApiError(400, said, code="invalid_http", headers={"Connection": "close"})
        if self._checks_host and _host_name(hosts[0]) not in self._hosts:
            return ApiError(
                403, "the Host header names another host than this server's; see --allow-host", code="host_not_allowed"
            )
        own = {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}
        origins = headers.getlist("origin")
        if "*" in self._origins or all(one in self._origins or one.lower() in own for one in origins):
            return None
        return ApiError(403, "the request comes from another site; see --allow-origin", code="origin_not_allowed")


class KeyGuard:
    """Asks for a key, where there are keys, of what is not public: the page itself, /health and the description are."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[OWNER] = ""
        app = self._app
        path = scope["path"]
        if self._keys is not None and any(path == one.rstrip("/") or path.startswith(one) for one in API_PATHS):
            key = given_key(Headers(scope=scope))
            owner = None if key is None else self._keys.owner(key)
            if owner is None:
                said = "a key is needed: Authorization: Bearer KEY" if key is None else "this key is not known"
                headers = {"WWW-Authenticate": "Bearer"}
                app = error_response(ApiError(401, said, code="invalid_api_key", headers=headers), path)
            else:
                scope[OWNER] = owner
        await app(scope, receive, send)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; "" where it is none."""
    match = _HOST.fullmatch(host.lower())
    return "" if match is None else match[1] or match[2]


def _with_headers(send: Send, added: Iterable[tuple[bytes, bytes]] = tuple(SECURITY_HEADERS)) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sending


async def _refuse_others(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})

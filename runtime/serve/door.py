"""Who is let in: before any request is looked at, its host, origin and token, and whether there is room.

host     a server on the loopback without a token answers only to the loopback's names: a page elsewhere could
         otherwise have its own name point here and read what it likes
origin   a browser says which page asks; pages of other hosts are refused, WebSockets and HTTP alike
token    `Authorization: Bearer`, compared in constant time; health and the page's own file are open to all
room     at most `max_connections` WebSockets and requests; the next gets 503, or close code 1013
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from .limits import Settings

HEALTH = ("/v2/health/live", "/v2/health/ready")
_OPEN = ("/", *HEALTH)  # need no token
_TRY_AGAIN_LATER = 1013
_POLICY = 1008


class Door:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
        elif self._inside >= self._settings.max_connections and scope["path"] not in HEALTH:
            await _turn_away(scope, receive, send)
        else:
            self._inside += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._inside -= 1

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        settings, host = self._settings, headers.get("host", "").lower()
        if settings.hosts is not None and _name(host) not in settings.hosts:
            return _error(403, f"this server does not go by the name {host!r:.80}; use its address")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host:
            return _error(403, f"pages of {origin!r:.80} may not ask this server; ask from its own page or no browser")
        if settings.token is None or path in _OPEN or _matches(headers.get("authorization", ""), settings.token):
            return None
        refusal = _error(401, "a token is needed; send it as 'Authorization: Bearer TOKEN'")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _matches(header: str, token: str) -> bool:
    scheme, _, given = header.partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    return right and scheme.lower() == "bearer"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


async def _refuse(refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await refusal(scope, receive, send)
        return
    socket = WebSocket(scope, receive, send)
    if "websocket.http.response" in scope.get("extensions", {}):
        await socket.send_denial_response(refusal)
    else:
        await socket.close(_POLICY)


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        response = _error(503, "too many connections; try again later")
        response.headers["retry-after"] = "1"
        await response(scope, receive, send)
        return
    socket = WebSocket(scope, receive, send)
    await socket.accept()
    await socket.close(_TRY_AGAIN_LATER, "too many connections")

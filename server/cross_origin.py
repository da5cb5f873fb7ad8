"""HEAD, which every path that takes GET takes too; pages of other origins, which the configuration may let in (CORS).

Without `server.allowed_origins` no answer says anything to other pages. /admin never does: its page is the console.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.sse import HEAD_ONLY

ANY = "*"
SHOWN = (
    "X-Request-Id, Retry-After, X-Spectral-Setting, X-Spectral-Rank, X-Spectral-Bits, X-Spectral-KL, "
    "X-Spectral-Bytes-Per-Token, X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, "
    "X-RateLimit-Reset-Requests, X-RateLimit-Limit-Tokens, X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens"
)
"""Headers that a page may read beside those that every page may."""
PREFLIGHT_S = 600


class HeadAsGet:
    """ASGI middleware: HEAD is answered as GET is, without a body (the server leaves it out). Some clients ask so
    whether anybody is there: Ollama's before every command."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", HEAD_ONLY: True}
        await self._app(scope, receive, send)


class CrossOrigin:
    """ASGI middleware around the check of keys: browsers ask without one whether they may send it."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        allowed = self._allowed(scope) if self._origins and scope["type"] == "http" else None
        if allowed is None:
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        told = {"Access-Control-Allow-Origin": allowed, "Vary": "Origin"}
        if scope["method"] == "OPTIONS" and "access-control-request-method" in asked:
            told |= {"Access-Control-Allow-Methods": "GET, HEAD, POST", "Access-Control-Max-Age": str(PREFLIGHT_S)}
            told["Access-Control-Allow-Headers"] = asked.get("access-control-request-headers", "content-type")
            await Response(status_code=204, headers=told)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({**told, "Access-Control-Expose-Headers": SHOWN})
            await send(message)

        await self._app(scope, receive, with_headers)

    def _allowed(self, scope: Scope) -> str | None:
        """The origin that the answer names, None where it names none."""
        path = scope["path"]
        origin = Headers(scope=scope).get("origin")
        if origin is None or path == "/admin" or path.startswith("/admin/"):
            return None
        return ANY if ANY in self._origins else origin if origin in self._origins else None

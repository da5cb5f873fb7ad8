"""Around every request: its id, its line in the log, its count, and an answer for exceptions that nobody expected."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.metrics import Metrics
from server.sse import DIRECT
from server.tracing import Tracing

access_log = logging.getLogger("spectral.access")
_POLLED = ("/health", "/ready", "/metrics")
_COUNTED = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate", "/generate_stream"}
_COUNTED |= {"/api/chat", "/api/generate"}


class Outermost:
    """ASGI middleware; plain ASGI, so that streams and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            await _Exchange(self._app, self._metrics, scope, self._tracing).run(receive, send)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request and its response."""

    def __init__(self, app: ASGIApp, metrics: Metrics, scope: Scope, tracing: Tracing | None) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self._request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
        self._app, self._metrics, self._scope = app, metrics, scope
        self._notes = scope.setdefault("state", {})
        self._path = scope["path"].encode("unicode_escape").decode("ascii")
        self._began = time.monotonic()
        self._span = tracing.begin(scope, headers) if tracing is not None else None
        self._notes["span"] = self._span
        self._status, self._complete, self._gone = 0, False, False

    async def run(self, receive: Receive, send: Send) -> None:
        self._scope[DIRECT] = send

        async def watched_receive() -> Message:
            message = await receive()
            self._gone = self._gone or message["type"] == "http.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = self._request_id
                if self._span is not None:
                    headers["traceparent"] = self._span.header
            self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(self._scope, watched_receive, watched_send)
        except Exception as error:
            if self._status:  # half an answer is out: the connection breaks, which a client can tell from an end
                raise
            answer = errors.internal(error, f"{self._scope['method']} {self._path}").response(self._scope["path"])
            await answer(self._scope, receive, watched_send)
        finally:
            self._record()

    def _record(self) -> None:
        # A client that leaves early is 499; a failure in mid-stream counts as what it was, not as the 200 before it.
        early = self._gone and not self._complete
        status = 499 if early else self._notes.get("outcome", self._status)
        if self._path in _COUNTED:
            model = self._notes.get("model", "none")
            self._metrics.requests.labels(model, str(status)).inc()
            if status >= 400:
                code = "client_gone" if early else self._notes.get("code", "internal_error")
                self._metrics.request_errors.labels(model, code).inc()
        if self._span is not None:
            self._span.end(status, self._notes)
        level = logging.DEBUG if self._path in _POLLED and status < 400 else logging.INFO
        seconds, method = time.monotonic() - self._began, self._scope["method"]
        facts = {"method": method, "path": self._path, "status": status, "seconds": round(seconds, 6)}
        facts |= {"request_id": self._request_id}
        facts |= {name: self._notes[name] for name in ("model", "key", "usage") if self._notes.get(name)}
        access_log.log(level, "%s %s %s", method, self._path, status, extra={"facts": facts})

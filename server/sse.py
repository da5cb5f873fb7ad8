"""Streams: events or lines, pings, and a response that notices at once when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server import errors

log = logging.getLogger("spectral.sse")
STALLED_AFTER_S = 60.0
STALL_CHECK_S = 5.0
DIRECT = "spectral.send"
"""Where a scope has the server's own `send`: pieces in mid-stream need no layer that looks at heads and ends."""
HEAD_ONLY = "spectral.head"
"""Set in a scope whose request was HEAD: a stream of events then ends with its head."""
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
encode = msgspec.json.Encoder().encode
"""JSON as bytes."""


def event(data: Any) -> bytes:
    """One event with a JSON body."""
    return b"data: " + encode(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """One event with a name and a JSON body."""
    return b"event: " + name.encode() + b"\ndata: " + encode(data) + b"\n\n"


def line(data: Any) -> bytes:
    """One line of JSON."""
    return encode(data) + b"\n"


def error_event(error: errors.ApiError) -> bytes:
    """How a stream of events ends that fails on the way; there is no [DONE] after it."""
    return event(error.envelope)


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection. The body must have been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream whose pieces go out as they come. `on_end` runs exactly once however it ends, also where it never began.

    `ping_s`: seconds of silence after which a comment is sent; None: never, for forms without comments.
    `on_error`: the last piece where the events fail: the status is out, and a failure must not look like an end.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_end: Callable[[], Awaitable[None]],
        headers: dict[str, str],
        *,
        ping_s: float | None,
        media_type: str = "text/event-stream",
        on_error: Callable[[errors.ApiError], bytes] = error_event,
    ) -> None:
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type=media_type, headers={**quiet, **headers})
        self._events, self._on_end, self._on_error, self._ping_s = events, on_end, on_error, ping_s
        self._sending_since: float | None = None
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end, the client is gone, or it has read nothing for STALLED_AFTER_S."""
        if scope.get(HEAD_ONLY):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            await self._on_end()
            return
        sending = asyncio.ensure_future(self._send_all(send, scope.get(DIRECT, send)))
        gone = asyncio.ensure_future(disconnected(receive))
        ping: asyncio.Future[None] | None = None
        self._last = time.monotonic()
        try:
            while not sending.done() and not gone.done():
                await asyncio.wait({sending, gone}, timeout=self._pause(), return_when=asyncio.FIRST_COMPLETED)
                now = time.monotonic()
                if self._sending_since is not None:
                    if now - self._sending_since > STALLED_AFTER_S:
                        log.warning("a client has read nothing for %g s; its stream is closed", STALLED_AFTER_S)
                        break
                elif self._ping_s is not None and now - self._last >= self._ping_s and not sending.done():
                    ping = asyncio.ensure_future(self._send(send, PING))
            if sending.done() and not isinstance(sending.exception(), OSError):
                sending.result()
        finally:
            unfinished = [task for task in (sending, gone, ping) if task is not None]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            with contextlib.suppress(Exception):
                await self._events.aclose()  # type: ignore[attr-defined]
            await self._on_end()

    def _pause(self) -> float:
        """Seconds until there is something to look after."""
        if self._ping_s is None or self._sending_since is not None:
            return STALL_CHECK_S
        return min(STALL_CHECK_S, max(0.001, self._last + self._ping_s - time.monotonic()))

    async def _send_all(self, send: Send, direct: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                if data:  # as _send does, without a call for every token
                    self._sending_since = time.monotonic()
                    await direct({"type": "http.response.body", "body": data, "more_body": True})
                    self._sending_since, self._last = None, time.monotonic()
        except errors.ApiError as error:
            await self._send(send, self._on_error(error))
        except OSError:
            raise
        except Exception as error:  # the status is sent already, so that a last piece is all that can be said
            await self._send(send, self._on_error(errors.internal(error, "a stream")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since, self._last = None, time.monotonic()

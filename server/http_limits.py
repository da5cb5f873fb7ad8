"""uvicorn's HTTP protocol with bounds: how large a request's head may be, how long it may take, and no trailers.

llhttp (under httptools) refuses what requests are smuggled with: both Content-Length and Transfer-Encoding, two
lengths, other codings than chunked, spaces before colons (tests/server/test_raw_http.py). It has no bound on size or
time, though, and hands a trailer's fields to uvicorn, which would append them to the head's after those were checked.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES, HEAD_FIELDS = 64 << 10, 100
HEAD_SECONDS = 20.0
"""From a connection's start, or a request's first byte, to the end of its head."""
FRAMING_BYTES, FRAMING_FACTOR = 64 << 10, 8
"""Bytes of a body's chunk heads and trailers, and so many more for each byte of the body: chunks may be small."""

_REFUSALS = {
    408: b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    431: b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
}


class TooLarge(Exception):
    """A head, or a body's framing, beyond its bound."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _timer: TimerHandle | None = None
    _in_head = True
    _head = 0  # bytes since the head began
    _framing = 0  # bytes of a message that are neither head nor body
    _body = 0
    _refused = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; its first head is awaited."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body."""
        if self._refused or self.transport.is_closing():
            return
        if self._in_head:
            self._head += len(data)
        else:
            self._framing += len(data)
        super().data_received(data)
        if self._refused:
            return
        # A field that has not ended is kept by the parser, wherever it began: what was fed is what it may hold.
        bound = HEAD_BYTES if self._in_head else FRAMING_BYTES + (1 + FRAMING_FACTOR) * self._body
        if (self._head if self._in_head else self._framing) > bound:
            self._refuse(431)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._in_head, self._framing, self._body, self._size = True, 0, 0, 0
        if self._timer is None:
            self._await_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or of a trailer, which nobody here asks for."""
        self._count(len(name) + len(value) + 4)
        if not self._in_head:
            return
        if len(self.headers) >= HEAD_FIELDS:
            self._too_large()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._stop_timer()
        self._in_head, self._head, self._size = False, 0, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; the next bytes are another head."""
        self._in_head, self._head = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets 400, what is too large 431."""
        if self._refused:
            self._refuse(self._refused)
        else:
            self._refused = 400
            self._stop_timer()
            super().send_400_response(msg)

    _size = 0

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > HEAD_BYTES:
            self._too_large()

    def _too_large(self) -> None:
        self._refused = 431
        raise TooLarge

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._in_head and (self.cycle is None or self.cycle.response_complete):
            self._refuse(408)

    def _refuse(self, status: int) -> None:
        self._refused = status
        self._stop_timer()
        if self.cycle is None or self.cycle.response_complete:  # else it would stand in the middle of an answer
            self.transport.write(_REFUSALS[status])
        self.transport.close()


def uvicorn_config(app: Any, **options: Any) -> uvicorn.Config:
    """uvicorn as Spectral runs it: bounded heads, no WebSockets, no server header, no log of its own."""
    fixed: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    return uvicorn.Config(app, http=BoundedProtocol, ws="none", **{**fixed, **options})

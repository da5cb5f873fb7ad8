"""Connections between gateways and node agents: TLS 1.3 between two ends that have the cluster's secret (trust.py),
then frames."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from server.aio import within
from server.cluster import trust, wire
from server.worker.messages import LENGTH, BadFrame, body_length

log = logging.getLogger("spectral.cluster")
T = TypeVar("T")
HANDSHAKE_S, BEAT_S, SILENCE_S = 5.0, 1.0, 5.0
READ_BYTES = 256 * 1024
MAX_BUFFERED = 64 << 20
"""Bytes that may wait for a peer that does not read; then its connection ends."""


class NotTrusted(Exception):
    """The other end does not have the secret, or is no part of a Spectral cluster."""


class Link(Generic[T]):
    """One end of an open connection. `decode` turns a frame's body into a message."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], T]
    ) -> None:
        self._reader, self._writer, self._decode = reader, writer, decode
        self._bytes = bytearray()
        self._messages: deque[T] = deque()
        self._outgoing: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._beating = asyncio.create_task(self._beat())

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._writer.is_closing()

    def send(self, value: Any) -> None:
        """Send a message. All of one turn of the loop go out in one write: a step of a worker has a token of every
        stream. What the socket does not take at once waits, up to MAX_BUFFERED, then the link ends."""
        if self._writer.is_closing():
            return
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(wire.frame(value))

    def _flush(self) -> None:
        if self._writer.is_closing() or not self._outgoing:
            return
        self._writer.write(b"".join(self._outgoing))
        self._outgoing.clear()
        if self._writer.transport.get_write_buffer_size() > MAX_BUFFERED:
            log.warning("a peer of the cluster does not read; its connection ends")
            self.close()

    async def receive(self) -> T | None:
        """The next message; None at the end, also after SILENCE_S without a byte. Raises BadFrame."""
        while not self._messages:
            try:
                data = await within(SILENCE_S, self._reader.read(READ_BYTES))
            except (OSError, asyncio.TimeoutError):
                return None
            if not data:
                return None
            self._bytes += data
            self._split()
        return self._messages.popleft()

    def pending(self) -> list[T]:
        """Messages that have come already, so that they can be handled together."""
        found = list(self._messages)
        self._messages.clear()
        return found

    async def drained(self) -> None:
        """Wait until the socket has taken most of what was sent. Raises OSError where the link has ended."""
        self._flush()
        await self._writer.drain()

    def close(self) -> None:
        """End the connection; what was sent before still goes out. Safe to call twice."""
        self._beating.cancel()
        if self._outgoing and not self._writer.is_closing():
            self._writer.write(b"".join(self._outgoing))
            self._outgoing.clear()
        self._writer.close()

    def _split(self) -> None:
        at, size = 0, len(self._bytes)
        while size - at >= LENGTH.size:
            end = at + LENGTH.size + body_length(bytes(self._bytes[at : at + LENGTH.size]))
            if end > size:
                break
            self._messages.append(self._decode(bytes(self._bytes[at + LENGTH.size : end])))
            at = end
        del self._bytes[:at]

    async def _beat(self) -> None:
        seq = 0
        while not self._writer.is_closing():
            seq += 1
            self.send(wire.Beat(seq))
            await asyncio.sleep(BEAT_S)


async def dial(address: str, secret: str) -> Link[wire.ToGateway]:
    """A gateway's connection to an agent at "host:port". Raises NotTrusted, OSError."""
    host, _, port = address.rpartition(":")
    try:
        opening = asyncio.open_connection(host.strip("[]"), int(port), ssl=trust.dialling(secret))
        reader, writer = await within(HANDSHAKE_S, opening)
    except asyncio.TimeoutError:
        raise OSError(f"{address} does not answer") from None
    except ssl.SSLError as error:
        raise NotTrusted(f"{address} is no agent of this cluster, or has another secret ({error})") from error
    return Link(reader, writer, wire.to_gateway)


async def listen(
    connected: Callable[[Link[wire.ToAgent]], Coroutine[Any, Any, None]], host: str, port: int, secret: str
) -> asyncio.Server:
    """Take gateways' connections; those of others end in their handshake. Raises OSError."""

    async def took(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await connected(Link(reader, writer, wire.to_agent))

    context = trust.listening(secret)
    return await asyncio.start_server(took, host, port, ssl=context, ssl_handshake_timeout=HANDSHAKE_S)


__all__ = ["BadFrame", "Link", "NotTrusted", "dial", "listen"]

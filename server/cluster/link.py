"""Connections between gateways and node agents: TCP, both ends prove that they know the cluster's token, then frames.

    agent    -> "SPCL1" + 32 random bytes (s)
    gateway  -> 32 random bytes (c) + HMAC-SHA256(token, "gateway" + s + c)
    agent    -> HMAC-SHA256(token, "agent" + c + s)

The token itself never crosses the wire. What follows is neither encrypted nor signed: the network between the nodes has
to be one that is trusted (docs/cluster.md says what that means).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from server.aio import within
from server.cluster import wire
from server.worker.messages import LENGTH, BadFrame, body_length

log = logging.getLogger("spectral.cluster")
T = TypeVar("T")
MAGIC, NONCE, DIGEST = b"SPCL1", 32, 32
HANDSHAKE_S, BEAT_S, SILENCE_S = 5.0, 1.0, 5.0
READ_BYTES = 256 * 1024
MAX_BUFFERED = 64 << 20
"""Bytes that may wait for a peer that does not read; then its connection ends."""


class NotTrusted(Exception):
    """The other end does not know the token, or is no part of a Spectral cluster."""


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


async def dial(address: str, token: str) -> Link[wire.ToGateway]:
    """A gateway's connection to an agent at "host:port". Raises NotTrusted, OSError."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await within(HANDSHAKE_S, asyncio.open_connection(host.strip("[]"), int(port)))
    except asyncio.TimeoutError:
        raise OSError(f"{address} does not answer") from None
    proof = _prove_gateway(reader, writer, token.encode())
    await _shaken(writer, proof, f"{address} is no agent of this cluster, or has another token")
    return Link(reader, writer, wire.to_gateway)


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> Link[wire.ToAgent]:
    """An agent's end of a connection that came. Raises NotTrusted, after closing it."""
    proof = _prove_agent(reader, writer, token.encode())
    await _shaken(writer, proof, "a connection did not show the cluster's token")
    return Link(reader, writer, wire.to_agent)


async def _shaken(writer: asyncio.StreamWriter, proof: Coroutine[Any, Any, None], otherwise: str) -> None:
    """Wait for one side's part of the handshake. Raises NotTrusted, `otherwise`; what fails closes the connection."""
    try:
        await within(HANDSHAKE_S, proof)
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
        writer.close()
        raise NotTrusted(f"{otherwise} ({error or type(error).__name__})") from error
    except BaseException:
        writer.close()
        raise


async def _prove_gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes) -> None:
    greeting = await reader.readexactly(len(MAGIC) + NONCE)
    if not greeting.startswith(MAGIC):
        raise NotTrusted("it does not speak this protocol")
    theirs, ours = greeting[len(MAGIC) :], secrets.token_bytes(NONCE)
    writer.write(ours + _mac(token, b"gateway", theirs, ours))
    if not hmac.compare_digest(await reader.readexactly(DIGEST), _mac(token, b"agent", ours, theirs)):
        raise NotTrusted("the agent does not know the cluster's token")


async def _prove_agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes) -> None:
    ours = secrets.token_bytes(NONCE)
    writer.write(MAGIC + ours)
    answer = await reader.readexactly(NONCE + DIGEST)
    theirs = answer[:NONCE]
    if not hmac.compare_digest(answer[NONCE:], _mac(token, b"gateway", ours, theirs)):
        raise NotTrusted("a connection does not know the cluster's token")
    writer.write(_mac(token, b"agent", theirs, ours))


def _mac(token: bytes, *parts: bytes) -> bytes:
    return hmac.new(token, b"".join(parts), hashlib.sha256).digest()


__all__ = ["BadFrame", "Link", "NotTrusted", "accept", "dial"]

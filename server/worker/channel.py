"""The two ends of the socket between gateway and worker: asynchronous here, blocking there."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections import deque

from server.worker.messages import (
    LENGTH,
    BadFrame,
    ToParent,
    ToWorker,
    body_length,
    decode_to_parent,
    decode_to_worker,
    encode,
)

READ_BYTES = 64 * 1024


class MessageReader:
    """The worker's messages. One read of the socket takes all that have come: two reads for each cost more than it."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._bytes = bytearray()
        self._needed = LENGTH.size  # bytes that make the next step possible
        self._messages: deque[ToParent] = deque()
        self._broken: BadFrame | None = None

    async def take(self) -> list[ToParent]:
        """All messages that have come, at least one; none at the end of the stream.

        Raises BadFrame, after the messages before it.
        """
        await self._filled()
        taken = list(self._messages)
        self._messages.clear()
        return taken

    async def _filled(self) -> None:
        """Until there is a message, or the stream has ended."""
        while not self._messages:
            if self._broken is not None:
                raise self._broken
            try:
                data = await self._reader.read(READ_BYTES)
            except ConnectionError:
                return
            if not data:
                return
            self._bytes += data
            if len(self._bytes) >= self._needed:
                self._split()

    def _split(self) -> None:
        data, at, self._needed = bytes(self._bytes), 0, LENGTH.size
        try:
            while len(data) - at >= LENGTH.size:
                end = at + LENGTH.size + body_length(data[at : at + LENGTH.size])
                if end > len(data):
                    self._needed = end - at
                    break
                self._messages.append(decode_to_parent(data[at + LENGTH.size : end]))
                at = end
        except BadFrame as error:  # what came before it counts
            self._broken = error
        del self._bytes[:at]


class SocketChannel:
    """The child's end: a blocking socket. `send` may be called from several threads; receiving belongs to one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(True)
        self._send_lock = threading.Lock()

    @classmethod
    def from_fd(cls, fd: int) -> SocketChannel:
        """Take over the descriptor given as `--fd N`.

        Programs that the worker itself starts do not get it: an open copy would hide the worker's end from the gateway.
        """
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd))

    def send(self, *messages: ToParent) -> None:
        """Send messages in one write. Raises OSError where the gateway is gone."""
        self.send_bytes(b"".join(encode(message) for message in messages))

    def send_at_once(self, *messages: ToParent) -> bytes:
        """Send what the socket takes without waiting; returns the rest, for `send_bytes`. Raises OSError where the
        gateway is gone."""
        frames = b"".join(encode(message) for message in messages)
        with self._send_lock:
            try:
                sent = self._socket.send(frames, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
        return frames[sent:]

    def send_bytes(self, data: bytes) -> None:
        """Send bytes of messages, waiting as long as it takes. Raises OSError where the gateway is gone."""
        with self._send_lock:
            self._socket.sendall(data)

    def receive(self) -> ToWorker | None:
        """The next message, waiting for it; None where the gateway closed its end. Raises BadFrame."""
        head = self._exactly(LENGTH.size)
        if head is None:
            return None
        body = self._exactly(body_length(head))
        return None if body is None else decode_to_worker(body)

    def poll(self, timeout_s: float) -> bool:
        """True where receive() would find bytes (or the end) within `timeout_s` seconds."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def close(self) -> None:
        """Close the socket; safe to call twice."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._socket.recv(count - len(data))
            except ConnectionError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)

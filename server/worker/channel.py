"""A worker's end of its socket to the gateway: blocking, for several sending threads and one that receives."""

from __future__ import annotations

import os
import select
import socket
import threading

from server.worker.messages import LENGTH, ToParent, ToWorker, body_length, decode_to_worker, encode


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

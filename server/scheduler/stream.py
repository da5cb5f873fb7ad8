"""What a worker says about one request, on its way to the one who reads it."""

from __future__ import annotations

import asyncio
from collections import deque

from server.worker import messages

STREAM_EVENTS = 4096
StreamItem = messages.Told


class SlowReader(Exception):
    """The reader let its buffer fill up; what was in it is gone."""


class RequestStream:
    """A bounded queue with a deadline. One reader; belongs to the event loop that made it.

    A token is one event: a client may stand still for STREAM_EVENTS tokens of each choice before it loses its stream.
    """

    def __init__(self, request_id: str, seconds: float, choices: int = 1) -> None:
        self.request_id = request_id
        self.seconds = seconds  # what the reader is told when they are over
        self.seconds_field: str | None = None  # the request's field that set them
        self.overflowed = False
        self._told = 0
        self._limit = STREAM_EVENTS * choices
        self._items: deque[StreamItem | None] = deque()
        self._expired = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._expire)

    def put(self, item: StreamItem | None) -> None:
        """Add an item; None means that the worker is gone."""
        self._told += 1
        if item is not None and len(self._items) >= self._limit:
            self.overflowed = True
            self._items.clear()
        if not self.overflowed:
            self._items.append(item)
        self._wake()

    async def get(self) -> StreamItem | None:
        """The next item. Raises asyncio.TimeoutError after the deadline, SlowReader after an overflow."""
        while not self._readable():
            await self.coming()
        return self._items.popleft()

    def taken(self) -> list[StreamItem | None]:
        """All items that have come, perhaps none. Raises as :meth:`get`."""
        if not self._readable():
            return []
        taken = list(self._items)
        self._items.clear()
        return taken

    def coming(self) -> asyncio.Future[None]:
        """Done when there is something to take, or to raise. A future and no coroutine: every token waits here."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _readable(self) -> bool:
        if self.overflowed:
            raise SlowReader
        if self._expired:
            raise asyncio.TimeoutError
        return bool(self._items)

    @property
    def begun(self) -> bool:
        """Whether more came than that the request was accepted, or refused."""
        return self._told > 1

    def close(self) -> None:
        """Nobody reads any more."""
        self._timer.cancel()
        self._items.clear()

    def _expire(self) -> None:
        self._expired = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

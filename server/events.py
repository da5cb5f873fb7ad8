"""What happened and why: a ring in memory for those who watch, and the state's table for those who come later."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from server import state_tables
from server.state import State
from server.state_schema import StateUnusable

log = logging.getLogger("spectral.events")
RING = 1000
WATCHER_QUEUE = 1000
FLUSH_S = 0.2
UNSAVED_KEPT = 5000
"""Events that wait for a disk which takes none; beyond it the oldest are lost."""


class EventLog:
    """Events with a kind, a reason for people, and facts. `add` belongs to the event loop's thread and never waits."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._next = state.run_now(state_tables.last_event) + 1
        self._ring: deque[bytes] = deque(maxlen=RING)  # as JSON, which is a third of the objects' size
        self._unsaved: list[dict[str, Any]] = []
        self._watchers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._wake = asyncio.Event()
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._refused = False  # the disk took nothing the last time: it is said once

    def add(
        self, kind: str, reason: str, *, model: str | None = None, device: str | None = None, **detail: Any
    ) -> dict[str, Any]:
        """Record an event, for example ("squeeze", "6x -> 10x: 1.9 GiB for gemma", model="qwen", bytes=2040109465)."""
        event = {"id": self._next, "at": time.time(), "kind": kind, "model": model, "device": device}
        event |= {"reason": reason, "detail": detail}
        self._next += 1
        self._ring.append(json.dumps(event).encode())
        self._unsaved.append(event)
        self._wake.set()
        for listener in self.listeners:
            listener(event)
        for watcher in list(self._watchers):
            if watcher.full():  # it sees a gap in the ids and can ask for what it missed
                watcher.get_nowait()
            watcher.put_nowait(event)
        return event

    def recent(self, after: int = 0) -> list[dict[str, Any]]:
        """Events of the ring with an id above `after`, oldest first."""
        new = max(0, self._next - 1 - after)  # ids have no gaps
        return [json.loads(event) for event in list(self._ring)[-new:]] if new else []

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
        """A queue that gets every event from now on; a reader that is too slow loses the oldest."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(WATCHER_QUEUE)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    def start(self) -> None:
        """Begin to write events down, a few at a time."""
        self._task = asyncio.create_task(self._write(), name="event log")

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    async def flush(self) -> None:
        """Write what is not yet on the disk."""
        events, self._unsaved = self._unsaved, []
        if not events:
            return
        try:
            await self._state.run(lambda db: state_tables.add_events(db, events))
        except StateUnusable as error:  # a full disk must not end the server, whose first task is to answer
            self._unsaved = [*events, *self._unsaved][-UNSAVED_KEPT:]  # written when the disk takes them again
            if not self._refused:
                log.error("%d events cannot be written: %s", len(events), error)
            self._refused = True
        except Exception:
            log.exception("%d events could not be written", len(events))
        else:
            self._refused = False

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(FLUSH_S)  # so that a burst is one transaction
            self._wake.clear()
            await self.flush()

"""A worker's queues: who has not begun by a deadline is told, not worked on for nobody; tenants take turns."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from server.worker import messages as wire

if TYPE_CHECKING:
    from server.worker.child_engines import Engines

CODE = "queue_timeout"
T = TypeVar("T")


class TurnQueue(Generic[T]):
    """Items of several tenants, taken in turn: many of one do not hold up another's. For any threads."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}  # in the order of their turns; none is empty
        self._some = threading.Condition()

    def put(self, item: T, tenant: str = "") -> None:
        """Add an item behind the tenant's others; returns at once."""
        with self._some:
            self._lines.setdefault(tenant, deque()).append(item)
            self._some.notify()

    def get(self) -> T:
        """The next item, however long it takes to come."""
        with self._some:
            while not self._lines:
                self._some.wait()
            tenant = next(iter(self._lines))
            line = self._lines.pop(tenant)
            item = line.popleft()
            if line:
                self._lines[tenant] = line  # behind the others
            return item


class QueueDeadlines:
    """The requests that have not begun. Belongs to the inference thread."""

    def __init__(
        self, engines: Engines, tell: Callable[..., None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engines, self._tell, self._clock = engines, tell, clock
        self._until: dict[str, tuple[float, float]] = {}

    def add(self, message: wire.Submit) -> None:
        """Remember a request that came; one without a deadline is let alone."""
        if message.queue_s is not None:
            self._until[message.request_id] = self._clock() + message.queue_s, message.queue_s

    def look(self) -> None:
        """End those whose time is over and who have not begun; forget the others whose time is over."""
        now = self._clock()
        late = [(ident, seconds) for ident, (until, seconds) in self._until.items() if now >= until]
        if not late:
            return
        engines = self._engines.all
        waiting = {s.request_id for engine in engines for s in engine.scheduler.waiting if not s.started}
        for ident, seconds in late:
            del self._until[ident]
            if ident in waiting:
                self._engines.cancel(ident)
                said = f"the request waited {seconds:.0f} s for its turn, which is the longest; send it again later"
                self._tell(wire.Failed(ident, said, CODE))

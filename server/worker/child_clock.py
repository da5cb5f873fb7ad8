"""Where a request's time goes in the worker: until its first step, until each choice's first token, until its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class _Times:
    submitted: float
    choices: int
    started: float | None = None
    first: dict[int, float] = field(default_factory=dict)  # of each choice that has one


class RequestClock:
    """Times of the requests that are under way. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Times] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def submitted(self, request_id: str, choices: int) -> None:
        """It waits for its first step."""
        self._requests[request_id] = _Times(self._clock(), choices)

    def started(self, request_id: str) -> None:
        """It has left the queue."""
        times = self._requests.get(request_id)
        if times is not None and times.started is None:
            times.started = self._clock()

    def token(self, request_id: str, index: int) -> None:
        """A choice has a token; only the first one counts."""
        times = self._requests.get(request_id)
        if times is not None and index not in times.first:
            times.first[index] = self._clock()

    def finished(self, request_id: str, index: int) -> tuple[float, float, float]:
        """Seconds in the queue, of prefill and of decoding; a part that was never reached is 0."""
        times = self._requests.get(request_id)
        if times is None:
            return 0.0, 0.0, 0.0
        times.choices -= 1
        if not times.choices:
            self.forget(request_id)
        now = self._clock()
        started = now if times.started is None else times.started
        first = times.first.get(index, now)
        return started - times.submitted, max(0.0, first - started), now - first

    def forget(self, request_id: str) -> None:
        """It failed."""
        self._requests.pop(request_id, None)

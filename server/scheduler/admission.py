"""Who may join a model's queue: nobody who would wait too long, and no key that leaves no room for the others.

A request is refused when it comes (429 with Retry-After), not when it has waited in vain: work is only done for those
who will still be there. From the times at which answers end while the model is busy, `pace` (seconds from one end to
the next) is known, and from that the time that a newcomer would wait:

    places before it x pace          where all wait in one line
    its key's own places x keys x pace   where keys take turns (spectral.engine.scheduler does so); the less counts

A key may have up to SHARE times the places that are left, so one alone fills two thirds of the queue and never all.
Those who are refused are told times that follow each other at the pace at which there will be room.
No I/O; the clock is given.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

SHARE = 2
PATIENCE_S = 10.0
"""Longest wait in the queue, unless answers themselves take so long that SLOW of them are more."""
SLOW = 2.0
LONGEST_RETRY_S = 60
UNKNOWN_RETRY_S = 2
WEIGHT = 0.1
"""Of the newest time between two ends in the average."""
STALL = 5.0
"""A time between two ends counts as at most so many average ones: a restart is no change of pace."""


@dataclass(frozen=True)
class Room:
    """A model's limits. `longest_s`: configured longest wait, None: chosen by pace."""

    concurrency: int
    queue: int
    longest_s: float | None = None


class Refusal(Exception):
    """No place in the queue; the message says why. `retry_after`: whole seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Admission:
    """The open requests of one model, as sequences (a request with n choices has n). Belongs to the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[str, tuple[str, int]] = {}
        self._held: Counter[str] = Counter()
        self._pace: float | None = None
        self._busy_since: float | None = None
        self._promised = 0.0

    @property
    def total(self) -> int:
        """Sequences that run or wait."""
        return self._held.total()

    @property
    def pace(self) -> float | None:
        """Seconds from one answer's end to the next while all places are taken; None while that is not known."""
        return self._pace

    def longest(self, room: Room) -> float | None:
        """The longest wait in the queue, seconds; None while the pace is not known and none is configured."""
        if room.longest_s is not None or self._pace is None:
            return room.longest_s
        return max(PATIENCE_S, SLOW * room.concurrency * self._pace)

    def expected(self, room: Room, tenant: str, count: int) -> float:
        """Seconds that `count` more sequences of a tenant would wait; 0 while the pace is not known."""
        if self._pace is None:
            return 0.0
        tenants = len(self._held) + (tenant not in self._held)
        ahead = self.total + count - room.concurrency
        turns = (self._held[tenant] + count - room.concurrency / tenants) * tenants
        return max(0.0, min(ahead, turns)) * self._pace

    def enter(self, room: Room, request_id: str, tenant: str = "", count: int = 1) -> float | None:
        """Take a place; the seconds that it may wait, or None. Raises Refusal. `tenant`: "" for callers without keys,
        who are one crowd and have no share."""
        held, left = self._held[tenant], room.concurrency + room.queue - self.total
        if not held:
            del self._held[tenant]  # looking it up has put it there
        if tenant and held and held + count > max(1, SHARE * left):
            message = f"{held} requests of this key are here already, and the room that is left is for others too"
            raise Refusal(message, self.retry_after(self._pace or 0.0))
        expected, longest = self.expected(room, tenant, count), self.longest(room)
        if longest is not None and expected > longest:
            message = f"a place is expected in {expected:.0f} s, and a request may wait {longest:.0f} s"
            raise Refusal(message, self.retry_after(expected - longest))
        if self.total < room.concurrency <= self.total + count:
            self._busy_since = self._clock()
        self._open[request_id] = tenant, count
        self._held[tenant] += count
        return longest

    def leave(self, room: Room, request_id: str, *, answered: bool) -> None:
        """Give the place back. `answered`: the model has worked on it to its end. An id that is not here is ignored."""
        tenant, count = self._open.pop(request_id, ("", 0))
        if not count:
            return
        now, busy = self._clock(), self.total >= room.concurrency
        if answered and busy and self._busy_since is not None:
            took = (now - self._busy_since) / count
            if self._pace is None:
                self._pace = took
            else:
                self._pace += WEIGHT * (min(took, STALL * self._pace) - self._pace)
        if answered:
            self._busy_since = now
        self._held[tenant] -= count
        if self._held[tenant] <= 0:
            del self._held[tenant]

    def retry_after(self, excess_s: float = 0.0) -> int:
        """When to come back: no sooner than in `excess_s`, and each who is told so at a place of their own in time."""
        if self._pace is None:
            return UNKNOWN_RETRY_S
        now = self._clock()
        self._promised = min(max(self._promised + self._pace, now + excess_s), now + LONGEST_RETRY_S)
        return max(1, math.ceil(self._promised - now))

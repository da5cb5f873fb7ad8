"""How many replicas a model's traffic needs. Pure: the clock is an argument.

    rate      requests a second, over about RATE_S, known to within its standard error
    service   seconds that a sequence runs, by Little's law: sequences that ran, over those that began
    backlog   requests without a place, to be worked off within CATCH_UP_S
    places    rate x service + backlog x service / CATCH_UP_S

A model grows as soon as the least that this may be takes more than `target` of its places, at once as far as that says,
and shrinks to the most that it may have been within the last SHRINK_S. So neither chance nor a burst that will be over
before another replica is loaded changes anything, and what does change is foreseen from arrivals, not from queues.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

RATE_S = 30.0
SERVICE_OVER_S = 120.0
CATCH_UP_S = 30.0
SHRINK_S = 120.0
SERVICE_S = 4.0
"""How long a sequence is taken to run, until AS_MANY have begun."""
AS_MANY = 8.0
REPORT_S, LEAST_S = 1.0, 2.0
"""What the first report covers; a rate is never taken from less time than the other."""


@dataclass
class Traffic:
    """What is known of one model's requests. Times are monotonic seconds."""

    count: float = 0.0
    seconds: float = REPORT_S
    at: float | None = None
    ran: float = 0.0
    begun: float = 0.0
    running: int = 0
    looked_at: float | None = None
    since: float | None = None
    recent: deque[tuple[float, float]] = field(default_factory=deque)

    def came(self, count: int, now: float) -> None:
        """Requests since the last call."""
        self._fade(now)
        self.count += count

    def ended(self, count: int) -> None:
        """Sequences that are over."""
        self.begun += count

    def lost(self, count: int) -> None:
        """Sequences that are gone with their replica: they neither run nor have ended."""
        self.running = max(0, self.running - count)

    def wanted(self, now: float, running: int, backlog: int, each: float, live: int) -> int:
        """Replicas, of which `live` are there or on their way. `each`: places of one that may be busy."""
        self._look(now, running)
        service = (self.ran + SERVICE_S * AS_MANY) / (self.begun + AS_MANY)
        low, high = self._rates(now)
        late = backlog * service / CATCH_UP_S
        grow = (low * service + late) / each
        self._remember(now, max(high * service + late, float(running)) / each)
        if grow > live:
            return math.ceil(grow)
        self.since = now if self.since is None else self.since
        if now - self.since < SHRINK_S:  # a conductor that was restarted does not know yet what was needed
            return live
        return min(live, math.ceil(self.recent[0][1]))

    def _fade(self, now: float) -> None:
        passed = 0.0 if self.at is None else max(0.0, now - self.at)
        keep = math.exp(-passed / RATE_S)
        self.count, self.seconds, self.at = self.count * keep, self.seconds * keep + RATE_S * (1 - keep), now

    def _rates(self, now: float) -> tuple[float, float]:
        """The rate, less and more its standard error."""
        if self.at is None:
            return 0.0, 0.0
        self._fade(now)
        error, over = math.sqrt(self.count), max(self.seconds, LEAST_S)
        return (self.count - error) / over if self.count > 1 else 0.0, (self.count + error) / over

    def _look(self, now: float, running: int) -> None:
        """Little's law counts what begins; it is known from what runs more than before, and from what has ended."""
        passed = 0.0 if self.looked_at is None else max(0.0, now - self.looked_at)
        self.begun = max(0.0, self.begun + running - self.running)
        self.ran += (running + self.running) / 2 * passed
        keep = math.exp(-passed / SERVICE_OVER_S)
        self.ran, self.begun = self.ran * keep, self.begun * keep
        self.running, self.looked_at = running, now

    def _remember(self, now: float, most: float) -> None:
        """The most of the last SHRINK_S: those that something later exceeds are not needed any more."""
        while self.recent and self.recent[-1][1] <= most:
            self.recent.pop()
        self.recent.append((now, most))
        while self.recent[0][0] < now - SHRINK_S:
            self.recent.popleft()

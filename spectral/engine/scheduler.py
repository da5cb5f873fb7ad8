"""Which sequences run in a step: continuous batching with chunked prefill, fair queueing, and who gives way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from spectral.engine.fairness import Fairness
from spectral.engine.sequence import Sequence
from spectral.engine.types import EngineLimits
from spectral.errors import OutOfPages, RequestError

MAX_SEARCHES = 4
"""How often memory is looked for before a sequence must give way."""


class Lane(Protocol):
    """What the scheduler needs of spectral.engine.lane.Lane."""

    store: Any

    def waits(self, sequence: Sequence) -> bool:
        """True while another sequence computes the same prefix."""

    def need(self, sequence: Sequence) -> tuple[int, int]:
        """Bytes for all its tokens; bytes of idle prefix pages among those that it shares."""

    def close(self, sequence: Sequence) -> None:
        """Free its row."""


class Lanes(Protocol):
    """What the scheduler needs of spectral.engine.lanes.Lanes."""

    @property
    def idle_nbytes(self) -> int:
        """Bytes of prefixes that no sequence uses."""

    def join(self, sequence: Sequence) -> Any:
        """The sequence's lane, chosen if it has none. Raises RequestError."""

    def open(self, sequence: Sequence) -> None:
        """Give it a row. Raises OutOfPages, nothing changed."""

    def park(self, sequence: Sequence) -> None:
        """Take its row away, to host memory where there is room."""

    def leave(self, sequence: Sequence) -> None:
        """It ended."""

    def spare(self) -> int | None:
        """Bytes that nobody owns."""

    def make_room(self, error: OutOfPages) -> bool:
        """Find bytes without touching sequences; False if there are none."""


Work = list[tuple[Sequence, int]]
"""Sequences, and how many tokens each of them runs."""


@dataclass(slots=True)
class Part:
    """One forward over one store: (sequence, new tokens) in flattened order, and the store's batch for it. `followed`:
    as far as one can say, the next step's is the same sequences'."""

    work: list[tuple[Sequence, int]]
    batch: Any
    followed: bool = False


class Scheduler:
    """The sequences that run and those that wait.

    A step is put together so:
    1. Every running sequence with one token to go decodes: streams never wait for prompts.
    2. What is left of the token budget goes to prompts that have begun: the oldest of the tenant that was served the
       least first, so that it always advances, then that tenant's others and the other tenants', each with the least
       computed first, so that short ones get through. Chunks end at multiples of `chunk` tokens and are never cut to
       a budget: how a prompt is computed does not depend on what else runs, so neither does the answer. `chunk` is so
       small that all decodes and one chunk fit into a step.
    3. Then waiting sequences are admitted while there is concurrency for them and their tokens' bytes fit. The order:
       priority; the tenant that has been served the fewest tokens; those that ran already; arrival. Whose prefix is
       being computed by another waits for that.
    4. A waiting sequence of higher priority takes the place of the running one of the lowest, which is parked; one of
       a tenant with fewer places takes one of a tenant with more. Tenants that ask for much leave out steps, so that
       those of others are short (rules 1 to 3 are for the rest): see spectral.engine.fairness.
    5. If the stores are out of pages: idle prefixes go, memory is trimmed; then the sequence of lowest priority, the
       newest of them, is parked in host memory. Nobody is admitted until another sequence has ended, or the two would
       take turns at it.
    6. A sequence that is alone and does not fit fails.

    `divide`: which forwards the work on one store becomes, in this order; a sequence must run in the same way whatever
    else there is. None: one.
    """

    def __init__(
        self,
        lanes: Lanes,
        limits: EngineLimits,
        *,
        divide: Callable[[Work], list[Work]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lanes, self.limits, self.clock = lanes, limits, clock
        self._divide = divide or (lambda work: [work])
        self.chunk = chunk_length(limits)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.failed: list[tuple[Sequence, Exception]] = []
        self.preemptions = 0
        self.fairness = Fairness(limits.max_concurrency)
        self._began: float | None = None  # the step that was put together last
        self._blocked = False

    def room(self) -> int:
        """Sequences that may still be added without exceeding the queue."""
        free = max(0, self.limits.max_concurrency - len(self.running))
        return self.limits.max_queue + free - len(self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue."""
        self.fairness.came(sequence.tenant, {s.tenant for s in (*self.running, *self.waiting)})
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ended: free its row. Removing one that is neither running nor waiting is a mistake."""
        if sequence.row is not None:
            self.running.remove(sequence)
            sequence.lane.close(sequence)
        else:
            self.waiting.remove(sequence)
        self.lanes.leave(sequence)
        self._blocked = False

    def unblock(self) -> None:
        """Bytes have become free."""
        self._blocked = False

    def schedule(self) -> list[Part]:
        """The next step's forwards; none if nothing can run. Sequences that cannot run at all are left in `failed`."""
        if self._began is not None and self.running:  # else it may have been idle since
            self.fairness.took(self.clock() - self._began)
        self._began = None
        self._displace()
        self._let_in()
        searches = 0
        while True:
            work = self._choose()
            if not work:
                return []
            try:
                parts = self._begin(work)
            except OutOfPages as error:
                # What one lane has grown by, another may lack: with no end to the search the two would take turns.
                searches += 1
                if searches > MAX_SEARCHES or not self.lanes.make_room(error):
                    self._relieve(error)
                    searches = 0
                continue
            parts[0].followed = len(parts) == 1 and len(work) == len(self.running)
            self.fairness.spend(work)
            self._began = self.clock()
            return parts

    def _begin(self, work: Work) -> list[Part]:
        """Reserve the work of every lane, or raise OutOfPages with nothing reserved."""
        by_lane: dict[int, Work] = {}
        for sequence, count in work:
            by_lane.setdefault(id(sequence.lane), []).append((sequence, count))
        parts: list[Part] = []
        try:
            for items in (items for found in by_lane.values() for items in self._divide(found)):
                store = items[0][0].lane.store
                parts.append(Part(items, store.begin([(sequence.row, count) for sequence, count in items])))
        except OutOfPages:
            for part in parts:
                part.batch.abort()
            raise
        return parts

    def _choose(self) -> list[tuple[Sequence, int]]:
        work: list[tuple[Sequence, int]] = []
        prompts: list[Sequence] = []
        self.fairness.look(self.running, self.waiting)
        for sequence in self.running:
            if self.fairness.leaves_out(sequence):
                continue
            if sequence.pending == 1:
                work.append((sequence, 1))
            else:
                prompts.append(sequence)
        budget = self.limits.token_budget - len(work)
        if len(prompts) > 1:
            served = self.fairness.served
            prompts.sort(key=lambda s: (served[s.tenant], s.order))
            prompts[1:] = sorted(prompts[1:], key=lambda s: (served[s.tenant], s.row.length, s.order))
        for number, sequence in enumerate(prompts):
            if number and self.fairness.leaves_out(sequence):
                continue
            budget = self._take(work, sequence, budget, must=number == 0)
        while budget > 0 and self.waiting:
            admitted = self._admit()
            if admitted is None:
                break
            budget = self._take(work, admitted, budget, must=not work)
        return work

    def _take(self, work: list[tuple[Sequence, int]], sequence: Sequence, budget: int, must: bool) -> int:
        count = min(sequence.pending, self.chunk - sequence.row.length % self.chunk)
        if count > budget and not must:
            return budget
        work.append((sequence, count))
        self.fairness.takes(sequence)
        return budget - count

    # -- the queue -------------------------------------------------------------------------------------------------

    def _next(self) -> Sequence | None:
        """The waiting sequence whose turn it is."""

        def turn(s: Sequence) -> tuple[int, int, bool, int]:
            return -s.priority, self.fairness.served[s.tenant], not s.started, s.order

        for sequence in sorted(self.waiting, key=turn):
            try:
                lane = self.lanes.join(sequence)
            except RequestError as error:  # the setting that would have been good enough is gone
                self.waiting.remove(sequence)
                self.failed.append((sequence, error))
                continue
            if not lane.waits(sequence):
                return sequence
        return None

    def _admit(self, chosen: Sequence | None = None) -> Sequence | None:
        """Open a row for the next sequence, or for one that was `chosen`, if there is room for it."""
        if not self.running:
            self._blocked = False
        searches = 0
        while not self._blocked and len(self.running) < self.limits.max_concurrency:
            sequence = chosen or self._next()
            if sequence is None or self.fairness.leaves_out(sequence) or (self.running and not self._fits(sequence)):
                return None
            try:
                self.lanes.open(sequence)
            except OutOfPages as error:
                searches += 1  # what opening has allocated before it failed is found again every time
                if searches <= MAX_SEARCHES and self.lanes.make_room(error):
                    continue
                searches = 0
                if self.running:
                    self._blocked = True
                    return None
                self.waiting.remove(sequence)
                self.lanes.leave(sequence)
                self.failed.append((sequence, error))
                if chosen is not None:
                    return None
                continue
            self.waiting.remove(sequence)
            self.running.append(sequence)
            return sequence
        return None

    def _fits(self, sequence: Sequence) -> bool:
        """True if the sequence's tokens fit beside what the running ones have and will need for theirs."""
        spare = self.lanes.spare()
        if spare is None:
            return True
        need, shared = sequence.lane.need(sequence)
        need += sum(s.lane.need(s)[0] for s in self.running)
        return need <= spare or need <= spare + self.lanes.idle_nbytes - shared

    def _displace(self) -> None:
        """Rule 4."""
        while self.waiting and self.running:
            least = min(s.priority for s in self.running)
            if all(s.priority <= least for s in self.waiting):
                return
            sequence = self._next()
            if sequence is None or sequence.priority <= least:
                return
            if len(self.running) < self.limits.max_concurrency and not self._blocked and self._fits(sequence):
                return
            self.park(self._last())
            self._blocked = False

    def _let_in(self) -> None:
        """Tenants that ask for little do not wait for a place, nor behind the prompts of this step."""
        self.fairness.look(self.running, self.waiting)
        while self.running and self.waiting and not self._blocked and len(self.fairness.served) > 1:
            sequence = self._next()
            if sequence is None or not self.fairness.light(sequence) or self.fairness.leaves_out(sequence):
                return
            if len(self.running) >= self.limits.max_concurrency:
                other = self.fairness.gives_way(sequence, self.running)
                if other is None:
                    return
                self.park(other)
            if self._admit(sequence) is None:  # not the one that was just parked, whose turn it may be by age
                return

    def _last(self) -> Sequence:
        """Who gives way first: the lowest priority, the newest of them."""
        return max(self.running, key=lambda s: (-s.priority, s.order))

    def park(self, sequence: Sequence) -> None:
        """A running sequence gives way and waits to come back."""
        self.running.remove(sequence)
        self.lanes.park(sequence)
        self.waiting.append(sequence)
        self.preemptions += 1

    def restart(self, sequence: Sequence) -> None:
        """A running sequence whose window may be half-written waits again: its tokens are computed anew."""
        self.running.remove(sequence)
        sequence.lane.close(sequence)
        self.waiting.append(sequence)
        self._blocked = False

    def _relieve(self, error: OutOfPages) -> None:
        """Rules 5 and 6."""
        last = self._last()
        if len(self.running) > 1:
            self.park(last)
            self._blocked = True
            return
        self.running.remove(last)
        last.lane.close(last)
        self.lanes.leave(last)
        self.failed.append((last, error))


def chunk_length(limits: EngineLimits) -> int:
    """Tokens of a prompt's chunks: as asked, but so that all decodes and one chunk fit into a step's budget."""
    return max(1, min(limits.prefill_chunk, limits.token_budget - limits.max_concurrency + 1))

"""Admission: nobody waits in vain, no key takes all the room, and Retry-After is a time at which there is room."""

from __future__ import annotations

import contextlib
import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import ModelSettings
from server.errors import ApiError
from server.scheduler.admission import LONGEST_RETRY_S, UNKNOWN_RETRY_S, Admission, Refusal, Room
from server.scheduler.slots import Slot
from server.worker.child_queue import TurnQueue

ROOM = Room(concurrency=4, queue=36)


class World:
    """A model that works on `concurrency` requests at once, `service_s` each, keys in turn; time is simulated."""

    def __init__(self, room: Room, service_s: float) -> None:
        self.now, self.room, self.service_s = 0.0, room, service_s
        self.admission = Admission(lambda: self.now)
        self.waiting: dict[str, list[tuple[str, float]]] = {}
        self.served: dict[str, int] = {}
        self.running: list[tuple[float, str, str]] = []
        self.waits: dict[str, list[float]] = {}
        self.refused: list[tuple[float, str, int]] = []
        self.done: list[float] = []

    def ask(self, ident: str, tenant: str) -> bool:
        try:
            self.admission.enter(self.room, ident, tenant)
        except Refusal as refusal:
            self.refused.append((self.now, tenant, refusal.retry_after))
            return False
        if tenant not in self.served:
            self.served[tenant] = min(self.served.values(), default=0)
        self.waiting.setdefault(tenant, []).append((ident, self.now))
        self.begin()
        return True

    def begin(self) -> None:
        while len(self.running) < self.room.concurrency and any(self.waiting.values()):
            tenant = min((t for t, queue in self.waiting.items() if queue), key=lambda t: self.served[t])
            ident, came = self.waiting[tenant].pop(0)
            self.served[tenant] += 1
            self.waits.setdefault(tenant, []).append(self.now - came)
            heapq.heappush(self.running, (self.now + self.service_s, ident, tenant))

    def until(self, when: float) -> None:
        while self.running and self.running[0][0] <= when:
            self.now, ident, _ = heapq.heappop(self.running)
            self.admission.leave(self.room, ident, answered=True)
            self.done.append(self.now)
            self.begin()
        self.now = when

    def load(self, rates: dict[str, float], seconds: float, seed: int = 0) -> None:
        drawn, start = random.Random(seed), self.now
        arrivals = []
        for tenant, rate in rates.items():
            at = start
            while (at := at + drawn.expovariate(rate)) < start + seconds:
                arrivals.append((at, tenant))
        for number, (at, tenant) in enumerate(sorted(arrivals)):
            self.until(at)
            self.ask(f"{tenant}{start}{number}", tenant)


@pytest.mark.parametrize("service_s", [0.2, 2.0, 30.0])
@pytest.mark.parametrize("queue", [36, 1000])
def test_at_four_times_the_rate_work_goes_on_and_nobody_waits_too_long(service_s: float, queue: int) -> None:
    world = World(Room(4, queue), service_s)
    world.load({"": 4 * 4 / service_s}, 500 * service_s)
    longest = max(10.0, 2 * service_s)
    assert len(world.done) > 0.95 * 500 * 4
    assert max(world.waits[""][100:]) <= 1.3 * longest
    assert world.admission.pace == pytest.approx(service_s / 4, rel=0.5)


def test_a_heavy_key_leaves_room_and_does_not_hold_up_a_light_one() -> None:
    world = World(ROOM, 1.0)
    world.load({"heavy": 16.0}, 60)
    assert world.admission._held["heavy"] <= 2 / 3 * 40 + 1
    before = len(world.refused)
    world.load({"heavy": 16.0, "light": 0.4}, 300, seed=1)
    assert not [one for one in world.refused[before:] if one[1] == "light"]
    assert max(world.waits["light"]) <= 1.0, "one place becomes free in every quarter of a second"
    assert len(world.waits["heavy"]) > 300 * 3.4


def test_those_who_come_back_as_they_were_told_find_room() -> None:
    world = World(ROOM, 1.0)
    world.load({"": 8.0}, 60)
    world.refused.clear()
    for number in range(200):  # a crowd in one moment
        world.ask(f"crowd{number}", "")
    assert len(world.refused) >= 160
    late = sorted((at + wait, number) for number, (at, _, wait) in enumerate(world.refused))
    assert late[0][0] >= world.now + 1 and max(wait for _, _, wait in world.refused) <= LONGEST_RETRY_S
    world.refused.clear()
    got = 0
    for when, number in late:
        world.until(when)
        got += world.ask(f"again{number}", "")
    assert got > 0.9 * len(late)


def test_without_a_known_pace_only_the_limits_count() -> None:
    admission = Admission(lambda: 0.0)
    for number in range(1000):
        assert admission.enter(ROOM, str(number)) is None
    assert admission.retry_after() == UNKNOWN_RETRY_S
    assert admission.enter(Room(4, 36, longest_s=5.0), "x") == 5.0


def test_a_restart_is_no_change_of_pace() -> None:
    world = World(ROOM, 1.0)
    world.load({"": 8.0}, 60)
    pace = world.admission.pace or 0.0
    world.now += 600  # the worker was gone; the next end comes late
    world.running = [(world.now, ident, tenant) for _, ident, tenant in world.running]
    world.until(world.now)
    assert world.admission.pace is not None and world.admission.pace < 2 * pace


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", "a", "b"]), st.integers(1, 3), st.booleans())))
def test_whatever_happens_the_count_is_right(steps: list[tuple[int, str, int, bool]]) -> None:
    now = [0.0]
    admission = Admission(lambda: now[0])
    held: dict[str, int] = {}
    for ident, tenant, count, answered in steps:
        now[0] += 0.5
        name = str(ident)
        if name in held:
            admission.leave(ROOM, name, answered=answered)
            del held[name]
        else:
            try:
                admission.enter(ROOM, name, tenant, count)
                held[name] = count
            except Refusal as refusal:
                assert 1 <= refusal.retry_after <= LONGEST_RETRY_S
        assert admission.total == sum(held.values())
        assert admission.pace is None or admission.pace >= 0
    for name in held:
        admission.leave(ROOM, name, answered=False)
    assert admission.total == 0 and not admission._held


def test_one_key_cannot_fill_the_queue_of_another() -> None:
    admission, room = Admission(lambda: 0.0), Room(2, 4)
    for number in range(4):
        admission.enter(room, f"h{number}", "heavy")
    with pytest.raises(Refusal, match="4 requests of this key"):
        admission.enter(room, "h4", "heavy")
    admission.enter(room, "l0", "light")
    assert admission.total == 5


def test_one_key_cannot_fill_the_line_of_those_who_wait_for_a_load() -> None:
    slot = Slot(ModelSettings(name="m", path="m", limits={"max_concurrency": 2, "max_queue": 10}))  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(slot.waits("heavy", 5))
        with pytest.raises(ApiError, match="8 requests of this key") as refused, slot.waits("heavy", 5):
            pass
        assert refused.value.status == 429 and refused.value.retry_after == 5 and slot.waiting == 8
        for name in ("a", "b", "", ""):
            stack.enter_context(slot.waits(name, 5))
        with pytest.raises(ApiError, match="too many requests wait"), slot.waits("c", 5):
            pass
    assert slot.waiting == 0 and not slot.line


def test_long_prompts_are_prepared_for_keys_in_turn() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for name in ("h1", "h2", "h3", "l1", "h4", "l2", "x1"):
        queue.put(name, name[0])
    assert [queue.get() for _ in range(7)] == ["h1", "l1", "x1", "h2", "l2", "h3", "h4"]
    assert not queue._lines

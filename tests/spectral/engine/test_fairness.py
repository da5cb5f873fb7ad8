"""Tenants beside each other: a light one has places and time whatever a heavy one asks, and nobody pays for nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from spectral.engine import fairness
from spectral.engine.scheduler import Scheduler
from spectral.engine.sequence import Sequence
from spectral.engine.types import EngineLimits
from tests.spectral.engine.test_scheduler import FakeLanes, sequence, step

ANSWER, BASE_S = 12, 0.015
ROW_S = 0.002
"""As the embedded model's on a CPU core: a step of eight takes twice as long as one of one."""
BOUND = 1 + 1 / fairness.YIELD


class World:
    """A scheduler whose steps take BASE_S, `row` seconds for each sequence and a tenth of it for each further token of
    a prompt; requests end after ANSWER tokens."""

    def __init__(self, row: float, **limits: int) -> None:
        self.now, self.row = 0.0, row
        self.lanes = FakeLanes()
        given = EngineLimits(
            **{"max_concurrency": 8, "max_queue": 1000, "prefill_chunk": 64, "token_budget": 128, **limits}
        )
        self.scheduler = Scheduler(self.lanes, given, clock=lambda: self.now)
        self.came: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}
        self.tokens: Counter[str] = Counter()
        self.number = 0

    def ask(self, tenant: str, prompt: int, **more: Any) -> Sequence:
        self.number += 1
        made = sequence(f"{tenant}{self.number}", self.number, prompt, tenant=tenant, **more)
        self.came[made.request_id] = self.now
        self.scheduler.add(made)
        return made

    def step(self) -> int:
        work = step(self.scheduler)
        count = sum(tokens for _, tokens in work)
        self.now += BASE_S + self.row * (len(work) + (count - len(work)) / 10)
        for each in [s for s in self.scheduler.running if len(s.tokens) > s.prompt_length + ANSWER]:
            self.scheduler.remove(each)
            self.took.setdefault(each.tenant, []).append(self.now - self.came[each.request_id])
        for name, tokens in work:
            self.tokens[name.rstrip("0123456789")] += tokens
        return count

    def run(
        self, seconds: float, heavy: int, light_every: float, prompts: tuple[int, int], tenants: str = "heavy"
    ) -> None:
        """`heavy` requests of a tenant always wait or run; a light one's come one after another."""
        until, due = self.now + seconds, self.now
        while self.now < until:
            of = Counter(s.tenant for s in (*self.scheduler.running, *self.scheduler.waiting))
            for _ in range(heavy - of[tenants]):
                self.ask(tenants, prompts[0])
            if light_every and self.now >= due:
                self.ask("light", prompts[1])
                due += light_every
            if not self.step():
                self.now = max(self.now, due)


def worst(heavy: int, long: int) -> tuple[float, float]:
    """The light tenant's longest answer beside the heavy one against alone, and the part of tokens that is left."""
    alone, beside, only = (World(ROW_S) for _ in range(3))
    every = 40 * (BASE_S + ROW_S)
    alone.run(100, 0, every, (long, 24))
    only.run(100, heavy, 0, (long, 24))
    beside.run(100, heavy, every, (long, 24))
    assert len(beside.took["light"]) >= 0.95 * 100 / every and beside.took["heavy"]
    return max(beside.took["light"]) / max(alone.took["light"]), sum(beside.tokens.values()) / sum(only.tokens.values())


@pytest.mark.parametrize("long", [24, 900])
def test_whatever_a_heavy_tenant_asks_a_light_one_is_not_much_slower(long: int) -> None:
    slower, left = worst(40, long)
    assert slower <= BOUND + 0.1, "the step that runs when it comes is not in the bound"
    assert left > 0.7


@pytest.mark.parametrize("long", [24, 900])
def test_without_the_rules_it_would_be(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness.Fairness, "leaves_out", lambda self, sequence: False)
    monkeypatch.setattr(fairness.Fairness, "gives_way", lambda self, newcomer, running: None)
    assert worst(40, long)[0] > 2.2


def test_one_long_prompt_is_enough_to_burden_and_few_short_requests_are_not() -> None:
    assert worst(1, 5000)[0] <= BOUND + 0.1
    world = World(ROW_S)
    for name in ("a", "b", "c"):
        world.ask(name, 8)
    for _ in range(ANSWER):
        assert world.step() in (24, 3), "three with a request each are in every step together"


def test_where_a_full_step_is_as_fast_as_a_short_one_nobody_leaves_out_any() -> None:
    world = World(0.0)
    world.run(20, 40, 0.5, (24, 24))
    rows = [s for s in world.scheduler.running if s.tenant == "heavy"]
    before = {s.request_id: len(s.tokens) for s in rows if s.pending == 1}
    world.ask("light", 24)
    for _ in range(3):
        world.step()
    still = [s for s in world.scheduler.running if s.request_id in before]
    grown = [len(s.tokens) - before[s.request_id] for s in still]
    assert len(grown) > 2 and set(grown) == {3}


def test_two_who_ask_for_much_share_and_neither_leaves_out_steps() -> None:
    world = World(ROW_S)
    until = 40.0
    while world.now < until:
        of = Counter(s.tenant for s in (*world.scheduler.running, *world.scheduler.waiting))
        for name in ("a", "b"):
            for _ in range(20 - of[name]):
                world.ask(name, 24)
        world.step()
        assert not any(world.scheduler.fairness.leaves_out(s) for s in world.scheduler.running)
    assert 0.9 < world.tokens["a"] / world.tokens["b"] < 1.1


def test_a_place_is_given_at_once_and_the_one_who_gave_it_goes_on_where_it_was() -> None:
    world = World(0.0)
    for _ in range(20):
        world.ask("heavy", 10)
    for _ in range(4):
        world.step()
    light = world.ask("light", 10)
    world.step()
    world.step()
    assert light.row is not None and len(world.lanes.parked) == 1
    name = world.lanes.parked[0]
    gave = next(s for s in world.scheduler.waiting if s.request_id == name)
    assert gave.parked == 13
    while gave.row is None:
        world.step()
    assert gave.row.length == 14, "what was computed is kept"
    assert world.lanes.parked == [name]


def test_a_place_is_not_taken_from_one_who_has_no_more() -> None:
    world = World(0.0, max_concurrency=2)
    world.ask("a", 10)
    world.ask("b", 10)
    world.step()
    world.ask("c", 10)
    for _ in range(4):
        world.step()
    assert not world.lanes.parked


def test_a_higher_priority_does_not_wait_for_a_lower_one() -> None:
    world = World(ROW_S)
    world.ask("light", 10)
    admin = [world.ask("admin", 500, priority=1) for _ in range(7)]
    world.step()
    while any(s.row is not None and s.pending > 1 for s in admin):
        world.step()
        assert not any(world.scheduler.fairness.leaves_out(s) for s in admin)


def test_a_place_goes_to_whom_it_was_made_free_for() -> None:
    """With all served alike, the one that was parked for it is older and would be next: the step came to no end."""
    world = World(ROW_S, max_concurrency=2)
    for _ in range(2):
        world.ask("a", 8)
    world.step()
    light = world.ask("b", 8)
    for tenant in ("a", "b"):
        world.scheduler.fairness.served[tenant] = 16
    world.step()
    assert light in world.scheduler.running
    assert Counter(s.tenant for s in world.scheduler.running) == {"a": 1, "b": 1}

"""The simulator: its physics hold for every rule, and the real policy wins where caches can be squeezed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from bench.trace_simulator import GIB, Kind, Request, Rule, Simulator, SpectralRule, kind
from bench.whole_model_rules import LeastCost, LeastKeepAlive
from server.scheduler.steward import Wishes

LADDER = [("3.5x", 3.5, 0.0001), ("6x", 6.0, 0.0007), ("10x", 10.0, 0.003)]
DEVICES = {"cuda:0": 12 * GIB, "cpu": 32 * GIB}


def kinds(count: int, gib: float, ladder: list[tuple[str, float, float]]) -> list[Kind]:
    return [kind(f"m{i}", gib, 147_456, ladder) for i in range(count)]


def requests(count: int, models: int, per_second: float) -> list[Request]:
    rng, at, out = random.Random(3), 0.0, []
    for _ in range(count):
        at += rng.expovariate(per_second)
        out.append(Request(at, f"m{rng.randrange(models)}", rng.randint(50, 3000), rng.randint(5, 300)))
    return out


def run(rule: Rule, models: list[Kind], work: list[Request]) -> Simulator:
    sim = Simulator(models, DEVICES, work, rule)
    sim.run(tick_s=1.0 if isinstance(rule, SpectralRule) else 0.0)
    return sim


@pytest.mark.parametrize(
    "make",
    [
        lambda models: SpectralRule(models, Wishes()),
        lambda models: LeastKeepAlive(sleep=False),
        lambda models: LeastKeepAlive(sleep=True),
        lambda models: LeastCost(sleep=True),
    ],
)
def test_every_request_is_answered_and_no_device_overruns(make: Callable[[list[Kind]], Rule]) -> None:
    ladder = LADDER if make(kinds(1, 1, LADDER)).__class__ is SpectralRule else [("exact", 1.0, 0.0)]
    models = kinds(4, 4, ladder)
    work = requests(150, 4, 0.2)
    sim = run(make(models), models, work)
    assert all(request.first is not None and request.first > request.at for request in work)
    assert sim.overruns == 0
    assert sum(machine.starts for machine in sim.machines.values()) >= 4


def test_three_models_stay_hot_where_whole_models_take_turns() -> None:
    squeezed, whole = kinds(3, 2.9, LADDER), kinds(3, 2.9, [("exact", 1.0, 0.0)])
    ours, theirs = requests(300, 3, 0.5), requests(300, 3, 0.5)
    mine = run(SpectralRule(squeezed, Wishes(min_context=4096, max_concurrency=4)), squeezed, ours)
    other = run(LeastKeepAlive(sleep=True), whole, theirs)
    moves = [sum(m.starts + m.wakes for m in sim.machines.values()) for sim in (mine, other)]
    assert moves[0] == 3 and moves[1] >= 15
    assert max(request.kl for request in ours) <= 0.003

"""The planner: within 1 % of exhaustive search, never over a budget, no thrash, floors and pins kept, all explained."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

from server.scheduler.demand import ASLEEP, COLD, HOT, Demand, Device, Placement, Rung
from server.scheduler.options import PIN_S, UNMET_S, options
from server.scheduler.planner import plan
from tests.server.scheduler.cases import GIB, carried_out, least_cost, problem, taken

LADDER = (Rung("4x", 0.001, 30_000), Rung("8x", 0.004, 15_000), Rung("16x", 0.016, 7_500))


def model(name: str, gib: float, **kwargs: object) -> Demand:
    facts: dict[str, object] = {"rungs": LADDER, "tokens": 100_000, "rate": 0.01, "can_sleep": False}
    return Demand(name, weights=int(gib * GIB), **{**facts, **kwargs})  # type: ignore[arg-type]


def gap(seed: int, solve: bool) -> float:
    """By how much a plan is worse than the best there is."""
    models, devices = problem(seed, 1 + seed % 4, 1 + seed % 2, 1 + seed % 3, wishes=seed % 3 == 0)
    best = least_cost(models, devices)
    found = plan(models, devices, hysteresis=0, solve=solve, time_limit_s=0.2)
    # A penalty that no plan avoids must not hide a difference in the rest.
    measured = best % UNMET_S if best < PIN_S else best % PIN_S
    assert found.cost >= best - 1e-9
    return (found.cost - best) / max(measured, 1e-9)


def test_plans_are_within_one_percent_of_exhaustive_search() -> None:
    gaps = [gap(seed, True) for seed in range(300)]
    assert max(gaps) <= 0.01


def test_the_search_alone_is_seldom_far_from_the_best() -> None:
    gaps = [gap(seed, False) for seed in range(300)]
    assert sum(value > 0.01 for value in gaps) <= 9


def test_no_budget_is_exceeded_and_leases_keep_their_floor() -> None:
    for seed in range(60):
        models, devices = problem(seed, 12, 3, 5)
        found = plan(models, devices)
        used = taken(list(found.choices.values()))
        assert all(used.get(device.name, 0) <= device.budget for device in devices)
        assert all(found.free[device.name] == device.budget - used.get(device.name, 0) for device in devices)
        for demand in models:
            choice = found.choices[demand.name]
            if choice.residency == HOT:
                rung = next(r for r in demand.rungs if r.name == choice.setting)
                assert choice.lease >= demand.floor(rung)
                assert demand.max_kl is None or choice.kl <= demand.max_kl


def test_the_same_minute_a_hundred_times_moves_nothing_after_the_first() -> None:
    for seed in range(12):
        models, devices = problem(seed, 3 + 4 * (seed % 5), 1 + seed % 4, 5)
        models = carried_out(models, plan(models, devices))
        first = {m.name: m.now for m in models}
        for _ in range(100 if seed < 2 else 5):
            models = carried_out(models, plan(models, devices))
            assert {m.name: m.now for m in models} == first, f"seed {seed}"


def test_the_same_problem_gives_the_same_plan_in_any_order() -> None:
    models, devices = problem(5, 20, 4, 5)
    assert plan(models, devices, solve=False) == plan(models[::-1], devices, solve=False)


def test_a_large_problem_is_planned_in_time() -> None:
    models, devices = problem(1, 50, 8, 5)
    plan(models, devices)  # imports SciPy
    times = []
    for _ in range(5):
        began = time.process_time()  # other programs of the machine are no part of it
        plan(models, devices)
        times.append(time.process_time() - began)
    assert min(times) < 0.2, "50 models on 8 GPUs take 35 ms on an idle machine; the bench has the figures"


def test_a_seventh_model_loads_because_the_others_are_squeezed() -> None:
    hot = Placement(HOT, ("cuda:0",), "4x")
    devices = [Device("cuda:0", 30 * GIB), Device("cpu", 0)]
    others = [model(f"m{i}", 2, now=hot, rate=0.1, live=True) for i in range(6)]
    assert sum(m.weights + m.lease(LADDER[0]) for m in others) + model("new", 2).weights < 31 * GIB
    found = plan([*others, model("new", 2, needed=True)], devices)
    assert not found.unmet
    assert all(choice.residency == HOT for choice in found.choices.values())
    squeezed = [name for name, choice in found.choices.items() if choice.setting != "4x" and name != "new"]
    assert squeezed and "requests wait for it" in found.reasons["new"]


def test_pins_busy_models_and_max_kl_hold_against_a_needed_model() -> None:
    devices = [Device("cuda:0", 10 * GIB), Device("cpu", 64 * GIB)]
    pinned = model("pinned", 5, pinned=True, now=Placement(HOT, ("cuda:0",), "4x"), max_kl=0.004)
    busy = model("busy", 2, busy=True, live=True, now=Placement(HOT, ("cuda:0",), "8x"))
    found = plan([pinned, busy, model("big", 6, needed=True, priority=5)], devices)
    assert found.unmet == ("big",)
    assert found.choices["pinned"].residency == found.choices["busy"].residency == HOT
    assert found.choices["pinned"].setting in ("4x", "8x")
    assert found.choices["busy"].setting in ("8x", "16x"), "a live cache is never made finer"
    assert "pinned, busy or worth more" in found.reasons["big"]


def test_priorities_decide_who_goes() -> None:
    devices = [Device("cuda:0", 6 * GIB)]
    low, high = model("low", 4, rate=0.02), model("high", 4, rate=0.01, priority=10)
    found = plan([low, high], devices)
    assert (found.choices["low"].residency, found.choices["high"].residency) == (COLD, HOT)


def test_a_model_sleeps_where_host_memory_allows_and_goes_cold_where_not() -> None:
    now = Placement(HOT, ("cuda:0",), "16x")
    pair = [model("old", 4, can_sleep=True, now=now), model("new", 4, needed=True)]
    for host, residency in ((8 * GIB, ASLEEP), (GIB, COLD)):
        found = plan(pair, [Device("cuda:0", 6 * GIB), Device("cpu", host)])
        assert found.choices["old"].residency == residency
        assert found.choices["new"].residency == HOT


def test_a_model_too_large_for_one_device_is_split_by_free_bytes() -> None:
    devices = [Device("cuda:0", 8 * GIB), Device("cuda:1", 16 * GIB), Device("cpu", 64 * GIB)]
    found = plan([model("large", 18, overhead=GIB // 2, needed=True)], devices)
    choice = found.choices["large"]
    assert choice.devices == ("cuda:0", "cuda:1") and "too large for one device" in found.reasons["large"]
    shares = dict(choice.shares)
    assert shares["cuda:1"] > 1.8 * shares["cuda:0"]
    assert options(model("large", 18, splittable=False), devices) == options(model("large", 40), devices)


def test_a_model_at_rest_frees_its_device_unless_somebody_asks() -> None:
    now = Placement(HOT, ("cuda:0",), "4x")
    devices = [Device("cuda:0", 12 * GIB), Device("cpu", 0)]
    assert plan([model("m", 4, resting=True, now=now)], devices).choices["m"].residency == COLD
    for reason in ("needed", "pinned", "busy"):
        woken = replace(model("m", 4, resting=True, now=now), **{reason: True})
        assert plan([woken], devices).choices["m"].residency == HOT


def test_max_bytes_of_a_model_bounds_its_cache() -> None:
    devices = [Device("cuda:0", 24 * GIB)]
    choice = plan([model("m", 4, max_bytes=5 * GIB, tokens=1_000_000)], devices).choices["m"]
    assert choice.residency == HOT and dict(choice.shares)["cuda:0"] <= 5 * GIB
    refused = plan([model("m", 4, max_bytes=3 * GIB, needed=True)], devices)
    assert refused.unmet == ("m",)


def test_an_empty_plan_and_a_model_without_an_allowed_setting() -> None:
    assert plan([], [Device("cpu", GIB)]).free == {"cpu": GIB}
    found = plan([model("m", 1, max_kl=1e-6, needed=True)], [Device("cuda:0", 24 * GIB)])
    assert found.unmet == ("m",) and "max_kl" in found.reasons["m"]


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from server.scheduler.planner import plan; from tests.server.scheduler.cases import problem;"
        "plan(*problem(1, 12, 2, 5)); assert 'scipy.optimize' in sys.modules; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

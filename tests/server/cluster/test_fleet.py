"""The plan in cells: places, spread, what is planned anew, and how far it is from the optimum."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.cluster.crowd import Crowd, model_of, node_of
from server.cluster.fleet import Fleet, FleetPlan
from server.scheduler.demand import HOT, Demand, Device, Placement, Rung
from server.scheduler.planner import plan
from tests.server.scheduler.cases import GIB

LADDER = (Rung("4x", 0.001, 16384.0), Rung("8x", 0.01, 8192.0), Rung("16x", 0.05, 4096.0))


def demand(name: str, gib: float = 4.0, rate: float = 1.0, **more: object) -> Demand:
    base = Demand(
        name, int(gib * GIB), LADDER, tokens=65536, floor_tokens=8192, rate=rate, can_sleep=False, needed=True
    )
    return replace(base, **more)  # type: ignore[arg-type]


def fleet(nodes: int, gpus: int = 2, gib: float = 16.0, cell: int = 4) -> Fleet:
    made = Fleet(cell)
    for node in range(nodes):
        made.set_node(f"n{node}", [Device(f"n{node}/cuda:{i}", int(gib * GIB)) for i in range(gpus)])
    return made


def carried_out(demands: list[Demand], found: FleetPlan) -> list[Demand]:
    """The replicas where the plan wants them."""
    placed = []
    for each in demands:
        where = found.choices[each.name].placement
        placed.append(replace(each, now=where, needed=where.residency != HOT))
    return placed


def test_devices_are_cut_into_cells_and_nodes_stay_whole() -> None:
    made = fleet(5)
    assert [len(cell.devices) for cell in made.cells.values()] == [4, 4, 2]
    made.set_node("big", [Device(f"big/cuda:{i}", GIB) for i in range(8)])
    assert len(made.cells["cell-4"].devices) == 8
    made.remove_node("big")
    assert "cell-4" not in made.cells and "big" not in made.nodes


def test_replicas_of_one_model_are_on_different_nodes() -> None:
    made = fleet(4)
    found = made.plan([demand(f"m#{i}") for i in range(4)])
    assert len({node_of(choice.devices[0]) for choice in found.choices.values()}) == 4


def test_busy_models_do_not_share_a_device_while_others_are_idle() -> None:
    made = fleet(2)
    found = made.plan([demand(f"m{i}#1", rate=2.0) for i in range(4)])
    assert len({choice.devices for choice in found.choices.values()}) == 4


def test_what_fits_nowhere_is_unmet_and_says_why() -> None:
    made = fleet(2)
    found = made.plan([demand("huge#1", gib=40.0, splittable=False), demand("m#1")])
    assert found.unmet == ("huge#1",) and found.reasons["huge#1"]
    assert Fleet().plan([demand("m#1")]).reasons == {"m#1": "no node has a device for it"}


def test_a_plan_that_was_carried_out_is_its_own_answer_and_plans_nothing_again() -> None:
    made = fleet(6)
    demands = [demand(f"m{i}#{i}", rate=0.1 * i) for i in range(14)]
    placed = carried_out(demands, made.plan(demands, improve=24))
    for _ in range(3):
        found = made.plan(placed, improve=24)
        assert all(found.choices[d.name].placement.devices == d.now.devices for d in placed)
    assert made.plan(placed).planned == 0, "nothing changed, so nothing is solved"


def test_one_more_replica_and_a_lost_node_touch_few_cells() -> None:
    made = fleet(20)
    demands = [demand(f"m{i}#{i}") for i in range(40)]
    placed = carried_out(demands, made.plan(demands))
    placed = carried_out(placed, made.plan(placed))
    one = made.plan([*placed, demand("new#1")])
    assert one.planned <= 2 and one.choices["new#1"].residency == HOT
    made.remove_node("n3")
    away = [replace(d, now=Placement(), needed=True) if d.now.devices[0].startswith("n3/") else d for d in placed]
    found = made.plan(away)
    lost = [d.name for d in away if d.needed]
    assert lost and all(found.choices[name].residency == HOT for name in lost) and not found.unmet
    assert found.planned <= 2 + 2 * len(lost)
    stay = [d for d in away if not d.needed]
    assert all(found.choices[d.name].placement.devices == d.now.devices for d in stay)


def test_a_plan_that_runs_out_of_time_places_everybody_and_leaves_cells_to_the_next() -> None:
    made = fleet(20)
    demands = [demand(f"m{i}#{i}", rate=0.1 + i % 5) for i in range(40)]
    found = made.plan(demands, over=lambda: True)
    assert found.planned == 1 and found.left == len(made.cells) - 1
    assert not found.unmet and len({choice.devices for choice in found.choices.values()}) == 40
    placed, plans = carried_out(demands, found), 0
    while found.left:
        found = made.plan(placed, over=lambda: True)
        assert all(found.choices[d.name].residency == HOT for d in placed), "nobody goes because time is short"
        placed, plans = carried_out(placed, found), plans + 1
    assert plans < len(made.cells), "each plan solves at least one"


def test_who_waits_comes_before_who_could_be_better_off() -> None:
    made = fleet(20, gib=8.0)
    demands = [demand(f"m{i}#{i}") for i in range(40)]
    placed = carried_out(demands, made.plan(demands))
    busy = [replace(d, load_s=20.0) for d in placed]  # something changed everywhere
    made.remove_node("n7")
    away = [replace(d, now=Placement(), needed=True) if d.now.devices[0].startswith("n7/") else d for d in busy]
    squeezed = made.plan(away, over=lambda: True)
    (cell,) = [cell for cell in made.cells.values() if not cell.dirty]
    assert squeezed.planned == 1 and any(d.name in cell.members for d in away if d.needed)


def test_what_came_as_planned_is_not_planned_again() -> None:
    made = fleet(10)
    demands = [demand(f"m{i}#{i}") for i in range(20)]
    placed = carried_out(demands, made.plan(demands))
    assert made.plan(placed).planned == 0
    elsewhere = next(d for d in made.cells["cell-2"].devices)
    moved = [replace(placed[0], now=Placement(HOT, (elsewhere,), "4x")), *placed[1:]]
    assert made.plan(moved).planned >= 1


def test_a_node_that_joins_or_goes_changes_nothing_for_the_others() -> None:
    made = fleet(6)
    allowed = lambda: frozenset(name for cell in made.cells.values() for name in cell.devices)  # noqa: E731
    demands = [demand(f"m{i}#{i}", devices=allowed()) for i in range(12)]
    placed = carried_out(demands, made.plan(demands))
    made.set_node("new", [Device(f"new/cuda:{i}", 16 * GIB) for i in range(2)])
    placed = [replace(d, devices=allowed()) for d in placed]
    assert made.plan(placed).planned == 1, "the new node's cell"
    found = made.plan([replace(placed[0], devices=frozenset({"new/cuda:0"})), *placed[1:]])
    assert found.planned >= 1 and not found.choices["m0#0"].devices, "its old place is no longer allowed"


def test_a_model_too_large_for_a_gpu_is_split_over_those_of_one_node() -> None:
    made = fleet(4, gpus=2, gib=16.0, cell=8)
    assert len(made.cells) == 1
    found = made.plan([demand("big#1", gib=24.0), demand("m#1")])
    devices = found.choices["big#1"].devices
    assert len(devices) == 2 and len({node_of(device) for device in devices}) == 1
    assert made.plan([demand("huge#1", gib=40.0)]).unmet == ("huge#1",), "no node has so much, though two would"


def test_traffic_alone_replans_a_few_cells_at_a_time() -> None:
    made = fleet(40)
    demands = [demand(f"m{i}#{i}") for i in range(80)]
    placed = carried_out(demands, made.plan(demands))
    placed = carried_out(placed, made.plan(placed))
    assert 0 < made.plan([replace(d, rate=5.0) for d in placed]).planned <= 4


@pytest.mark.parametrize("seed", range(4))
def test_two_cells_are_near_the_exact_optimum_of_one(seed: int) -> None:
    devices = [Device(f"n{i // 2}/cuda:{i % 2}", (12 + 4 * ((i + seed) % 3)) * GIB) for i in range(6)]
    demands = [demand(f"m{i}#1", 3.0 + (i * 7 + seed) % 5, 0.2 + 0.3 * i, needed=False) for i in range(9)]
    best = plan(demands, devices, hysteresis=0.0, time_limit_s=5.0)
    made = Fleet(4)
    for node in range(3):
        made.set_node(f"n{node}", devices[2 * node : 2 * node + 2])
    ours = made.plan(demands, improve=8)
    kl = lambda choices: sum(d.rate * (choices[d.name].kl or 0.05) for d in demands)  # noqa: E731
    hot = lambda choices: sum(d.rate for d in demands if choices[d.name].residency == HOT)  # noqa: E731
    assert hot(ours.choices) >= 0.95 * hot(best.choices)
    assert kl(ours.choices) <= 1.25 * kl(best.choices) + 1e-9


def test_a_move_changes_the_sum_by_what_the_mover_sees_of_it() -> None:
    crowd, devices = Crowd(), ("n0/cuda:0", "n0/cuda:1", "n1/cuda:0")
    everybody = [demand(f"m{i % 3}#{i}", rate=0.1 + 0.2 * i) for i in range(7)]
    for at, each in enumerate(everybody):
        crowd.add(each, (devices[at % 2],))
    before, mover = crowd.total, everybody[4]
    crowd.remove(mover, (devices[0],))
    change = crowd.extra(mover, devices[2]) - crowd.extra(mover, devices[0])
    crowd.add(mover, (devices[2],))
    assert change < 0 and crowd.total - before == pytest.approx(change)


def test_who_shares_a_device_and_could_not_leave_for_less_than_a_move_costs_stays() -> None:
    made = fleet(2)
    for rate, moves in ((0.05, 0), (1.0, 1)):
        here = [demand(f"m{i}#1", rate=rate, needed=False, now=Placement(HOT, ("n0/cuda:0",), "4x")) for i in range(2)]
        found = made.plan(here)
        assert sum(found.choices[d.name].devices != d.now.devices for d in here) >= moves
        assert moves or all(found.choices[d.name].devices == d.now.devices for d in here)


def test_those_that_leave_make_nobody_else_go() -> None:
    made = fleet(1)
    leaving = demand("m0#1", rate=2.0, busy=True, needed=False, now=Placement(HOT, ("n0/cuda:0",), "4x"))
    stays = replace(leaving, name="m1#2", busy=False)
    found = made.plan([leaving, stays])
    assert found.choices["m1#2"].devices == ("n0/cuda:0",)


def test_names() -> None:
    assert model_of("a/b#12") == "a/b" and node_of("x/cuda:0") == "x" and model_of("plain") == "plain"

"""The policy with a clock of its own: who loads, who is squeezed, put to sleep and relaxed, and when not."""

from __future__ import annotations

import pytest

from server.scheduler.demand import ASLEEP, COLD, HOT, Device, Placement, Rung
from server.scheduler.steward import RELAX_AFTER_S, Action, Facts, Steward, Wishes

GIB = 2**30
LADDER = (Rung("4x", 0.001, 32_768), Rung("8x", 0.004, 16_384), Rung("16x", 0.012, 8_192))


def facts(gib: float, **changes: object) -> Facts:
    return Facts(int(gib * GIB), LADDER, **{"overhead": GIB // 4, "context": 32_768, **changes})  # type: ignore[arg-type]


def carry_out(steward: Steward, actions: list[Action], now: float) -> list[str]:
    for action in actions:
        steward.begin(action)
        steward.moved(action.model, action.target, action.lease, now)
    return [f"{action.kind} {action.model}" for action in actions]


def devices(gpu: float = 12, host: float = 32) -> list[Device]:
    return [Device("cuda:0", int(gpu * GIB)), Device("cpu", int(host * GIB))]


def hot(steward: Steward, name: str, gib: float, wishes: Wishes | None = None, now: float = 0.0) -> None:
    steward.add(name, facts(gib), wishes or Wishes(), now)
    steward.requested(name, now)
    steward.report(name, now, running=0, waiting=1, kv_tokens=0)
    carry_out(steward, steward.decide(now, devices()), now)
    steward.report(name, now, running=0, waiting=0, kv_tokens=0)
    assert steward.wards[name].now.residency == HOT
    if wishes is None:
        carry_out(steward, steward.decide(now, devices()), now)


def test_a_request_loads_a_model_and_then_nothing_is_due() -> None:
    steward = Steward()
    steward.add("a", facts(4), Wishes())
    steward.requested("a", 0.0)
    steward.report("a", 0.0, running=0, waiting=1, kv_tokens=0)
    assert steward.due(0.0)
    [action] = steward.decide(0.0, devices())
    assert (action.kind, action.target) == ("load", Placement(HOT, ("cuda:0",), "4x"))
    assert action.needs["cuda:0"] <= 12 * GIB and action.lease > 0
    steward.begin(action)
    assert steward.decide(0.5, devices()) == [], "a model on the move is left alone"
    steward.moved("a", action.target, action.lease, 5.0)
    steward.report("a", 5.0, running=1, waiting=0, kv_tokens=100)
    carry_out(steward, steward.decide(5.0, devices()), 5.0)
    assert not steward.due(6.0)


def test_running_models_are_squeezed_for_a_new_one_and_the_log_says_so() -> None:
    steward = Steward()
    hot(steward, "a", 5)
    steward.report("a", 1.0, running=4, waiting=0, kv_tokens=150_000)
    steward.add("b", facts(5), Wishes())
    steward.requested("b", 1.0)
    steward.report("b", 1.0, running=0, waiting=1, kv_tokens=0)
    actions = steward.decide(1.0, devices(12))
    assert [action.kind for action in actions] == ["squeeze", "load"]
    assert "squeezed a 4x->" in actions[0].reason and "for b" in actions[0].reason and "KL .001->" in actions[0].reason
    assert actions[0].needs == {} and actions[1].needs


def test_an_idle_model_sleeps_for_a_new_one_and_wakes_again() -> None:
    steward = Steward()
    hot(steward, "a", 8)
    steward.add("b", facts(8), Wishes())
    steward.requested("b", 1.0)
    steward.report("b", 1.0, running=0, waiting=1, kv_tokens=0)
    assert carry_out(steward, steward.decide(1.0, devices()), 1.0) == ["sleep a", "load b"]
    assert steward.wards["a"].now.residency == ASLEEP
    steward.report("b", 2.0, running=0, waiting=0, kv_tokens=0)
    steward.requested("a", 2.0)
    steward.report("a", 2.0, running=0, waiting=1, kv_tokens=0)
    assert carry_out(steward, steward.decide(2.0, devices()), 2.0) == ["sleep b", "wake a"]


def test_a_model_that_was_put_to_sleep_by_hand_stays_so_until_somebody_asks_for_it() -> None:
    steward = Steward()
    hot(steward, "a", 2)
    steward.wards["a"].laid_down = True
    steward.moved("a", Placement(ASLEEP, ("cuda:0",), "4x"), 0, 1.0)
    for at in (1.0, 40.0, 4000.0):
        assert steward.decide(at, devices()) == []
    steward.requested("a", 4001.0)
    steward.report("a", 4001.0, running=0, waiting=1, kv_tokens=0)
    assert carry_out(steward, steward.decide(4001.0, devices()), 4001.0) == ["wake a"]


def test_a_model_that_answers_is_never_put_away_for_another() -> None:
    steward = Steward()
    hot(steward, "a", 8)
    steward.report("a", 1.0, running=1, waiting=0, kv_tokens=10)
    steward.add("b", facts(8), Wishes())
    steward.requested("b", 1.0)
    steward.report("b", 1.0, running=0, waiting=1, kv_tokens=0)
    assert all(action.kind in ("lease", "squeeze", "grow") for action in steward.decide(1.0, devices()))
    assert steward.last is not None and steward.last.unmet == ("b",)
    steward.changed()
    assert not steward.due(1.5), "what could not be done is not tried again at once"
    steward.changed(urgent=True)
    assert steward.due(1.5), "but memory that others took is given back at once"
    steward.decide(1.5, devices())
    steward.changed()
    assert not steward.due(2.0)
    steward.report("a", 5.0, running=0, waiting=0, kv_tokens=0)
    assert steward.due(5.0)
    assert carry_out(steward, steward.decide(5.0, devices()), 5.0)[-2:] == ["sleep a", "load b"]


@pytest.mark.parametrize("alive, at, residency", [(60.0, 59.0, HOT), (60.0, 61.0, ASLEEP), (0.0, 0.0, ASLEEP)])
def test_keep_alive_of_the_model_and_of_the_request(alive: float, at: float, residency: str) -> None:
    steward = Steward()
    hot(steward, "a", 4, Wishes(keep_alive_s=alive))
    carry_out(steward, steward.decide(at, devices()), at)
    assert steward.wards["a"].now.residency == residency
    by_request = Steward()
    hot(by_request, "a", 4)
    assert not by_request.due(1.0)
    by_request.requested("a", 0.0, alive, given=True)
    carry_out(by_request, by_request.decide(at, devices()), at)
    assert by_request.wards["a"].now.residency == residency


def test_without_host_memory_a_model_whose_keep_alive_is_over_goes_cold() -> None:
    steward = Steward()
    hot(steward, "a", 4, Wishes(keep_alive_s=5))
    assert carry_out(steward, steward.decide(6.0, devices(host=1)), 6.0) == ["evict a"]
    assert steward.wards["a"].now == Placement(COLD)


def test_a_squeezed_model_is_relaxed_slowly_and_only_while_it_holds_nothing() -> None:
    steward = Steward()
    hot(steward, "a", 8)
    steward.report("a", 1.0, running=2, waiting=0, kv_tokens=60_000)
    assert "squeeze a" in carry_out(steward, steward.decide(1.0, devices(10)), 1.0)
    steward.report("a", 2.0, running=0, waiting=0, kv_tokens=0)
    later = 2.0 + RELAX_AFTER_S
    assert all(action.kind != "relax" for action in steward.decide(3.0, devices(24)))
    relaxed = steward.decide(later + 1, devices(24))
    assert [action.kind for action in relaxed] == ["relax"] and "memory is free" in relaxed[0].reason
    steward.report("a", later + 1, running=1, waiting=0, kv_tokens=10)
    assert all(action.kind != "relax" for action in steward.decide(later + 2, devices(24)))


def test_foreign_memory_is_answered_by_a_squeeze_or_a_smaller_lease() -> None:
    steward = Steward()
    hot(steward, "a", 4)
    steward.report("a", 1.0, running=3, waiting=0, kv_tokens=100_000)
    steward.changed()
    actions = steward.decide(1.0, devices(6))
    assert {action.kind for action in actions} <= {"squeeze", "lease"} and actions
    size = facts(4).weights + facts(4).overhead + actions[0].lease
    assert size <= 6 * GIB


def test_a_removed_model_is_forgotten() -> None:
    steward = Steward()
    hot(steward, "a", 4)
    steward.remove("a")
    assert steward.decide(1.0, devices()) == []

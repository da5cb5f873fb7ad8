"""The ledger adds up, tells foreign memory from ours, and gives budgets as configured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.scheduler.ledger import Holding, Ledger
from server.scheduler.nvml import Reading

GIB = 2**30


def gpu(used: int, total: int = 24 * GIB, **processes: int) -> Reading:
    return Reading("cuda:0", "card", total, used, {int(pid[1:]): size for pid, size in processes.items()})


def test_budget_is_cap_or_total_less_reserve_less_foreign() -> None:
    ledger = Ledger({"*": 20 * GIB}, {"*": GIB, "cuda:1": 2 * GIB})
    ledger.observe([gpu(3 * GIB), Reading("cuda:1", "small", 8 * GIB, 0), Reading("cpu", "host", 64 * GIB, 4 * GIB)])
    budgets = {device.name: device.budget for device in ledger.devices()}
    assert budgets == {"cuda:0": 17 * GIB, "cuda:1": 6 * GIB, "cpu": 60 * GIB}


def test_a_cap_on_host_memory_is_ours_alone() -> None:
    ledger = Ledger({"cpu": 8 * GIB}, {"cpu": GIB})
    for used, budget in ((20, 8), (60, 3), (64, 0)):
        ledger.observe([Reading("cpu", "host", 64 * GIB, used * GIB)])
        assert ledger.devices()[0].budget == budget * GIB


def test_a_foreign_process_is_seen_and_our_growth_is_not_foreign() -> None:
    ledger = Ledger()
    ledger.observe([gpu(GIB)])
    ledger.hold("m", "cuda:0", Holding(weights=8 * GIB, kv=2 * GIB))
    assert ledger.observe([gpu(11 * GIB)]) == {}
    assert ledger.observe([gpu(21 * GIB)]) == {"cuda:0": 10 * GIB}
    assert ledger.excess() == {} and ledger.devices()[0].budget == 13 * GIB
    ledger.hold("m", "cuda:0", Holding(weights=8 * GIB, kv=6 * GIB))
    assert ledger.excess() == {"cuda:0": GIB}
    assert ledger.observe([gpu(15 * GIB)]) == {"cuda:0": -10 * GIB}


def test_growth_of_a_load_is_the_models_until_it_is_more_than_expected() -> None:
    ledger = Ledger()
    ledger.observe([gpu(2 * GIB)])
    ledger.hold("m", "cuda:0", Holding(expected=6 * GIB))
    assert ledger.observe([gpu(7 * GIB)]) == {}
    assert ledger.accounts["cuda:0"].foreign == 2 * GIB
    assert ledger.observe([gpu(10 * GIB)]) == {"cuda:0": 2 * GIB}
    ledger.hold("m", "cuda:0", Holding(weights=6 * GIB))
    ledger.observe([gpu(8 * GIB)])
    assert ledger.accounts["cuda:0"].foreign == 2 * GIB


def test_figures_per_process_tell_the_context() -> None:
    ledger = Ledger()
    ledger.hold("m", "cuda:0", Holding(weights=4 * GIB, kv=GIB), pid=7)
    ledger.observe([gpu(6 * GIB, p7=6 * GIB)], per_process=True)
    assert ledger.of("m")["cuda:0"].context == GIB
    assert ledger.accounts["cuda:0"].foreign == 0
    ledger.hold("m", "cuda:0", Holding(weights=4 * GIB, kv=2 * GIB))
    assert ledger.of("m")["cuda:0"].context == GIB, "a report of the cache does not forget it"


def test_a_device_that_cannot_be_read_keeps_its_figures_and_nothing_grows() -> None:
    ledger = Ledger()
    ledger.hold("m", "cuda:0", Holding(weights=4 * GIB))
    ledger.observe([gpu(4 * GIB)])
    ledger.observe([Reading("cuda:0", "card", error="NVML: GPU is lost")])
    assert ledger.devices()[0].budget == 4 * GIB
    assert ledger.snapshot()[0]["stale"] and ledger.snapshot()[0]["total_bytes"] == 24 * GIB
    ledger.release("m")
    assert ledger.of("m") == {}


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=20
    )
)
def test_every_snapshot_adds_up_to_the_total(steps: list[tuple[int, int, int, int]]) -> None:
    ledger = Ledger(reserves={"*": 1})
    for model, weights, expected, used in steps:
        ledger.hold(f"m{model}", "cuda:0", Holding(weights=weights, kv=weights // 2, expected=expected))
        ledger.observe([Reading("cuda:0", "card", 40, used)])
        row = ledger.snapshot()[0]
        parts = sum(part["bytes"] for part in row["segments"])
        assert parts + row["foreign_bytes"] + row["free_bytes"] == row["total_bytes"]
        assert row["total_bytes"] >= 40 and row["budget_bytes"] >= 0


def test_a_context_that_nobody_reports_comes_with_the_load_and_is_not_foreign() -> None:
    ledger = Ledger()
    ledger.observe([gpu(GIB)])
    ledger.hold("m", "cuda:0", Holding(expected=6 * GIB))
    ledger.observe([gpu(5 * GIB)])
    ledger.hold("m", "cuda:0", Holding(weights=4 * GIB, settle=GIB))
    ledger.hold("m", "cuda:0", Holding(weights=4 * GIB, kv=10))
    assert ledger.observe([gpu(5 * GIB + GIB // 2)]) == {}
    assert ledger.of("m")["cuda:0"].context == GIB // 2 - 10
    ledger.hold("m", "cuda:0", Holding())  # it sleeps: its process is there
    ledger.observe([gpu(GIB + GIB // 2)])
    ledger.hold("m", "cuda:0", Holding(expected=5 * GIB))  # it wakes
    ledger.hold("m", "cuda:0", Holding(weights=4 * GIB))
    assert ledger.of("m")["cuda:0"].total == 4 * GIB + GIB // 2 - 10 and ledger.accounts["cuda:0"].foreign <= GIB + 10


def test_contexts_of_models_that_load_together_are_told_when_the_last_has_loaded() -> None:
    ledger = Ledger()
    ledger.observe([gpu(GIB)])
    for name in "ab":
        ledger.hold(name, "cuda:0", Holding(expected=6 * GIB))
    ledger.hold("a", "cuda:0", Holding(weights=4 * GIB, settle=GIB))
    ledger.observe([gpu(8 * GIB)])  # what b has loaded so far is no context of a's
    assert ledger.of("a")["cuda:0"].context == 0 and ledger.accounts["cuda:0"].foreign == GIB
    ledger.hold("b", "cuda:0", Holding(weights=5 * GIB, settle=GIB))
    assert ledger.observe([gpu(11 * GIB)]) == {}
    assert [ledger.of(name)["cuda:0"].context for name in "ab"] == [GIB // 2, GIB // 2]


def test_what_a_model_gives_back_is_neither_foreign_nor_shown_twice() -> None:
    ledger = Ledger()
    ledger.observe([gpu(3 * GIB)])
    ledger.hold("a", "cuda:0", Holding(weights=8 * GIB, kv=4 * GIB))
    ledger.hold("b", "cuda:0", Holding(weights=2 * GIB))
    assert ledger.observe([gpu(17 * GIB)]) == {}
    with ledger.giving("a"):
        for used in (15, 13, 9, 5):  # its report comes when all is done
            assert ledger.observe([gpu(used * GIB)]) == {}
            row = ledger.snapshot()[0]
            assert row["foreign_bytes"] == 3 * GIB and row["free_bytes"] == (24 - used) * GIB
            assert sum(part["bytes"] for part in row["segments"]) + row["foreign_bytes"] == used * GIB
            assert sum(part["bytes"] for part in row["segments"] if part["model"] == "b") == 2 * GIB
        ledger.hold("a", "cuda:0", Holding())
    assert ledger.observe([gpu(4 * GIB)]) == {"cuda:0": -GIB}  # and this is somebody else's

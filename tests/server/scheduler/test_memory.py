"""The loop with real processes (that hold nothing) on scripted GPUs: loads wait, caches are squeezed, models sleep."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server import errors
from server.config import ModelSettings, Settings
from server.metrics import Metrics
from server.scheduler import memory as memory_module
from server.scheduler.demand import HOST, Rung
from server.scheduler.facts import Measured
from server.scheduler.ledger import Holding
from server.scheduler.loop import Scheduler
from server.scheduler.nvml import Devices, Reading
from server.scheduler.steward import Facts
from server.worker import messages as m
from tests.server.scheduler.memory_worker import EXACT, GIB, KL

COMMAND = (sys.executable, str(Path(__file__).with_name("memory_worker.py")))
RUNGS = tuple(Rung(name, kl, EXACT / float(name[:-1])) for name, kl in KL.items())
CONTEXT = 65_536  # 2 GiB of cache at 4x


class Scripted(Devices):
    """GPUs that hold what our workers report, and what is foreign."""

    def __init__(self, *gpus: float, host: float = 64) -> None:
        super().__init__()
        self.gpus, self.host = [int(size * GIB) for size in gpus], int(host * GIB)
        self.foreign = 0
        self.ledger: Any = None

    def read(self) -> list[Reading]:
        readings = [Reading(HOST, "host", self.host, 0)]
        for index, total in enumerate(self.gpus):
            account = self.ledger.accounts.get(f"cuda:{index}")
            used = (account.ours if account is not None else 0) + (self.foreign if index == 0 else 0)
            readings.append(Reading(f"cuda:{index}", "card", total, min(used, total)))
        return readings


class Events:
    """What the loop told people."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def add(self, kind: str, reason: str, **detail: Any) -> None:
        self.found.append((kind, reason))

    def of(self, kind: str) -> list[str]:
        return [reason for name, reason in self.found if name == kind]


class Server:
    """A scheduler under test."""

    def __init__(self, scheduler: Scheduler, events: Events, devices: Scripted) -> None:
        self.scheduler, self.events, self.devices = scheduler, events, devices

    def state(self, name: str) -> str:
        return self.scheduler.slots[name].state

    def setting(self, name: str) -> str:
        ready = self.scheduler.slots[name].ready
        return ready.setting if ready is not None else ""

    async def ask(self, name: str, prompt: str = "x", keep_alive: float | None = None) -> Any:
        """A request up to Accepted; the stream."""
        slot = self.scheduler.slots[name]
        worker = await self.scheduler.ensure(slot, keep_alive)
        message = m.Submit(f"{name}-{time.monotonic_ns()}", "completion", m.Sampling(), prompt=prompt)
        stream = self.scheduler.submit(slot, worker, message, 30.0)
        assert isinstance(await stream.get(), m.Accepted)
        if prompt != "hold":
            assert isinstance(await stream.get(), m.Finished)
            self.scheduler.release(slot, stream, cancel=False)
        return stream

    async def until(self, condition: Callable[[], bool], within_s: float = 10.0) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < within_s, self.events.found
            await asyncio.sleep(0.005)
        return time.monotonic() - began


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: Scripted, *models: dict[str, Any], **memory: Any
) -> AsyncIterator[Server]:
    """A scheduler over models on demand, with the devices."""

    def facts(model: ModelSettings, device: str, setting: str, *_: Any) -> Facts:
        rungs = RUNGS if setting == "auto" else tuple(rung for rung in RUNGS if rung.name == setting)
        weights = int(float(model.path.split("-")[1]) * GIB)
        return Facts(weights, rungs, GIB // 4, CONTEXT, 10.0, 0.5, device != HOST)

    monkeypatch.setattr(memory_module, "facts_for", facts)
    given = [{"load": "on_demand", "limits": {"max_concurrency": 2}, "min_context": CONTEXT, **one} for one in models]
    budget = {"reserve": 0, "host_reserve": 0, "tick_seconds": 0.05, **memory}
    config = Settings(models=given, memory=budget, server={"state_dir": str(tmp_path), "load_wait_seconds": 8})  # type: ignore[arg-type]
    events = Events()
    scheduler = Scheduler(config, Metrics(), COMMAND, events)  # type: ignore[arg-type]
    devices.ledger, scheduler.memory.devices = scheduler.memory.ledger, devices
    scheduler.start()
    try:
        yield Server(scheduler, events, devices)
    finally:
        await scheduler.stop()


def model(name: str, gib: float, suffix: str = "", **fields: Any) -> dict[str, Any]:
    return {"name": name, "path": f"gib-{gib}{suffix}", **fields}


async def test_a_model_that_does_not_fit_beside_others_loads_because_they_are_squeezed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 4), model("b", 5.5)) as server:
        stream = await server.ask("a", "hold")
        assert server.setting("a") == "4x"
        await server.ask("b")
        assert (server.state("a"), server.state("b")) == ("hot", "hot")
        assert server.setting("a") in ("8x", "16x") and server.setting("b") in KL
        [reason] = server.events.of("squeeze")
        assert reason.startswith("squeezed a 4x->") and "for b" in reason and "KL .001->" in reason
        row = next(r for r in server.scheduler.memory.vram()["devices"] if r["device"] == "cuda:0")
        assert {part["model"] for part in row["segments"]} == {"a", "b"}
        leases = server.scheduler.memory.vram()["leases"]
        assert sum(leases.values()) + 10 * GIB <= 12 * GIB
        server.scheduler.release(server.scheduler.slots["a"], stream, cancel=True)


async def test_a_cpu_worker_that_holds_more_than_was_expected_makes_room_for_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan is made with what is there: with the 256 MiB that were expected both fit, and the second load would wait
    for room that nobody makes."""

    class Fat(Scripted):
        def resident(self, pid: int) -> int:
            return 6 * GIB

    models = (model("a", 2, device="cpu"), model("b", 2, device="cpu"))
    async with serving(monkeypatch, tmp_path, Fat(host=64), *models, max_host="8GiB") as server:
        await server.ask("a")
        await server.until(lambda: server.scheduler.memory.ledger.of("a")[HOST].workspace > 3 * GIB)
        await server.ask("b")
        assert (server.state("a"), server.state("b")) == ("cold", "hot")


async def test_an_idle_model_sleeps_for_another_and_wakes_when_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 8), model("b", 8)) as server:
        await server.ask("a")
        pid = server.scheduler.slots["a"].worker.pid  # type: ignore[union-attr]
        await server.ask("b")
        assert (server.state("a"), server.state("b")) == ("asleep", "hot")
        held = server.scheduler.memory.ledger.of("a")
        assert held[HOST].weights == 8 * GIB and held["cuda:0"].total == 0
        await server.ask("a")
        assert (server.state("a"), server.state("b")) == ("hot", "asleep")
        assert server.scheduler.slots["a"].worker.pid == pid, "it woke; it did not start again"  # type: ignore[union-attr]


async def test_a_model_that_falls_asleep_counts_in_host_memory_from_the_first_moment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = (model("a", 8, "-slow"), model("b", 3, "-stubborn"))
    async with serving(monkeypatch, tmp_path, Scripted(24, host=14), *models) as server:
        manager, host = server.scheduler.memory, server.scheduler.memory.ledger.accounts[HOST]
        for name in "ab":
            await server.ask(name)
        await server.ask("a", keep_alive=0)
        await server.until(lambda: server.state("a") == "asleep")
        assert manager.ledger.of("a")[HOST].expected == 8 * GIB and manager.steward.wards["a"].moving is not None
        assert manager.moves._host_spare(server.scheduler.slots["b"]) == 3 * GIB, "14 less both models' weights"
        assert manager.ledger.of("a")["cuda:0"].weights == 8 * GIB, "it is still there, too"
        await server.ask("b", keep_alive=0)
        await server.until(lambda: bool(server.events.of("refused")))
        assert HOST not in manager.ledger.of("b"), "one that does not fall asleep takes no host memory"
        await server.until(lambda: manager.steward.wards["a"].moving is None)
        assert manager.ledger.of("a")[HOST] == Holding(8 * GIB) and host.claimed == 8 * GIB


async def test_without_host_memory_it_goes_cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    devices = Scripted(12, host=4)
    async with serving(monkeypatch, tmp_path, devices, model("a", 8), model("b", 8)) as server:
        await server.ask("a")
        await server.ask("b")
        assert (server.state("a"), server.state("b")) == ("cold", "hot")
        assert server.scheduler.memory.ledger.of("a") == {}


async def test_a_model_that_answers_stays_and_the_other_waits_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 8), model("b", 8)) as server:
        stream = await server.ask("a", "hold")
        waiting = asyncio.create_task(server.ask("b"))
        await server.until(lambda: server.state("b") == "loading")
        await server.ask("a")  # a resident model does not wait for another one's load
        assert not waiting.done() and server.state("a") == "hot"
        server.scheduler.release(server.scheduler.slots["a"], stream, cancel=True)
        await waiting
        assert server.state("b") == "hot"


@pytest.mark.alone
async def test_foreign_memory_is_noticed_within_a_second_and_nobody_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices = Scripted(12)
    async with serving(monkeypatch, tmp_path, devices, model("a", 4), model("b", 3)) as server:
        streams = [await server.ask(name, "hold") for name in "ab"]
        leases = dict(server.scheduler.memory.vram()["leases"])
        held = server.scheduler.memory.ledger.of
        await server.until(lambda: not any(held(name)["cuda:0"].settle for name in "ab"))  # loads are over
        devices.foreign = 3 * GIB
        took = await server.until(lambda: bool(server.events.of("foreign")))
        assert took < 1.0 and "others took 3.0 GiB on cuda:0" in server.events.of("foreign")[0]
        smaller = lambda: sum(server.scheduler.memory.vram()["leases"].values()) <= 1.5 * GIB  # noqa: E731
        await server.until(smaller)
        assert sum(leases.values()) > 1.5 * GIB
        assert (server.state("a"), server.state("b")) == ("hot", "hot")
        devices.foreign = 0
        await server.until(lambda: not smaller())
        for name, stream in zip("ab", streams, strict=True):
            server.scheduler.release(server.scheduler.slots[name], stream, cancel=True)


async def test_keep_alive_of_the_model_and_of_one_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = (model("short", 2, keep_alive="0.2s"), model("long", 2))
    async with serving(monkeypatch, tmp_path, Scripted(12), *models) as server:
        await server.ask("short")
        await server.ask("long")
        await server.until(lambda: server.state("short") == "asleep")
        assert server.state("long") == "hot"
        await server.ask("long", keep_alive=0)
        await server.until(lambda: server.state("long") == "asleep")
        await server.ask("short", keep_alive=-1)
        assert server.scheduler.memory.steward.wards["short"].keep_alive_s is None


async def test_a_pinned_model_is_not_put_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = (model("a", 8, pin=True, keep_alive=0), model("b", 8))
    async with serving(monkeypatch, tmp_path, Scripted(12), *models) as server:
        await server.ask("a")
        server.scheduler.settings = server.scheduler.settings.model_copy(
            update={"server": server.scheduler.settings.server.model_copy(update={"load_wait_seconds": 0.3})}
        )
        with pytest.raises(errors.ApiError) as caught:
            await server.ask("b")
        assert caught.value.status == 503 and server.state("a") == "hot"
        assert "waits for memory, cold: it needs at least" in caught.value.message
        last = server.scheduler.memory.steward.last
        assert last is not None and last.unmet == ("b",) and "pinned" in last.reasons["b"]


async def test_a_model_larger_than_any_device_says_so_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = (model("huge", 40), model("nowhere", 1, device="cuda:7"))
    async with serving(monkeypatch, tmp_path, Scripted(12, 16), *models) as server:
        for name, words in (("huge", "40.0 GiB and the GPUs together have 28.0 GiB"), ("nowhere", "cuda:7")):
            with pytest.raises(errors.ApiError) as caught:
                await server.ask(name)
            assert caught.value.status == 503 and words in caught.value.message


async def test_a_model_too_large_for_one_gpu_is_spread_over_two_and_sleeps_and_wakes_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = model("large", 20, keep_alive="0.3s")
    async with serving(monkeypatch, tmp_path, Scripted(12, 16), one) as server:
        await server.ask("large")
        manager = server.scheduler.memory
        ward = manager.steward.wards["large"]
        assert ward.now.devices == ("cuda:0", "cuda:1")
        held = manager.ledger.of("large")
        assert {name: holding.expected for name, holding in held.items()} == {"cuda:0": 0, "cuda:1": 0}
        assert sum(holding.weights for holding in held.values()) == pytest.approx(20 * GIB, abs=2)
        # By what is free beside each one's overhead: the worker was told so (its shares are what it was told).
        assert held["cuda:0"].weights / held["cuda:1"].weights == pytest.approx(11.75 / 15.75, rel=1e-6)
        await server.until(lambda: server.state("large") == "asleep")
        await server.ask("large")
        assert (server.state("large"), ward.now.devices) == ("hot", ("cuda:0", "cuda:1"))
        assert not server.events.of("refused") and not server.events.of("worker_lost")


async def test_a_squeeze_that_is_refused_is_told_and_the_model_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = (model("a", 4, "-stubborn"), model("b", 5.5))
    async with serving(monkeypatch, tmp_path, Scripted(12), *models) as server:
        stream = await server.ask("a", "hold")
        waiting = asyncio.create_task(server.ask("b"))
        await server.until(lambda: bool(server.events.of("refused")))
        assert "does not want to" in server.events.of("refused")[0]
        assert (server.state("a"), server.setting("a")) == ("hot", "4x")
        waiting.cancel()
        server.scheduler.release(server.scheduler.slots["a"], stream, cancel=True)


async def test_the_solver_is_there_before_memory_gets_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported: list[str] = []
    monkeypatch.setattr(memory_module, "import_solver", lambda: imported.append(threading.current_thread().name))
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 1), model("b", 1)) as server:
        await server.ask("a")
        assert not imported, "plans for one model do without"
        await server.ask("b")
        await server.until(lambda: bool(imported))
        assert imported != [threading.main_thread().name], "streams go on meanwhile"


async def test_a_worker_that_breaks_while_it_wakes_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 2, "-breaks", keep_alive="0.1s")) as server:
        await server.ask("a")
        await server.until(lambda: server.state("a") == "asleep")
        await server.ask("a")
        assert server.scheduler.slots["a"].restarts == 1 and server.state("a") == "hot"


async def test_a_dry_run_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 4)) as server:
        await server.ask("a")
        extra = ModelSettings(name="new", path="gib-5.5", min_context=CONTEXT)
        plan = await server.scheduler.memory.plan(extra)
        assert plan.choices["new"].residency == "hot" and plan.choices["a"].setting != "4x"
        longer = await server.scheduler.memory.plan(context=4 * CONTEXT)
        assert longer.choices["a"].setting == "8x" or longer.choices["a"].lease >= 4 * GIB
        assert server.setting("a") == "4x" and "new" not in server.scheduler.slots
        ward = server.scheduler.memory.steward.wards["a"]
        assert replace(ward.now, setting="4x") == ward.now


async def test_requests_for_a_hot_model_never_wait_for_anothers_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = (model("a", 4, pin=True), model("b", 9))
    async with serving(monkeypatch, tmp_path, Scripted(12), *models) as server:
        await server.ask("a")
        waiting = asyncio.create_task(server.ask("b"))
        await server.until(lambda: server.state("b") == "loading")
        for _ in range(20):
            await server.ask("a")
            assert server.state("b") == "loading" and not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_every_model_has_its_own_setting_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = (model("a", 1, setting="8x"), model("b", 1, setting="16x"), model("c", 1))
    async with serving(monkeypatch, tmp_path, Scripted(24), *models) as server:
        for name in "abc":
            await server.ask(name)
        assert [server.setting(name) for name in "abc"] == ["8x", "16x", "4x"]


async def test_what_a_model_takes_beside_weights_and_cache_is_planned_with_as_soon_as_it_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(24), model("a", 4)) as server:
        await server.ask("a")
        slot, manager = server.scheduler.slots["a"], server.scheduler.memory
        weights = manager.ledger.of("a")["cuda:0"].weights
        manager.ledger.hold("a", "cuda:0", Holding(weights, context=GIB // 2))
        slot.stats = m.Stats(reserved_bytes=weights + 3 * GIB, beside_bytes=2 * GIB)
        manager.report(slot)
        held = manager.ledger.of("a")["cuda:0"]
        assert (held.workspace, held.context) == (3 * GIB, GIB // 2)
        known = manager.measured.get(Measured.key(slot.settings, "card"))
        assert known is not None and known.overhead == 2 * GIB + GIB // 2


async def test_who_looks_sees_what_the_devices_hold_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 4), tick_seconds=10.0) as server:
        memory = server.scheduler.memory
        server.devices.foreign = 5 * GIB
        await asyncio.sleep(0.05)
        stale, views = memory.vram(), await asyncio.gather(*(memory.vram_now() for _ in range(3)))
        assert [row["foreign_bytes"] for row in stale["devices"] if row["device"] == "cuda:0"] == [0]
        for view in views:
            assert [row["foreign_bytes"] for row in view["devices"] if row["device"] == "cuda:0"] == [5 * GIB]
        for size in (6, 7):  # right after one another
            server.devices.foreign = size * GIB
            [row] = [row for row in (await memory.vram_now())["devices"] if row["device"] == "cuda:0"]
            assert row["foreign_bytes"] == size * GIB
        assert memory._tick() == 10.0
        memory.steward.wards["a"].moving = memory.steward.wards["a"].now
        assert memory._tick() <= 0.05


async def test_who_holds_more_than_is_planned_gives_its_reserve_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 4)) as server:
        await server.ask("a")
        memory, slot = server.scheduler.memory, server.scheduler.slots["a"]
        facts = memory.steward.wards["a"].facts
        for spare, settle in ((facts.overhead, False), (facts.overhead + 1, True)):
            memory.ledger.hold("a", "cuda:0", Holding(facts.weights, spare, 0, GIB))
            assert memory.moves.lease_message(slot, GIB)("x").settle is settle
        assert memory.moves.lease_message(slot, 2 * GIB)("x").settle is False
        assert memory.moves.lease_message(slot, 2 * GIB, settle=True)("x").settle is True

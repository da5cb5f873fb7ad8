"""Workers and drivers that stand still are noticed in every state; the gateway's own standstill is not theirs."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import Any, cast

import pytest

from server.scheduler import liveness
from server.scheduler.nvml import Reading
from server.scheduler.patient import PatientReader
from server.scheduler.slots import Slot
from server.worker import messages
from server.worker.child_queue import QueueDeadlines
from tests.server.conftest import alive, serving, settings


def test_a_worker_that_stands_still_while_it_loads_is_replaced() -> None:
    with serving(settings({"name": "demo", "path": "stuck"}, worker_silence_seconds=0.3)) as server:
        server.until(lambda: "pid" in server.ready()["demo"])
        pid = server.ready()["demo"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        server.until(lambda: not alive(pid), 20)
        server.until(lambda: server.ready()["demo"].get("pid", pid) != pid)
        said = [event["reason"] for event in server.client.get("/admin/events?kind=worker_lost").json()["events"]]
        assert any("no sign of life" in reason for reason in said)


def test_a_worker_that_stands_still_while_it_sleeps_is_replaced() -> None:
    with serving(settings(worker_silence_seconds=0.6)) as server:
        server.until_state("demo", "hot")
        assert server.client.post("/admin/models/demo/sleep").status_code == 200
        pid = server.slot().worker.pid  # type: ignore[union-attr]
        os.kill(pid, signal.SIGSTOP)
        server.until(lambda: not alive(pid), 20)
        answer = server.client.post("/v1/completions", json={"model": "demo", "prompt": "hello"})
        assert answer.status_code == 200


class Clock:
    """Time that passes only in sleeps; the first of them takes `stall` seconds longer."""

    def __init__(self, stall: float) -> None:
        self.now, self.stall = 1000.0, stall

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now, self.stall = self.now + seconds + self.stall, 0.0
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)


class Worker:
    """Answers pings until `until`; computes always or never."""

    def __init__(self, slot: Any, clock: Clock, until: float, computes: bool) -> None:
        self.slot, self.clock, self.until, self.computes = slot, clock, until, computes
        self.pid, self.killed_at = 1, 0.0

    def cpu_seconds(self) -> float:
        return self.clock.now if self.computes else 0.5

    def send(self, message: Any) -> None:
        assert isinstance(message, messages.Ping)
        if self.clock.now < self.until:
            self.slot.last_pong = self.clock.now

    def kill(self) -> None:
        self.killed_at = self.clock.now


@pytest.mark.parametrize(
    ("state", "computes", "stall", "dies_after"),
    [
        ("hot", True, 0.0, 35.0),  # a hot worker answers, whatever it computes
        ("asleep", False, 0.0, 35.0),
        ("loading", False, 0.0, 125.0),
        ("hot", False, 500.0, 535.0),  # the gateway's own standstill is not the worker's silence
    ],
)
async def test_how_long_silence_may_last(
    monkeypatch: pytest.MonkeyPatch, state: str, computes: bool, stall: float, dies_after: float
) -> None:
    clock = Clock(stall)
    slot = cast(Slot, type("S", (), {"state": state, "last_pong": 1000.0, "error": ""})())
    worker = Worker(slot, clock, 1000.0, computes)
    monkeypatch.setattr(liveness, "time", clock)
    monkeypatch.setattr(liveness, "asyncio", clock)
    await liveness.watch(slot, worker, 30.0)  # type: ignore[arg-type]
    assert dies_after - 6 < worker.killed_at - 1000.0 <= dies_after + 6 and "no sign of life" in slot.error


async def test_a_load_that_computes_is_given_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    slot = cast(Slot, type("S", (), {"state": "loading", "last_pong": 1000.0, "error": ""})())
    worker = Worker(slot, clock, 1000.0, True)
    monkeypatch.setattr(liveness, "time", clock)
    monkeypatch.setattr(liveness, "asyncio", clock)
    watching = asyncio.ensure_future(liveness.watch(slot, worker, 30.0))  # type: ignore[arg-type]
    while clock.now < 1000.0 + 3600:
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
    assert not worker.killed_at and not watching.done()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_driver_that_hangs_holds_nothing_up_and_is_read_once() -> None:
    go, calls = threading.Event(), []

    def read() -> list[Reading]:
        calls.append(time.monotonic())
        go.wait(20)
        return [Reading("cpu", "host", 1, 0)]

    reader = PatientReader(0.05)
    assert await reader.read(read) is None and await reader.read(read) is None
    assert len(calls) == 1, "one thread hangs, not one for each tick"
    go.set()
    slow = PatientReader(10)
    slow._reading = reader._reading
    found = await slow.read(read)
    assert found is not None and found[0].device == "cpu" and len(calls) == 1

    def broken() -> list[Reading]:
        raise RuntimeError("no driver")

    with pytest.raises(RuntimeError, match="no driver"):
        await slow.read(broken)


def test_a_request_that_never_begins_is_told_when_its_time_is_over() -> None:
    now, told, cancelled = [0.0], [], []
    sequence = lambda ident, started: type("S", (), {"request_id": ident, "started": started})()  # noqa: E731
    waiting = [sequence("late", False), sequence("parked", True), sequence("young", False)]
    scheduler = type("W", (), {"waiting": waiting})()
    engine = type("E", (), {"scheduler": scheduler})()
    engines = type("A", (), {"all": [engine], "cancel": lambda _, ident: cancelled.append(ident)})()
    queue = QueueDeadlines(engines, told.append, lambda: now[0])
    for ident, seconds in (("late", 10.0), ("parked", 10.0), ("young", 30.0), ("over", 5.0), ("patient", None)):
        queue.add(messages.Submit(ident, "completion", messages.Sampling(), queue_s=seconds))
    now[0] = 9.0
    queue.look()
    assert not told
    now[0] = 10.0
    queue.look()
    assert cancelled == ["late"] and [(m.request_id, m.code) for m in told] == [("late", "queue_timeout")]
    now[0] = 100.0
    queue.look()
    assert cancelled == ["late", "young"] and not queue._until

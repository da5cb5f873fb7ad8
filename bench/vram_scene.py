"""What the parts of bench/vram.py share: the scheduler with its models, another process that takes memory, and the
comparison of the ledger with what the device says."""

from __future__ import annotations

import asyncio
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from server.config import Settings
from server.metrics import Metrics
from server.scheduler.facts import Measured
from server.scheduler.loop import Scheduler
from server.scheduler.nvml import Devices
from server.scheduler.slots import Slot
from server.worker import messages as m

GIB = 2**30
STREAMS = 8
SAMPLE_S = 0.1
STEADY_S, STEADY_WITHIN_S = 1.5, 20.0
"""A worker reports four times a second, after a step."""
FOREIGN = """
import sys, time, torch
device, held = sys.argv[1], None
if device != "cpu":
    torch.cuda.init()
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    size, best = 2 << 30, 0.0
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began))
    del host, there
    torch.cuda.empty_cache()
print(best if device != "cpu" else 0.0, flush=True)
for line in sys.stdin:
    size, held = int(line), None
    if device != "cpu":
        torch.cuda.empty_cache()
    if size:
        held = torch.empty(size, dtype=torch.uint8, device=device)
        held.fill_(1)
    if device != "cpu":
        torch.cuda.synchronize()
    print("done", flush=True)
"""


@dataclass(frozen=True)
class Sizes:
    """What is measured. budget, foreign: GiB; prompt, answer: tokens of a stream; long, longest: of one whose cache is
    squeezed, beside other models and alone; hold_s: how long foreign memory is held; probes: requests of one
    measurement of times to first token; threads: of a worker; together: processes that prepare at once."""

    models: tuple[str, ...]
    device: str
    budget: float = 38.0
    foreign: float = 10.0
    prompt: int = 1500
    answer: int = 400
    long: int = 8000
    longest: int = 24000
    hold_s: float = 10.0
    probes: int = 150
    threads: int = 4
    together: int = 8


class Events:
    """What the scheduler told, with times."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._began = time.monotonic()

    def add(self, kind: str, reason: str, **detail: Any) -> None:
        """Keep an event."""
        self.found.append({"at_s": time.monotonic() - self._began, "kind": kind, "reason": reason, **detail})

    def since(self, moment: float) -> float:
        """A moment of time.monotonic() on the events' clock."""
        return moment - self._began


class Lines(logging.Handler):
    """Log lines of the workers and the scheduler that speak of memory that ran out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "out of memory" in text.lower() or "OutOfMemory" in text:
            self.found.append(text[:300])


class Foreign:
    """Another process. `context`: bytes that it holds on the device before it takes any; `copy_bytes_s`: how fast it
    copied pinned host memory there, with nothing beside it."""

    def __init__(self, process: asyncio.subprocess.Process, context: int, copy_bytes_s: float) -> None:
        self._process, self.context, self.held, self.copy_bytes_s = process, context, 0, copy_bytes_s
        self.changing = False

    @classmethod
    async def start(cls, device: str) -> Foreign:
        """Start it; nothing else may use the device meanwhile, so that its context can be told."""
        devices = Devices()
        before = reading(devices, device)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FOREIGN, device, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        rate = float(await process.stdout.readline())
        context = 0 if device == "cpu" else max(0, reading(devices, device) - before)
        devices.close()
        return cls(process, context, rate)

    async def take(self, size: int) -> None:
        """Hold so many bytes; returns when they are held."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self.changing = True
        self._process.stdin.write(f"{size}\n".encode())
        await self._process.stdin.drain()
        await self._process.stdout.readline()
        self.held, self.changing = size, False

    async def give(self) -> None:
        """Hold nothing."""
        await self.take(0)

    async def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


def reading(devices: Devices, device: str) -> int:
    """Bytes in use on a device, as it says itself."""
    return next(r for r in devices.read() if r.device == device).used


class Scene:
    """The scheduler, its models, and what is known from outside."""

    def __init__(
        self, sizes: Sizes, folder: Path, foreign: Foreign, keep: Callable[[], None] = lambda: None
    ) -> None:
        self.sizes, self.device, self.foreign, self._keep = sizes, sizes.device, foreign, keep
        self._devices, self._state = Devices(), tempfile.TemporaryDirectory()
        self.base = reading(self._devices, self.device)
        self.budget = int(sizes.budget * GIB) if self.device != "cpu" else self.base + int(sizes.budget * GIB)
        context = sizes.long + max(sizes.long, sizes.longest)
        limits = {"max_concurrency": STREAMS, "context_length": context, "longest_wait_seconds": 120}
        given = [
            {
                "name": name, "path": str(folder / name), "profile": str(folder / name / "profile.safetensors"),
                "load": "on_demand", "device": self.device, "threads": sizes.threads, "limits": limits,
                "min_context": sizes.prompt,
            }
            for name in sizes.models
        ]  # fmt: skip
        memory = {"max_vram": f"{sizes.budget}GiB", "reserve": 0}
        server = {"state_dir": self._state.name, "load_wait_seconds": 400, "worker_silence_seconds": 120}
        settings = Settings(models=given, memory=memory, server=server)  # type: ignore[arg-type]
        self.events, self.lines = Events(), Lines()
        logging.getLogger("spectral").addHandler(self.lines)
        self.scheduler = Scheduler(settings, Metrics(), events=self.events)  # type: ignore[arg-type]
        self.scheduler.start()

    @property
    def account(self) -> Any:
        """The ledger's account of the device."""
        return self.scheduler.memory.ledger.accounts[self.device]

    def tell(self, row: dict[str, Any]) -> None:
        """A row is there: it is shown, and everything so far is kept."""
        print(f"  {row}", flush=True)
        self._keep()

    def used(self) -> int:
        """Bytes in use on the device, read now."""
        return reading(self._devices, self.device)

    def overrun(self) -> int:
        """Bytes over the budget, now."""
        return max(0, self.used() - self.budget)

    async def shown(self, least: int) -> float:
        """The moment at which the device first shows so many bytes more than now: a process that takes memory holds it
        before it says so."""
        before = self.used()
        while self.used() < before + least:
            await asyncio.sleep(0.005)
        return time.monotonic()

    def noticed(self, first: int) -> float | None:
        """When the scheduler first told that others took memory of this device, among the events from `first` on."""
        kinds = (e for e in self.events.found[first:] if e["kind"] == "foreign" and e["device"] == self.device)
        return next((e["at_s"] for e in kinds if e["bytes"] >= int(self.sizes.foreign * GIB) // 2), None)

    def vram(self) -> dict[str, Any]:
        """The ledger's row of the device, and the leases, in GiB."""
        found = self.scheduler.memory.vram()
        row = next(row for row in found["devices"] if row["device"] == self.device)
        kinds: dict[str, float] = {}
        for part in row["segments"]:
            kinds[f"{part['model']} {part['kind']}"] = part["bytes"] / GIB
        kinds |= {name: row[f"{name}_bytes"] / GIB for name in ("foreign", "budget")}
        settings = {name: slot.ready.setting for name, slot in self.scheduler.slots.items() if slot.ready is not None}
        return kinds | {"leases": {k: v / GIB for k, v in found["leases"].items()}, "settings": settings}

    async def set_setting(self, slot: Slot, setting: str) -> m.Footprint:
        """Tell a worker another setting, as the scheduler does; what it answers."""
        found = await self.scheduler.memory.moves.send(slot, partial(m.SetSetting, setting=setting))
        assert found is not None
        return found

    async def state(self, slot: Slot, state: str, within_s: float) -> float:
        """Seconds until a model is in a state, and whatever moved it there has ended: a model is "asleep" from the
        moment that it begins to fall asleep. Raises TimeoutError."""
        began, ward = time.monotonic(), self.scheduler.memory.steward.wards[slot.name]
        while slot.state != state or ward.moving is not None:
            if time.monotonic() - began > within_s:
                raise TimeoutError(f"{slot.name} is {slot.state} after {within_s:g} s, not {state}")
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    async def steady(self, slot: Slot) -> float | None:
        """Wait until a model's cache and all that torch holds for it stay as they are, for STEADY_S; seconds until
        then, None where that did not come within STEADY_WITHIN_S."""
        began = since = time.monotonic()
        held = None
        while (now := time.monotonic()) - began < STEADY_WITHIN_S:
            found = slot.stats.kv_bytes_allocated, slot.stats.reserved_bytes
            if found != held:
                held, since = found, now
            if now - since >= STEADY_S:
                return now - began
            await asyncio.sleep(0.02)
        return None

    def asleep_bytes(self, slot: Slot) -> int:
        """Host memory that a sleeping model takes: weights, tables, and what it keeps of its cache."""
        return int(self.scheduler.memory.ledger.of(slot.name)["cpu"].weights)

    def wake_seconds(self, slot: Slot) -> float:
        """What the scheduler measured for the last wake-up, from its command to the worker's answer."""
        found = self.scheduler.memory.measured.get(Measured.key(slot.settings, self.account.reading.name))
        assert found is not None
        return found.wake_s

    async def close(self) -> None:
        """End everything."""
        await self.scheduler.stop()
        await self.foreign.stop()
        self._devices.close()
        logging.getLogger("spectral").removeHandler(self.lines)
        self._state.cleanup()


@asynccontextmanager
async def watching(scene: Scene) -> AsyncIterator[dict[str, Any]]:
    """Within: the ledger is compared with the device again and again; what is yielded is filled in at the end."""
    found: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    task = asyncio.create_task(_sample(scene, samples))
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        found |= summed(samples)


async def _sample(scene: Scene, samples: list[dict[str, Any]]) -> None:
    while True:
        used = scene.used()
        rows = (await scene.scheduler.memory.vram_now())["devices"]  # as GET /admin/vram
        later = scene.used()
        row = next(row for row in rows if row["device"] == scene.device)
        ours = sum(part["bytes"] for part in row["segments"])
        # On a CPU other programs come and go: nobody knows what is foreign there.
        known = not scene.foreign.changing and scene.device != "cpu"
        true = scene.base + scene.foreign.held if known else None
        samples.append(
            {
                "at": time.monotonic(), "used": used, "ledger": ours + row["foreign_bytes"],
                "total": outside(ours + row["foreign_bytes"], used, later) / used, "moved": abs(later - used) / used,
                "foreign": None if true is None else abs(row["foreign_bytes"] - true) / used,
                "over": max(0, used - scene.budget),
            }
        )  # fmt: skip
        await asyncio.sleep(SAMPLE_S)


def outside(value: int, one: int, other: int) -> int:
    """How far a value lies outside what is between two others: the ledger reads between two readings of ours, and a
    model that wakes or loads moves gigabytes in the time of one."""
    return max(min(one, other) - value, value - max(one, other), 0)


def summed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one watch. total: |ledger - NVML| over NVML, NVML being anything between a reading before and one
    after; moved_max: the most that these two differ; foreign: what the ledger calls foreign against what is
    known to be (what was there before, and what the other process holds), over NVML."""
    out: dict[str, Any] = {"samples": len(samples)}
    for what in ("total", "foreign"):
        known = [(s["at"], s[what]) for s in samples if s[what] is not None]
        if known:
            wrong = [at for at, error in known if error > 0.03]
            out[f"{what}_error_max"] = max(error for _, error in known)
            out[f"{what}_error_median"] = statistics.median(error for _, error in known)
            out[f"{what}_above_3_percent"] = len(wrong) / len(known)
            out[f"{what}_longest_above_3_percent_s"] = longest(wrong)
    out["moved_max"] = max((s["moved"] for s in samples), default=0.0)
    over = [s for s in samples if s["over"]]
    out |= {"over_budget_max_gib": max((s["over"] for s in over), default=0) / GIB}
    out |= {"over_budget_longest_s": longest([s["at"] for s in over])}
    began = samples[0]["at"] if samples else 0.0
    out["series"] = [
        [s["at"] - began, s["used"] / GIB, s["ledger"] / GIB, -1.0 if s["foreign"] is None else s["foreign"]]
        for s in samples[::5]
    ]
    return out


def longest(times: list[float]) -> float:
    """The longest run of moments that follow one another at the pace of sampling, in seconds."""
    best = begin = last = 0.0
    for at in times:
        if at - last > 3 * SAMPLE_S:
            begin = at
        best, last = max(best, at - begin + SAMPLE_S), at
    return best

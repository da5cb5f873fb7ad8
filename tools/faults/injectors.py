"""Faults from outside the server: workers killed, stopped for a while, or slowed down, at any moment or in a change."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tools.faults.changes import PHASES, Changes
from tools.faults.rig import Rig

STOP_S = (0.5, 4.0)
"""How long a stopped worker stands still; the server kills one only after worker_silence_seconds."""
AIMED = 0.5
"""Part of the faults that are aimed at a change, if there are changes."""
SLOW_S, SLOW_PART = 4.0, 0.75
"""A slowed worker stands still for SLOW_PART of every tenth of a second."""


class Injector:
    """Does one of the named faults at a time. `changes`: what some of them are aimed at."""

    def __init__(self, rig: Rig, kinds: list[str], seed: int, changes: Changes | None = None) -> None:
        self._rig, self._kinds, self._random, self._changes = rig, kinds, random.Random(seed), changes
        self.counts: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self._beside: set[asyncio.Task[None]] = set()

    async def run(self, every_s: float, over: asyncio.Event) -> None:
        """A fault every `every_s` seconds, give or take a third, so that no phase of the server is met always."""
        while not over.is_set():
            try:
                await asyncio.wait_for(over.wait(), every_s * self._random.uniform(0.67, 1.33))
            except asyncio.TimeoutError:
                await self.once()
        await asyncio.gather(*self._beside)

    async def once(self) -> None:
        """One fault at one worker, whatever that is doing (loading, serving, waiting), or in a change of its model."""
        if self._changes is not None and self._random.random() < AIMED and await self._aim(self._changes):
            return
        pids = self._rig.worker_pids()
        if not pids:
            self.counts["nobody there"] += 1
            return
        pid = self._random.choice(pids)
        models = await self._rig.models()
        self._hurt(pid, next((m["state"] for m in models.values() if m.get("pid") == pid), "gone"))

    async def _aim(self, changes: Changes) -> bool:
        """A fault in a change of a model that is hot; False where there is none."""
        models = await self._rig.models()
        await changes.rouse(models.get(changes.resting, {}).get("state", ""))
        for phase in self._random.sample(PHASES, len(PHASES)):
            name = changes.model_for(phase)
            if models.get(name, {}).get("state") == "hot":
                course = await changes.begin(phase, name)
                self._hurt(models[name]["pid"], f"{phase} is under way" if not course.done() else f"{phase} is over")
                self._keep(course)
                return True
        return False

    def _hurt(self, pid: int, state: str) -> None:
        kind = self._random.choice(self._kinds)
        self.counts[kind] += 1
        self.states[f"{kind} while {state}"] += 1
        beside: dict[str, Callable[[int], Awaitable[Any]]] = {"stop": self._stop, "slow": self._slow}
        if kind in beside:
            self._keep(asyncio.ensure_future(beside[kind](pid)))
        else:
            self._rig.signal(pid, {"kill": signal.SIGKILL, "term": signal.SIGTERM, "abort": signal.SIGABRT}[kind])

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _stop(self, pid: int) -> None:
        self._rig.signal(pid, signal.SIGSTOP)
        await asyncio.sleep(self._random.uniform(*STOP_S))
        self._rig.signal(pid, signal.SIGCONT)

    async def _slow(self, pid: int) -> None:
        until = time.monotonic() + SLOW_S
        while time.monotonic() < until and self._rig.signal(pid, signal.SIGSTOP):
            await asyncio.sleep(0.1 * SLOW_PART)
            self._rig.signal(pid, signal.SIGCONT)
            await asyncio.sleep(0.1 * (1 - SLOW_PART))

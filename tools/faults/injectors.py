"""Faults from outside the server: workers killed, stopped for a while, or slowed down."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tools.faults.rig import Rig

STOP_S = (0.5, 4.0)
"""How long a stopped worker stands still; the server kills one only after worker_silence_seconds."""
SLOW_S, SLOW_PART = 4.0, 0.75
"""A slowed worker stands still for SLOW_PART of every tenth of a second."""


class Injector:
    """Does one of the named faults at a time. `log`: what was done when, seconds since the start."""

    def __init__(self, rig: Rig, kinds: list[str], seed: int) -> None:
        self._rig, self._kinds, self._random = rig, kinds, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self._began = time.monotonic()
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
        """One fault at one worker, whatever that is doing: loading, serving, or waiting."""
        pids = self._rig.worker_pids()
        if not pids:
            self.counts["nobody there"] += 1
            return
        kind, pid = self._random.choice(self._kinds), self._random.choice(pids)
        models = await self._rig.models()
        state = next((m["state"] for m in models.values() if m.get("pid") == pid), "gone")
        self.counts[kind] += 1
        self.states[f"{kind} while {state}"] += 1
        beside: dict[str, Callable[[int], Awaitable[Any]]] = {"stop": self._stop, "slow": self._slow}
        if kind in beside:
            task = asyncio.ensure_future(beside[kind](pid))
            self._beside.add(task)
            task.add_done_callback(self._beside.discard)
        else:
            self._rig.signal(pid, {"kill": signal.SIGKILL, "term": signal.SIGTERM, "abort": signal.SIGABRT}[kind])

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

"""Clients of bench/vram.py: single answers, and eight streams on each of some models."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bench.vram_scene import STREAMS, Scene
from server.scheduler.slots import Slot
from server.scheduler.stream import RequestStream
from server.worker import messages as m


async def begin(
    scene: Scene, name: str, prompt: list[int], tokens: int, keep_alive: float | None = None
) -> tuple[Slot, RequestStream]:
    """Send a request."""
    slot = scene.scheduler.slots[name]
    worker = await scene.scheduler.ensure(slot, keep_alive)
    sampling = m.Sampling(max_tokens=tokens, temperature=0.0)
    message = m.Submit(uuid.uuid4().hex, "completion", sampling, prompt=prompt)
    return slot, scene.scheduler.submit(slot, worker, message, 600.0)


def tokens_of(count: int, seed: int) -> list[int]:
    """Random token ids, no end of text among them."""
    return random.Random(seed).choices(range(10, 8000), k=count)


_seeds = itertools.count(1)


async def answer(scene: Scene, name: str, prompt: int, tokens: int, keep_alive: float | None = None) -> float:
    """A whole answer; seconds to its first token. Raises RuntimeError for a request that fails."""
    began, first = time.monotonic(), 0.0
    slot, stream = await begin(scene, name, tokens_of(prompt, next(_seeds)), tokens, keep_alive)
    item: Any = None
    try:
        while not isinstance(item := await stream.get(), m.Finished):
            if item is None or isinstance(item, (m.Failed, m.Rejected)):
                raise RuntimeError(f"{name}: {item}")
            if isinstance(item, m.Delta) and not first:
                first = time.monotonic() - began
    finally:
        scene.scheduler.release(slot, stream, cancel=not isinstance(item, m.Finished))
    return first


class Clients:
    """Eight streams on each of some models, one request after another on each stream."""

    def __init__(self, scene: Scene, names: list[str], *, prompt: int, answer: int) -> None:
        self._scene, self._sizes = scene, (prompt, answer)
        self._stop = self._drop = False
        self._begun = 0
        self.broken: list[str] = []
        self.requests, self.tokens = 0, 0
        self.settings: Counter[str] = Counter()
        self._first: list[float] = []
        self._last: dict[int, float] = {}
        self._pauses: list[tuple[float, float]] = []
        self._all = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._run(name, number))
            for number, name in enumerate(name for name in names for _ in range(STREAMS))
        ]

    async def _run(self, name: str, number: int) -> None:
        while not self._stop:
            try:
                await self._one(name, number)
            except Exception as error:  # a refusal breaks a stream too
                self.broken.append(f"{name}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    async def _one(self, name: str, number: int) -> None:
        prompt, count = self._sizes
        began, first = time.monotonic(), False
        slot, stream = await begin(self._scene, name, tokens_of(prompt, next(_seeds)), count)
        item: Any = None
        try:
            while not isinstance(item, m.Finished) and not self._drop:
                item = await stream.get()
                if item is None or isinstance(item, (m.Failed, m.Rejected)):
                    self.broken.append(f"{name}: {item}")
                    return
                if isinstance(item, m.Delta):
                    now = time.monotonic()
                    if first:
                        self._pauses.append((now, now - self._last[number]))
                    else:
                        self._first.append(now - began)
                        self._begun, first = self._begun + 1, True
                        if self._begun >= len(self._tasks):
                            self._all.set()
                    self._last[number] = now
                    self.tokens += len(item.token_ids)
            if isinstance(item, m.Finished):
                self.requests += 1
                self.settings[f"{name} {item.usage.setting}"] += 1
        finally:
            self._scene.scheduler.release(slot, stream, cancel=not isinstance(item, m.Finished))

    async def started(self) -> None:
        """Wait until as many answers have begun as there are streams. Raises RuntimeError where one broke."""
        done = asyncio.ensure_future(self._all.wait())
        while not done.done():
            await asyncio.wait({done}, timeout=1.0)
            if self.broken and not done.done():
                done.cancel()
                await self.cancel()
                raise RuntimeError(f"streams broke before all had begun: {self.broken[:3]}")

    async def longest_pause(self, seconds: float) -> float:
        """The longest time between two tokens of a stream that ended in the last and the next so many seconds."""
        since = time.monotonic() - seconds
        await asyncio.sleep(seconds)
        return max((pause for at, pause in self._pauses if at >= since), default=0.0)

    async def cancel(self) -> int:
        """End all streams now; how many had broken by themselves."""
        self._stop = self._drop = True
        await asyncio.gather(*self._tasks)
        return len(self.broken)

    async def finished(self) -> dict[str, Any]:
        """Let every stream come to its end, and sum up."""
        self._stop = True
        await asyncio.gather(*self._tasks)
        pauses = [pause for _, pause in self._pauses]
        return {
            "streams": len(self._tasks), "answers": self.requests, "tokens": self.tokens,
            "streams_broken": len(self.broken), "why": self.broken[:5], "answers_by_setting": dict(self.settings),
            "first_token_p50_s": statistics.median(self._first), "first_token_max_s": max(self._first),
            "longest_pause_s": max(pauses, default=0.0),
        }  # fmt: skip


@asynccontextmanager
async def running(scene: Scene, names: list[str], *, prompt: int, answer: int) -> AsyncIterator[Clients]:
    """Streams on some models; whatever ends the block ends them."""
    clients = Clients(scene, names, prompt=prompt, answer=answer)
    try:
        yield clients
    finally:
        await clients.cancel()


def percentile(values: list[float], part: float) -> float:
    """The smallest value that at least this part of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-part * len(ordered) // 1) - 1))]

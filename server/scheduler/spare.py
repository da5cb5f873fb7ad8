"""Workers that wait for a model: they have imported torch and transformers, which is most of a small model's load.

One that is taken gets its first message like any other worker, and the next one is started once no model loads. What
they hold in host memory (about 0.5 GiB each) is in the device's reading as bytes that models cannot have, and in the
metric spectral_spare_workers_bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from server.metrics import Metrics
from server.scheduler.slots import Slot
from server.worker.process import WorkerProcess

log = logging.getLogger("spectral.worker")
AHEAD = "--ahead"
RETRY_S = 30.0
"""After a spare worker that ended by itself, or could not be started."""


class Spares:
    """`count`: how many wait; `command`: the workers' command line. Belongs to the scheduler's loop."""

    def __init__(self, count: int, command: Sequence[str], metrics: Metrics) -> None:
        self._count, self._command = count if command else 0, tuple(command)
        metrics.spare_bytes.set_function(self.nbytes)
        self._waiting: list[WorkerProcess] = []
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._filling: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Of those that wait."""
        return [worker.pid for worker in self._waiting]

    def nbytes(self) -> int:
        """What they hold in host memory."""
        return sum(map(_resident, self.pids))

    async def take(self, name: str, threads: int) -> WorkerProcess:
        """A worker for a model: one that waits, even if it is not done importing, or a new one. Raises OSError.

        How many threads torch uses is said by the first message; only libraries that count processors when they are
        loaded would not know."""
        while self._waiting:
            worker = self._waiting.pop(0)
            self._watches.pop(worker.pid).cancel()
            if worker.alive:
                worker.name = name
                return worker
            await worker.stop(0.0)
        return await WorkerProcess.start(name, threads, self._command)

    def fill(self, slots: Iterable[Slot]) -> None:
        """Start those that are missing, one after another, unless a model loads: beside it their imports would only
        take its processor. Returns at once."""
        if len(self._waiting) >= self._count or any(slot.state == "loading" for slot in slots):
            return
        now = asyncio.get_running_loop().time()
        busy = self._filling is not None and not self._filling.done()
        if not self._closed and not busy and now >= self._not_before:
            self._filling = asyncio.create_task(self._fill(), name="spare workers")

    async def _fill(self) -> None:
        while len(self._waiting) < self._count:
            try:
                worker = await WorkerProcess.start("spare", 1, (*self._command, AHEAD))
            except OSError as error:
                log.warning("a spare worker cannot be started: %s", error)
                self._not_before = asyncio.get_running_loop().time() + RETRY_S
                return
            self._waiting.append(worker)
            self._watches[worker.pid] = asyncio.create_task(self._watch(worker))

    async def _watch(self, worker: WorkerProcess) -> None:
        """One that ends by itself is forgotten."""
        await worker.ended()
        self._waiting.remove(worker)
        self._watches.pop(worker.pid)
        self._not_before = asyncio.get_running_loop().time() + RETRY_S
        log.warning("a spare worker (pid %d) ended with %s", worker.pid, await worker.stop(0.0))

    async def stop(self) -> None:
        """End them all; none is started any more."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        self._watches.clear()
        ending, self._waiting = self._waiting, []
        for worker in ending:
            worker.kill()
        await asyncio.gather(*(worker.stop(0.0) for worker in ending))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0

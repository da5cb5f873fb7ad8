"""Whether a worker still lives: it answers pings, or it is killed and replaced, whatever state its model is in."""

from __future__ import annotations

import asyncio
import time

from server.scheduler.slots import Slot
from server.worker import messages
from server.worker.process import WorkerProcess

PINGS_PER_SILENCE = 6
LOADING_PATIENCE = 4
"""A worker that loads may neither answer nor compute for so many times worker_silence_seconds: disks can be slow."""


async def watch(slot: Slot, worker: WorkerProcess, silence_s: float) -> None:
    """Ping the worker for as long as it lives; kill it where it gives no sign of life for `silence_s` seconds.

    Its pings are answered by a thread of their own, so a long step, a copy to host memory or a squeeze is no silence. A
    load may hold the interpreter for long; it then computes, which counts as a sign of life. The end of its socket
    ends a killed worker's life in the loop, as any other end does.
    """
    seq, computed = 0, 0.0
    while True:
        before_sleep, pause = time.monotonic(), silence_s / PINGS_PER_SILENCE
        await asyncio.sleep(pause)
        # Time in which this very process stood still (stopped, swapped out) is no silence of the worker's.
        slot.last_pong += max(0.0, time.monotonic() - before_sleep - pause)
        limit, before, computed = silence_s, computed, worker.cpu_seconds()
        if slot.state == "loading":
            limit = LOADING_PATIENCE * silence_s
            if computed != before:
                slot.last_pong = time.monotonic()
        if time.monotonic() - slot.last_pong > limit:
            slot.error = f"its worker (pid {worker.pid}) gave no sign of life for {limit:g} s and was killed"
            worker.kill()
            return
        seq += 1
        worker.send(messages.Ping(seq))

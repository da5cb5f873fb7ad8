"""How many bytes of cache an engine may hold, changed while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spectral.engine.upkeep import effective_context
from spectral.errors import CacheError

if TYPE_CHECKING:
    from spectral.engine.engine import Engine


def set_lease(engine: Engine, max_bytes: int | None) -> int:
    """Let an engine's caches hold at most so many bytes, from now on; returns the bytes freed on the device.

    Where it holds more, the cheapest goes first: unused memory, idle prefixes, then running sequences, newest of the
    lowest priority first, which are parked in host memory and go on when there is room. The longest sequence that is
    accepted follows the lease. Raises CacheError for a lease that does not hold a single sequence; nothing is changed
    then.
    """
    before = engine.limits
    engine.limits = replace(before, max_kv_bytes=max_bytes)
    try:
        context = effective_context(engine)
    except CacheError:
        engine.limits = before
        raise
    engine.context_length = context
    engine.scheduler.limits = engine.lanes._limits = engine.limits
    held = engine.lanes.nbytes
    if max_bytes is not None and held > max_bytes:
        engine.lanes.trim()
        over = engine.lanes.nbytes - max_bytes
        if over > 0 and engine.lanes.free_idle(over):
            engine.lanes.trim()
        while engine.lanes.nbytes > max_bytes and engine.scheduler.running:
            engine.scheduler.park(min(engine.scheduler.running, key=lambda s: (s.priority, -s.order)))
            engine.lanes.trim()
    for lane in engine.lanes.all:
        lane.store.max_bytes = max_bytes
    engine.scheduler.unblock()
    return held - engine.lanes.nbytes

"""How many bytes of cache an engine may hold, changed while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spectral.engine.upkeep import effective_context
from spectral.errors import CacheError

if TYPE_CHECKING:
    from spectral.engine.engine import Engine
    from spectral.residency import Sleeper


def sleep(engines: Sequence[Engine], sleeper: Sleeper, keep_bytes: int) -> int:
    """Move a model that rests to host memory, with its tables and with as much of its idle prefixes, compressed as they
    are, as `keep_bytes` hold: a chat goes on after the wake-up without being computed again. Returns the bytes freed.

    Tables of settings that are not in use are forgotten. Nothing may run. Raises CacheError where the host has too
    little memory.
    """
    before = sum(engine.lanes.nbytes for engine in engines)
    for engine in engines:
        engine.lanes.shelf.clear()
        engine.lanes.trim()
        over = engine.lanes.nbytes - keep_bytes
        if over > 0:
            engine.lanes.free_idle(over)
        engine.trim(prefixes=over > 0 and engine.lanes.nbytes - engine.lanes.idle_nbytes > keep_bytes)
        engine.runner.trim(everything=True)
        keep_bytes = max(0, keep_bytes - engine.lanes.nbytes)
    stores = [store for engine in engines for store in engine.lanes.stores()]
    held = sum(store.nbytes for store in stores)
    modules = [codec for store in stores for codec in store.codebook.layers if codec is not None]
    return before - held + sleeper.sleep(modules, [tensor for store in stores for tensor in store.tensors()])


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

"""How many bytes of cache an engine may hold, changed while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spectral.errors import CacheError

if TYPE_CHECKING:
    from spectral.engine.engine import Engine


def set_lease(engine: Engine, max_bytes: int | None) -> int:
    """Let an engine's cache hold at most so many bytes; unused memory is given back first. Returns the bytes freed.

    What running sequences hold stays theirs, so a lease below that stops growth and frees nothing by itself: they give
    way, newest first, when they need more. The longest sequence that is accepted follows the lease. Raises CacheError
    for a lease that does not hold a single sequence; nothing is changed then.
    """
    before = engine.limits
    engine.limits = replace(before, max_kv_bytes=max_bytes)
    try:
        context = engine._effective_context()
    except CacheError:
        engine.limits = before
        raise
    engine.context_length = context
    engine._scheduler.limits = engine.limits
    freed = engine.store.trim()
    engine.store.max_bytes = max_bytes
    return freed

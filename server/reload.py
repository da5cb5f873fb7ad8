"""Reading the configuration again while the server runs: checked in full first, and then taken over, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.config import Settings
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot

SECTIONS_AT_START_ONLY = ("auth", "logging", "memory", "sessions", "tracing")  # a file of keys is read again by itself
AT_START_ONLY = ("host", "port", "allow_public", "allowed_origins", "state_dir", "max_profile_bytes")
LIVE = ("load", "aliases", "thoughts", "keep_alive", "pin", "priority", "max_kl", "min_context", "max_vram")
"""Fields of a model that need no new worker."""


def changes(old: Settings, new: Settings) -> dict[str, Any]:
    """What differs: models added, removed and changed (with the fields), and server fields that a restart is needed
    for. Secrets are compared and not shown."""
    before, after = ({m.name: m for m in settings.models} for settings in (old, new))
    changed = {name: _fields(before[name], after[name]) for name in before.keys() & after.keys()}
    server = _fields(old.server, new.server)
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": {name: fields for name, fields in sorted(changed.items()) if fields},
        "server": [name for name in server if name not in AT_START_ONLY],
        "needs_server_restart": [
            *(f"server.{name}" for name in server if name in AT_START_ONLY),
            *(name for name in SECTIONS_AT_START_ONLY if getattr(old, name) != getattr(new, name)),
        ],
    }


def _fields(old: Any, new: Any) -> list[str]:
    return [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]


async def apply(
    scheduler: Scheduler, new: Settings, prepare: Callable[[Slot], None], *, drain_s: float
) -> dict[str, Any]:
    """Take a checked configuration over. Returns :func:`changes`, and which hot models keep their old worker until they
    are loaded again. `prepare` gets every new slot before it loads."""
    old = scheduler.settings
    found = changes(old, new)
    fixed = {name: getattr(old.server, name) for name in AT_START_ONLY}
    sections = {name: getattr(old, name) for name in SECTIONS_AT_START_ONLY}
    scheduler.settings = new.model_copy(update={"server": new.server.model_copy(update=fixed), **sections})
    models = {model.name: model for model in new.models}
    for name in found["added"]:
        scheduler.add(models[name], prepare)
    for name in found["changed"]:
        scheduler.slots[name].settings = models[name]
        scheduler.memory.adopt(scheduler.slots[name])
    for name in found["removed"]:
        await scheduler.unload(scheduler.slots.pop(name), drain_s, "no longer in the configuration")
        scheduler.memory.forget(name)
        scheduler.metrics.forget(name)
    stale = [name for name, fields in found["changed"].items() if _needs_worker(scheduler.slots[name], fields)]
    return {**found, "needs_load": stale}


def _needs_worker(slot: Slot, fields: list[str]) -> bool:
    return slot.state in ("hot", "loading") and any(field not in LIVE for field in fields)

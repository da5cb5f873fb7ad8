"""A plan from a configuration alone: does it fit, where, and at what KL? Nothing is loaded and nothing is changed.

Every model is taken as asked for at once, each with its floor (min_context, max_concurrency); `extra` adds one more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.config import ModelSettings, Settings
from server.config_memory import MemorySettings
from server.scheduler.demand import HOST, Demand, Plan
from server.scheduler.facts import Measured, facts_for, folder_of
from server.scheduler.ledger import Ledger
from server.scheduler.nvml import Reading
from server.scheduler.planner import PATIENT_S, plan
from server.scheduler.steward import Facts, Steward, Wishes

DEFAULT_FLOOR_TOKENS = 32_768


def ledger_for(settings: MemorySettings) -> Ledger:
    """An empty ledger with the configured caps and reserves."""
    caps: dict[str, int | None] = {"*": settings.max_vram, HOST: settings.max_host}
    reserves = {"*": settings.reserve, HOST: settings.host_reserve}
    for name, budget in settings.devices.items():
        caps |= {} if budget.max_vram is None else {name: budget.max_vram}
        reserves |= {} if budget.reserve is None else {name: budget.reserve}
    return Ledger(caps, reserves)


def wishes_for(model: ModelSettings, devices: Iterable[str], pinned: bool = False) -> Wishes:
    """A model's configuration as the steward takes it. `devices`: names of all devices there are."""
    floor = model.min_context or min(model.limits.context_length or DEFAULT_FLOOR_TOKENS, DEFAULT_FLOOR_TOKENS)
    gpus = tuple(name for name in devices if name != HOST)
    anywhere = model.device in ("auto", "cuda")
    return Wishes(
        priority=model.priority,
        pinned=model.pin or pinned,
        keep_alive_s=None if model.keep_alive < 0 else model.keep_alive,
        max_kl=model.max_kl,
        min_context=floor,
        max_concurrency=model.limits.max_concurrency,
        max_bytes=model.max_vram,
        devices=(gpus or (HOST,)) if anywhere else (model.device,),
        splittable=anywhere and len(gpus) > 1,
    )


@dataclass(frozen=True)
class DryRun:
    """A plan and what it was made from. `unknown`: models whose files are not on this machine, planned as empty."""

    plan: Plan
    demands: list[Demand]
    budgets: dict[str, int]
    unknown: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the plan, and for every model what it needs and the settings that it could have."""
        found: dict[str, Any] = self.plan.as_dict()
        for demand in self.demands:
            found["models"][demand.name] |= {
                "weights_bytes": demand.weights,
                "overhead_bytes": demand.overhead,
                "ladder": [
                    {"setting": r.name, "kl": r.kl, "floor_bytes": demand.floor(r), "token_bytes": r.token_bytes}
                    for r in demand.rungs
                ],
            }
        return {"fits": not self.plan.unmet, "budgets": self.budgets, "unknown": self.unknown, **found}


def dry_run(
    settings: Settings,
    readings: Sequence[Reading],
    *,
    extra: ModelSettings | None = None,
    context: int | None = None,
    measured: Measured | None = None,
    facts: Mapping[str, Facts] | None = None,
) -> DryRun:
    """Plan all models of a configuration, and `extra`, on these devices. `context`: tokens of cache that every model
    must have, instead of min_context. `facts`: known ones, by model's name, instead of predictions."""
    ledger, steward = ledger_for(settings.memory), Steward()
    ledger.observe(readings)
    names = [reading.name for reading in readings]
    by_device = dict(zip([reading.device for reading in readings], names, strict=True))
    models = [*settings.models, *([extra] if extra is not None else [])]
    for model in models:
        wishes = wishes_for(model, ledger.accounts)
        if context is not None:
            wishes = replace(wishes, min_context=context)
        device = wishes.devices[0]
        known = measured.get(Measured.key(model, by_device.get(device, device))) if measured is not None else None
        found = (facts or {}).get(model.name) or facts_for(model, device, model.setting, None, known)
        ward = steward.add(model.name, replace(found, context=max(found.context, context or 0)), wishes)
        ward.waiting = 1
    demands = steward.demands(0.0)
    devices = ledger.devices()
    result = plan(demands, devices, hysteresis=0.0, time_limit_s=4 * PATIENT_S)
    unknown = [model.name for model in models if folder_of(model.path) is None and model.name not in (facts or {})]
    return DryRun(result, demands, {device.name: device.budget for device in devices}, unknown)

"""Reasons in words: why a model is where a plan puts it, and what a move does. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from server.scheduler.demand import COLD, HOST, HOT, Choice, Demand

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    size, unit = float(count), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def nats(value: float) -> str:
    """.0043 in as many digits as matter."""
    return f"{value:.4f}".rstrip("0").rstrip(".").removeprefix("0") or "0" if value < 1 else f"{value:.2f}"


def reasons(models: Sequence[Demand], picked: dict[str, Choice], free: dict[str, int]) -> dict[str, str]:
    """One sentence per model."""
    return {model.name: _reason(model, picked[model.name], free) for model in models}


def _reason(model: Demand, choice: Choice, free: dict[str, int]) -> str:
    finest = model.rungs[0] if model.rungs else None
    allowed = [r for r in model.rungs if model.max_kl is None or r.kl <= model.max_kl]
    if choice.residency == HOT:
        where = " and ".join(choice.devices)
        text = f"hot on {where} at {choice.setting} (KL {nats(choice.kl)}), {human(choice.lease)} of cache"
        if model.busy:
            text += "; it answers requests, so it stays"
        elif model.pinned:
            text += "; pinned"
        elif model.needed:
            text += "; requests wait for it"
        if finest is not None and choice.setting != finest.name and model.now.setting != choice.setting:
            more = human(model.lease(finest) - _wanted(model, choice))
            text += f"; not at {finest.name}, which would take {more} more"
        if len(choice.devices) > 1:
            text += f"; too large for one device, so split over {len(choice.devices)}"
        return text
    if not allowed:
        return f"not hot: no setting of its ladder is within max_kl {model.max_kl}; raise it or profile the model"
    least = min(model.weights + model.overhead + model.floor(rung) for rung in allowed)
    most = max((free[name] for name in free if (name in model.devices if model.devices else name != HOST)), default=0)
    what = "asleep in host memory" if choice.residency != COLD else "cold"
    if model.resting and not model.needed:
        return f"{what}: its keep-alive is over"
    why = f"it needs at least {human(least)} and {human(most)} are left on any device"
    if least <= most:
        why = f"nobody asks for it ({model.rate * 3600:.2g} requests/h), and a load costs more than it saves"
    elif model.needed or model.pinned:
        why += "; the others are pinned, busy or worth more"
    else:
        why += f"; it is asked for {model.rate * 3600:.3g} times an hour, and the others are worth more"
    return f"{what}: {why}"


def _wanted(model: Demand, choice: Choice) -> int:
    return next((model.lease(rung) for rung in model.rungs if rung.name == choice.setting), choice.lease)

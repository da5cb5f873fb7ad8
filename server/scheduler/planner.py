"""The planner: what should be where, at which setting, and why. Pure: no clock, no I/O, no logging.

1. Every model's options are listed (`options`): hot on a device or a split at a setting, asleep, cold; each with
   its bytes and its cost in seconds of delay per second: traffic x measured KL x KL_SECONDS, or traffic x the time
   to wake or load, plus the move itself spread over HORIZON_S.
2. A deterministic search finds a plan (`search`). A small problem is searched to its end, or goes to HiGHS (`solver`)
   where that takes too long; a large one is begun from HiGHS's relaxed answer, which divides few models.
3. The present state is kept unless the better plan gains more than the hysteresis, or the state no longer fits.
4. What is left on a device is added to the leases of the models there, by traffic.
5. Every choice gets a reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.scheduler.demand import HOT, Choice, Demand, Device, Plan
from server.scheduler.options import IDLE_RATE, is_now, worth_having
from server.scheduler.search import EPSILON, Search
from server.scheduler.solver import WHOLE, Program
from server.scheduler.words import reasons

EXACT_OPTIONS = 160
"""Above this many options in all, HiGHS rarely proves anything in the time that a plan may take."""
TIME_LIMIT_S, PATIENT_S = 0.03, 0.25
"""HiGHS's time where a plan is wanted at once; from PATIENT_S on a large problem goes to it too."""
EXHAUST_OPTIONS, EXHAUST_NODES = 80, 3000
"""Up to so many options a depth-first search is tried first, for so many steps: 1 to 2 us each."""
LOOKS, LOOKS_LARGE = 1000, 80
"""How often the searches of one plan may look at all options, 10 to 60 us each."""
HYSTERESIS = 0.02
"""Part of the present cost that a plan must save to be worth any move."""


def plan(
    models: Sequence[Demand],
    devices: Sequence[Device],
    *,
    hysteresis: float = HYSTERESIS,
    solve: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> Plan:
    """The plan for these models on these devices.

    Deterministic, except that HiGHS may or may not finish within `time_limit_s`; without `solve` entirely so. 50 models
    on 8 devices take 15 ms of a core in the median, 17 at most (bench/results/scheduler.json); with `time_limit_s` of a
    second or more such a plan is also searched exactly. A model that is needed or pinned and cannot be hot is named in
    `unmet`: its requests wait, or get an answer that says so.
    """
    if not models:
        return Plan({}, {}, 0.0, "stay", free={device.name: max(0, device.budget) for device in devices})
    models = sorted(models, key=lambda model: model.name)
    budgets = {device.name: max(0, device.budget) for device in devices}
    table = [worth_having(model, devices) for model in models]
    search = Search(table, budgets)
    now = _present(models, search)
    stay = now if now is not None and search.fits(now) else None
    chosen, how = _best(search, stay, solve, time_limit_s)
    if stay is not None and search.total(chosen) >= search.total(stay) * (1 - hysteresis) - EPSILON:
        chosen, how = stay, "stay"
    picked = {model.name: search.options[at] for model, at in zip(models, chosen, strict=True)}
    return _finish(models, budgets, picked, search.total(chosen), how)


def _present(models: Sequence[Demand], search: Search) -> np.ndarray | None:
    """The options that are what is now; None where one is no longer offered."""
    chosen = []
    for m, model in enumerate(models):
        options_ = range(int(search.first[m]), int(search.first[m + 1]))
        k = next((k for k in options_ if is_now(search.options[k], model.now)), None)
        if k is None:
            return None
        chosen.append(k)
    return np.array(chosen, dtype=int)


def _best(search: Search, stay: np.ndarray | None, solve: bool, time_limit_s: float) -> tuple[np.ndarray, str]:
    """The best of several starts, each improved, and of the solver's answer; and which it was."""
    best = search.cheapest()
    if search.fits(best):  # everybody has what is best for it: nothing to solve, and SciPy is not even loaded
        return best, "exact"
    starts: list[np.ndarray] = [] if stay is None else [stay]
    price: np.ndarray | None = None
    small = len(search.options) <= EXACT_OPTIONS or time_limit_s >= PATIENT_S
    relaxed = Program(search).relaxed(time_limit_s) if solve and not small else None
    if relaxed is None:
        starts += search.starts()
    else:
        given, share, price = relaxed
        divided = np.flatnonzero(share < WHOLE)
        start = given.copy()
        start[divided] = search.least()[divided]
        starts.append(search.fill(start, sorted(divided, key=lambda m: -float(search.cost[search.row(m)].max()))))
    looks = (LOOKS if small else LOOKS_LARGE) // len(starts)
    results = [search.improve(start, looks, price) for start in starts if search.fits(start)]
    # With every model at its least nothing may fit still (models that run hold too much): then that is the answer, and
    # the loop parks sequences.
    chosen, how = min(results, key=search.total) if results else starts[-1], "search"
    if results and len(search.options) <= EXHAUST_OPTIONS:
        chosen, proved = search.exhaust(chosen, EXHAUST_NODES)
        if proved:  # the same on any machine, however busy it is, and without SciPy
            return chosen, "exact"
    if solve and small and search.models:
        found, proved = Program(search).exact(time_limit_s)
        if found is not None and search.fits(found):
            if search.total(found) < search.total(chosen) - EPSILON:
                chosen = found
            how = "exact" if proved else how
    return chosen, how


def _finish(
    models: Sequence[Demand], budgets: dict[str, int], picked: dict[str, Choice], cost: float, how: str
) -> Plan:
    used = dict.fromkeys(budgets, 0)
    for choice in picked.values():
        for device, size in choice.shares:
            used[device] += size
    free = {name: budgets[name] - used[name] for name in budgets}
    before = free
    picked, free = _hand_out(models, picked, free)
    why = reasons(models, picked, before)
    unmet = tuple(m.name for m in models if (m.needed or m.pinned or m.busy) and picked[m.name].residency != HOT)
    hot = [(max(m.rate, IDLE_RATE), picked[m.name].kl) for m in models if picked[m.name].residency == HOT]
    kl = sum(rate * value for rate, value in hot) / sum(rate for rate, _ in hot) if hot else 0.0
    return Plan(picked, why, cost, how, unmet, free, kl)


def _hand_out(
    models: Sequence[Demand], picked: dict[str, Choice], free: dict[str, int]
) -> tuple[dict[str, Choice], dict[str, int]]:
    """Leases grown by what is free, by traffic: a lease is a right, and bytes not in use stay on the device."""
    left, out = dict(free), dict(picked)
    for name in free:
        here = [m for m in models if picked[m.name].residency == HOT and picked[m.name].devices == (name,)]
        weights = [max(m.rate, IDLE_RATE) * m.priority for m in here]
        for model, weight in zip(here, weights, strict=True):
            choice = picked[model.name]
            extra = max(0, int(free[name] * weight / sum(weights)))
            if model.max_bytes is not None:
                extra = min(extra, model.max_bytes - choice.shares[0][1])
            size = choice.shares[0][1] + max(0, extra)
            out[model.name] = choice._replace(lease=choice.lease + max(0, extra), shares=((name, size),))
            left[name] -= max(0, extra)
    return out, left

"""Every way in which one model can be held, with its bytes and its cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from server.scheduler.demand import ASLEEP, COLD, HOST, HOT, Choice, Demand, Device, Placement, Rung

KL_SECONDS = 60.0
"""Seconds of delay that one nat of KL in every token of a request is worth: 0.01 nats against 0.6 s."""
HORIZON_S = 300.0
"""Moves are paid for over this time: a move of 10 s pays if it saves more than 1/30 s per second."""
IDLE_RATE = 1e-5
"""Traffic of a model that nobody asks for: what is free is used for somebody."""
SQUEEZE_S = 0.3
RELAX_S = 1e-9
DROP_S = 0.05
QUEUE_S = 2.0
"""What a request loses that waits, or is parked, because the lease is the floor's instead of what traffic wants."""
UNMET_S = 1e4
PIN_S = 1e6


def options(model: Demand, devices: Sequence[Device]) -> list[Choice]:
    """All choices for one model, in a fixed order: hot ones by device and setting, then asleep, then cold.

    A model that runs requests has only hot ones where it is; one that must run and cannot still has "cold", at a
    penalty, so that a plan always exists.
    """
    away = _away_choices(model, devices)
    found = _hot(model, devices, math.inf, every=True) if _may_be_hot(model) else []
    return found + (away[:-1] if model.busy and found else away)


def worth_having(model: Demand, devices: Sequence[Device]) -> list[Choice]:
    """Those of :func:`options` that no other one beats in cost without taking more bytes, and those that are what is
    now. Of choices of one place the later ones take fewer bytes; what takes none at all beats whatever costs more."""
    away = _away_choices(model, devices)
    free = math.inf if model.busy else away[-1].cost
    found = _hot(model, devices, free, every=False) if _may_be_hot(model) else []
    if model.busy and found:
        return found
    return found + [c for c in away if c.cost < away[-1].cost or not c.shares or is_now(c, model.now)]


def _may_be_hot(model: Demand) -> bool:
    return not model.resting or model.busy or model.needed or model.pinned


def _away_choices(model: Demand, devices: Sequence[Device]) -> list[Choice]:
    """Asleep, where that is possible, and cold."""
    found = []
    # Requests of a model that is away have it loaded first and then pay for quality like all others.
    finest = min([rung.kl for rung in _rungs(model)], default=0.0) * KL_SECONDS
    host = next((device for device in devices if device.name == HOST), None)
    if model.can_sleep and not model.busy and host is not None and model.weights <= host.budget:
        cost = _traffic(model) * (model.wake_s + finest) + _away(model)
        cost += switch_cost(model, ASLEEP, (), model.now.setting)
        shares = ((HOST, model.weights), *((name, model.residue) for name in model.now.devices if model.residue))
        found.append(Choice(model.name, ASLEEP, shares, model.now.setting, cost=cost))
    cost = _traffic(model) * (model.load_s + finest) + _away(model) + switch_cost(model, COLD, (), "")
    found.append(Choice(model.name, COLD, cost=cost))
    return found


def is_now(choice: Choice, now: Placement) -> bool:
    """Whether a choice is what a model has now; asleep and cold ones are alike wherever they were."""
    if choice.residency != now.residency:
        return False
    return now.residency != HOT or (choice.setting == now.setting and choice.devices == now.devices)


def _traffic(model: Demand) -> float:
    return max(model.rate, IDLE_RATE) * model.priority


def _away(model: Demand) -> float:
    """What it costs that a model is not hot although somebody asked for that."""
    return (UNMET_S * model.priority if model.needed else 0.0) + (PIN_S if model.pinned or model.busy else 0.0)


def switch_cost(model: Demand, residency: str, devices: tuple[str, ...], setting: str) -> float:
    """Seconds per second for the move from where the model is; 0 where it stays. Obeys the triangle inequality, so
    that a plan once carried out is its own answer."""
    now = model.now
    if residency == HOT:
        if now.residency == HOT and now.devices == devices:
            if now.setting == setting:
                return 0.0
            names = [rung.name for rung in model.rungs]
            finer = now.setting not in names or names.index(setting) < names.index(now.setting)
            return RELAX_S if finer else SQUEEZE_S / HORIZON_S  # an empty cache changes its setting for nothing
        # One that sleeps wakes on the devices that it left.
        wakes = now.residency == ASLEEP and now.devices in ((), devices)
        leaves = DROP_S if now.residency != COLD else 0.0
        return (model.wake_s if wakes else model.load_s + leaves) / HORIZON_S
    if now.residency == residency:
        return 0.0
    if residency == ASLEEP:  # from disk it is loaded first, then put to sleep
        return (model.wake_s + (model.load_s if now.residency == COLD else 0.0)) / HORIZON_S
    return DROP_S / HORIZON_S


class _Way(NamedTuple):
    """A setting with a lease, wherever it is. least: bytes below which the lease is not cut; wanted: what traffic wants
    of this setting; quality: what its KL costs."""

    rung: Rung
    least: int
    lease: int
    wanted: int
    quality: float


def _hot(model: Demand, devices: Sequence[Device], most: float, every: bool) -> list[Choice]:
    """Hot ones that cost less than `most`; of each place those that no later one beats, or with `every` all of them."""
    rungs, ways = _rungs(model), []
    for rung in rungs:
        held, wanted = rung.nbytes(max(model.floor_tokens, model.held), model.floor_sequences), model.lease(rung)
        ways.append(_Way(rung, held, max(held, wanted), max(1, wanted), rung.kl * KL_SECONDS))
    if rungs and model.floor(rungs[-1]) < model.lease(rungs[-1]):
        floor = model.floor(rungs[-1])
        ways.append(ways[-1]._replace(least=floor, lease=floor))
    now = model.now.devices if model.now.residency == HOT else ()
    extra = dict(model.bias)
    moves = switch_cost(model, HOT, ("",), "")  # elsewhere it is the same for every place and setting
    sizes: dict[tuple[int, int], list[_Sized]] = {}
    found = []
    for place in _places(model, devices, rungs):
        names = tuple([device.name for device, _ in place])
        size = len(place), sum([device.budget for device, _ in place])
        here, moved = now == names, sum([extra.get(name, 0.0) for name in names])
        rows = sizes[size] if size in sizes else sizes.setdefault(size, _sized(model, *size, ways))
        if here:
            rows = [row._replace(cost=row.cost + switch_cost(model, HOT, names, row.rung.name)) for row in rows]
        else:
            moved += moves
        for rung, nbytes, lease, cost in rows if every else _undominated(rows, model.now.setting if here else None):
            if cost + moved >= most and not (here and rung.name == model.now.setting):
                continue
            shares = ((names[0], nbytes),) if len(place) == 1 else _shares(model, place, lease)
            if shares:
                found.append(Choice(model.name, HOT, shares, rung.name, rung.kl, lease, cost + moved))
    return found


class _Sized(NamedTuple):
    """A way on a place of a certain size: all its bytes there, the lease that fits, and what quality and waits cost."""

    rung: Rung
    nbytes: int
    lease: int
    cost: float


def _sized(model: Demand, count: int, most: int, ways: Sequence[_Way]) -> list[_Sized]:
    """What fits on `count` devices of so many bytes together: leases are cut to the model's cap and the devices."""
    traffic, fixed = _traffic(model), model.weights + model.overhead * count
    most = most if model.max_bytes is None else min(most, model.max_bytes)
    found = []
    for rung, least, lease, wanted, quality in ways:
        lease = max(least, min(lease, most - fixed))
        if fixed + lease <= most:
            found.append(_Sized(rung, fixed + lease, lease, traffic * (quality + QUEUE_S * (1 - lease / wanted))))
    return found


def _undominated(rows: Sequence[_Sized], now: str | None) -> list[_Sized]:
    """Rows of one place that cost less than all later ones, and those with the present setting."""
    best, kept = math.inf, []
    for row in reversed(rows):
        if row.cost < best or row.rung.name == now:
            kept.append(row)
            best = min(best, row.cost)
    return kept[::-1]


def _shares(model: Demand, place: Sequence[tuple[Device, float]], lease: int) -> tuple[tuple[str, int], ...]:
    """Bytes on each device of a model that is spread; () where one of them has not as many."""
    shares = tuple([(d.name, round((model.weights + lease) * part) + model.overhead) for d, part in place])
    fits = all(size <= device.budget for (device, _), (_, size) in zip(place, shares, strict=True))
    return shares if fits else ()


def _rungs(model: Demand) -> list[Rung]:
    """Settings within max_kl; for a live cache only its own and coarser ones."""
    allowed = [rung for rung in model.rungs if model.max_kl is None or rung.kl <= model.max_kl]
    names = [rung.name for rung in allowed]
    if model.live and model.now.setting in names:
        return allowed[names.index(model.now.setting) :]
    return allowed


def _places(model: Demand, devices: Sequence[Device], rungs: Sequence[Rung]) -> list[list[tuple[Device, float]]]:
    """Sets of devices with each one's part of the bytes: one device each, or a balanced split where none is enough."""
    usable = [d for d in devices if (d.name in model.devices if model.devices else d.name != HOST)]
    if model.busy and model.now.devices:
        usable = [d for d in usable if d.name in model.now.devices]
        return [_balanced(model, usable)] if len(usable) == len(model.now.devices) else []
    if not rungs:
        return []
    least = model.weights + min(model.floor(rung) for rung in rungs)
    single = [d for d in usable if least + model.overhead <= d.budget]
    if single or not model.splittable:
        return [[(device, 1.0)] for device in single]
    return [_balanced(model, group) for group in _splits(model, usable, least)]


def _splits(model: Demand, usable: Sequence[Device], least: int) -> list[list[Device]]:
    """The smallest sets of GPUs that hold a model, each of one machine: a fleet's devices are named "node/device"."""
    machines: dict[str, list[Device]] = {}
    for device in sorted(usable, key=lambda d: (-d.budget, d.name)):
        machine, _, name = device.name.rpartition("/")
        if name != HOST:
            machines.setdefault(machine, []).append(device)
    found = []
    for largest in machines.values():
        for count in range(2, len(largest) + 1):
            if sum(d.budget - model.overhead for d in largest[:count]) >= least:
                groups = [largest[i : i + count] for i in range(len(largest) - count + 1)]
                found += [group for group in groups if sum(d.budget for d in group) >= least]
                break
    return found


def _balanced(model: Demand, group: Sequence[Device]) -> list[tuple[Device, float]]:
    """Parts by what each device has left beside the overhead."""
    group = sorted(group, key=lambda d: d.name)
    room = [max(1, device.budget - model.overhead) for device in group]
    return [(device, part / sum(room)) for device, part in zip(group, room, strict=True)]

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
    found = [] if model.resting and not (model.busy or model.needed or model.pinned) else _hot(model, devices)
    # Requests of a model that is away have it loaded first and then pay for quality like all others.
    finest = min((rung.kl for rung in _rungs(model)), default=0.0) * KL_SECONDS
    host = {device.name: device for device in devices}.get(HOST)
    if model.can_sleep and not model.busy and host is not None and model.weights <= host.budget:
        cost = _traffic(model) * (model.wake_s + finest) + _away(model)
        cost += switch_cost(model, ASLEEP, (), model.now.setting)
        shares = ((HOST, model.weights), *((name, model.residue) for name in model.now.devices if model.residue))
        found.append(Choice(model.name, ASLEEP, shares, model.now.setting, cost=cost))
    if not (model.busy and found):
        cost = _traffic(model) * (model.load_s + finest) + _away(model) + switch_cost(model, COLD, (), "")
        found.append(Choice(model.name, COLD, cost=cost))
    return found


def worth_having(found: Sequence[Choice], now: Placement) -> list[Choice]:
    """Those that no other one beats in cost without taking more bytes, and those that are what is now. Of choices of
    one place the later ones take fewer bytes; what takes none at all beats whatever costs more."""
    free = min((choice.cost for choice in found if not choice.shares), default=math.inf)
    best: dict[tuple[str, ...], float] = {}
    kept = []
    for choice in reversed(found):
        place = tuple([name for name, _ in choice.shares])
        if choice.cost < min(best.get(place, math.inf), free) or not place or is_now(choice, now):
            kept.append(choice)
            best[place] = min(choice.cost, best.get(place, math.inf))
    return kept[::-1]


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


def _hot(model: Demand, devices: Sequence[Device]) -> list[Choice]:
    rungs, traffic, ways = _rungs(model), _traffic(model), []
    for rung in rungs:
        held, wanted = rung.nbytes(max(model.floor_tokens, model.held), model.floor_sequences), model.lease(rung)
        ways.append(_Way(rung, held, max(held, wanted), max(1, wanted), rung.kl * KL_SECONDS))
    if rungs and model.floor(rungs[-1]) < model.lease(rungs[-1]):
        floor = model.floor(rungs[-1])
        ways.append(ways[-1]._replace(least=floor, lease=floor))
    found = []
    for place in _places(model, devices, rungs):
        found += _at(model, place, ways, traffic)
    return found


def _at(model: Demand, place: Sequence[tuple[Device, float]], ways: Sequence[_Way], traffic: float) -> list[Choice]:
    """The choices of one place: leases are cut to the model's cap and the devices."""
    names = tuple([device.name for device, _ in place])
    most = sum([device.budget for device, _ in place])
    most = most if model.max_bytes is None else min(most, model.max_bytes)
    fixed = model.weights + model.overhead * len(place)
    bias = sum([extra for name, extra in model.bias if name in names])
    here = model.now.residency == HOT and model.now.devices == names
    switch = 0.0 if here else switch_cost(model, HOT, names, "")  # elsewhere it is the same for every setting
    found = []
    for rung, least, lease, wanted, quality in ways:
        lease = max(least, min(lease, most - fixed))
        if fixed + lease > most:
            continue
        if len(place) == 1:
            shares: tuple[tuple[str, int], ...] = ((names[0], fixed + lease),)
        else:
            shares = tuple((d.name, round((model.weights + lease) * part) + model.overhead) for d, part in place)
            if any(size > device.budget for (device, _), (_, size) in zip(place, shares, strict=True)):
                continue
        moved = switch_cost(model, HOT, names, rung.name) if here else switch
        cost = traffic * (quality + QUEUE_S * (1 - lease / wanted)) + moved + bias
        found.append(Choice(model.name, HOT, shares, rung.name, rung.kl, lease, cost))
    return found


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

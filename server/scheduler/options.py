"""Every way in which one model can be held, with its bytes and its cost. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from server.scheduler.demand import ASLEEP, COLD, HOST, HOT, Choice, Demand, Device, Rung

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


def _hot(model: Demand, devices: Sequence[Device]) -> list[Choice]:
    found = []
    rungs = _rungs(model)
    for place in _places(model, devices, rungs):
        for rung in rungs:
            held = rung.nbytes(max(model.floor_tokens, model.held), model.floor_sequences)
            wanted = _fit(model, place, rung, held, max(held, model.lease(rung)))
            if wanted is not None:
                found.append(wanted)
        if rungs and model.floor(rungs[-1]) < model.lease(rungs[-1]):
            lean = _fit(model, place, rungs[-1], model.floor(rungs[-1]), model.floor(rungs[-1]))
            if lean is not None:
                found.append(lean)
    return found


def _fit(model: Demand, place: Sequence[tuple[Device, float]], rung: Rung, least: int, lease: int) -> Choice | None:
    """The choice of this place and setting with a lease: cut to the model's cap and the device, not below `least`."""
    fixed = model.weights + model.overhead * len(place)
    most = sum(device.budget for device, _ in place)
    most = most if model.max_bytes is None else min(most, model.max_bytes)
    lease = max(least, min(lease, most - fixed))
    if fixed + lease > most:
        return None
    shares = tuple((d.name, round((model.weights + lease) * part) + model.overhead) for d, part in place)
    if any(size > device.budget for (device, _), (_, size) in zip(place, shares, strict=True)):
        return None
    names = tuple(device.name for device, _ in place)
    waits = QUEUE_S * (1 - lease / max(1, model.lease(rung)))
    cost = _traffic(model) * (rung.kl * KL_SECONDS + waits) + switch_cost(model, HOT, names, rung.name)
    cost += sum(extra for name, extra in model.bias if name in names)
    return Choice(model.name, HOT, shares, rung.name, rung.kl, lease, cost)


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

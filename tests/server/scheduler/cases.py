"""Random scheduling problems for tests and the bench, and exhaustive search."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from server.scheduler.demand import ASLEEP, COLD, HOT, Demand, Device, Placement, Plan, Rung
from server.scheduler.options import options

GIB = 2**30


def rungs(rng: random.Random, count: int) -> tuple[Rung, ...]:
    """A ladder as profiles have it: KL grows with about the square of the ratio."""
    exact, kl = rng.choice([20_000, 60_000, 130_000]), rng.uniform(0.0002, 0.002)
    ratios = (4, 6, 8, 12, 16)[:count]
    return tuple(Rung(f"{x}x", kl * (x / 4) ** 2, exact / x, int(exact * 256 / x)) for x in ratios)


def problem(
    seed: int, models: int, gpus: int, settings: int, *, wishes: bool = True
) -> tuple[list[Demand], list[Device]]:
    """Models of 1 to 12 GiB on devices of 8 to 24 GiB, each somewhere at present; `wishes`: some pinned or needed."""
    rng = random.Random(seed)
    sizes = [8, 12, 16, 24]
    devices = [Device(f"cuda:{i}", rng.choice(sizes) * GIB) for i in range(gpus)]
    devices.append(Device("cpu", rng.choice([0, 16, 64]) * GIB))
    demands = []
    for i in range(models):
        tokens = rng.choice([2_000, 30_000, 200_000])
        demand = Demand(
            f"m{i}",
            weights=int(rng.uniform(1, 12) * GIB),
            rungs=rungs(rng, settings),
            overhead=GIB // 2,
            tokens=tokens,
            sequences=8,
            floor_tokens=min(tokens, rng.choice([1_000, 8_000])),
            rate=rng.choice([0, 0.001, 0.01, 0.1, 1]) * rng.random(),
            wake_s=rng.uniform(0.3, 2),
            load_s=rng.uniform(3, 30),
            max_kl=rng.choice([None, 0.005, 0.02]),
            needed=wishes and rng.random() < 0.15,
            pinned=wishes and rng.random() < 0.05,
            resting=wishes and rng.random() < 0.1,
        )
        before = replace(demand, now=Placement(rng.choice([HOT, ASLEEP, COLD])))
        demands.append(replace(before, now=rng.choice(options(before, devices)).placement))
    return demands, devices


def least_cost(models: list[Demand], devices: list[Device]) -> float:
    """The cost of the best plan, by looking at every one."""
    budgets = {device.name: device.budget for device in devices}
    best = float("inf")
    for combination in itertools.product(*(options(model, devices) for model in models)):
        cost = sum(choice.cost for choice in combination)
        if cost < best and all(size <= budgets[name] for name, size in taken(combination).items()):
            best = cost
    return best


def taken(choices: tuple[object, ...] | list[object]) -> dict[str, int]:
    """Bytes by device."""
    used: dict[str, int] = {}
    for choice in choices:
        for name, size in choice.shares:  # type: ignore[attr-defined]
            used[name] = used.get(name, 0) + size
    return used


def carried_out(models: list[Demand], plan: Plan) -> list[Demand]:
    """The models after a plan was carried out."""
    return [replace(model, now=plan.choices[model.name].placement) for model in models]

"""The exact optimum of a small fleet, what replicas on one device cost each other included, as a program for HiGHS."""

from __future__ import annotations

from typing import Any

import numpy as np

from server.cluster.crowd import CROWD_S, load_of
from server.scheduler.demand import HOT, Demand, Device
from server.scheduler.options import worth_having

GAP = 1e-3


def optimum(demands: list[Demand], devices: list[Device], time_limit_s: float) -> tuple[float, bool]:
    """The least cost in seconds of delay per second, and whether it is proved within GAP. One replica of each model.

    One option of each model is chosen. A pair that shares a device costs what it costs: a variable for each pair and
    device is at least one less than the sum of what both have there.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    options = [(m, choice) for m, demand in enumerate(demands) for choice in worth_having(demand, devices)]
    column = {device.name: at for at, device in enumerate(devices)}
    there: dict[tuple[int, str], list[int]] = {}
    for k, (m, choice) in enumerate(options):
        if choice.residency == HOT:
            (name,) = choice.devices
            there.setdefault((m, name), []).append(k)
    pairs = [(a, b, d) for a, d in there for b, other in there if other == d and a < b]
    count, fixed = len(options), len(demands) + len(devices)
    costs = [choice.cost for _, choice in options]
    costs += [2 * CROWD_S * demands[a].rate * load_of(demands[b]) for a, b, _ in pairs]
    rows: Any = lil_matrix((fixed + len(pairs), count + len(pairs)))
    for k, (m, choice) in enumerate(options):
        rows[m, k] = 1
        for name, size in choice.shares:
            rows[len(demands) + column[name], k] = size / devices[column[name]].budget
    for p, (a, b, name) in enumerate(pairs):
        for k in there[a, name] + there[b, name]:
            rows[fixed + p, k] = 1
        rows[fixed + p, count + p] = -1
    low = [1.0] * len(demands) + [0.0] * len(devices) + [-np.inf] * len(pairs)
    high = [1.0] * (fixed + len(pairs))
    found: Any = milp(
        np.array(costs),
        constraints=LinearConstraint(rows.tocsr(), low, high),
        integrality=np.array([1] * count + [0] * len(pairs)),
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit_s, "mip_rel_gap": GAP},
    )
    return (float("inf"), False) if found.x is None else (float(found.fun), found.status == 0)

"""Replicas change places between cells of a fleet, where both cells together lose less then. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from server.cluster.crowd import cost_of, crowd_of, move_s
from server.scheduler.demand import Choice, Demand, Device, Plan
from server.scheduler.options import KL_SECONDS

TRIES, SWAPS = 3, 4
"""Cells that are tried for a replica, and replicas there that it may change places with, nearest in size first."""
LEAST_REGRET = 1e-4
"""Seconds of delay per second that are worth a move."""


@dataclass
class Cell:
    """A few nodes that are planned together."""

    name: str
    devices: dict[str, Device] = field(default_factory=dict)
    members: dict[str, Demand] = field(default_factory=dict)
    plan: Plan | None = None
    dirty: bool = True
    urgent: bool = True
    """Somebody in it waits for its plan."""
    waits: int = 0
    """Plans that had no time for it."""
    stuck: set[str] = field(default_factory=set)
    """Members for which no better place was found since this cell was planned."""
    given: dict[str, Choice] = field(default_factory=dict)
    """Members that were given a place where they fit, until the cell is planned."""
    drifted: int = 0
    """For how many plans its traffic has been another one than that which it was planned for."""
    _regrets: tuple[Plan | None, dict[str, float]] = None, {}

    def regrets(self) -> dict[str, float]:
        """What each member loses by want of bytes and by its neighbours, in seconds of delay per second."""
        if self._regrets[0] is not self.plan:
            self._regrets = self.plan, dict(self._lost())
        return self._regrets[1]

    def _lost(self) -> Iterable[tuple[str, float]]:
        choices = self.plan.choices if self.plan is not None else {}
        crowd = crowd_of(choices, self.members)
        for name, choice in choices.items():
            demand = self.members.get(name)  # it may have gone since
            if demand is not None and not demand.busy:
                crowd.remove(demand, choice.devices)
                beside = sum(crowd.extra(demand, device) for device in choice.devices)
                crowd.add(demand, choice.devices)
                finest = min((rung.kl for rung in demand.rungs), default=0.0)
                yield name, choice.cost + beside - finest * KL_SECONDS * demand.rate * demand.priority


Solve = Callable[[Cell, Mapping[str, Demand]], Plan]


def exchange(cells: Iterable[Cell], solve: Solve, over: Callable[[], bool] = lambda: False) -> bool:
    """Move the replica that loses most by its cell's want of bytes, alone or in exchange for another one. False where
    nobody loses anything that was not tried since its cell was planned, or where the time is `over`."""
    every = [cell for cell in cells if not cell.dirty]
    worst = _worst(every)
    if worst is None:
        return False
    cell, name = worst
    demand = cell.members[name]
    rest = {other: d for other, d in cell.members.items() if other != name}
    alone = solve(cell, rest)
    for other in roomiest(every, cell, demand)[:TRIES]:
        before = _cost(cell) + _cost(other)
        for back in (None, *_partners(demand, other, cell)):
            if over():
                return False
            here = rest if back is None else {**rest, back.name: back}
            there = {n: d for n, d in other.members.items() if back is None or n != back.name} | {name: demand}
            price = LEAST_REGRET + move_s(demand) + (0.0 if back is None else move_s(back))
            plans = alone if back is None else solve(cell, here), solve(other, there)
            if plans[0].cost + plans[1].cost < before - price:
                cell.members, cell.plan = here, plans[0]
                other.members, other.plan = there, plans[1]
                for changed in (cell, other):
                    changed.stuck.clear()
                return True
    cell.stuck.add(name)
    return True


def roomiest(cells: Iterable[Cell], cell: Cell, demand: Demand) -> list[Cell]:
    """Other cells with a device for a replica, those with the most bytes that nobody is given first."""
    allowed = set(demand.devices)
    found = [o for o in cells if o is not cell and (not allowed or allowed.intersection(o.devices))]
    return sorted(found, key=lambda o: -float(max(o.plan.free.values(), default=0)) if o.plan else float("-inf"))


def _worst(cells: Iterable[Cell]) -> tuple[Cell, str] | None:
    found: tuple[float, Cell, str] | None = None
    for cell in cells:
        for name, regret in cell.regrets().items():
            if name in cell.members and name not in cell.stuck and regret > max(LEAST_REGRET, found[0] if found else 0):
                found = regret, cell, name
    return None if found is None else (found[1], found[2])


def _partners(demand: Demand, other: Cell, cell: Cell) -> list[Demand]:
    """Members of another cell that could come here instead."""
    free = [d for d in other.members.values() if not d.busy and (not d.devices or set(d.devices) & set(cell.devices))]
    return sorted(free, key=lambda d: (abs(d.weights - demand.weights), d.name))[:SWAPS]


def _cost(cell: Cell) -> float:
    """Of those that are still there."""
    return cost_of(cell.plan.choices, cell.members) if cell.plan is not None else 0.0

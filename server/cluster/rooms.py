"""What is left on each device of a fleet while new replicas are given places, one after another. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from server.cluster.crowd import NEIGHBOUR_S, load_of, model_of, node_of, places_of
from server.cluster.exchange import Cell
from server.scheduler.demand import Demand


def nbytes(demand: Demand, finest: bool) -> float:
    """A replica's bytes with the lease that its traffic wants, or at its coarsest setting with the floor."""
    rungs = [rung for rung in demand.rungs if demand.max_kl is None or rung.kl <= demand.max_kl] or demand.rungs
    if not rungs:
        return float(demand.weights + demand.overhead)
    lease = demand.lease(rungs[0]) if finest else demand.floor(rungs[-1])
    return float(demand.weights + demand.overhead + lease)


class Rooms:
    """What is left on each device. Arrays have an element for each device, in the order of their names."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        cells = list(cells)
        devices = {name: device for cell in cells for name, device in cell.devices.items()}
        self._names = sorted(devices)
        self._at = {name: at for at, name in enumerate(self._names)}
        self._free = np.array([devices[name].budget for name in self._names], dtype=np.float64)
        self._load: np.ndarray = np.zeros(len(self._names))
        nodes = {node: at for at, node in enumerate(dict.fromkeys(map(node_of, self._names)))}
        self._node = np.array([nodes[node_of(name)] for name in self._names], dtype=np.int64)
        self._siblings: dict[str, set[int]] = {}  # model -> nodes that have it
        self._allowed: dict[Collection[str], np.ndarray] = {}
        for cell in cells:
            for demand in cell.members.values():
                for device in places_of(demand)[:1]:
                    if device in devices:
                        self.take(demand, device)

    def take(self, demand: Demand, device: str) -> None:
        """A replica is or will be there."""
        at = self._at[device]
        self._free[at] -= nbytes(demand, finest=False)
        self._load[at] += load_of(demand) + NEIGHBOUR_S
        self._siblings.setdefault(model_of(demand.name), set()).add(int(self._node[at]))

    def best(self, demand: Demand) -> tuple[str | None, bool]:
        """The device for a new replica, None where none is allowed; whether it fits there, if all give way."""
        left = np.flatnonzero(self._mask(demand.devices))
        finest, least = nbytes(demand, finest=True), nbytes(demand, finest=False)
        missing = 2.0 + (least - self._free) / max(1.0, least)
        misfit = np.where(self._free >= finest, 0.0, np.where(self._free >= least, 1.0, missing))
        sibling = np.isin(self._node, list(self._siblings.get(model_of(demand.name), ())))
        for key in (misfit > 1.0, sibling, misfit, self._load, -self._free):
            if len(left) > 1:
                here = key[left]
                left = left[here == here.min()]
        return (self._names[left[0]], bool(misfit[left[0]] <= 1.0)) if len(left) else (None, False)

    def _mask(self, allowed: Collection[str]) -> np.ndarray:
        key = frozenset(allowed)
        if key not in self._allowed:
            self._allowed[key] = np.array([not key or name in key for name in self._names], dtype=bool)
        return self._allowed[key]

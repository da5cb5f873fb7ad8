"""The plan of a whole fleet: which device holds which replica. Pure: no clock, no I/O, no logging.

One solve over a thousand devices would take minutes, so the fleet is cut into cells of a few nodes each, and the same
planner as on a single machine (`server.scheduler.planner`) plans each cell.

1. Replicas that are somewhere keep their cell; new ones are given a device, the most wanted first: where they fit
   best, on a node without a sibling, where least runs.
2. Cells whose replicas, wishes or budgets changed are planned anew; of those in which only traffic changed, a few
   each time, so that a plan takes about as long for a large fleet as for a small one. Load of others and siblings on
   a device are costs
   (`Demand.bias`), so that a cell's plan spreads what can be spread.
3. A replica that a cell cannot serve tries others, those with the most room first.
4. On request (`improve`) replicas that lose most by their cell's squeeze change places, as long as the sum of the two
   cells' costs falls.

Devices are named "node/device". Sleep is a node's own business: to the fleet a replica is assigned to a device or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from server.cluster.exchange import Cell, exchange, roomiest
from server.scheduler.demand import COLD, HOT, Choice, Demand, Device, Plan
from server.scheduler.options import UNMET_S
from server.scheduler.planner import TIME_LIMIT_S, plan

CELL_DEVICES = 8
"""Devices of one cell; a node that has more is a cell of its own."""
SERVICE_S = 4.0
"""Device seconds that a request is taken to cost, for the load of devices."""
CROWD_S = 0.5
"""What a device that others keep busy costs: seconds of delay for every request, per other sequence that runs."""
SIBLING_S, NEIGHBOUR_S = 0.05, 1e-6
"""A second replica of one model on a node, for it serves no purpose there that another node would not serve better;
and any other model on a device, so that those that nobody asks for are spread too."""
TRIES = 3
DRIFTED_CELLS = 4
"""Cells with other traffic than before that one plan looks at, the longest waiting first."""


@dataclass(frozen=True)
class FleetPlan:
    """`choices`: for every replica; `planned`: how many cells were solved; `unmet`: needed and nowhere hot."""

    choices: dict[str, Choice]
    reasons: dict[str, str]
    cost: float
    planned: int
    unmet: tuple[str, ...]


def node_of(device: str) -> str:
    """The node of "node/device"."""
    return device.rpartition("/")[0]


def model_of(replica: str) -> str:
    """The model of "model#3"."""
    return replica.rpartition("#")[0] or replica


class Fleet:
    """Cells and their plans; remembers what has not changed."""

    def __init__(self, cell_devices: int = CELL_DEVICES, time_limit_s: float = TIME_LIMIT_S) -> None:
        self.cells: dict[str, Cell] = {}
        self._size, self._limit = cell_devices, time_limit_s
        self._cell_of_node: dict[str, str] = {}
        self._made = 0
        self._planned = 0

    # ------------------------------------------------------------------------------------------ nodes

    @property
    def nodes(self) -> list[str]:
        """The nodes that are planned."""
        return list(self._cell_of_node)

    def set_node(self, node: str, devices: Iterable[Device]) -> None:
        """A node joined, or its budgets changed. `devices`: named "node/device"."""
        given = {device.name: device for device in devices}
        cell = self.cells.get(self._cell_of_node.get(node, ""))
        if cell is None:
            cell = self._room_for(len(given))
            self._cell_of_node[node] = cell.name
        before = {name: device for name, device in cell.devices.items() if node_of(name) == node}
        if before != given:
            cell.devices = {name: device for name, device in cell.devices.items() if node_of(name) != node} | given
            cell.dirty = True

    def remove_node(self, node: str) -> None:
        """A node is gone."""
        cell = self.cells.get(self._cell_of_node.pop(node, ""))
        if cell is None:
            return
        cell.devices = {name: device for name, device in cell.devices.items() if node_of(name) != node}
        cell.dirty = True
        if not cell.devices:
            del self.cells[cell.name]

    def _room_for(self, count: int) -> Cell:
        for cell in self.cells.values():
            if len(cell.devices) + count <= self._size:
                return cell
        self._made += 1
        cell = self.cells[f"cell-{self._made}"] = Cell(f"cell-{self._made}")
        return cell

    # ------------------------------------------------------------------------------------------ plans

    def plan(self, demands: Sequence[Demand], improve: int = 0) -> FleetPlan:
        """The plan for these replicas; cells in which nothing changed keep theirs. `improve`: exchanges to try."""
        self._planned = 0
        new = self._keep_homes(demands)
        rooms = _Rooms(self.cells.values())
        for demand in sorted(new, key=lambda d: (not d.pinned, -d.rate * d.priority, -d.weights, d.name)):
            device = rooms.best(demand)
            if device is not None:
                self._join(demand, device)
                rooms.take(demand, device)
        drifted = sorted((c for c in self.cells.values() if c.drifted and not c.dirty), key=lambda c: -c.drifted)
        for cell in [*(c for c in self.cells.values() if c.dirty), *drifted[:DRIFTED_CELLS]]:
            self._solve(cell)
        self._place_unmet()
        for _ in range(improve):
            if not exchange(self.cells.values(), self._plan_of):
                break
        return self._whole(demands)

    def _keep_homes(self, demands: Sequence[Demand]) -> list[Demand]:
        """Bring the cells' members up to date; those that have no cell are returned."""
        homes = {name: cell for cell in self.cells.values() for name in cell.members}
        seen: set[str] = set()
        new = []
        for demand in demands:
            seen.add(demand.name)
            there = demand.now.devices if demand.now.residency == HOT else ()
            cell = self.cells.get(self._cell_of_node.get(node_of(there[0]), "")) if there else homes.get(demand.name)
            before = homes.get(demand.name)
            if before is not None and before is not cell:
                del before.members[demand.name]
                before.dirty = True
            if cell is None or (cell.plan is not None and demand.name in cell.plan.unmet and not there):
                if cell is not None:
                    cell.members.pop(demand.name, None)
                    cell.dirty = True
                new.append(demand)
                continue
            known = cell.members.get(demand.name)
            if known is None or _changed(known, demand):
                cell.dirty = True
            elif _drifted(known, demand):
                cell.drifted += 1
            else:
                continue
            cell.members[demand.name] = replace(demand, bias=known.bias) if known is not None else demand
        for name, cell in homes.items():
            if name not in seen and cell.members.pop(name, None) is not None:
                cell.dirty = True
        return new

    def _join(self, demand: Demand, device: str) -> None:
        cell = self.cells[self._cell_of_node[node_of(device)]]
        cell.members[demand.name] = replace(demand, bias=((device, -NEIGHBOUR_S / 2),))
        cell.dirty = True

    def _solve(self, cell: Cell) -> Plan:
        cell.plan = self._plan_of(cell, cell.members)
        cell.dirty, cell.drifted = False, 0
        cell.stuck.clear()
        return cell.plan

    def _plan_of(self, cell: Cell, members: Mapping[str, Demand]) -> Plan:
        self._planned += 1
        return plan(list(_with_load(members, cell)), list(cell.devices.values()), time_limit_s=self._limit)

    def _place_unmet(self) -> None:
        """Those that their cell cannot serve try the cells with the most room."""
        for cell in list(self.cells.values()):
            for name in cell.plan.unmet if cell.plan is not None else ():
                demand = cell.members[name]
                if demand.now.residency == HOT:
                    continue
                for other in roomiest(self.cells.values(), cell, demand)[:TRIES]:
                    trial = self._plan_of(other, {**other.members, name: demand})
                    if len(trial.unmet) <= len(other.plan.unmet if other.plan is not None else ()):
                        del cell.members[name]
                        other.members[name], other.plan = demand, trial
                        self._solve(cell)
                        break

    def _whole(self, demands: Sequence[Demand]) -> FleetPlan:
        choices: dict[str, Choice] = {}
        reasons: dict[str, str] = {}
        cost = 0.0
        for cell in self.cells.values():
            if cell.plan is not None:
                choices |= cell.plan.choices
                reasons |= cell.plan.reasons
                cost += cell.plan.cost
        for demand in demands:
            if demand.name not in choices:  # no cell has a device for it
                lost = UNMET_S if demand.needed or demand.pinned else 0.0
                choices[demand.name] = Choice(demand.name, COLD, cost=lost)
                reasons[demand.name] = "no node has a device for it"
                cost += lost
        must = [d.name for d in demands if d.needed or d.pinned or d.busy]
        unmet = tuple(name for name in must if choices[name].residency != HOT)
        return FleetPlan(choices, reasons, cost, self._planned, unmet)


def _changed(before: Demand, now: Demand) -> bool:
    """Whether a replica's place or wishes are others."""
    return _fixed(now) != _fixed(before)


def _fixed(demand: Demand) -> tuple[object, ...]:
    """What a plan depends on, beside traffic."""
    d = demand
    needs = d.weights, d.rungs, d.overhead, d.floor_tokens, d.floor_sequences, d.max_kl, d.max_bytes, d.devices
    return (*needs, d.now, d.needed, d.pinned, d.busy, d.priority, d.resting, d.load_s)


def _drifted(before: Demand, now: Demand) -> bool:
    """Whether its traffic is another one by half."""
    more = abs(now.rate - before.rate) > 0.5 * max(before.rate, 0.01)
    return more or now.tokens > before.tokens * 1.5 or now.sequences > before.sequences * 1.5


def _load(demand: Demand) -> float:
    """Sequences that a replica keeps running on its device."""
    return demand.rate * SERVICE_S


def _with_load(members: Mapping[str, Demand], cell: Cell) -> Iterable[Demand]:
    """The members with the costs of others' load on each device, as far as it is known where they will be."""
    # Each sees what stands before it in this order, so that of two that are in each other's way one stays.
    members = dict(sorted(members.items(), key=lambda item: (not item[1].busy, -_load(item[1]), item[0])))
    place = {name: _device(demand) for name, demand in members.items()}
    load: dict[str, float] = {}
    count: dict[str, int] = {}
    siblings: dict[tuple[str, str], int] = {}
    for name, demand in members.items():
        here, bias = place[name], []
        for device in cell.devices:
            same = siblings.get((model_of(name), node_of(device)), 0)
            extra = demand.rate * CROWD_S * load.get(device, 0.0) + SIBLING_S * same
            stays = -NEIGHBOUR_S / 2 if device == here else 0.0
            bias.append((device, extra + NEIGHBOUR_S * count.get(device, 0) + stays))
        if here is not None:
            load[here] = load.get(here, 0.0) + _load(demand)
            count[here] = count.get(here, 0) + 1
            key = model_of(name), node_of(here)
            siblings[key] = siblings.get(key, 0) + 1
        least = min((extra for _, extra in bias), default=0.0)  # only differences count: to be away is no better
        yield replace(demand, bias=tuple((device, extra - least) for device, extra in bias))


def _device(demand: Demand) -> str | None:
    """Where a replica is, or was given a place (the only device of its first bias)."""
    if demand.now.residency == HOT and demand.now.devices:
        return demand.now.devices[0]
    return demand.bias[0][0] if demand.bias else None


class _Rooms:
    """What is left on each device while new replicas are given places, one after another."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._free: dict[str, float] = {}
        self._load: dict[str, float] = {}
        self._models: dict[str, set[str]] = {}
        for cell in cells:
            for name, device in cell.devices.items():
                self._free[name], self._load[name] = float(device.budget), 0.0
                self._models.setdefault(node_of(name), set())
        for cell in cells:
            for demand in cell.members.values():
                device_name = _device(demand)
                if device_name in self._free:
                    self.take(demand, device_name)

    def take(self, demand: Demand, device: str) -> None:
        """A replica is or will be there."""
        self._free[device] -= _nbytes(demand, finest=False)
        self._load[device] += _load(demand) + NEIGHBOUR_S
        self._models[node_of(device)].add(model_of(demand.name))

    def best(self, demand: Demand) -> str | None:
        """The device for a new replica; None where none is allowed."""
        allowed = set(demand.devices)
        finest, least = _nbytes(demand, finest=True), _nbytes(demand, finest=False)
        best: tuple[tuple[float, ...], str] | None = None
        for name, free in self._free.items():
            if allowed and name not in allowed:
                continue
            sibling = model_of(demand.name) in self._models[node_of(name)]
            misfit = 0.0 if free >= finest else 1.0 if free >= least else 2.0 + (least - free) / max(1.0, least)
            rank = (misfit > 1.0, sibling, misfit, self._load[name], -free)
            if best is None or (rank, name) < best:
                best = rank, name
        return best[1] if best is not None else None


def _nbytes(demand: Demand, finest: bool) -> float:
    """A replica's bytes with the lease that its traffic wants, or at its coarsest setting with the floor."""
    rungs = [rung for rung in demand.rungs if demand.max_kl is None or rung.kl <= demand.max_kl] or demand.rungs
    if not rungs:
        return float(demand.weights + demand.overhead)
    lease = demand.lease(rungs[0]) if finest else demand.floor(rungs[-1])
    return float(demand.weights + demand.overhead + lease)

"""The plan of a whole fleet: which device holds which replica. Pure: no clock, no I/O, no logging.

One solve over a thousand devices would take minutes, so the fleet is cut into cells of a few nodes each, and the same
planner as on a single machine (`server.scheduler.planner`) plans each cell.

1. Replicas that are somewhere keep their cell; new ones are given a device, the most wanted first: where they fit
   best, on a node without a sibling, where least runs. One that fits need not wait until its cell is planned.
2. Cells that got somebody new, or lost a device, are planned anew; then those whose replicas or wishes changed in
   another way than the last plan said; of those with other traffic, or with bytes that came free, a few each time.
   What replicas cost each other on a device or a node (`crowd`) is a cost of the device to each of them
   (`Demand.bias`), so that a cell's plan spreads what can be spread. That is right for one that moves alone: whoever
   carries a plan out moves one replica of a cell at a time, and asks for another plan.
3. A replica that a cell cannot serve tries others, those with the most room first.
4. On request (`improve`) replicas that lose most by their cell's squeeze change places, as long as the sum of the two
   cells' costs falls.

Whoever asks for a plan says when its time is over (`over`). Cells that are left then keep their plan, and are solved by
the next one: a plan takes about as long for a large fleet as for a small one, however much has changed.

Devices are named "node/device". Sleep is a node's own business: to the fleet a replica is assigned to a device or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from server.cluster.crowd import NEIGHBOUR_S, counted, node_of, places_of, with_crowd
from server.cluster.exchange import LEAST_REGRET, Cell, exchange, roomiest
from server.cluster.rooms import Rooms, nbytes
from server.scheduler.demand import COLD, HOT, Choice, Demand, Device, Plan, Rung
from server.scheduler.options import UNMET_S
from server.scheduler.planner import TIME_LIMIT_S, plan

CELL_DEVICES = 8
"""Devices of one cell; a node that has more is a cell of its own."""
TRIES, LOOKS = 3, 2
"""Cells that are tried for a replica; how often a cell's new replicas are planned anew for what they found."""
DRIFTED_CELLS = 4
"""Cells with other traffic than before that one plan looks at, the longest waiting first."""


@dataclass(frozen=True)
class FleetPlan:
    """`choices`: for every replica; `planned`: how many cells were solved, `left`: how many could not be any more;
    `unmet`: needed and nowhere hot."""

    choices: dict[str, Choice]
    reasons: dict[str, str]
    cost: float
    planned: int
    unmet: tuple[str, ...]
    left: int = 0


class Fleet:
    """Cells and their plans; remembers what has not changed."""

    def __init__(self, cell_devices: int = CELL_DEVICES, time_limit_s: float = TIME_LIMIT_S) -> None:
        self.cells: dict[str, Cell] = {}
        self._size, self._limit = cell_devices, time_limit_s
        self._cell_of_node: dict[str, str] = {}
        self._seen: dict[str, Demand] = {}
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
            cell.dirty = cell.urgent = True

    def remove_node(self, node: str) -> None:
        """A node is gone."""
        cell = self.cells.get(self._cell_of_node.pop(node, ""))
        if cell is None:
            return
        cell.devices = {name: device for name, device in cell.devices.items() if node_of(name) != node}
        cell.dirty = cell.urgent = True
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

    def plan(self, demands: Sequence[Demand], improve: int = 0, over: Callable[[], bool] = lambda: False) -> FleetPlan:
        """The plan for these replicas; cells in which nothing changed keep theirs. `improve`: exchanges to try; `over`:
        whether no further cell is to be solved."""
        self._planned = 0
        new = self._keep_homes(demands)
        if new:
            self._give_places(new)
        changed = sorted((c for c in self.cells.values() if c.dirty), key=lambda c: (not c.urgent, -c.waits))
        drifted = sorted((c for c in self.cells.values() if c.drifted and not c.dirty), key=lambda c: -c.drifted)
        for cell in [*changed, *drifted[:DRIFTED_CELLS]]:
            if self._planned and over():
                cell.waits += 1
            else:
                self._solve(cell)
        self._place_unmet(over)
        for _ in range(improve):
            if over() or not exchange(self.cells.values(), self._plan_of, over):
                break
        return self._whole(demands)

    def _give_places(self, new: list[Demand]) -> None:
        rooms = Rooms(self.cells.values())
        for demand in sorted(new, key=lambda d: (not d.pinned, -d.rate * d.priority, -d.weights, d.name)):
            device, fits = rooms.best(demand)
            if device is not None:
                self._join(demand, device, fits)
                rooms.take(demand, device)

    def _keep_homes(self, demands: Sequence[Demand]) -> list[Demand]:
        """Bring the cells' members up to date; those that have no cell are returned."""
        homes = {name: cell for cell in self.cells.values() for name in cell.members}
        seen, self._seen = self._seen, {demand.name: demand for demand in demands}
        new = []
        for demand in demands:
            there = demand.now.devices if demand.now.residency == HOT else ()
            before = homes.get(demand.name)
            if there and seen.get(demand.name) is demand and before is self._cell_at(there[0]):
                continue  # the same as in the last plan, as most are
            cell = self._cell_at(there[0]) if there else before
            if before is not None and before is not cell:
                del before.members[demand.name]
                before.drifted += 1
            if cell is None or (cell.plan is not None and demand.name in cell.plan.unmet and not there):
                if cell is not None:
                    cell.members.pop(demand.name, None)
                    cell.drifted += 1
                new.append(demand)
                continue
            known = cell.members.get(demand.name)
            if known is None or (_changed(cell, known, demand) and not _as_planned(cell, known, demand)):
                cell.dirty = True
            elif _drifted(known, demand):
                cell.drifted += 1
            elif known.now == demand.now:
                if known.devices is not demand.devices:
                    cell.members[demand.name] = replace(known, devices=demand.devices)
                continue
            given = known.bias if known is not None and not there else ()
            cell.members[demand.name] = replace(demand, bias=given) if given else demand
        for name, cell in homes.items():
            if name not in self._seen and cell.members.pop(name, None) is not None:
                cell.drifted += 1  # what it leaves makes room for somebody: that can wait
        return new

    def _join(self, demand: Demand, device: str, fits: bool) -> None:
        cell = self.cells[self._cell_of_node[node_of(device)]]
        tried = cell.plan is not None and demand.name in cell.plan.unmet
        cell.members[demand.name] = _given(demand, device)
        cell.dirty, cell.urgent = True, cell.urgent or not (tried or fits)
        if fits:  # it need not wait until its cell is planned
            size, rung = round(nbytes(demand, finest=True)), next(iter(demand.rungs), Rung("", 0.0, 0.0))
            lease = demand.lease(rung)
            cell.given[demand.name] = Choice(demand.name, HOT, ((device, size),), rung.name, rung.kl, lease)

    def _solve(self, cell: Cell) -> Plan:
        cell.plan = self._plan_of(cell, cell.members)
        cell.dirty, cell.urgent, cell.drifted, cell.waits = False, False, 0, 0
        cell.given.clear()
        cell.stuck.clear()
        return cell.plan

    def _plan_of(self, cell: Cell, members: Mapping[str, Demand]) -> Plan:
        """New ones see each other where they were given places, and may find better ones: then they see each other
        there, as long as that makes the plan better."""
        self._planned += 1
        found = self._once(cell, members)
        for _ in range(LOOKS):
            moved = {}
            for name, choice in found.choices.items():
                demand = members[name]
                if choice.devices and demand.now.residency != HOT and places_of(demand) != choice.devices[:1]:
                    moved[name] = _given(demand, choice.devices[0])
            if not moved:
                break
            members = {**members, **moved}
            again = self._once(cell, members)
            if again.cost >= found.cost - LEAST_REGRET:
                break
            found = again
        return found

    def _once(self, cell: Cell, members: Mapping[str, Demand]) -> Plan:
        biased = with_crowd(members.values(), cell.devices)
        return counted(plan(biased, list(cell.devices.values()), time_limit_s=self._limit), members, biased)

    def _cell_at(self, device: str) -> Cell | None:
        return self.cells.get(self._cell_of_node.get(node_of(device), ""))

    def cell_of(self, node: str) -> str:
        """The cell of a node, "" for one that is not planned."""
        return self._cell_of_node.get(node, "")

    def _place_unmet(self, over: Callable[[], bool]) -> None:
        """Those that their cell cannot serve try the cells with the most room."""
        for cell in list(self.cells.values()):
            for name in cell.plan.unmet if cell.plan is not None and not cell.dirty else ():
                demand = cell.members.get(name)
                if demand is None or demand.now.residency == HOT:
                    continue
                for other in [] if over() else roomiest(self.cells.values(), cell, demand)[:TRIES]:
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
        planned = [cell.plan for cell in self.cells.values() if cell.plan is not None and not cell.dirty]
        for found in planned:
            choices |= found.choices
            reasons |= found.reasons
            cost += found.cost
        dirty = [cell for cell in self.cells.values() if cell.dirty]
        given = {name: choice for cell in dirty for name, choice in cell.given.items()}
        waiting = {name for cell in dirty for name in cell.members}
        for demand in demands:
            if demand.name in choices:
                continue
            if demand.now.residency == HOT:
                shares = tuple((device, 0) for device in demand.now.devices)
                choices[demand.name] = Choice(demand.name, HOT, shares, demand.now.setting)
                reasons[demand.name] = "stays until its cell is planned"
                continue
            if demand.name in given:
                choices[demand.name], reasons[demand.name] = given[demand.name], "fits there beside the others"
                continue
            lost = UNMET_S if demand.needed or demand.pinned else 0.0
            choices[demand.name] = Choice(demand.name, COLD, cost=lost)
            later = demand.name in waiting
            reasons[demand.name] = "the next plan has a place for it" if later else "no node has a device for it"
            cost += lost
        must = [d.name for d in demands if d.needed or d.pinned or d.busy]
        unmet = tuple(name for name in must if choices[name].residency != HOT)
        return FleetPlan(choices, reasons, cost, self._planned, unmet, sum(c.dirty for c in self.cells.values()))


def _given(demand: Demand, device: str) -> Demand:
    """A new replica that has a place."""
    return replace(demand, bias=((device, -NEIGHBOUR_S / 2),))


def _changed(cell: Cell, before: Demand, now: Demand) -> bool:
    """Whether a replica's place or wishes are others. Devices that it may use elsewhere in the fleet come and go."""
    if now.devices is not before.devices:
        known, allowed = frozenset(before.devices), frozenset(now.devices)
        if any((not known or name in known) != (not allowed or name in allowed) for name in cell.devices):
            return True
    return _fixed(now) != _fixed(before)


def _fixed(demand: Demand) -> tuple[object, ...]:
    """What a plan depends on, beside traffic and devices."""
    d = demand
    needs = d.weights, d.rungs, d.overhead, d.floor_tokens, d.floor_sequences, d.max_kl, d.max_bytes
    # The setting is its node's business.
    return (*needs, d.now.residency, d.now.devices, d.needed, d.pinned, d.busy, d.priority, d.resting, d.load_s)


def _as_planned(cell: Cell, before: Demand, now: Demand) -> bool:
    """Whether all that changed is that the plan was carried out, which leads to the same plan again."""
    choice = cell.plan.choices.get(now.name) if cell.plan is not None else None
    if choice is None or now.now.residency != HOT or choice.devices != now.now.devices:
        return False
    return not _changed(cell, replace(before, now=now.now, needed=now.needed), now)


def _drifted(before: Demand, now: Demand) -> bool:
    """Whether its traffic is another one by half."""
    more = abs(now.rate - before.rate) > 0.5 * max(before.rate, 0.01)
    return more or now.tokens > before.tokens * 1.5 or now.sequences > before.sequences * 1.5

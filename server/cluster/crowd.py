"""What replicas cost each other that share a device or a node. Pure.

Every pair counts once, at what both lose, so that a replica that moves alone changes the sum over all by exactly the
difference of what it sees at its two places (`Crowd.extra`). Two that move at once may not: see `Fleet`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from server.scheduler.demand import HOT, Choice, Demand, Plan
from server.scheduler.options import switch_cost

SERVICE_S = 4.0
"""Device seconds that a request is taken to cost, for the load of devices."""
NEIGHBOUR_S = 1e-6
"""What any other model on a device costs, so that those that nobody asks for are spread too."""
CROWD_S = 0.5
"""What a device that others keep busy costs: seconds of delay for every request, per other sequence that runs."""
SIBLING_S = 0.05
"""A second replica of one model on a node: it serves no purpose there that another node would not serve better."""


def node_of(device: str) -> str:
    """The node of "node/device"."""
    return device.rpartition("/")[0]


def model_of(replica: str) -> str:
    """The model of "model#3"."""
    return replica.rpartition("#")[0] or replica


def load_of(demand: Demand) -> float:
    """Sequences that a replica keeps running on its device."""
    return demand.rate * SERVICE_S


def places_of(demand: Demand) -> tuple[str, ...]:
    """Where a replica is, or was given a place (the only device of its first bias)."""
    if demand.now.residency == HOT and demand.now.devices:
        return demand.now.devices
    return (demand.bias[0][0],) if demand.bias else ()


class Crowd:
    """Who is where. `total`: seconds of delay per second that they cost each other."""

    def __init__(self) -> None:
        self.total = 0.0
        self._load: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._siblings: dict[tuple[str, str], int] = {}

    def add(self, demand: Demand, devices: Sequence[str]) -> None:
        """One more there."""
        self.total += sum(self.extra(demand, device) for device in devices)
        self._put(demand, devices, 1)

    def remove(self, demand: Demand, devices: Sequence[str]) -> None:
        """One that was added."""
        self._put(demand, devices, -1)
        self.total -= sum(self.extra(demand, device) for device in devices)

    def extra(self, demand: Demand, device: str) -> float:
        """What it costs all that one more is on a device."""
        # As many requests of each as run of the other on an average wait for each other, so both lose the same.
        load = 2 * demand.rate * CROWD_S * self._load.get(device, 0.0)
        siblings = self._siblings.get((model_of(demand.name), node_of(device)), 0)
        return load + NEIGHBOUR_S * self._count.get(device, 0) + SIBLING_S * siblings

    def _put(self, demand: Demand, devices: Sequence[str], sign: int) -> None:
        for device in devices:
            self._load[device] = self._load.get(device, 0.0) + sign * load_of(demand)
            self._count[device] = self._count.get(device, 0) + sign
        for node in {node_of(device) for device in devices}:
            key = model_of(demand.name), node
            self._siblings[key] = self._siblings.get(key, 0) + sign


def move_s(demand: Demand) -> float:
    """What a replica's move costs, in seconds of delay per second; 0 for one that is nowhere yet. The planner counts it
    once; here it is asked for once more: what is known of traffic is an estimate, and a move for half of its price of
    gain would be taken back when the estimate has changed."""
    return switch_cost(demand, HOT, ("",), "") if demand.now.residency == HOT and not demand.busy else 0.0


def with_crowd(members: Iterable[Demand], devices: Iterable[str]) -> list[Demand]:
    """The members with what the others cost on each device, as far as it is known where they will be. Those that leave
    (`busy`) hold bytes until then, but nobody makes room for their load."""
    devices, crowd, seen = list(devices), Crowd(), []
    order = sorted(members, key=lambda d: (not d.busy, d.now.residency != HOT, -load_of(d), d.name))
    for demand in order:
        if demand.now.residency == HOT and not demand.busy:
            crowd.add(demand, places_of(demand))
    for demand in order:
        places = places_of(demand)
        here = demand.now.residency == HOT and not demand.busy
        if here:
            crowd.remove(demand, places)
        stays = NEIGHBOUR_S / 2 + (move_s(demand) if here else 0.0)
        costs = [crowd.extra(demand, device) - (stays if device in places else 0.0) for device in devices]
        if not demand.busy:  # of new ones each sees those before it: of two in each other's way one stays
            crowd.add(demand, places)
        least = min(costs, default=0.0)  # only differences count: to be away is no better
        bias = tuple((device, cost - least) for device, cost in zip(devices, costs, strict=True))
        seen.append(replace(demand, bias=bias))
    return seen


def counted(plan: Plan, members: Mapping[str, Demand], biased: Iterable[Demand]) -> Plan:
    """A plan made with :func:`with_crowd`: choices with what they cost alone, the sum with what all cost each other."""
    biases = {demand.name: dict(demand.bias) for demand in biased}
    choices = {}
    for name, choice in plan.choices.items():
        extra = sum(biases[name][device] for device in choice.devices)
        choices[name] = choice._replace(cost=choice.cost - extra)
    return replace(plan, choices=choices, cost=cost_of(choices, members))


def cost_of(choices: Mapping[str, Choice], members: Mapping[str, Demand]) -> float:
    """Seconds of delay per second of those choices whose replicas are still members."""
    there = [(members[name], choice) for name, choice in choices.items() if name in members]
    return sum(choice.cost for _, choice in there) + crowd_of(choices, members).total


def crowd_of(choices: Mapping[str, Choice], members: Mapping[str, Demand]) -> Crowd:
    """The members where the choices have them."""
    crowd = Crowd()
    for name, choice in choices.items():
        if name in members and not members[name].busy:
            crowd.add(members[name], choice.devices)
    return crowd

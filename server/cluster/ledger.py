"""What the conductor knows of nodes and replicas. No I/O; the clock is an argument."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from server.cluster import wire
from server.cluster.scaling import Traffic
from server.scheduler.demand import HOST, Device
from server.scheduler.steward import RATE_S

LEAST_S = 30.0
"""A rate is never taken from less time: the first requests say little."""


@dataclass
class Node:
    """One machine: its last report, and when it came (monotonic seconds)."""

    name: str
    address: str = ""
    life: str = ""
    seen_at: float = 0.0
    draining: bool = False
    devices: list[wire.DeviceState] = field(default_factory=list)
    version: int = 1
    """Counts changes of what it shall serve."""

    def fleet_devices(self) -> list[Device]:
        """Its devices as the planner takes them, host memory among them."""
        return [Device(f"{self.name}/{each.name}", each.budget) for each in self.devices]


@dataclass
class Replica:
    """One copy of a model. `node` and `device` are empty until a plan gave it a place; a model that is spread over
    several GPUs of its node has them all in `device`, with commas between."""

    name: str
    model: str
    node: str = ""
    device: str = ""
    leaving: bool = False
    """Another one shall take its place; it goes when that one is hot."""
    retiring: bool = False
    """It takes nothing new and ends with its last stream."""
    state: wire.ReplicaState | None = None
    placed_at: float = 0.0

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that hold it, as the planner names them."""
        return tuple(f"{self.node}/{device}" for device in self.device.split(",")) if self.node else ()

    @property
    def live(self) -> bool:
        """Whether it counts as one of its model's replicas."""
        return not self.leaving and not self.retiring

    @property
    def hot(self) -> bool:
        """Whether it can answer now, or after a wake-up."""
        return self.state is not None and self.state.state in ("hot", "asleep") and not self.retiring

    @property
    def busy(self) -> int:
        """Requests that it has."""
        return self.state.streams + self.state.waiting if self.state is not None else 0

    @property
    def running(self) -> int:
        """Those of them that have a place in its batch."""
        return self.state.stats.running if self.state is not None else 0


class Replicas(dict[str, Replica]):
    """All replicas by name; also by model and by node, for a fleet has thousands and every report asks for a few."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, dict[str, Replica]] = {}
        self._on: dict[str, dict[str, Replica]] = {}

    def add(self, replica: Replica) -> Replica:
        """One more."""
        self[replica.name] = self._of.setdefault(replica.model, {})[replica.name] = replica
        self._on.setdefault(replica.node, {})[replica.name] = replica
        return replica

    def settle(self, replica: Replica, node: str, device: str) -> None:
        """It is given a place."""
        self._on[replica.node].pop(replica.name)
        replica.node, replica.device = node, device
        self._on.setdefault(node, {})[replica.name] = replica

    def drop(self, name: str) -> None:
        """It is gone."""
        replica = self.pop(name, None)
        if replica is not None:
            self._of[replica.model].pop(name)
            self._on[replica.node].pop(name)

    def of(self, model: str) -> Collection[Replica]:
        """A model's."""
        return self._of.get(model, {}).values()

    def on(self, node: str) -> Collection[Replica]:
        """A node's; those of "" have no place yet."""
        return self._on.get(node, {}).values()


@dataclass
class Model:
    """One configured model: what is wanted of it, and its traffic."""

    name: str
    since: float = 0.0
    """From when on its traffic is known."""
    rate: float = 0.0
    rated_at: float = 0.0
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)  # by gateway: how many, and until when
    wanted: bool = False
    """Whether it shall be somewhere: a startup model, or one that somebody asked for."""
    stage: str = ""
    traffic: Traffic = field(default_factory=Traffic)
    pause_until: float = 0.0
    """A replica was given up for want of bytes: until then no other one is made for it, unless requests wait."""

    def came(self, count: int, now: float) -> None:
        """Requests since the last call."""
        self.rate = self.rate * math.exp(-(now - self.rated_at) / RATE_S) + count / RATE_S
        self.rated_at = now
        self.traffic.came(count, now)

    def rate_at(self, now: float) -> float:
        """Requests per second, averaged over the last RATE_S, or over as much of them as is known."""
        known = 1 - math.exp(-max(LEAST_S, now - self.since) / RATE_S)
        return self.rate * math.exp(-(now - self.rated_at) / RATE_S) / known

    def waits(self, now: float) -> int:
        """Requests that wait for it in all gateways."""
        return sum(count for count, until in self.waiting.values() if until > now)


def devices_for(wanted: str, names: list[str]) -> tuple[str, ...]:
    """The fleet's devices that a model may use: GPUs where there are some, unless its configuration names others."""
    gpus = tuple(name for name in names if not name.endswith(f"/{HOST}"))
    if wanted in ("auto", "cuda"):
        return gpus or tuple(names) or ("none/none",)
    return tuple(name for name in names if name.endswith(f"/{wanted}")) or (f"none/{wanted}",)

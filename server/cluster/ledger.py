"""What the conductor knows of nodes and replicas. No I/O; the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.cluster import wire
from server.scheduler.demand import Device


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
    """One copy of a model. `node` and `device` are empty until a plan gave it a place."""

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


@dataclass
class Model:
    """One configured model: what is wanted of it, and its traffic."""

    name: str
    rate: float = 0.0
    rated_at: float = 0.0
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)  # by gateway: how many, and until when
    wanted: bool = False
    """Whether it shall be somewhere: a startup model, or one that somebody asked for."""
    stage: str = ""
    low_since: float | None = None
    pause_until: float = 0.0
    """A replica was given up for want of bytes: until then no other one is made for it, unless requests wait."""

    def waits(self, now: float) -> int:
        """Requests that wait for it in all gateways."""
        return sum(count for count, until in self.waiting.values() if until > now)

"""What the planner is told and what it answers: plain values, no behaviour beyond arithmetic. Pure.

Bytes are integers, times are seconds, rates are requests per second, KL is nats per token against the exact cache.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

HOT, ASLEEP, COLD = "hot", "asleep", "cold"
HOST = "cpu"
"""The device whose bytes are host memory: models that run on the CPU, and weights of models that sleep."""


@dataclass(frozen=True)
class Device:
    """A device and the bytes that the planner may give away there, everything of ours included."""

    name: str
    budget: int


@dataclass(frozen=True)
class Rung:
    """One setting of a model's ladder: measured KL, bytes per token of packed pages, bytes of a sequence's window."""

    name: str
    kl: float
    token_bytes: float
    window_bytes: int = 0

    def nbytes(self, tokens: int, sequences: int) -> int:
        """KV bytes of `tokens` tokens in all, spread over `sequences`."""
        return round(self.token_bytes * tokens) + self.window_bytes * sequences


@dataclass(frozen=True)
class Placement:
    """Where a model is: its residency, the devices that hold it, and the setting of its cache."""

    residency: str = COLD
    devices: tuple[str, ...] = ()
    setting: str = ""


@dataclass(frozen=True)
class Demand:
    """One model as the planner sees it.

    Attributes:
        weights: bytes; overhead: context and workspace on every device it uses.
        rungs: its settings that may be used, finest first.
        tokens, sequences: the cache that its traffic wants; held: tokens in it now, which only parking makes fewer.
        floor_tokens, floor_sequences: what it must have.
        rate, priority: traffic, and how much a second of it counts (1: normal).
        wake_s, load_s: to make it hot from host memory, from disk. can_sleep: its weights can be kept in host memory.
        max_kl: no setting above it; max_bytes: no more than that on devices, weights included.
        residue: bytes that its process holds on its device while it sleeps (a CUDA context).
        devices: where it may run, () for anywhere but the host. splittable: it may be spread over several.
        pinned: stays hot. needed: requests wait for it. busy: requests run, so it stays hot where it is.
        live: it holds cache that can only be squeezed, so no finer setting. resting: keep-alive is over, so not hot.
        now: where it is.
        bias: what a device costs it beside all that, in seconds of delay per second: others' load there, in a fleet.
    """

    name: str
    weights: int
    rungs: tuple[Rung, ...]
    overhead: int = 0
    tokens: int = 0
    sequences: int = 1
    held: int = 0
    floor_tokens: int = 0
    floor_sequences: int = 1
    rate: float = 0.0
    priority: float = 1.0
    wake_s: float = 1.0
    load_s: float = 10.0
    can_sleep: bool = True
    residue: int = 0
    max_kl: float | None = None
    max_bytes: int | None = None
    devices: Collection[str] = ()
    splittable: bool = True
    pinned: bool = False
    needed: bool = False
    busy: bool = False
    live: bool = False
    resting: bool = False
    now: Placement = Placement()
    bias: tuple[tuple[str, float], ...] = ()

    def floor(self, rung: Rung) -> int:
        """The smallest lease at a setting, in bytes."""
        return rung.nbytes(self.floor_tokens, self.floor_sequences)

    def lease(self, rung: Rung) -> int:
        """The lease that its traffic wants at a setting, in bytes."""
        return max(self.floor(rung), rung.nbytes(self.tokens, self.sequences))


class Choice(NamedTuple):
    """One way to hold one model. `shares`: bytes on each device; `cost`: seconds of delay per second, KL included.
    A tuple because a plan of many models makes thousands of them."""

    model: str
    residency: str
    shares: tuple[tuple[str, int], ...] = ()
    setting: str = ""
    kl: float = 0.0
    lease: int = 0
    cost: float = 0.0

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that hold it: none for a model that is not hot."""
        return tuple(name for name, _ in self.shares) if self.residency == HOT else ()

    @property
    def placement(self) -> Placement:
        """Where the model is once this is done."""
        return Placement(self.residency, self.devices, self.setting)


@dataclass(frozen=True)
class Plan:
    """The planner's answer: one choice per model with its reason.

    Attributes:
        cost: seconds of delay per second, moves included; penalty: the part of it for wishes that cannot be met.
        solver: "exact" (proved within the gap), "search" (found by the deterministic search), "stay" (no move pays).
        unmet: models that are needed or pinned and cannot be hot.
        free: bytes of each device's budget that nobody is given; kl: traffic-weighted mean of the hot models.
    """

    choices: dict[str, Choice]
    reasons: dict[str, str]
    cost: float
    solver: str
    unmet: tuple[str, ...] = ()
    free: dict[str, int] = field(default_factory=dict)
    kl: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, for `spectral plan --json` and GET /admin/plan."""
        return {
            "solver": self.solver,
            "cost": self.cost,
            "kl": self.kl,
            "unmet": list(self.unmet),
            "free": dict(self.free),
            "models": {
                name: {
                    "residency": choice.residency,
                    "devices": list(choice.devices),
                    "setting": choice.setting,
                    "kl": choice.kl,
                    "lease_bytes": choice.lease,
                    "bytes": dict(choice.shares),
                    "reason": self.reasons[name],
                }
                for name, choice in self.choices.items()
            },
        }

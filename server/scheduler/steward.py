"""What is known of every model, and from that what to do: the scheduler's policy. Pure: the clock is an argument.

The loop tells a `Steward` what happens (requests, reports, moves that ended) and asks what to do; the simulator of
bench/scheduler.py drives the same object with a virtual clock. A decision is a list of actions in two phases: those
that free bytes come first, those that need bytes (`needs`) begin when the devices have them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.scheduler import words
from server.scheduler.demand import ASLEEP, COLD, HOST, HOT, Choice, Demand, Device, Placement, Plan, Rung
from server.scheduler.planner import TIME_LIMIT_S, plan

RATE_S = 600.0
"""Time over which traffic is averaged."""
PEAK_S = 300.0
"""Half-life of the largest cache that a model lately had: what its lease is sized for."""
RELAX_AFTER_S = 60.0
"""A squeezed model gets a finer setting again only after so long without a squeeze, and only while it holds nothing."""
REPLAN_S = 30.0
RETRY_S = 1.0
REFUSED_S = 30.0
"""A model whose worker did not do as it was told is planned around for so long."""
LEASE_SLACK = 0.1
"""A lease that would grow by less than this part is left alone."""


@dataclass(frozen=True)
class Facts:
    """What a model needs: predicted before its first load, measured after it. Bytes, seconds, tokens."""

    weights: int
    rungs: tuple[Rung, ...]
    overhead: int = 0
    context: int = 8192
    load_s: float = 10.0
    wake_s: float = 1.0
    can_sleep: bool = True
    measured: bool = False


@dataclass(frozen=True)
class Wishes:
    """What its owner wants of a model. `keep_alive_s`: stays hot so long after its last request; None: for ever."""

    priority: float = 1.0
    pinned: bool = False
    keep_alive_s: float | None = None
    max_kl: float | None = None
    min_context: int = 2048
    max_concurrency: int = 8
    max_bytes: int | None = None
    devices: tuple[str, ...] = ()
    splittable: bool = True


@dataclass
class Ward:
    """One model in the steward's care."""

    name: str
    facts: Facts
    wishes: Wishes
    now: Placement = Placement()
    lease: int = 0
    moving: Placement | None = None
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    rate: float = 0.0
    rated_at: float = 0.0
    peak_tokens: float = 0.0
    peak_sequences: float = 0.0
    used_at: float = 0.0
    keep_alive_s: float | None = None
    squeezed_at: float = -math.inf
    residue: int = 0
    beside: int = 0  # bytes that its process on a CPU is seen to hold beside weights and cache
    refused_at: float = -math.inf
    pinned: bool = False
    laid_down: bool = False  # put to sleep by hand: until somebody asks for it

    def rate_at(self, now: float) -> float:
        """Requests per second, averaged over the last RATE_S."""
        return self.rate * math.exp(-(now - self.rated_at) / RATE_S)

    @property
    def rung(self) -> Rung | None:
        """The setting it is at."""
        return next((rung for rung in self.facts.rungs if rung.name == self.now.setting), None)

    def resting(self, now: float) -> bool:
        """Whether its keep-alive is over, or it was put to sleep by hand."""
        alive = 0.0 if self.laid_down else self.keep_alive_s
        return alive is not None and not self.running and not self.waiting and now - self.used_at >= alive


@dataclass(frozen=True)
class Action:
    """One thing to do. kind: lease (a smaller one), squeeze, sleep, evict; wake, load, move; grow (the lease), relax.

    `target`: where the model is afterwards; `lease`: its KV bytes; `needs`: bytes by device that have to be free;
    `weights`: those of them that are weights, for a model that is spread over several devices.
    """

    kind: str
    model: str
    target: Placement
    lease: int
    reason: str
    needs: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def expected(self) -> dict[str, int]:
        """Bytes by device beside the cache."""
        total = max(1, sum(self.needs.values()))
        return {name: size - round(self.lease * size / total) for name, size in self.needs.items()}


FREEING = ("squeeze", "lease", "sleep", "evict")


class Steward:
    """Knows every model and decides. Not thread-safe; belongs to the loop."""

    def __init__(self) -> None:
        self.wards: dict[str, Ward] = {}
        self.last: Plan | None = None
        self._planned_at = -math.inf
        self._dirty, self._urgent = True, False

    def add(self, name: str, facts: Facts, wishes: Wishes, now: float = 0.0) -> Ward:
        """Take a model in care, cold."""
        ward = Ward(name, facts, wishes, used_at=now, rated_at=now, keep_alive_s=wishes.keep_alive_s)
        self.wards[name] = ward
        return ward

    def remove(self, name: str) -> None:
        """Forget a model."""
        self.wards.pop(name, None)
        self._dirty = True

    # ------------------------------------------------------------------------------------------ what happens

    def requested(self, name: str, now: float, keep_alive_s: float | None = None, *, given: bool = False) -> None:
        """A request came. `keep_alive_s` (if `given`) holds from this request on, as Ollama's keep_alive does."""
        ward = self.wards[name]
        ward.rate, ward.rated_at, ward.used_at = ward.rate_at(now) + 1 / RATE_S, now, now
        ward.keep_alive_s = keep_alive_s if given else ward.wishes.keep_alive_s
        ward.laid_down = False
        if ward.now.residency != HOT:
            self._dirty = True

    def report(self, name: str, now: float, *, running: int, waiting: int, kv_tokens: int) -> None:
        """What a model does: sequences that run, requests that wait (for a load too), tokens in its cache."""
        ward = self.wards[name]
        fade = 0.5 ** (max(0.0, now - ward.used_at) / PEAK_S) if not running else 1.0
        ward.peak_tokens = max(float(kv_tokens), ward.peak_tokens * fade)
        ward.peak_sequences = max(float(running + waiting), ward.peak_sequences * fade)
        if running:
            ward.used_at = now
        unmet = self.last is not None and bool(self.last.unmet)
        if (waiting > ward.waiting and ward.now.residency != HOT) or (unmet and ward.running and not running):
            self._dirty = True
        ward.running, ward.waiting, ward.kv_tokens = running, waiting, kv_tokens

    def moved(self, name: str, placement: Placement, lease: int, now: float, *, refused: bool = False) -> None:
        """A move ended, or failed: this is where the model is now. One that was `refused` is left alone for a while."""
        ward = self.wards[name]
        ward.refused_at = now if refused else ward.refused_at
        if ward.now.residency == HOT and placement.setting != ward.now.setting:
            ward.squeezed_at = now
        ward.now, ward.lease, ward.moving = placement, lease, None
        self._dirty = True

    def changed(self, *, urgent: bool = False) -> None:
        """Something else changed: a device's budget, a wish. `urgent`: somebody took memory, and no retry of what could
        not be done is waited for."""
        self._dirty, self._urgent = True, self._urgent or urgent

    # ------------------------------------------------------------------------------------------ what to do

    def due(self, now: float) -> bool:
        """Whether it is time to decide: something changed that matters, or REPLAN_S have passed."""
        if now - self._planned_at >= REPLAN_S:
            return True
        wait = RETRY_S if self.last is not None and self.last.unmet and not self._urgent else 0.0
        if self._dirty and now - self._planned_at >= wait:
            return True
        return any(w.now.residency == HOT and w.moving is None and w.resting(now) for w in self.wards.values())

    def demands(self, now: float) -> list[Demand]:
        """Every model as the planner sees it."""
        return [self.demand(name, now) for name in self.wards]

    def demand(self, name: str, now: float) -> Demand:
        """One of them."""
        ward = self.wards[name]
        facts, wishes, at = ward.facts, ward.wishes, ward.moving or ward.now
        floor = min(wishes.min_context, facts.context)
        sequences = max(1, wishes.max_concurrency)
        fixed = at.residency == HOT and (ward.moving is not None or now - ward.refused_at < REFUSED_S)
        rungs = tuple(rung for rung in facts.rungs if rung.name == at.setting) if fixed else ()
        return Demand(
            name=ward.name,
            weights=facts.weights,
            rungs=rungs or facts.rungs,
            overhead=max(facts.overhead, ward.beside),
            tokens=max(floor, math.ceil(ward.peak_tokens * 1.25)),
            sequences=max(sequences, math.ceil(ward.peak_sequences)),
            held=ward.kv_tokens if ward.running else 0,
            floor_tokens=floor,
            floor_sequences=sequences,
            rate=ward.rate_at(now),
            priority=wishes.priority,
            wake_s=facts.wake_s,
            load_s=facts.load_s,
            can_sleep=facts.can_sleep,
            residue=ward.residue if at.residency != COLD else 0,
            max_kl=wishes.max_kl,
            max_bytes=wishes.max_bytes,
            devices=wishes.devices,
            splittable=wishes.splittable,
            pinned=wishes.pinned or ward.pinned,
            needed=ward.waiting > 0,
            busy=at.residency == HOT and (ward.running > 0 or fixed),
            live=at.residency == HOT and (ward.kv_tokens > 0 or now - ward.squeezed_at < RELAX_AFTER_S),
            resting=ward.resting(now),
            now=at,
        )

    def decide(self, now: float, devices: Sequence[Device], time_limit_s: float = TIME_LIMIT_S) -> list[Action]:
        """The plan's actions, those that free bytes first; models that are on the move are left alone.

        The caller carries them out, calls :meth:`begin` when one starts and :meth:`moved` when it ended.
        """
        self.last = plan(self.demands(now), devices, time_limit_s=time_limit_s)
        self._planned_at, self._dirty, self._urgent = now, False, False
        actions = []
        for ward in self.wards.values():
            choice = self.last.choices[ward.name]
            if ward.moving is None:
                action = self._action(ward, choice, self.last.reasons[ward.name], now)
                if action is not None:
                    actions.append(action)
        return sorted(actions, key=lambda action: (self._rank(action), action.model))

    def _rank(self, action: Action) -> tuple[int, float]:
        """The relief ladder, then what needs bytes: those for whom requests wait first."""
        ward = self.wards[action.model]
        if action.kind in FREEING:
            live = 1 if ward.kv_tokens else 0
            return (("lease", "squeeze", "sleep", "evict").index(action.kind) * 2 + live, 0.0)
        return (100, -float(ward.waiting)) if action.kind in ("wake", "load", "move") else (200, 0.0)

    def begin(self, action: Action) -> None:
        """An action starts that moves the model elsewhere: until it ended nothing else is done with it."""
        self.wards[action.model].moving = action.target

    def _action(self, ward: Ward, choice: Choice, reason: str, now: float) -> Action | None:
        here, there = ward.now, choice.placement
        needs = dict(choice.shares) if choice.residency == HOT else {}
        # Weights and cache are divided alike, and every device has the whole overhead.
        cache = {name: max(0, size - ward.facts.overhead) for name, size in needs.items()} if len(needs) > 1 else {}
        weights = {name: ward.facts.weights * size // max(1, sum(cache.values())) for name, size in cache.items()}
        make = lambda kind, why: Action(kind, ward.name, there, choice.lease, why, needs, weights)  # noqa: E731
        if there.residency == HOT:
            if here.residency == COLD:
                return make("load", reason)
            if here.residency == ASLEEP:
                return make("wake" if here.devices in ((), there.devices) else "move", reason)
            if here.devices != there.devices:
                return make("move", reason) if not ward.running else None
            return self._resize(ward, choice)
        if ward.running or ward.waiting or here.residency == COLD or here.residency == there.residency:
            return None
        if ward.laid_down and not any(one.waiting and one.now.residency != HOT for one in self.wards.values()):
            return None  # asleep by hand: it gives way to those that somebody waits for, and to no calculation
        if there.residency == ASLEEP:
            asleep = Placement(ASLEEP, here.devices, here.setting)
            return Action("sleep", ward.name, asleep, 0, reason, {HOST: ward.facts.weights})
        return Action("evict", ward.name, there, 0, reason)

    def _resize(self, ward: Ward, choice: Choice) -> Action | None:
        """Another setting, or another lease, where it is."""
        there, old = choice.placement, ward.rung
        if there.setting != ward.now.setting and old is not None:
            new = next(rung for rung in ward.facts.rungs if rung.name == there.setting)
            coarser = new.token_bytes < old.token_bytes
            freed = round((old.token_bytes - new.token_bytes) * ward.kv_tokens)
            change = f"{old.name}->{new.name}, KL {words.nats(old.kl)}->{words.nats(new.kl)}"
            if coarser:
                why = f"squeezed {ward.name} {change}: {words.human(freed)} at once, {self._for_whom()}"
                return Action("squeeze", ward.name, there, choice.lease, why)
            why = f"relaxed {ward.name} {change}: memory is free"
            return Action("relax", ward.name, there, choice.lease, why, dict(choice.shares))
        if -0.01 * ward.lease <= choice.lease - ward.lease <= LEASE_SLACK * ward.lease:
            return None
        why = f"{ward.name} may use {words.human(choice.lease)} of cache, before {words.human(ward.lease)}"
        if choice.lease < ward.lease:
            return Action("lease", ward.name, there, choice.lease, why)
        return Action("grow", ward.name, there, choice.lease, why, dict(choice.shares))

    def _for_whom(self) -> str:
        wanted = [ward.name for ward in self.wards.values() if ward.waiting and ward.now.residency != HOT]
        return f"for {', '.join(wanted)}" if wanted else "because memory got short"

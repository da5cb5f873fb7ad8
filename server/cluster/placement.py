"""From reports, traffic and choices to orders: how many replicas each model has, and where. No I/O; the clock is given.

1. A model that is wanted has as many replicas as its traffic needs, between `min` and `max`.
2. `Fleet` gives each a device, with the steward's demands, as on a single machine.
3. Those on a node that is drained are replaced first, and leave when another one of their model is hot.
4. A replica that its node let go (keep_alive, or want of memory) is taken from the plan.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from server.cluster import wire
from server.cluster.fleet import Fleet, FleetPlan
from server.cluster.ledger import Model, Node, Replica
from server.config import ModelSettings
from server.config_cluster import ClusterSettings, ReplicaSettings
from server.config_memory import MemorySettings
from server.scheduler.demand import COLD, HOST, HOT, Placement
from server.scheduler.dry_run import wishes_for
from server.scheduler.facts import Measure, facts_for, with_ladder
from server.scheduler.steward import RATE_S, Facts, Steward, Ward, Wishes

log = logging.getLogger("spectral.cluster")
REPLAN_S = 5.0
IMPROVE = 1
"""Exchanges that a plan tries for which nothing calls but the time; each solves up to 28 cells."""
PAUSE_S = 30.0
STAY_S = 120.0
"""A replica that was just placed is not moved again: its load shows only when it has been hot for a while."""
SHRINK_S = 120.0
"""A replica too many goes after so long."""


class Placements:
    """The conductor's knowledge and its plan."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.nodes: dict[str, Node] = {}
        self.replicas: dict[str, Replica] = {}
        self.models: dict[str, Model] = {}
        self.settings: dict[str, ModelSettings] = {}
        self.choices: dict[str, wire.Choice] = {}
        self.cluster = ClusterSettings()
        self.memory = MemorySettings()
        self.fleet = Fleet()
        self.last: FleetPlan | None = None
        self._steward = Steward()
        self._count = 0
        self._dirty = True
        self._planned_at = -math.inf
        self._told: dict[str, list[wire.Assignment]] = {}
        self._wishes: dict[str, Wishes] = {}
        self._copies: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------ what happens

    def configure(self, what: wire.Configure) -> None:
        """Take a gateway's configuration over; models that are no longer in it end. Raises ValidationError."""
        models = [ModelSettings.model_validate(model) for model in what.models]
        self.cluster = ClusterSettings.model_validate(what.cluster)
        self.memory = MemorySettings.model_validate(what.memory)
        self.settings = {model.name: model for model in models}
        for gone in set(self.models) - set(self.settings):
            self.release(gone)
            del self.models[gone]
        for settings in models:
            model = self.models.setdefault(settings.name, Model(settings.name))
            model.wanted = model.wanted or settings.load == "startup"
        self._dirty = True

    def reported(self, node: Node, states: list[wire.ReplicaState]) -> None:
        """A node's replicas as they are."""
        found = {state.replica: state for state in states}
        for name, state in found.items():
            self._count = max(self._count, _number(name))
            replica = self.replicas.get(name)
            if replica is None:  # a conductor that was restarted learns what runs
                replica = self.replicas[name] = Replica(name, state.model, node.name, state.device, state.retiring)
                if state.model in self.models and not state.retiring:
                    self.models[state.model].wanted = True
                    self._dirty = True
                else:
                    replica.retiring = True
            was, replica.state = replica.state, state
            if was is None or was.state != state.state:
                self._dirty = True
            if state.state == "cold" and was is not None and was.state != "cold" and not state.retiring:
                self._let_go(replica)
        for replica in [r for r in self.replicas.values() if r.node == node.name and r.name not in found]:
            if replica.retiring:
                self._remove(replica)

    def _let_go(self, replica: Replica) -> None:
        replica.retiring = self._dirty = True
        model = self.models.get(replica.model)
        if model is not None and not model.waits(self._clock()):
            model.wanted = any(r.model == replica.model and r.live for r in self.replicas.values())

    def asked(self, question: wire.Ask) -> bool:
        """A gateway's traffic; True where a model is wanted that nobody wanted before."""
        now, new = self._clock(), False
        for name, count in question.requests.items():
            model = self.models.get(name)
            if model is not None:
                model.rate = model.rate * math.exp(-(now - model.rated_at) / RATE_S) + count / RATE_S
                model.rated_at = now
        for model in self.models.values():
            count = question.waiting.get(model.name, 0)
            model.waiting[question.gateway] = count, now + 5.0 + question.wait
            if count and not model.wanted:
                model.wanted = self._dirty = new = True
        return new

    def release(self, name: str) -> None:
        """End all replicas of a model."""
        if name in self.models:
            self.models[name].wanted = False
        for replica in self.replicas.values():
            if replica.model == name:
                replica.retiring = True
        self._dirty = True

    def lost(self, name: str) -> None:
        """A node is gone with everything on it."""
        self.nodes.pop(name, None)
        self._told.pop(name, None)
        for replica in [r for r in self.replicas.values() if r.node == name]:
            self._remove(replica)
        self._dirty = True

    def _remove(self, replica: Replica) -> None:
        self.replicas.pop(replica.name, None)
        self._steward.remove(replica.name)
        self._dirty = True

    def touch(self) -> None:
        """Something changed that a plan should see."""
        self._dirty = True

    def due(self) -> bool:
        """Whether it is time to plan."""
        return self._dirty or self._clock() - self._planned_at >= REPLAN_S

    # ------------------------------------------------------------------------------------------ the plan

    def plan(self) -> None:
        """Decide, and bump the versions of nodes whose orders changed."""
        now, calm = self._clock(), not self._dirty
        self._planned_at, self._dirty = now, False
        usable = {node.name for node in self.nodes.values() if not node.draining}
        for node in self.nodes.values():
            if node.draining:
                self.fleet.remove_node(node.name)
            else:
                self.fleet.set_node(node.name, node.fleet_devices())
        for name in set(self.fleet.nodes) - usable:
            self.fleet.remove_node(name)
        for replica in self.replicas.values():
            replica.leaving = replica.leaving or bool(replica.node and replica.node not in usable)
        for model in self.models.values():
            self._count_replicas(model, now)
        planned = [r for r in self.replicas.values() if not r.retiring and (not r.node or r.node in usable)]
        names = [device.name for name in usable for device in self.nodes[name].fleet_devices()]
        self._wishes = {name: self._wishes_for(self.settings[name], names) for name in {r.model for r in planned}}
        self._copies = Counter(r.model for r in self.replicas.values() if r.live)
        for replica in planned:
            self._adopt(replica, now)
        demands = {demand.name: demand for demand in self._steward.demands(now)}
        # One that runs requests may move all the same: its successor is hot before it goes. What its cache holds is its
        # node's business.
        fixed = {r.name: r.leaving for r in planned}
        wanted = [replace(demands[n], busy=stays, live=False, held=0) for n, stays in fixed.items()]
        self.last = self.fleet.plan(wanted, IMPROVE if calm else 0)
        moved: set[str] = set()
        for replica in [r for r in planned if r.live]:
            self._apply(replica, now, moved)
        self._replace_leaving()
        self._drop_unplaced()
        self._orders()

    def _count_replicas(self, model: Model, now: float) -> None:
        live = [r for r in self.replicas.values() if r.model == model.name and r.live]
        count = self._wanted(model, live, now) if model.wanted else 0
        if now < model.pause_until and not model.waits(now):
            count = min(count, len(live))
        for _ in range(count - len(live)):
            self._new(model.name)
        for replica in sorted(live, key=lambda r: (bool(r.node), r.hot, r.busy, r.name))[: max(0, len(live) - count)]:
            replica.retiring = True

    def _new(self, model: str) -> Replica:
        self._count += 1
        name = f"{model}#{self._count}"
        self.replicas[name] = Replica(name, model)
        return self.replicas[name]

    def _wanted(self, model: Model, live: list[Replica], now: float) -> int:
        """More as soon as the target is passed; fewer when one fewer would have been enough for SHRINK_S."""
        rule = self.cluster.replicas.get(model.name, ReplicaSettings())
        each = self.settings[model.name].limits.max_concurrency * rule.target
        busy = sum(replica.busy for replica in live) + model.waits(now)
        needed = max(rule.min, min(rule.max, math.ceil(busy / each) if busy else rule.min))
        if needed >= len(live):
            model.low_since = None
            return needed
        if model.low_since is None:
            model.low_since = now
        if now - model.low_since < SHRINK_S:
            return max(rule.min, min(rule.max, len(live)))
        model.low_since = now
        return max(needed, len(live) - 1)

    def _wishes_for(self, settings: ModelSettings, names: list[str]) -> Wishes:
        choice = self.choices.get(settings.name)
        wishes = wishes_for(settings, [], choice is not None and choice.pinned)
        return replace(wishes, devices=devices_for(settings.device, names), keep_alive_s=None)

    def _adopt(self, replica: Replica, now: float) -> Ward:
        """The replica as the steward sees it."""
        settings = self.settings[replica.model]
        choice = self.choices.get(replica.model)
        chosen = settings.setting if choice is None or choice.setting is None else choice.setting
        state, ready = replica.state, replica.state.ready if replica.state is not None else None
        wishes = self._wishes[replica.model]
        kind = HOST if wishes.devices[0].endswith(f"/{HOST}") else "cuda:0"
        ward = self._steward.wards.get(replica.name)
        if ward is None or (ready is not None and ward.facts.weights != ready.weights_bytes):
            facts = self.facts(settings, kind, chosen, replica)
            ward = ward or self._steward.add(replica.name, facts, wishes, now)
            ward.facts = facts
        model = self.models[replica.model]
        copies = self._copies[replica.model]
        ward.wishes, ward.pinned = wishes, wishes.pinned
        ward.rate, ward.rated_at = model.rate * math.exp(-(now - model.rated_at) / RATE_S) / max(1, copies), now
        running = len_running(state)
        waiting = 0 if replica.node else max(1, model.waits(now))
        tokens = state.stats.kv_tokens if state is not None else 0
        self._steward.report(replica.name, now, running=running, waiting=waiting, kv_tokens=tokens)
        if replica.node:
            setting = ready.setting if ready is not None else ward.now.setting
            ward.now = Placement(HOT, (f"{replica.node}/{replica.device}",), setting)
        return ward

    @staticmethod
    def _may_move(replica: Replica, now: float, moved: set[str]) -> bool:
        return replica.hot and replica.node not in moved and now - replica.placed_at >= STAY_S

    def facts(self, settings: ModelSettings, kind: str, setting: str, replica: Replica) -> Facts:
        """What a replica needs: predicted from files, or as its worker told. `kind`: "cpu" or a GPU."""
        choice, ready = self.choices.get(replica.model), replica.state.ready if replica.state is not None else None
        measured = Measure(weights=ready.weights_bytes) if ready is not None else None
        found = facts_for(settings, kind, setting, choice.profile if choice is not None else None, measured)
        return with_ladder(found, setting, ready)

    def _apply(self, replica: Replica, now: float, moved: set[str]) -> None:
        """Carry out one choice. Of replicas that should move one goes at a time from a node: what the others lose by
        their neighbours is then seen anew."""
        assert self.last is not None
        choice = self.last.choices[replica.name]
        model = self.models[replica.model]
        if choice.residency == HOT:
            node, _, device = choice.devices[0].rpartition("/")
            if not replica.node:
                replica.node, replica.device, replica.placed_at = node, device, now
                self._steward.moved(replica.name, choice.placement, choice.lease, now)
                model.stage = ""
            elif (replica.node, replica.device) != (node, device) and self._may_move(replica, now, moved):
                moved.add(replica.node)
                successor = self._new(replica.model)
                successor.node, successor.device, successor.placed_at = node, device, now
                replica.leaving = self._dirty = True
        elif not replica.node:
            model.stage = f"waits for a node, {self.last.reasons[replica.name]}"
        elif choice.residency == COLD and not replica.busy:
            model.pause_until = now + PAUSE_S
            self._let_go(replica)

    def _replace_leaving(self) -> None:
        """Replicas that are leaving go when all others of their model are hot, or nobody wants the model."""
        for replica in [r for r in self.replicas.values() if r.leaving and not r.retiring]:
            same = [r for r in self.replicas.values() if r.model == replica.model and r.live]
            model = self.models.get(replica.model)
            if model is None or not model.wanted or (same and all(r.hot for r in same)):
                replica.retiring = True

    def _drop_unplaced(self) -> None:
        """Replicas that end before they were anywhere."""
        for replica in [r for r in self.replicas.values() if r.retiring and not r.node]:
            self._remove(replica)

    def _orders(self) -> None:
        for node in self.nodes.values():
            orders = self.assignments(node.name)
            if orders != self._told.get(node.name):
                self._told[node.name] = orders
                node.version += 1

    def assignments(self, node: str) -> list[wire.Assignment]:
        """What a node shall serve now."""
        found = []
        for replica in self.replicas.values():
            if replica.node != node or replica.retiring or replica.model not in self.settings:
                continue
            choice = self.choices.get(replica.model, wire.Choice(replica.model))
            settings = self.settings[replica.model].model_dump(mode="json")
            chosen = choice.setting, choice.profile, choice.pinned
            found.append(wire.Assignment(replica.name, replica.model, replica.device, settings, *chosen))
        return found

    def described(self) -> dict[str, Any]:
        """The plan, JSON-ready."""
        last = self.last
        return {
            "cost": last.cost if last is not None else 0.0,
            "cells": len(self.fleet.cells),
            "unmet": list(last.unmet) if last is not None else [],
            "replicas": {
                replica.name: {
                    "model": replica.model,
                    "node": replica.node,
                    "device": replica.device,
                    "state": replica.state.state if replica.state is not None else "placed",
                    "retiring": replica.retiring,
                    "reason": last.reasons.get(replica.name, "") if last is not None else "",
                }
                for replica in self.replicas.values()
            },
        }


def devices_for(wanted: str, names: list[str]) -> tuple[str, ...]:
    """The fleet's devices that a model may use: GPUs where there are some, unless its configuration names others."""
    gpus = tuple(name for name in names if not name.endswith(f"/{HOST}"))
    if wanted in ("auto", "cuda"):
        return gpus or tuple(names) or ("none/none",)
    return tuple(name for name in names if name.endswith(f"/{wanted}")) or (f"none/{wanted}",)


def len_running(state: wire.ReplicaState | None) -> int:
    """Sequences that a replica runs or has promised to run."""
    return 0 if state is None else max(state.stats.running, state.streams)


def _number(replica: str) -> int:
    number = replica.rpartition("#")[2]
    return int(number) if number.isdigit() else 0

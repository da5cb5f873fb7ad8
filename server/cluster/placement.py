"""From reports, traffic and choices to orders: how many replicas each model has, and where. No I/O; the clock is given.

1. A model that is wanted has as many replicas as its traffic needs, between `min` and `max`.
2. `Fleet` gives each a device, with the steward's demands, as on a single machine.
3. Those on a node that is drained are replaced first, and leave when another one of their model is hot.
4. A replica that its node let go (keep_alive, or want of memory) is taken from the plan.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from server.cluster import wire
from server.cluster.crowd import node_of
from server.cluster.fleet import Fleet, FleetPlan
from server.cluster.ledger import Model, Node, Replica, Replicas, devices_for
from server.config import ModelSettings
from server.config_cluster import ClusterSettings, ReplicaSettings
from server.config_memory import MemorySettings
from server.scheduler.demand import COLD, HOST, HOT, Demand, Placement
from server.scheduler.dry_run import wishes_for
from server.scheduler.facts import Measure, facts_for, with_ladder
from server.scheduler.steward import Facts, Steward, Ward, Wishes

log = logging.getLogger("spectral.cluster")
REPLAN_S = 5.0
IMPROVE = 1
"""Exchanges that a plan tries for which nothing calls but the time; each solves up to 28 cells."""
PAUSE_S = 30.0
STAY_S = 120.0
"""A replica that was just placed is not moved again: its load shows only when it has been hot for a while."""
SAME = 0.1
"""Traffic that differs by less than this part is the same."""
PLAN_S = 0.2
"""Wall seconds that a plan may spend on solving cells; those that are left are solved by the next one."""


class Share(NamedTuple):
    """What the replicas of one model have in common: `rate`: requests per second of each; `waiting`: of all."""

    settings: ModelSettings
    wishes: Wishes
    setting: str
    kind: str
    rate: float
    waiting: int


class Placements:
    """The conductor's knowledge and its plan."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.nodes: dict[str, Node] = {}
        self.replicas = Replicas()
        self.models: dict[str, Model] = {}
        self.settings: dict[str, ModelSettings] = {}
        self.choices: dict[str, wire.Choice] = {}
        self.cluster = ClusterSettings()
        self.memory = MemorySettings()
        self.fleet = Fleet()
        self.last: FleetPlan | None = None
        self.moves = 0
        """Replicas that were given another place."""
        self._steward = Steward()
        self._count = 0
        self._dirty = True
        self._planned_at = -math.inf
        self._told: dict[str, list[wire.Assignment]] = {}
        self._plain: dict[str, dict[str, Any]] = {}
        self._devices: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {}  # wish -> what it allows in this fleet
        self._names: list[str] = []
        self._asked_for: dict[str, tuple[bool, Wishes]] = {}
        self._demands: dict[str, tuple[object, tuple[float, float, float], Demand]] = {}

    # ------------------------------------------------------------------------------------------ what happens

    def configure(self, what: wire.Configure) -> None:
        """Take a gateway's configuration over; models that are no longer in it end. Raises ValidationError."""
        models = [ModelSettings.model_validate(model) for model in what.models]
        self.cluster = ClusterSettings.model_validate(what.cluster)
        self.memory = MemorySettings.model_validate(what.memory)
        self.settings = {model.name: model for model in models}
        self._asked_for.clear()
        self._plain = {model.name: model.model_dump(mode="json") for model in models}
        for gone in set(self.models) - set(self.settings):
            self.release(gone)
            del self.models[gone]
        for settings in models:
            model = self.models.setdefault(settings.name, Model(settings.name, self._clock()))
            model.wanted = model.wanted or settings.load == "startup"
        self._dirty = True

    def reported(self, node: Node, states: list[wire.ReplicaState]) -> None:
        """A node's replicas as they are."""
        found = {state.replica: state for state in states}
        for name, state in found.items():
            self._count = max(self._count, _number(name))
            replica = self.replicas.get(name)
            if replica is None:  # a conductor that was restarted learns what runs
                made = Replica(name, state.model, node.name, state.device, retiring=state.retiring)
                replica = self.replicas.add(made)
                if state.model in self.models and not state.retiring:
                    self.models[state.model].wanted = True
                    self._dirty = True
                else:
                    replica.retiring = True
            was, replica.state = replica.state, state
            self._count_ended(was, state)
            if was is None or was.state != state.state:
                self._dirty = True
            if state.state == "cold" and was is not None and was.state != "cold" and not state.retiring:
                self._let_go(replica)
        for replica in [r for r in self.replicas.on(node.name) if r.retiring and r.name not in found]:
            self._remove(replica)

    def _count_ended(self, was: wire.ReplicaState | None, state: wire.ReplicaState) -> None:
        model = self.models.get(state.model)
        if model is not None and was is not None:
            more = sum(state.stats.finished.values()) - sum(was.stats.finished.values())
            model.traffic.ended(max(0, more))  # a worker that was started again counts from nothing

    def _let_go(self, replica: Replica) -> None:
        replica.retiring = self._dirty = True
        model = self.models.get(replica.model)
        if model is not None and not model.waits(self._clock()):
            model.wanted = any(r.live for r in self.replicas.of(replica.model))

    def asked(self, question: wire.Ask) -> bool:
        """A gateway's traffic; True where a model is wanted that nobody wanted before."""
        now, new = self._clock(), False
        for name, count in question.requests.items():
            model = self.models.get(name)
            if model is not None:
                model.came(count, now)
        for model in self.models.values():
            count = question.waiting.get(model.name, 0)
            model.waiting.pop(question.gateway, None)
            if count:
                model.waiting[question.gateway] = count, now + 5.0 + question.wait
                new = new or not model.wanted
                model.wanted = True
        self._dirty = self._dirty or new
        return new

    def release(self, name: str) -> None:
        """End all replicas of a model."""
        if name in self.models:
            self.models[name].wanted = False
        for replica in self.replicas.of(name):
            replica.retiring = True
        self._dirty = True

    def lost(self, name: str) -> None:
        """A node is gone with everything on it."""
        self.nodes.pop(name, None)
        self._told.pop(name, None)
        for replica in list(self.replicas.on(name)):
            self._remove(replica)
        self._dirty = True

    def _remove(self, replica: Replica) -> None:
        self.replicas.drop(replica.name)
        if replica.model in self.models:
            self.models[replica.model].traffic.lost(replica.running)
        self._steward.remove(replica.name)
        self._demands.pop(replica.name, None)
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
        names = []
        for node in self.nodes.values():
            if node.draining:
                self.fleet.remove_node(node.name)
            else:
                devices = node.fleet_devices()
                self.fleet.set_node(node.name, devices)
                names += [device.name for device in devices]
        for name in set(self.fleet.nodes) - usable:
            self.fleet.remove_node(name)
        for replica in self.replicas.values():
            replica.leaving = replica.leaving or bool(replica.node and replica.node not in usable)
        for model in self.models.values():
            self._count_replicas(model, now)
        planned = [r for r in self.replicas.values() if not r.retiring and (not r.node or r.node in usable)]
        self._know_devices(names)
        shares = {name: self._share(self.models[name], now) for name in {r.model for r in planned}}
        wanted = [self._demand(r, self._adopt(r, shares[r.model], now), now) for r in planned]
        until = time.perf_counter() + PLAN_S
        self.last = self.fleet.plan(wanted, IMPROVE if calm else 0, lambda: time.perf_counter() > until)
        self._dirty = self._dirty or self.last.left > 0
        moved: set[str] = set()
        for replica in [r for r in planned if r.live]:
            self._apply(replica, now, moved)
        self._replace_leaving()
        self._drop_unplaced()
        self._orders()

    def _demand(self, replica: Replica, ward: Ward, now: float) -> Demand:
        """The replica as the planner sees it: what it saw before, where nothing changed by which it would plan anew."""
        facts = ward.facts, ward.wishes, ward.now, ward.waiting > 0, ward.pinned, replica.leaving
        rate, tokens, sequences = ward.rate, ward.peak_tokens, ward.peak_sequences
        found = self._demands.get(replica.name)
        if found is not None and found[0] == facts:
            before = found[1]
            same = abs(before[0] - rate) <= SAME * before[0] and abs(before[1] - tokens) <= SAME * before[1]
            if same and abs(before[2] - sequences) <= SAME * before[2]:
                return found[2]
        # One that runs requests may move all the same: its successor is hot before it goes. What its cache holds is
        # its node's business.
        made = self._steward.demand(replica.name, now)
        made = replace(made, busy=replica.leaving, live=False, held=0, devices=self._allowed(replica.model)[1])
        self._demands[replica.name] = facts, (rate, tokens, sequences), made
        return made

    def _know_devices(self, names: list[str]) -> None:
        if names != self._names:
            self._names = names
            self._devices.clear()
            self._asked_for.clear()

    def _allowed(self, model: str) -> tuple[tuple[str, ...], frozenset[str]]:
        """The fleet's devices that a model may use. The same object each time, so that a plan sees at a glance that
        nothing changed."""
        wanted = self.settings[model].device
        if wanted not in self._devices:
            found = devices_for(wanted, self._names)
            self._devices[wanted] = found, frozenset(found)
        return self._devices[wanted]

    def _count_replicas(self, model: Model, now: float) -> None:
        live = [r for r in self.replicas.of(model.name) if r.live]
        count = self._wanted(model, live, now) if model.wanted else 0
        if now < model.pause_until and not model.waits(now):
            count = min(count, len(live))
        for _ in range(count - len(live)):
            self._new(model.name)
        if count >= len(live):
            return
        alike = Counter(replica.node for replica in live)  # two on one node: the first to go
        order = sorted(live, key=lambda r: (bool(r.node), r.hot, -alike[r.node], r.busy, r.name))
        for replica in order[: len(live) - count]:
            replica.retiring = True

    def _new(self, model: str) -> Replica:
        self._count += 1
        return self.replicas.add(Replica(f"{model}#{self._count}", model))

    def _wanted(self, model: Model, live: list[Replica], now: float) -> int:
        """As many as its traffic needs (scaling.py), within what its owner says."""
        rule = self.cluster.replicas.get(model.name, ReplicaSettings())
        each = self.settings[model.name].limits.max_concurrency * rule.target
        running = sum(replica.running for replica in self.replicas.of(model.name))
        backlog = sum(max(0, replica.busy - replica.running) for replica in live) + model.waits(now)
        return max(rule.min, min(rule.max, model.traffic.wanted(now, running, backlog, each, len(live))))

    def _wishes_for(self, settings: ModelSettings) -> Wishes:
        choice = self.choices.get(settings.name)
        pinned = choice is not None and choice.pinned
        before = self._asked_for.get(settings.name)
        if before is not None and before[0] == pinned:
            return before[1]
        wishes = wishes_for(settings, [], pinned)
        devices = self._allowed(settings.name)[0]
        gpus = settings.device in ("auto", "cuda") and not devices[0].endswith(f"/{HOST}")
        found = replace(wishes, devices=devices, splittable=gpus, keep_alive_s=None)
        self._asked_for[settings.name] = pinned, found
        return found

    def _share(self, model: Model, now: float) -> Share:
        """What each of a model's replicas has of its wishes and traffic."""
        settings, choice = self.settings[model.name], self.choices.get(model.name)
        wishes = self._wishes_for(settings)
        copies = max(1, sum(replica.live for replica in self.replicas.of(model.name)))
        setting = settings.setting if choice is None or choice.setting is None else choice.setting
        kind = HOST if wishes.devices[0].endswith(f"/{HOST}") else "cuda:0"
        return Share(settings, wishes, setting, kind, model.rate_at(now) / copies, max(1, model.waits(now)))

    def _adopt(self, replica: Replica, share: Share, now: float) -> Ward:
        """The replica as the steward sees it."""
        state, ready = replica.state, replica.state.ready if replica.state is not None else None
        ward = self._steward.wards.get(replica.name)
        if ward is None or (ready is not None and ward.facts.weights != ready.weights_bytes):
            facts = self.facts(share.settings, share.kind, share.setting, replica)
            ward = ward or self._steward.add(replica.name, facts, share.wishes, now)
            ward.facts = facts
        ward.wishes, ward.pinned = share.wishes, share.wishes.pinned
        ward.rate, ward.rated_at = share.rate, now
        waiting = 0 if replica.node else share.waiting
        tokens = state.stats.kv_tokens if state is not None else 0
        self._steward.report(replica.name, now, running=len_running(state), waiting=waiting, kv_tokens=tokens)
        if replica.node:
            setting, devices = ready.setting if ready is not None else ward.now.setting, replica.devices
            if ward.now.devices != devices or ward.now.setting != setting or ward.now.residency != HOT:
                ward.now = Placement(HOT, devices, setting)
        return ward

    def _may_move(self, replica: Replica, node: str, now: float, moved: set[str]) -> bool:
        cells = {self.fleet.cell_of(replica.node), self.fleet.cell_of(node)}
        may = replica.hot and not cells & moved and now - replica.placed_at >= STAY_S
        moved |= cells if may else set()
        return may

    def facts(self, settings: ModelSettings, kind: str, setting: str, replica: Replica) -> Facts:
        """What a replica needs: predicted from files, or as its worker told. `kind`: "cpu" or a GPU."""
        choice, ready = self.choices.get(replica.model), replica.state.ready if replica.state is not None else None
        measured = Measure(weights=ready.weights_bytes) if ready is not None else None
        found = facts_for(settings, kind, setting, choice.profile if choice is not None else None, measured)
        return with_ladder(found, setting, ready)

    def _apply(self, replica: Replica, now: float, moved: set[str]) -> None:
        """Carry out one choice. Of replicas that should move one goes at a time from a cell or into it, and what others
        lose by their neighbours is seen anew: several that flee from each other would meet again."""
        assert self.last is not None
        choice = self.last.choices[replica.name]
        model = self.models[replica.model]
        if choice.residency == HOT:
            node, device = node_of(choice.devices[0]), ",".join(d.rpartition("/")[2] for d in choice.devices)
            if not replica.node:
                self._settle(replica, node, device, now)
                self._steward.moved(replica.name, choice.placement, choice.lease, now)
                model.stage = ""
            elif (replica.node, replica.device) != (node, device) and self._may_move(replica, node, now, moved):
                self._settle(self._new(replica.model), node, device, now)
                replica.leaving = self._dirty = True
                self.moves += 1
        elif not replica.node:
            model.stage = f"waits for a node, {self.last.reasons[replica.name]}"
        elif choice.residency == COLD and not replica.busy:
            model.pause_until = now + PAUSE_S
            self._let_go(replica)

    def _settle(self, replica: Replica, node: str, device: str, now: float) -> None:
        self.replicas.settle(replica, node, device)
        replica.placed_at = now

    def _replace_leaving(self) -> None:
        """Replicas that are leaving go when all others of their model are hot, or nobody wants the model."""
        for replica in [r for r in self.replicas.values() if r.leaving and not r.retiring]:
            same = [r for r in self.replicas.of(replica.model) if r.live]
            model = self.models.get(replica.model)
            if model is None or not model.wanted or (same and all(r.hot for r in same)):
                replica.retiring = True

    def _drop_unplaced(self) -> None:
        """Replicas that end before they were anywhere."""
        for replica in [r for r in self.replicas.on("") if r.retiring]:
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
        for replica in self.replicas.on(node):
            if replica.retiring or replica.model not in self.settings:
                continue
            choice = self.choices.get(replica.model, wire.Choice(replica.model))
            chosen = choice.setting, choice.profile, choice.pinned
            # Which of its GPUs a model is spread over, and what each of them holds, a node knows better than its plan.
            device = replica.device if "," not in replica.device else "cuda"
            found.append(wire.Assignment(replica.name, replica.model, device, self._plain[replica.model], *chosen))
        return found


def len_running(state: wire.ReplicaState | None) -> int:
    """Sequences that a replica runs or has promised to run."""
    return 0 if state is None else max(state.stats.running, state.streams)


def _number(replica: str) -> int:
    number = replica.rpartition("#")[2]
    return int(number) if number.isdigit() else 0

"""A fleet in virtual time: the conductor's real placements and the gateways' real router, on machines that are made up.

What is physical is here: loads take time, a replica runs so many sequences at once and queues the rest, a token takes a
fixed time. Everything that decides is the server's own code (`server/cluster/placement.py`, `fleet.py`, `routing.py`),
which gets the same reports as from real nodes.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from server.cluster import wire
from server.cluster.ledger import Node, Replica
from server.cluster.placement import Placements
from server.cluster.routing import Candidate, Router, shares
from server.config import ModelSettings
from server.scheduler.demand import Rung
from server.scheduler.steward import Facts
from server.worker import messages

GIB = 2**30
CONCURRENCY = 8
PREFILL_TOKENS_S, TOKEN_S = 4000.0, 0.02
LOAD_S, DISK_BYTES_S = 4.0, 2e9
LADDER = (("4x", 4.0, 0.0012), ("8x", 8.0, 0.012), ("16x", 16.0, 0.05))
GATEWAYS = 4


@dataclass(frozen=True)
class Kind:
    """A made-up model. `share`: its part of all requests."""

    name: str
    weights: int
    token_bytes: int
    share: float

    @property
    def facts(self) -> Facts:
        """As the planner takes it."""
        rungs = tuple(Rung(label, kl, self.token_bytes / x, int(self.token_bytes * 64)) for label, x, kl in LADDER)
        return Facts(self.weights, rungs, int(0.6 * GIB), 8192, LOAD_S + self.weights / DISK_BYTES_S, 1.0, True, True)


def kinds(count: int, seed: int) -> list[Kind]:
    """Models of 1 to 14 GiB; their popularity falls as 1 / rank."""
    rng = random.Random(seed)
    weights = [1.0 / (rank + 1) for rank in range(count)]
    found = []
    for rank in range(count):
        size = rng.choice((1.0, 2.0, 4.0, 4.5, 5.0, 8.0, 14.0))
        token = int(rng.choice((32, 64, 96, 128)) * 1024)
        found.append(Kind(f"m{rank:03d}", int(size * GIB), token, weights[rank] / sum(weights)))
    return found


@dataclass
class Machine:
    """A replica that is somewhere."""

    replica: Replica
    kind: Kind
    hot: bool = False
    gone: bool = False
    running: int = 0
    ended: int = 0
    tokens: int = 0
    queue: deque[tuple[float, int, int]] = field(default_factory=deque)


class SimPlacements(Placements):
    """The real thing, with facts that are made up instead of read from files."""

    def __init__(self, clock: Callable[[], float], known: dict[str, Kind]) -> None:
        super().__init__(clock)
        self._known = known

    def facts(self, settings: ModelSettings, kind: str, setting: str, replica: Replica) -> Facts:
        """Made up."""
        return self._known[settings.name].facts


class Simulator:
    """Runs requests on a fleet; `figures` has what came of it. Times in virtual seconds unless they say wall."""

    def __init__(self, gpus: int, gpus_per_node: int, models: list[Kind], most: int = 128) -> None:
        self.now = 0.0
        self.kinds = {kind.name: kind for kind in models}
        self.places = SimPlacements(lambda: self.now, self.kinds)
        self.routers = [Router() for _ in range(GATEWAYS)]
        self.machines: dict[str, Machine] = {}
        self._on: dict[str, dict[str, Machine]] = {}
        self._by_model: dict[str, dict[str, Machine]] = {name: {} for name in self.kinds}
        self._waiting: dict[str, deque[tuple[float, int, int, tuple[int, ...]]]] = {n: deque() for n in self.kinds}
        self._arrived: dict[str, int] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.plan_wall: list[float] = []
        self.plan_cpu: list[float] = []
        self.left_cells: list[int] = []
        self.planned_cells: list[int] = []
        self.route_cpu = 0.0
        self._started: list[float] = []
        self.routed = self.cold_starts = self.finished = self.waited = 0
        self.prefix_hits = self.moved = self.cut = 0
        self.delays: list[tuple[float, float]] = []  # when a request came, how long it waited for its first token
        self.samples: list[dict[str, Any]] = []
        per = {"models": [ModelSettings(name=k.name, load="on_demand").model_dump(mode="json") for k in models]}
        replicas = {kind.name: {"min": 1, "max": most} for kind in models}
        self.places.configure(wire.Configure(per["models"], {"replicas": replicas}))
        for index in range(gpus // gpus_per_node):
            self.join(f"node{index:04d}", gpus_per_node)

    # ------------------------------------------------------------------------------------------ the fleet

    def join(self, name: str, gpus: int, size: int = 24 * GIB) -> None:
        """A node with so many GPUs."""
        node = self.places.nodes[name] = Node(name)
        self._on[name] = {}
        node.devices = [wire.DeviceState(f"cuda:{i}", size - GIB // 2, size) for i in range(gpus)]
        self.places.touch()

    def lose(self, name: str) -> int:
        """A node is gone; its requests go back to where they waited. Returns how many replicas it had."""
        gone = list(self._on[name].values())
        for machine in gone:
            self._drop(machine)
        self.places.lost(name)
        for router in self.routers:
            router.lost([machine.replica.name for machine in gone])
        return len(gone)

    def _drop(self, machine: Machine) -> None:
        self.machines.pop(machine.replica.name, None)
        self._on[machine.replica.node].pop(machine.replica.name, None)
        self._by_model[machine.kind.name].pop(machine.replica.name, None)
        for at, prompt, answer in machine.queue:
            self._waiting[machine.kind.name].append((at, prompt, answer, ()))
        machine.queue.clear()
        machine.gone, machine.hot = True, False
        self._send_waiting(machine.kind.name)

    # ------------------------------------------------------------------------------------------ time

    def at(self, when: float, happen: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (when, next(self._count), happen))

    def run(self, requests: list[tuple[float, str, int, int, tuple[int, ...]]], tick_s: float = 1.0) -> None:
        """All requests (time, model, prompt tokens, answer tokens, prompt's blocks), in order, to their end."""
        coming = iter(requests)
        following = next(coming, None)
        tick = 0.0
        while following is not None or self._events or any(self._waiting.values()):
            due = min(following[0] if following else float("inf"), tick)
            while self._events and self._events[0][0] <= due:
                self.now, _, happen = heapq.heappop(self._events)
                happen()
            self.now = due
            if following is not None and due == following[0]:
                self._arrive(*following)
                following = next(coming, None)
            else:
                self._control(tick_s)
                tick += tick_s
                if following is None and not any(m.running or m.queue for m in self.machines.values()):
                    break

    # ------------------------------------------------------------------------------------------ control

    def _control(self, tick_s: float) -> None:
        waiting = {name: len(queue) for name, queue in self._waiting.items() if queue}
        asked = wire.Ask("sim", self._arrived, waiting, 0, tick_s)
        self._arrived = {}
        new = self.places.asked(asked)
        for node in list(self.places.nodes.values()):
            self.places.reported(node, self._states(node.name))
        if new or self.places.due():
            began, cpu = time.perf_counter(), time.thread_time()
            self.places.plan()
            self.plan_wall.append(time.perf_counter() - began)
            self.plan_cpu.append(time.thread_time() - cpu)
            self.planned_cells.append(self.places.last.planned if self.places.last else 0)
            self.left_cells.append(self.places.last.left if self.places.last else 0)
        self._obey()
        if int(self.now) % 30 == 0:
            self._sample()

    def _states(self, node: str) -> list[wire.ReplicaState]:
        found = []
        for machine in self._on[node].values():
            ended = {"stop": machine.ended}
            queued = len(machine.queue)
            stats = messages.Stats(running=machine.running, queued=queued, kv_tokens=machine.tokens, finished=ended)
            replica, streams = machine.replica, machine.running + len(machine.queue)
            state = "hot" if machine.hot else "loading"
            found.append(
                wire.ReplicaState(
                    replica.name, replica.model, state, replica.device, streams=streams, retiring=replica.retiring,
                    stats=stats,
                )
            )  # fmt: skip
        return found

    def _obey(self) -> None:
        """What nodes do with their orders: load what is new, end what is no longer there."""
        for replica in list(self.places.replicas.values()):
            machine = self.machines.get(replica.name)
            if machine is None and replica.node and not replica.retiring:
                kind = self.kinds[replica.model]
                machine = self.machines[replica.name] = Machine(replica, kind)
                self._by_model[kind.name][replica.name] = self._on[replica.node][replica.name] = machine
                self.cold_starts += 1
                self._started.append(self.now)
                self.at(self.now + kind.facts.load_s, partial(self._hot, machine))
            elif machine is not None and replica.retiring and not machine.running:
                self._drop(machine)
        for name in [name for name, m in self.machines.items() if name not in self.places.replicas]:
            self._drop(self.machines[name])

    def _hot(self, machine: Machine) -> None:
        if machine.replica.name not in self.machines:
            return
        others = {name: m for name, m in self._by_model[machine.kind.name].items() if m.hot}
        machine.hot = True
        self._send_waiting(machine.kind.name)
        for name, count in shares({n: len(m.queue) for n, m in others.items()}, CONCURRENCY - machine.running).items():
            for at, prompt, answer in [others[name].queue.pop() for _ in range(count)][::-1]:
                self._route(at, machine.kind.name, prompt, answer, ())
                self.moved += 1

    def _send_waiting(self, model: str) -> None:
        """To a replica, where one is hot."""
        queue = self._waiting[model]
        while queue and any(m.hot and not m.replica.retiring for m in self._by_model[model].values()):
            at, prompt, answer, blocks = queue.popleft()
            self._route(at, model, prompt, answer, blocks)

    def cold_starts_by(self, when: float) -> int:
        """How many loads had begun by then."""
        return sum(at <= when for at in self._started)

    # ------------------------------------------------------------------------------------------ requests

    def _arrive(self, at: float, model: str, prompt: int, answer: int, blocks: tuple[int, ...]) -> None:
        self._arrived[model] = self._arrived.get(model, 0) + 1
        if not any(m.hot and not m.replica.retiring for m in self._by_model[model].values()):
            self.waited += 1
            self._waiting[model].append((at, prompt, answer, blocks))
            return
        self._route(at, model, prompt, answer, blocks)

    def _route(self, at: float, model: str, prompt: int, answer: int, blocks: tuple[int, ...]) -> None:
        began = time.thread_time()
        machines = [m for m in self._by_model[model].values() if m.hot and not m.replica.retiring]
        rows = [Candidate(m.replica.name, m.running, len(m.queue), CONCURRENCY) for m in machines]
        router = self.routers[self.routed % GATEWAYS]
        chosen = router.choose(blocks, prompt, rows).replica
        known = router.known(blocks, chosen)
        router.sent(blocks, chosen)
        self.route_cpu += time.thread_time() - began
        self.routed += 1
        self.prefix_hits += known > 0
        machine = self.machines[chosen]
        machine.queue.append((at, max(16, prompt - known * 256), answer))
        self._serve(machine)

    def _serve(self, machine: Machine) -> None:
        while machine.queue and machine.running < CONCURRENCY:
            at, prompt, answer = machine.queue.popleft()
            machine.running += 1
            machine.tokens += prompt + answer
            first = self.now + prompt / PREFILL_TOKENS_S
            self.delays.append((at, first - at))
            self.at(first + answer * TOKEN_S, partial(self._finish, machine, prompt + answer))

    def _finish(self, machine: Machine, tokens: int) -> None:
        if machine.gone:  # its node was lost: the client got an error
            self.cut += 1
            return
        machine.running -= 1
        machine.tokens -= tokens
        machine.ended += 1
        self.finished += 1
        self._serve(machine)

    def _sample(self) -> None:
        """How evenly devices are used that have something, and how full they are."""
        load: dict[str, int] = {}
        for machine in self.machines.values():
            if machine.hot:
                key = f"{machine.replica.node}/{machine.replica.device}"
                load[key] = load.get(key, 0) + machine.running
        busy = list(load.values())
        mean = sum(busy) / len(busy) if busy else 0.0
        self.samples.append(
            {
                "at": round(self.now),
                "replicas": len(self.machines),
                "devices_used": len(busy),
                "running": sum(busy),
                "mean": round(mean, 3),
                "max": max(busy, default=0),
                "queued": sum(len(m.queue) for m in self.machines.values()),
                "waiting": sum(map(len, self._waiting.values())),
            }
        )

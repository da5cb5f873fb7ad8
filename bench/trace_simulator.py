"""A server in virtual time: requests of a trace, devices with bytes, models that load, wake, squeeze and answer.

The rule under study decides what is where (`bench/whole_model_rules.py` has other servers' rules; `SpectralRule` drives
the real steward and planner of `server/scheduler`). Everything physical is here and is the same for all rules: how long
a load, a wake-up, a squeeze take, how fast models read and write, that bytes on a device never exceed what it has.

A request waits until its model is hot and has a free sequence and bytes for prompt and answer; then it reads its
prompt; its first token follows. Decoding takes a fixed time per token.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from server.scheduler.demand import COLD, HOT, Device, Placement, Rung
from server.scheduler.steward import Action, Facts, Steward, Wishes

GIB = 2**30
DISK_BYTES_S, LOAD_S = 2e9, 4.0  # an NVMe disk; starting a process and importing torch
COPY_BYTES_S, WAKE_S = 20e9, 0.2  # PCIe 4 x16, pinned
SQUEEZE_S_PER_GIB = 0.3
PREFILL_TOKENS_S, TOKEN_S = 4000.0, 0.02
SEQUENCES = 16


@dataclass(frozen=True)
class Kind:
    """A model of the study. `rungs[0]` is the exact cache (bf16); a rule that does not compress has only that."""

    name: str
    facts: Facts


def kind(name: str, weights_gib: float, exact_token_bytes: int, ladder: list[tuple[str, float, float]]) -> Kind:
    """`ladder`: name, ratio, KL of every setting, finest first."""
    weights = int(weights_gib * GIB)
    rungs = tuple(
        Rung(label, kl, exact_token_bytes / x, int(exact_token_bytes * 128 / min(x, 2))) for label, x, kl in ladder
    )
    load, wake = LOAD_S + weights / DISK_BYTES_S, WAKE_S + weights / COPY_BYTES_S
    return Kind(name, Facts(weights, rungs, int(0.6 * GIB), 16384, load, wake))


@dataclass
class Request:
    """One request of the trace and what became of it (seconds; `first` None: no token yet)."""

    at: float
    model: str
    prompt: int
    answer: int
    first: float | None = None
    kl: float = 0.0


@dataclass
class Machine:
    """A model in the simulated server. `shares`: bytes on devices, lease included, while they are taken."""

    kind: Kind
    state: str = COLD
    setting: str = ""
    lease: int = 0
    shares: dict[str, int] = field(default_factory=dict)
    queue: deque[Request] = field(default_factory=deque)
    running: int = 0
    tokens: int = 0
    used_at: float = 0.0
    draining: bool = False
    starts: int = 0
    wakes: int = 0

    @property
    def rung(self) -> Rung:
        """The setting that the cache is at."""
        return next(rung for rung in self.kind.facts.rungs if rung.name == self.setting)


class Rule(Protocol):
    """Decides. Called after every event that may matter."""

    def react(self, sim: Simulator) -> None:
        """Look at the machines and start moves."""
        ...


class Simulator:
    """Runs a trace under a rule. `devices`: bytes by name, "cpu" for host memory."""

    def __init__(self, kinds: list[Kind], devices: dict[str, int], requests: list[Request], rule: Rule) -> None:
        self.machines = {kind.name: Machine(kind) for kind in kinds}
        self.devices, self.requests, self.rule = devices, requests, rule
        self.now = 0.0
        self.overruns = 0  # moments in which a device would have been out of memory
        self.barrier = float("inf")  # requests that came after this moment do not start yet
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def run(self, tick_s: float = 0.0) -> None:
        """Until every request has its answer. `tick_s`: the rule is also asked this often."""
        for request in self.requests:
            self.at(request.at, functools.partial(self._arrive, request))
        if tick_s:
            end = self.requests[-1].at
            for step in range(1, int(end / tick_s) + 1):
                self.at(step * tick_s, lambda: None)
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            self.rule.react(self)
            self._check()

    def at(self, time: float, happen: Callable[[], None]) -> None:
        """Let something happen at a time."""
        heapq.heappush(self._events, (time, next(self._count), happen))

    def free(self, device: str) -> int:
        """Bytes of a device that nobody holds."""
        return self.devices[device] - sum(m.shares.get(device, 0) for m in self.machines.values())

    def _check(self) -> None:
        self.overruns += any(self.free(device) < 0 for device in self.devices)

    def _arrive(self, request: Request) -> None:
        machine = self.machines[request.model]
        machine.queue.append(request)
        machine.used_at = self.now
        self.serve(machine)

    def serve(self, machine: Machine) -> None:
        """Start what can start: a free sequence, and bytes for the whole of prompt and answer."""
        while machine.state == HOT and not machine.draining and machine.queue and machine.running < SEQUENCES:
            request, rung = machine.queue[0], machine.rung
            if request.at > self.barrier:
                return
            tokens = request.prompt + request.answer
            if machine.running and rung.nbytes(machine.tokens + tokens, machine.running + 1) > machine.lease:
                return
            machine.queue.popleft()
            machine.running += 1
            machine.tokens += tokens
            request.first = self.now + request.prompt / PREFILL_TOKENS_S
            request.kl = rung.kl
            end = request.first + request.answer * TOKEN_S
            self.at(end, functools.partial(self._finish, machine, tokens))

    def _finish(self, machine: Machine, tokens: int) -> None:
        machine.running -= 1
        machine.tokens -= tokens
        machine.used_at = self.now
        self.serve(machine)

    def bring(self, name: str, setting: str, lease: int, shares: dict[str, int], done: Callable[[], None]) -> None:
        """Load or wake a model; its bytes are taken from now on."""
        machine = self.machines[name]
        asleep = machine.state == "asleep"
        seconds = machine.kind.facts.wake_s if asleep else machine.kind.facts.load_s
        machine.starts, machine.wakes = machine.starts + (not asleep), machine.wakes + asleep
        machine.state, machine.setting, machine.lease = "moving", setting, lease
        machine.shares = {**shares, "cpu": machine.shares.get("cpu", 0)}

        def arrived() -> None:
            machine.state, machine.shares, machine.draining = HOT, dict(shares), False
            self.serve(machine)
            done()

        self.at(self.now + seconds, arrived)

    def remove(self, name: str, asleep: bool, done: Callable[[], None]) -> None:
        """Put a model to sleep, or end it. Its bytes are free when that is done."""
        machine = self.machines[name]
        seconds = machine.kind.facts.weights / COPY_BYTES_S if asleep else 0.3
        if asleep:
            machine.shares = {**machine.shares, "cpu": machine.kind.facts.weights}
        machine.state = "moving"

        def gone() -> None:
            machine.state = "asleep" if asleep else COLD
            machine.shares = {"cpu": machine.kind.facts.weights} if asleep else {}
            machine.draining = False
            done()

        self.at(self.now + seconds, gone)


class SpectralRule:
    """The real steward and planner, carried out in virtual time."""

    def __init__(self, kinds: list[Kind], wishes: Wishes) -> None:
        self.steward = Steward()
        for model in kinds:
            self.steward.add(model.name, model.facts, wishes)
        self._seen: dict[str, int] = dict.fromkeys((k.name for k in kinds), 0)
        self._pending: list[Action] = []
        self.squeezes = 0
        self.log: list[tuple[float, str]] = []

    def react(self, sim: Simulator) -> None:
        """Report, decide if it is time, and start what has its bytes."""
        for name, machine in sim.machines.items():
            arrived = machine.running + len(machine.queue)
            if arrived > self._seen[name]:
                self.steward.requested(name, sim.now)
            self._seen[name] = arrived
            self.steward.report(
                name, sim.now, running=machine.running, waiting=len(machine.queue), kv_tokens=machine.tokens
            )
        if self.steward.due(sim.now):
            devices = [Device(name, size) for name, size in sim.devices.items()]
            self._pending = self.steward.decide(sim.now, devices)
        self._start(sim)

    def _start(self, sim: Simulator) -> None:
        for action in list(self._pending):
            taken = sim.machines[action.model].shares
            if (
                all(size - taken.get(d, 0) <= sim.free(d) for d, size in action.needs.items())
                or action.kind == "squeeze"
            ):
                self._pending.remove(action)
                self._carry_out(sim, action)

    def _carry_out(self, sim: Simulator, action: Action) -> None:
        machine, target = sim.machines[action.model], action.target
        self.log.append((sim.now, f"{action.kind} {action.reason}"))
        self.steward.begin(action)
        ended = lambda: self.steward.moved(action.model, target, action.lease, sim.now)  # noqa: E731
        if action.kind in ("load", "wake", "move"):
            sim.bring(action.model, target.setting, action.lease, action.needs, ended)
        elif action.kind in ("sleep", "evict"):
            sim.remove(action.model, action.kind == "sleep", ended)
        else:
            self._resize(sim, machine, target, action)

    def _resize(self, sim: Simulator, machine: Machine, target: Placement, action: Action) -> None:
        """A squeeze or another lease: never below what running sequences hold, and no squeeze takes more bytes."""
        squeeze, old = action.kind == "squeeze", machine.rung
        machine.setting = target.setting
        held = machine.rung.nbytes(machine.tokens, machine.running)
        lease = max(held, min(action.lease, machine.lease) if squeeze else action.lease)
        share, device = machine.lease - lease, target.devices[0]
        self.squeezes += squeeze
        machine.lease = min(machine.lease, lease)  # what is given up is not used from now on

        def done() -> None:
            machine.shares = {**machine.shares, device: machine.shares[device] - share}
            machine.lease = lease
            sim.serve(machine)
            self.steward.moved(action.model, target, lease, sim.now)

        moved = (old.token_bytes * machine.tokens) / GIB if squeeze else 0.0
        sim.at(sim.now + (0.02 + SQUEEZE_S_PER_GIB * moved if squeeze else 0.0), done)

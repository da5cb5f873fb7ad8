"""What servers do that know only whole models: Ollama's rule and llama-swap's, as their sources have them.

Both keep an exact cache, sized when a model loads (context length x parallel sequences), and neither looks at quality.
`sleep` lets a rule keep what it evicts in host memory, as vLLM's sleep mode does; without it models go back to disk.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.trace_simulator import Machine, Simulator
from server.scheduler.demand import COLD, HOT

CONTEXT, PARALLEL = 4096, 4
"""Ollama's defaults: 4,096 tokens (cards below 24 GB), 4 parallel sequences when memory allows."""
USABLE = 0.8
"""Ollama's scheduler counts on 80 % of what is free."""


class WholeModels:
    """Load what is asked for; if it does not fit, let others finish what they run and evict them until it does.

    While a model is let out it takes no new requests. `blocks`: nor does any other model take requests that came later.
    """

    blocks = False

    def __init__(self, sleep: bool) -> None:
        self.sleep = sleep

    def react(self, sim: Simulator) -> None:
        """Requests for models that are not hot, oldest first; one load at a time holds up those behind it."""
        for machine in sim.machines.values():
            if machine.draining and not machine.running and machine.state == HOT:
                room = sim.free("cpu") >= machine.kind.facts.weights
                sim.remove(machine.kind.name, self.sleep and room, lambda: None)
        asked = [m for m in sim.machines.values() if m.queue and m.state in (COLD, "asleep")]
        waiting = None
        for machine in sorted(asked, key=lambda m: m.queue[0].at):
            if not self.place(sim, machine):
                waiting = machine.queue[0].at
                break
        before, sim.barrier = sim.barrier, waiting if waiting is not None and self.blocks else float("inf")
        if sim.barrier > before:
            for machine in sim.machines.values():
                sim.serve(machine)

    def place(self, sim: Simulator, machine: Machine) -> bool:
        """Start the load, or let others out for it. False: it has to wait."""
        lease = machine.kind.facts.rungs[0].nbytes(CONTEXT * PARALLEL, PARALLEL)
        needed = machine.kind.facts.weights + machine.kind.facts.overhead + lease
        best = max((name for name in sim.devices if name != "cpu"), key=lambda name: (sim.free(name), name))
        if sim.free(best) >= needed:
            sim.bring(machine.kind.name, machine.kind.facts.rungs[0].name, lease, {best: needed}, lambda: None)
            return True
        if not any(m.state == "moving" or m.draining for m in sim.machines.values()):
            for victim in self.victims(sim, needed):
                victim.draining = True
        return False

    def victims(self, sim: Simulator, needed: int) -> list[Machine]:
        """Models to let out."""
        raise RuntimeError("a rule has to say whom it evicts")

    def cheapest(self, sim: Simulator, needed: int, price: Callable[[Machine], float]) -> list[Machine]:
        """Over the devices: the models that free enough at the least price."""
        best: tuple[float, list[Machine]] | None = None
        for device in (name for name in sim.devices if name != "cpu"):
            there = [m for m in sim.machines.values() if m.state == HOT and device in m.shares]
            free, chosen = sim.free(device), []
            for machine in sorted(there, key=price):
                if free >= needed:
                    break
                free += machine.shares[device]
                chosen.append(machine)
            if free >= needed and (best is None or sum(map(price, chosen)) < best[0]):
                best = (sum(map(price, chosen)), chosen)
        return best[1] if best else []


class LeastKeepAlive(WholeModels):
    """Ollama: the model whose keep-alive ends first goes, idle ones before those that run; its queue is one for all
    models, so what came later waits until the load has begun."""

    blocks = True

    def victims(self, sim: Simulator, needed: int) -> list[Machine]:
        return self.cheapest(sim, needed, lambda m: (1e9 if m.running else 0.0) + m.used_at)


class LeastCost(WholeModels):
    """llama-swap: the set of models whose reload costs least goes; other models answer meanwhile."""

    def victims(self, sim: Simulator, needed: int) -> list[Machine]:
        return self.cheapest(sim, needed, lambda m: m.kind.facts.load_s)

"""What a cluster's gateway has in place of a machine's own memory manager; and its way to the conductor."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from server import errors
from server.cluster import wire
from server.config import ModelSettings, Settings
from server.scheduler.demand import Plan
from server.scheduler.ledger import Ledger
from server.scheduler.memory import MemoryManager
from server.scheduler.slots import Slot

if TYPE_CHECKING:
    from server.cluster.gateway import ClusterScheduler

log = logging.getLogger("spectral.cluster")
NODE_TIMES = ("drain_seconds", "load_wait_seconds", "request_timeout_seconds", "worker_silence_seconds")


class Conductor(Protocol):
    """How a gateway reaches the conductor. Raises ConductorAway where it does not answer."""

    async def ask(self, question: bytes) -> bytes:
        """A wire.Ask; the answer is a wire.Table."""
        ...

    async def command(self, what: bytes) -> bytes:
        """A wire.Command; the answer is a wire.Answer."""
        ...


class Client:
    """Typed calls of the conductor, and the cluster's secret."""

    def __init__(self, conductor: Conductor, secret: str) -> None:
        self._conductor, self.secret = conductor, secret

    async def ask(self, question: wire.Ask) -> wire.Table:
        """Where everything is."""
        return wire.unpack(await self._conductor.ask(wire.pack(question)), wire.Table)

    async def command(self, what: wire.Command) -> wire.Answer:
        """Have something done."""
        return wire.unpack(await self._conductor.command(wire.pack(what)), wire.Answer)

    async def configure(self, settings: Settings) -> None:
        """Tell which models there are. Raises ApiError where the conductor cannot use it."""
        answer = await self.command(configuration(settings))
        if answer.error:
            raise errors.ApiError(409, answer.error, code="refused_by_cluster")


def configuration(settings: Settings) -> wire.Configure:
    """What the conductor is told of a gateway's configuration: nothing secret is in it."""
    models = [model.model_dump(mode="json") for model in settings.models]
    server = {name: getattr(settings.server, name) for name in NODE_TIMES}
    cluster, memory = settings.cluster.model_dump(mode="json"), settings.memory.model_dump(mode="json")
    return wire.Configure(models, cluster, memory, server)


class ClusterLedger(Ledger):
    """Keeps no account of its own."""

    def __init__(self, memory: ClusterMemory) -> None:
        super().__init__()
        self._memory = memory

    def snapshot(self) -> list[dict[str, Any]]:
        """The devices of all nodes for the metrics, whose label is the model and not its replica."""
        rows: list[dict[str, Any]] = self._memory.vram()["devices"]
        for row in rows:
            named = [{**part, "model": (part["model"] or "").partition("#")[0] or None} for part in row["segments"]]
            row["segments"] = named
        return rows


class ClusterMemory(MemoryManager):
    """Every node manages its own memory; what an administrator chooses goes to the conductor."""

    def __init__(self, scheduler: ClusterScheduler, client: Client) -> None:
        super().__init__(scheduler)
        self.ledger = ClusterLedger(self)
        self._client, self._cluster = client, scheduler
        self._chosen: dict[str, wire.Choice] = {}

    def adopt(self, slot: Slot) -> None:
        """A model was pinned, or given another setting or profile: all nodes hear of it."""
        choice = wire.Choice(slot.name, slot.pinned, slot.setting, slot.profile)
        if self._chosen.get(slot.name, wire.Choice(slot.name)) != choice:
            self._chosen[slot.name] = choice
            self.spawn(self._choose(choice))

    async def _choose(self, choice: wire.Choice) -> None:
        try:
            await self._client.command(choice)
        except Exception as error:  # the administrator sees it by the model's state
            log.error("model %s: the choice did not reach the conductor: %s", choice.model, error)

    def forget(self, name: str) -> None:
        """A model is no longer in the configuration."""
        self._chosen.pop(name, None)
        self.spawn(self._client.configure(self._cluster.settings))

    def report(self, slot: Slot) -> None:
        """Nodes report by themselves."""

    def requested(self, slot: Slot, keep_alive: float | None = None) -> None:
        """Nodes count their own requests; a request's own keep_alive is theirs to keep as configured."""

    async def vram_now(self) -> dict[str, Any]:
        """As the nodes told last."""
        return self.vram()

    def vram(self) -> dict[str, Any]:
        """The devices of all nodes, named "node/device"."""
        rows: list[dict[str, Any]] = []
        leases: dict[str, int] = {}
        for peer in self._cluster.agents.peers.values():
            if peer.board is None:
                continue
            for row in peer.board.vram:
                rows.append({**row, "device": f"{peer.info.node[:12]}/{row['device']}", "node": peer.info.node})
            leases |= {state.replica: state.lease for state in peer.board.replicas if state.lease}
        return {"devices": rows, "leases": leases, "notes": []}

    def nodes(self) -> list[dict[str, Any]]:
        """Every node: where, whether it is connected and being emptied, what it serves."""
        found = []
        for info in self._cluster.agents.table.nodes:
            peer = self._cluster.agents.peers.get(info.node)
            board = peer.board if peer is not None else None
            found.append(
                {
                    "node": info.node,
                    "address": info.address,
                    "connected": board is not None,
                    "draining": info.draining,
                    "devices": [
                        {"device": d.name, "name": d.label, "total_bytes": d.total, "budget_bytes": d.budget}
                        for d in info.devices
                    ],
                    "replicas": [
                        {"replica": s.replica, "model": s.model, "state": s.state, "device": s.device,
                         "streams": s.streams, "retiring": s.retiring}
                        for s in (board.replicas if board is not None else [])
                    ],
                }
            )  # fmt: skip
        return found

    async def plan(self, extra: ModelSettings | None = None, context: int | None = None) -> Plan:
        """There is no dry run of a fleet: `spectral plan` answers for one machine's devices."""
        raise errors.ApiError(409, "a cluster has no dry run; GET /admin/nodes shows its plan", code="not_here")

    async def stop(self) -> None:
        """Let choices that are on their way arrive."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


__all__ = ["Client", "ClusterMemory", "Conductor", "configuration"]

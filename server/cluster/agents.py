"""A gateway's view of all nodes: one link to every agent, kept open; what their boards say; the conductor's table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable
from typing import Any

from server.aio import within
from server.cluster import link, wire
from server.cluster.agent import ConductorAway
from server.cluster.facade import Client
from server.cluster.link import BadFrame, Link, NotTrusted

log = logging.getLogger("spectral.cluster")
ASK_S, WANTED_S = 1.0, 0.25
REDIAL_S = 0.25
SERVES = ("hot", "asleep")


class Peer:
    """One agent: its link while there is one, and its last board."""

    def __init__(self, info: wire.NodeInfo) -> None:
        self.info = info
        self.link: Link[wire.ToGateway] | None = None
        self.board: wire.Board | None = None
        self.task: asyncio.Task[None] | None = None
        self.broken = False


class Agents:
    """Belongs to the gateway's loop. `take`: every message; `changed`: a board came; `lost`: a link ended."""

    def __init__(
        self,
        client: Client,
        take: Callable[[wire.ToGateway], None],
        changed: Callable[[], None],
        lost: Callable[[str, list[str], str], None],
    ) -> None:
        self._client, self._take, self._changed, self._lost = client, take, changed, lost
        self.name = uuid.uuid4().hex
        self.peers: dict[str, Peer] = {}
        self.table = wire.Table(0, [])
        self._where: dict[str, Peer] = {}  # replica -> its node
        self._sent: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        self._wake = asyncio.Event()

    @property
    def stages(self) -> dict[str, str]:
        """Why models are nowhere served."""
        return self.table.stages

    # ------------------------------------------------------------------------------------------ the conductor

    async def run(self, waiting: Callable[[], dict[str, int]]) -> None:
        """Follow the table until cancelled; `waiting`: requests that wait, by model."""
        while True:
            asked, self._requests = self._requests, {}
            wanted = waiting()
            broken = [name for name, peer in self.peers.items() if peer.broken]
            wait = WANTED_S if wanted or broken else ASK_S
            question = wire.Ask(self.name, asked, wanted, self.table.version, wait, broken)
            try:
                table = await self._ask(question)
                if table is not None:
                    self._apply(table)
                else:  # somebody waits: the next question says so, and counts these requests again
                    for model, count in asked.items():
                        self._requests[model] = self._requests.get(model, 0) + count
            except ConductorAway as error:
                log.warning("the conductor is away (%s); this gateway goes on with what it knows", error)
                await asyncio.sleep(REDIAL_S)
            except Exception:  # whatever it is, streams go on and the next turn asks again
                log.exception("the table of the cluster could not be fetched")
                await asyncio.sleep(REDIAL_S)

    async def _ask(self, question: wire.Ask) -> wire.Table | None:
        """The table; None where a model is wanted meanwhile, which is to be told at once."""
        asking = asyncio.ensure_future(self._client.ask(question))
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({asking, waking}, return_when=asyncio.FIRST_COMPLETED)
            self._wake.clear()
            if asking.done():
                return asking.result()
            return None
        finally:
            for task in (asking, waking):
                task.cancel()
            await asyncio.gather(asking, waking, return_exceptions=True)

    def look(self) -> None:
        """Somebody waits: tell the conductor now."""
        self._wake.set()

    def _apply(self, table: wire.Table) -> None:
        self.table = table
        there = {info.node: info for info in table.nodes}
        for name, peer in list(self.peers.items()):
            if name not in there and peer.link is None:
                self._drop(name, "the conductor has given it up")
        for name, info in there.items():
            known = self.peers.get(name)
            if known is None:
                known = self.peers[name] = Peer(info)
            known.info = info
            if known.task is None or known.task.done():
                known.task = asyncio.create_task(self._keep(known))
        self._changed()

    def _drop(self, name: str, why: str) -> None:
        peer = self.peers.pop(name)
        if peer.task is not None:
            peer.task.cancel()
        log.info("node %s: %s", name[:12], why)

    async def stop(self) -> None:
        """Close every link."""
        tasks = [peer.task for peer in self.peers.values() if peer.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------ links

    async def _keep(self, peer: Peer) -> None:
        """Keep a link to one agent until the conductor knows it no longer."""
        while peer.info.node in self.peers:
            try:
                peer.link = await link.dial(peer.info.address, self._client.secret)
                peer.broken = False
                await self._listen(peer, peer.link)
            except (OSError, NotTrusted, BadFrame) as error:
                log.info("node %s at %s: %s", peer.info.node[:12], peer.info.address, error)
            finally:
                self._ended(peer)
            if peer.info.node not in {info.node for info in self.table.nodes}:
                self.peers.pop(peer.info.node, None)
                return
            await asyncio.sleep(REDIAL_S)

    async def _listen(self, peer: Peer, connection: Link[wire.ToGateway]) -> None:
        while (message := await connection.receive()) is not None:
            for item in (message, *connection.pending()):
                if isinstance(item, wire.Board):
                    self._seen(peer, item)
                else:
                    self._take(item)

    def _seen(self, peer: Peer, board: wire.Board) -> None:
        for state in peer.board.replicas if peer.board is not None else ():
            self._where.pop(state.replica, None)
        peer.board = board
        for state in board.replicas:
            self._where[state.replica] = peer
        self._changed()

    def _ended(self, peer: Peer) -> None:
        had, peer.link = peer.link, None
        replicas = [state.replica for state in peer.board.replicas] if peer.board is not None else []
        for replica in replicas:
            self._where.pop(replica, None)
            self._sent.pop(replica, None)
        peer.board = None
        if had is not None:
            had.close()
            peer.broken = True
            self._wake.set()
            self._lost(peer.info.node, replicas, "the connection to its node ended")
            self._changed()

    # ------------------------------------------------------------------------------------------ replicas

    def states_of(self, model: str) -> list[wire.ReplicaState]:
        """Every replica of a model that a connected node tells of."""
        boards = [peer.board for peer in self.peers.values() if peer.board is not None]
        return [state for board in boards for state in board.replicas if state.model == model]

    def replicas_of(self, model: str) -> list[wire.ReplicaState]:
        """Replicas that take requests; those of nodes that are being emptied only where there are no others."""
        found = [state for state in self.states_of(model) if state.state in SERVES and not state.retiring]
        stay = [state for state in found if not self._where[state.replica].info.draining]
        return stay or found

    def node_of(self, replica: str) -> str:
        """The node that has a replica; "" where none has."""
        peer = self._where.get(replica)
        return peer.info.node if peer is not None else ""

    def address_of(self, replica: str) -> str:
        """Where that node's agent listens; "" where it is not known."""
        peer = self._where.get(replica)
        return peer.info.address if peer is not None else ""

    def send(self, replica: str, message: Any) -> bool:
        """Send to a replica's agent; False where there is no link to it."""
        peer = self._where.get(replica)
        if peer is None or peer.link is None or peer.link.closed:
            return False
        peer.link.send(message)
        return True

    def count(self, model: str) -> None:
        """A request came for a model."""
        self._requests[model] = self._requests.get(model, 0) + 1

    def opened(self, replica: str) -> None:
        """One more request of this gateway is with a replica."""
        self._sent[replica] = self._sent.get(replica, 0) + 1

    def closed(self, replica: str) -> None:
        """One fewer."""
        if self._sent.get(replica, 0) > 0:
            self._sent[replica] -= 1

    def sent_to(self, replica: str) -> int:
        """Requests of this gateway that a replica has."""
        return self._sent.get(replica, 0)

    async def connected(self, seconds: float) -> bool:
        """Whether some node is connected within this time."""
        with contextlib.suppress(asyncio.TimeoutError):
            await within(seconds, self._any())
        return any(peer.board is not None for peer in self.peers.values())

    async def _any(self) -> None:
        while not any(peer.board is not None for peer in self.peers.values()):
            await asyncio.sleep(0.02)

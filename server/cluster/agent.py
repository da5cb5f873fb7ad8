"""One machine of the cluster: the single-machine scheduler without HTTP, told by the conductor what to serve.

    orders   from the conductor, complete each time: what is missing is loaded, what is no longer there is drained
    reports  to the conductor, with every fetch of orders: devices, replicas, what each of them does
    streams  to gateways, over links of their own: a worker's messages are passed on in the turn in which they come

Settings, leases, squeezes and sleep stay this machine's own business, as on a machine alone. An agent whose conductor
is away goes on with its last orders. Nothing here knows Ray: `Conductor` is how orders are fetched.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec
from pydantic import ValidationError

from server import errors
from server.cluster import link, wire
from server.cluster.chats import Chats
from server.cluster.relay import Relay
from server.config import ModelSettings, Settings
from server.metrics import Metrics
from server.scheduler.demand import HOT
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot
from server.worker import messages
from server.worker.process import DEFAULT_COMMAND

log = logging.getLogger("spectral.cluster")
SYNC_S, RETRY_S = 0.5, 0.5
BOARD_S = 0.25
DRAIN_LOOK_S = 0.05
COMMAND_S = 600.0


class Conductor(Protocol):
    """How an agent reaches the conductor. Raises ConductorAway where it does not answer."""

    async def sync(self, report: bytes) -> bytes:
        """Give a wire.Report; the answer is wire.Orders, at once where they changed, else after a while."""
        ...


class ConductorAway(Exception):
    """The conductor does not answer now; it is being restarted, or its node is lost."""


class NodeAgent:
    """Serves replicas on this machine. `command` replaces the workers' command line."""

    def __init__(
        self, node: str, settings: Settings, secret: str, conductor: Conductor, command: Sequence[str] = DEFAULT_COMMAND
    ) -> None:
        self.node, self._secret, self._conductor = node, secret, conductor
        self.life = uuid.uuid4().hex
        alone: dict[str, Any] = {"models": ()}
        self.scheduler = Scheduler(settings.model_copy(update=alone), Metrics(), command)
        self.chats = Chats(self.scheduler, secret)
        self.address = ""
        self._assigned: dict[str, wire.Assignment] = {}
        self.retiring: set[str] = set()
        self._relays: set[Relay] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self._seen = 0
        self._shown: list[wire.ReplicaState] = []

    async def start(self, host: str, port: int = 0, reached_at: str = "") -> None:
        """Listen for gateways on `host` and begin to fetch orders. `reached_at`: the address that they are told, where
        `host` is not one ("0.0.0.0"). Raises OSError."""
        self._server = await link.listen(self._connected, host, port, self._secret)
        bound = self._server.sockets[0].getsockname()[1]
        told = reached_at or host
        self.address = f"[{told}]:{bound}" if ":" in told else f"{told}:{bound}"
        self.scheduler.start()
        self._spawn(self._follow())
        self._spawn(self._show())

    async def stop(self) -> None:
        """End everything; running requests get the configured time."""
        if self._server is not None:
            self._server.close()
        await self.scheduler.stop()
        self.chats.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for relay in list(self._relays):
            relay.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------------------------------ orders

    async def _follow(self) -> None:
        while True:
            try:
                answer = wire.unpack(await self._conductor.sync(wire.pack(self.report())), wire.Orders)
                self.obey(answer)
                self._seen = answer.version
            except ConductorAway as error:  # the models go on as they are
                log.warning("the conductor is away (%s); this node goes on with its last orders", error)
                await asyncio.sleep(RETRY_S)
            except Exception:  # whatever it is, the models go on and the next fetch tries again
                log.exception("orders could not be followed")
                await asyncio.sleep(RETRY_S)

    def report(self) -> wire.Report:
        """Devices and replicas as they are now."""
        devices = [
            wire.DeviceState(account.name, account.budget, account.reading.total, account.reading.name)
            for account in self.scheduler.memory.ledger.accounts.values()
        ]
        return wire.Report(self.node, self.life, self.address, devices, self.replicas(), self._seen)

    def obey(self, orders: wire.Orders) -> None:
        """Make what is served here what the orders say. Returns at once; loads and drains go on beside."""
        wanted = {assignment.replica: assignment for assignment in orders.assignments}
        for replica in [name for name in self._assigned if name not in wanted]:
            del self._assigned[replica]
            self.retiring.add(replica)
            self._spawn(self._retire(replica))
        for replica, assignment in wanted.items():
            if replica in self.retiring:
                continue  # it comes back as soon as it has gone
            before = self._assigned.get(replica)
            if before == assignment:
                continue
            try:
                settings = self._settings(assignment)
            except ValidationError as error:
                log.error("replica %s cannot be served: %s", replica, error)
                continue
            self._assigned[replica] = assignment
            if before is None:
                self.scheduler.add(settings, _prepare(assignment))
            else:
                slot = self.scheduler.slots[replica]
                slot.settings = settings
                _choose(slot, assignment)
                self.scheduler.memory.adopt(slot)

    @staticmethod
    def _settings(assignment: wire.Assignment) -> ModelSettings:
        """A model's configuration as this node's scheduler takes it: named as the replica, on the planned device."""
        model = ModelSettings.model_validate(assignment.settings)
        changes = {"name": assignment.replica, "device": assignment.device, "load": "startup", "aliases": ()}
        return model.model_copy(update={**changes, "path": model.path or model.name})

    async def _retire(self, replica: str) -> None:
        """End a replica when its streams have ended; it takes no new ones. No request may run for longer than that."""
        slot, server = self.scheduler.slots.get(replica), self.scheduler.settings.server
        until = time.monotonic() + server.request_timeout_seconds
        try:
            while slot is not None and slot.streams and time.monotonic() < until:
                await asyncio.sleep(DRAIN_LOOK_S)
            if slot is not None:
                await self.chats.keep(slot)
                await self.scheduler.unload(slot, server.drain_seconds, "moved elsewhere")
                self.scheduler.slots.pop(replica, None)
                self.scheduler.memory.forget(replica)
                self.scheduler.metrics.forget(replica)
        finally:
            self.retiring.discard(replica)

    # ------------------------------------------------------------------------------------------ what is told

    def replicas(self) -> list[wire.ReplicaState]:
        """Every replica here, those that end included."""
        return [self._state(slot) for slot in self.scheduler.slots.values()]

    def _state(self, slot: Slot) -> wire.ReplicaState:
        ward = self.scheduler.memory.steward.wards.get(slot.name)
        spread = sorted((ward.moving or ward.now).devices) if ward is not None else []
        return wire.ReplicaState(
            replica=slot.name,
            model=slot.name.rpartition("#")[0],
            state=slot.state,
            device=",".join(spread) if len(spread) > 1 else slot.settings.device,
            stage=slot.stage if slot.state == "loading" else "",
            error=slot.error,
            restarts=slot.restarts,
            streams=len(slot.streams),
            waiting=slot.waiting,
            lease=ward.lease if ward is not None and ward.now.residency == HOT else 0,
            retiring=slot.name in self.retiring,
            ready=slot.ready,
            stats=slot.stats,
        )

    def board(self) -> wire.Board:
        """What gateways are told."""
        return wire.Board(self.node, self.replicas(), self.scheduler.memory.vram()["devices"])

    async def _show(self) -> None:
        """Tell gateways what changed, soon after it does; the devices' bytes go along."""
        while True:
            changed: list[asyncio.Future[Any]] = []
            changed += [asyncio.ensure_future(slot.changed.wait()) for slot in self.scheduler.slots.values()]
            changed.append(asyncio.ensure_future(asyncio.sleep(BOARD_S)))
            try:
                await asyncio.wait(changed, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for waiting in changed:
                    waiting.cancel()
            now = self.replicas()
            if now != self._shown:
                self._shown = now
                board = self.board()
                for relay in self._relays:
                    relay.link.send(board)

    # ------------------------------------------------------------------------------------------ gateways

    async def _connected(self, connection: link.Link[wire.ToAgent]) -> None:
        relay = Relay(self, connection)
        self._relays.add(relay)
        connection.send(self.board())
        try:
            await relay.run()
        finally:
            self._relays.discard(relay)
            relay.close()

    async def tell(self, message: wire.Tell) -> messages.Done:
        """Carry out a gateway's command for a replica's worker."""
        slot, ident = self.scheduler.slots.get(message.replica), message.command.command_id
        if slot is None:
            return messages.Done(ident, f"the replica {message.replica} is not on this node any more")
        try:
            await self.scheduler.command(slot, partial(_named, message.command), COMMAND_S)
        except errors.ApiError as error:
            return messages.Done(ident, error.message)
        return messages.Done(ident)


def _named(command: Any, ident: str) -> Any:
    return msgspec.structs.replace(command, command_id=ident)


def _prepare(assignment: wire.Assignment) -> Callable[[Slot], None]:
    return lambda slot: _choose(slot, assignment)


def _choose(slot: Slot, assignment: wire.Assignment) -> None:
    slot.pinned, slot.setting, slot.profile = assignment.pinned, assignment.setting, assignment.profile

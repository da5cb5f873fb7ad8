"""One gateway's connection, at the agent's end: requests go to workers, their messages go back.

A stream here is no queue: what a worker says is written to the link in the same turn of the loop. Where the gateway
goes away all of its requests are cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from server import errors
from server.cluster import wire
from server.cluster.link import BadFrame, Link
from server.scheduler.admission import Refusal
from server.scheduler.slots import Slot
from server.scheduler.stream import RequestStream, StreamItem
from server.worker import messages

if TYPE_CHECKING:
    from server.cluster.agent import NodeAgent

log = logging.getLogger("spectral.cluster")
ELSEWHERE = ("shutting_down", "asleep")
"""Refusals by a worker that say nothing about the request: another replica may take it."""


class RelayStream(RequestStream):
    """A request's messages on their way to a gateway; :meth:`put` writes them to its link."""

    def __init__(self, relay: Relay, slot: Slot, message: messages.Submit | messages.Tokenize, seconds: float) -> None:
        super().__init__(message.request_id, seconds)
        self._relay, self.slot = relay, slot
        self._left = message.sampling.n if isinstance(message, messages.Submit) else 1

    def put(self, item: StreamItem | None) -> None:
        """Pass a message on; None: the worker is gone."""
        self._told += 1
        relay = self._relay
        if item is None:
            relay.link.send(wire.Gone(self.request_id, f"the worker of {self.slot.name} ended", True))
            asyncio.get_running_loop().call_soon(relay.over, self)  # the scheduler goes through the slot's streams now
            return
        if isinstance(item, messages.Rejected) and item.code in ELSEWHERE:
            relay.link.send(wire.Gone(self.request_id, item.message))
            relay.over(self)
            return
        relay.link.send(item)
        self._left -= isinstance(item, messages.Finished)
        if not self._left or isinstance(item, (messages.Rejected, messages.Failed, messages.Tokenized)):
            relay.over(self)

    def _expire(self) -> None:
        """The gateway keeps the time and says Drop; a request that it forgot ends a while after that."""
        self._relay.cancel(self.request_id)


class Relay:
    """Belongs to the agent's loop."""

    def __init__(self, agent: NodeAgent, link: Link[wire.ToAgent]) -> None:
        self.agent, self.link = agent, link
        self._streams: dict[str, RelayStream] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Serve the gateway until its connection ends."""
        try:
            while (message := await self.link.receive()) is not None:
                self._take(message)
        except BadFrame as error:
            log.error("a gateway sent bad bytes (%s); its connection ends", error)

    def close(self) -> None:
        """The gateway is gone: nobody reads what its requests would still say."""
        self.link.close()
        for task in [*self._opening.values(), *self._tasks]:
            task.cancel()
        for request_id in list(self._streams):
            self.cancel(request_id)

    def _take(self, message: wire.ToAgent) -> None:
        if isinstance(message, wire.Forward):
            self._forward(message)
        elif isinstance(message, wire.Drop):
            opening = self._opening.pop(message.request_id, None)
            if opening is not None:
                opening.cancel()
            self.cancel(message.request_id)
        elif isinstance(message, wire.Tell):
            self._spawn(self._tell(message))
        elif isinstance(message, wire.Fetch):
            self._spawn(self.agent.chats.give(message, self.link))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, message: wire.Tell) -> None:
        self.link.send(await self.agent.tell(message))

    # ------------------------------------------------------------------------------------------ requests

    def _forward(self, message: wire.Forward) -> None:
        ident, scheduler = message.message.request_id, self.agent.scheduler
        slot = scheduler.slots.get(message.replica)
        if slot is None or message.replica in self.agent.retiring:
            self.link.send(wire.Gone(ident, f"the replica {message.replica} is not on this node any more"))
        elif slot.state == "hot" and slot.worker is not None and not message.session_at:
            scheduler.memory.requested(slot)
            self._begin(slot, message)
        else:
            self._opening[ident] = asyncio.create_task(self._open(slot, message))

    async def _open(self, slot: Slot, message: wire.Forward) -> None:
        """A model that sleeps, or whose worker is being replaced: wait for it as a single machine does."""
        ident = message.message.request_id
        try:
            await self.agent.scheduler.ensure(slot)
            if message.session_at and isinstance(message.message, messages.Submit):
                await self.agent.chats.bring(slot, message, message.message)
            self._begin(slot, message)
        except errors.ApiError as error:
            self.link.send(wire.Gone(ident, error.message))
        finally:
            self._opening.pop(ident, None)

    def _begin(self, slot: Slot, message: wire.Forward) -> None:
        request, scheduler = message.message, self.agent.scheduler
        limits = slot.settings.limits
        if len(slot.streams) >= 2 * (limits.max_queue + limits.max_concurrency):
            full = messages.Rejected(request.request_id, 429, "queue_full", "this replica has too many open requests")
            self.link.send(full)
            return
        if isinstance(request, messages.Submit):
            try:
                longest = slot.admission.enter(slot.room, request.request_id, request.tenant, request.sampling.n)
            except Refusal as refusal:
                self.link.send(messages.Rejected(request.request_id, 429, "queue_full", f"{refusal}; try again later"))
                return
            request = msgspec.structs.replace(request, queue_s=longest)
        stream = RelayStream(self, slot, request, message.seconds + 5.0)
        worker = slot.worker
        if worker is None:  # it ended in this very moment
            stream.put(None)
            return
        self._streams[request.request_id] = slot.streams[request.request_id] = stream
        worker.send(request)
        scheduler.memory.report(slot)

    def over(self, stream: RelayStream) -> None:
        """A request has had its last message."""
        self._streams.pop(stream.request_id, None)
        self.agent.scheduler.release(stream.slot, stream, cancel=False)

    def cancel(self, request_id: str) -> None:
        """The worker drops a request before its next step. An unknown id is ignored."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self.agent.scheduler.release(stream.slot, stream, cancel=True)

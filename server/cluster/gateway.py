"""A gateway of a cluster: the scheduler's interface, with replicas on other machines behind it instead of workers.

It keeps nothing that another gateway needs: where replicas are it hears from the agents themselves, over the links that
also carry the tokens, and which agents there are from the conductor. While the conductor is away it goes on with what
it knows. A request whose replica is lost is sent to another one as long as nothing of its answer has been streamed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import msgspec

from server import errors
from server.aio import within
from server.cluster import wire
from server.cluster.agents import Agents
from server.cluster.facade import Client, ClusterMemory
from server.cluster.flights import Flight, texts_of
from server.cluster.routing import CHARS_PER_TOKEN, Candidate, Router, blocks_of, shares
from server.config import ModelSettings, Settings
from server.events import EventLog
from server.metrics import Metrics
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot
from server.scheduler.stream import RequestStream
from server.worker import messages
from server.worker.process import WorkerProcess

log = logging.getLogger("spectral.cluster")
MOST_CRASHES = 2
MOST_TIMES = 12
"""How often a request is sent at most."""
MOST_CHATS = 50_000


class ClusterScheduler(Scheduler):
    """What `server.gateway` and the routes see of a cluster. `client`: the way to the conductor."""

    def __init__(self, settings: Settings, metrics: Metrics, client: Client, events: EventLog | None = None) -> None:
        super().__init__(settings, metrics, (), events)
        self.memory: ClusterMemory = ClusterMemory(self, client)
        self.client = client
        self._router = Router()
        self._flights: dict[str, Flight] = {}  # by the name that they have with their replica
        self._open: dict[str, Flight] = {}  # by the name that their client's stream has
        self._serving: dict[str, set[str]] = {}
        self._tells: dict[str, asyncio.Future[None]] = {}
        self._why_lost: dict[str, str] = {}
        self._homes: OrderedDict[tuple[str, str, str], tuple[str, str]] = OrderedDict()  # chat -> replica, address
        self.agents = Agents(client, self._hear, self._boards_changed, self._agent_lost)
        self._loops: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Begin to follow the conductor; returns at once."""
        self._spawn(self.agents.run(self._traffic))
        for slot in self.slots.values():
            if slot.settings.load == "startup":
                self._set(slot, "loading")

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)

    async def stop(self) -> None:
        """Let this gateway's streams end; the nodes go on serving others. Safe to call twice."""
        self._closing = True
        for slot in self.slots.values():
            self._notify(slot)
        until = time.monotonic() + self.settings.server.drain_seconds
        while any(slot.streams for slot in self.slots.values()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for flight in list(self._open.values()):
            flight.stream.put(None)
        for task in list(self._loops):
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self.agents.stop()
        await self.memory.stop()

    def hurry(self) -> None:
        """Let a running or coming :meth:`stop` wait for nobody."""
        self._closing = True
        for flight in list(self._open.values()):
            flight.stream.put(None)
        for slot in self.slots.values():
            slot.streams.clear()

    # ------------------------------------------------------------------------------------------ requests

    async def ensure(self, slot: Slot, keep_alive: float | None = None, tenant: str = "") -> WorkerProcess:
        """Wait until some node serves the model. The value stands for all of its replicas. Raises ApiError 429, 503."""
        if slot.state not in ("hot", "asleep"):
            try:
                with slot.waits(tenant, 5):
                    self.metrics.waiting.labels(slot.name).set(slot.waiting)
                    self.agents.look()
                    await within(self.settings.server.load_wait_seconds, self._until_served(slot))
            except asyncio.TimeoutError:
                raise self._not_served(slot) from None
            finally:
                self.metrics.waiting.labels(slot.name).set(slot.waiting)
        return cast(WorkerProcess, self)

    async def _until_served(self, slot: Slot) -> None:
        while slot.state not in ("hot", "asleep"):
            if self._closing:
                raise errors.shutting_down()
            if slot.state == "failed" and slot.permanent:
                raise self._not_served(slot)
            await slot.changed.wait()

    def _not_served(self, slot: Slot) -> errors.ApiError:
        return errors.model_unavailable(slot.name, slot.state, slot.error or slot.stage, 5)

    def submit(
        self, slot: Slot, worker: WorkerProcess, message: messages.Submit | messages.Tokenize, seconds_left: float
    ) -> RequestStream:
        """Send a request to the replica where it loses least."""
        limits = slot.settings.limits
        most = 2 * (limits.max_queue + limits.max_concurrency) * max(1, len(self.agents.replicas_of(slot.name)))
        if len(slot.streams) >= most:
            raise errors.queue_full("this model has too many open requests")
        choices = message.sampling.n if isinstance(message, messages.Submit) else 1
        stream = RequestStream(message.request_id, seconds_left, choices)
        salt = message.cache_salt if isinstance(message, messages.Submit) else ""
        texts = texts_of(message)
        tokens = sum(map(len, texts)) / CHARS_PER_TOKEN
        flight = Flight(slot, message, stream, time.monotonic() + seconds_left, blocks_of(texts, salt), tokens)
        slot.streams[message.request_id], self._open[message.request_id] = stream, flight
        self.agents.count(slot.name)
        if not self._send(flight):
            self._again(flight, "the replica was lost")
        return stream

    def _send(self, flight: Flight) -> bool:
        """Forward a request to the best replica; False where there is none now."""
        states = self.agents.replicas_of(flight.slot.name)
        found = {s.replica: s for s in states if s.replica not in flight.tried} or {s.replica: s for s in states}
        if not found:
            return False
        home, address = self._homes.get(flight.chat, ("", "")) if flight.chat is not None else ("", "")
        rows = [
            candidate_of(state, self.agents.sent_to(state.replica), flight.slot, state.replica == home)
            for state in found.values()
        ]
        chosen = self._router.choose(flight.blocks, flight.tokens, rows).replica
        left, moves = max(0.0, flight.until - time.monotonic()), home not in ("", chosen)
        where = (address, home) if moves else ("", "")  # the chat's pages are fetched from there
        self._flights.pop(flight.ident, None)
        if not self.agents.send(chosen, wire.Forward(chosen, flight.anew(), left, *where)):
            return False
        self._flights[flight.ident] = flight
        if flight.chat is not None:
            self._homes.pop(flight.chat, None)
            self._homes[flight.chat] = chosen, self.agents.address_of(chosen)
            while len(self._homes) > MOST_CHATS:
                self._homes.popitem(last=False)
        flight.replica, flight.node = chosen, self.agents.node_of(chosen)
        self._router.sent(flight.blocks, chosen)
        self.agents.opened(chosen)
        return True

    def release(self, slot: Slot, stream: RequestStream, *, cancel: bool) -> None:
        """Nobody reads this stream any more; with `cancel` its replica drops the request."""
        stream.close()
        slot.streams.pop(stream.request_id, None)
        flight = self._open.pop(stream.request_id, None)
        if flight is not None:
            self._flights.pop(flight.ident, None)
            if flight.replica:
                self.agents.closed(flight.replica)
                if cancel:
                    self.agents.send(flight.replica, wire.Drop(flight.ident))

    def _hear(self, message: wire.ToGateway) -> None:
        """A message of an agent."""
        if isinstance(message, wire.Gone):
            flight = self._flights.get(message.request_id)
            if flight is not None:
                self._lost(flight, message.why, message.crash)
        elif isinstance(message, messages.Done):
            answer = self._tells.get(message.command_id)
            if answer is not None and not answer.done():
                refusal = errors.ApiError(409, message.error, code="refused_by_worker") if message.error else None
                answer.set_exception(refusal) if refusal is not None else answer.set_result(None)
        elif not isinstance(message, (wire.Board, wire.Beat, wire.Piece)):
            flight = self._flights.get(message.request_id)
            if flight is None:
                return
            if isinstance(message, messages.Rejected) and flight.accepted:  # it was sent again, and its client waits
                self._lost(flight, message.message, False)
                return
            if not flight.takes(message):
                return
            flight.stream.put(message)
            if flight.stream.overflowed:
                log.warning("model %s: a client reads too slowly; its request is cancelled", flight.slot.name)
                self.release(flight.slot, flight.stream, cancel=True)

    def _lost(self, flight: Flight, why: str, crash: bool) -> None:
        """A request's replica is gone: it begins anew elsewhere, where nothing of its answer has been streamed and not
        several workers have died of it."""
        self.agents.closed(flight.replica)
        flight.tried.add(flight.replica)
        node, flight.replica = flight.node, ""
        flight.crashes += crash
        if flight.streamed or flight.crashes > MOST_CRASHES or flight.times >= MOST_TIMES:
            sent = "its answer had begun" if flight.streamed else f"it was sent {flight.times} times"
            self._why_lost[flight.slot.name] = f"{why} (node {node[:12]}); {sent}"
            flight.stream.put(None)
        else:
            self._again(flight, why)

    def _again(self, flight: Flight, why: str) -> None:
        log.info("model %s: a request is sent again: %s", flight.slot.name, why)
        self.metrics.sent_again.labels(flight.slot.name).inc()
        self._spawn(self._resend(flight, why))

    async def _resend(self, flight: Flight, why: str) -> None:
        slot = flight.slot
        try:
            while not self._send(flight):
                self._refresh(slot)
                if slot.state in ("hot", "asleep"):  # of nodes that are just being connected
                    await asyncio.sleep(0.05)
                await self.ensure(slot)
                if flight.message.request_id not in self._open:
                    return
        except errors.ApiError as error:
            refused = messages.Rejected(flight.message.request_id, error.status, error.code, error.message)
            if flight.accepted:
                self._why_lost[slot.name] = f"{why}, and no other replica took the request: {error.message}"
                flight.stream.put(None)
            else:
                flight.stream.put(refused)

    def worker_lost(self, slot: Slot) -> errors.ApiError:
        """Why a stream ended without its end."""
        if self._closing:
            return errors.shutting_down()
        why = self._why_lost.get(slot.name, "its node was lost")
        message = f"the replica of {slot.name!r} that answered is lost: {why}; send the request again"
        return errors.ApiError(503, message, code="node_lost", retry_after=1)

    # ------------------------------------------------------------------------------------------ what is known

    def full_name(self, node: str) -> str:
        """A node by its name or the beginning of it, where that says which."""
        found = [name for name in self.agents.peers if name.startswith(node)]
        return found[0] if len(found) == 1 else node

    def _traffic(self) -> dict[str, int]:
        """Requests that wait for a model that is nowhere served."""
        return {slot.name: slot.waiting for slot in self.slots.values() if slot.waiting}

    def _agent_lost(self, node: str, replicas: list[str], why: str) -> None:
        gone = set(replicas)
        self._router.lost(gone)
        for flight in [f for f in self._open.values() if f.node == node and f.replica]:
            self._lost(flight, why, True)

    def _boards_changed(self) -> None:
        infos = self.agents.table.nodes
        connected = {name for name, peer in self.agents.peers.items() if peer.board is not None}
        draining = sum(info.draining for info in infos if info.node in connected)
        self.metrics.set_nodes(len(connected), draining, sum(info.node not in connected for info in infos))
        for slot in self.slots.values():
            self._refresh(slot)
            self._even_out(slot)

    def _even_out(self, slot: Slot) -> None:
        """Requests that wait with other replicas go to those that have just become hot."""
        states = {state.replica: state for state in self.agents.replicas_of(slot.name) if state.state == "hot"}
        before = self._serving.get(slot.name, set())
        self._serving[slot.name] = set(states)
        new, places = set(states) - before, slot.settings.limits.max_concurrency
        queues = {name: states[name].stats.queued for name in before & set(states)}
        if not new or not any(queues.values()):
            return
        for name, count in shares(queues, places * len(new)).items():
            waiting = [f for f in self._open.values() if f.replica == name and not f.streamed and f.chat is None]
            ours = len(waiting) / max(1, queues[name])  # other gateways move theirs
            for flight in waiting[::-1][: math.ceil(count * min(1.0, ours))]:
                self.agents.send(name, wire.Drop(flight.ident))
                self.agents.closed(name)
                flight.replica = ""
                if not self._send(flight):
                    self._again(flight, "it waited, and another replica became hot")

    def _refresh(self, slot: Slot) -> None:
        """A model's state from its replicas': the best one of them."""
        states = self.agents.states_of(slot.name)
        serving = [s for s in states if not s.retiring]
        best = next((s for name in ORDER for s in serving if s.state == name), None)
        slot.stage = best.stage if best is not None and best.stage else self.agents.stages.get(slot.name, "")
        slot.error = best.error if best is not None else ""
        slot.permanent = best is not None and best.state == "failed"
        slot.restarts = sum(s.restarts for s in states)
        ready = best.ready if best is not None else None
        if ready is not None and ready != slot.ready:
            self.metrics.set_ready(slot.name, ready)
        slot.ready = ready
        stats = total(states)
        if stats != slot.stats:
            slot.stats = stats
            self.metrics.set_stats(slot.name, stats)
        waits = slot.settings.load == "startup" or slot.waiting or slot.name in self.agents.stages
        state = best.state if best is not None else "loading" if waits else "cold"
        if state != slot.state or slot.state == "loading":
            self._set(slot, state)

    # ------------------------------------------------------------------------------------------ by hand

    async def unload(self, slot: Slot, drain_s: float, reason: str) -> None:
        """End all replicas of a model; running requests get the nodes' drain time."""
        answer = await self.client.command(wire.Release(slot.name))
        if answer.error:
            raise errors.ApiError(409, answer.error, code="refused_by_cluster")
        self.note("unload", reason, slot)
        states = {s.replica for s in self.agents.states_of(slot.name)}
        for _ in range(int(max(1.0, drain_s + 5.0) / 0.05)):
            if not states & {s.replica for s in self.agents.states_of(slot.name) if not s.retiring}:
                return
            await asyncio.sleep(0.05)

    async def command(self, slot: Slot, make: Callable[[str], messages.ToWorker], within_s: float) -> None:
        """Send a command to every replica's worker and wait for all. Raises ApiError 409, 503 or 504."""
        states = [s for s in self.agents.replicas_of(slot.name) if s.state == "hot"]
        if not states:
            raise errors.ApiError(409, f"{slot.name!r} is {slot.state}; load it first", code="not_hot")
        answers: dict[str, asyncio.Future[None]] = {}
        for state in states:
            ident = uuid.uuid4().hex
            answers[ident] = self._tells[ident] = asyncio.get_running_loop().create_future()
            self.agents.send(state.replica, wire.Tell(state.replica, cast(Any, make(ident))))
        try:
            await within(within_s, asyncio.gather(*answers.values()))
        except asyncio.TimeoutError:
            raise errors.deadline_exceeded(within_s) from None
        finally:
            for ident in answers:
                self._tells.pop(ident, None)

    def add(self, settings: ModelSettings, prepare: Callable[[Slot], None]) -> None:
        """One more model, from a configuration that was reloaded; the conductor hears of it with all others."""
        slot = self.slots[settings.name] = Slot(settings)
        prepare(slot)
        self._set(slot, "loading" if settings.load == "startup" else "cold")
        self._spawn(self.client.configure(self.settings))


ORDER = ("hot", "asleep", "stopping", "loading", "failed", "cold")


def candidate_of(state: wire.ReplicaState, sent: int, slot: Slot, home: bool = False) -> Candidate:
    """A replica for the router; `sent`: requests of this gateway that it has, which its report may not count yet."""
    stats, lease = state.stats, state.lease
    return Candidate(
        state.replica,
        running=max(stats.running, sent, state.streams),
        queued=stats.queued,
        concurrency=slot.settings.limits.max_concurrency,
        kv_share=stats.kv_bytes_used / lease if lease else 0.0,
        kl=state.ready.kl_mean if state.ready is not None else 0.0,
        asleep=state.state == "asleep",
        home=home,
    )


def total(states: list[wire.ReplicaState]) -> messages.Stats:
    """The sum over replicas."""
    sums: dict[str, Any] = dict.fromkeys(messages.Stats.__struct_fields__, 0) | {"finished": {}}
    for stats in (state.stats for state in states):
        for name in sums:
            if name == "finished":
                for reason, count in stats.finished.items():
                    sums[name][reason] = sums[name].get(reason, 0) + count
            else:
                sums[name] += getattr(stats, name)
    return msgspec.convert(sums, messages.Stats)

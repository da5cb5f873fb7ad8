"""The single owner of the workers' state: loads them once, watches them, replaces them, ends them.

States: cold (no worker), loading, hot, asleep (its weights are in host memory), failed (waiting for the next try, or
for a person), stopping (the server ends). Where and when a model loads, sleeps and wakes is decided in memory.py.
Everything here runs on the gateway's event loop; nothing else changes a slot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from server import errors
from server.aio import within
from server.config import ModelSettings, Settings
from server.events import EventLog
from server.metrics import Metrics
from server.scheduler import policy
from server.scheduler.admission import Refusal
from server.scheduler.liveness import watch
from server.scheduler.memory import WAITS, MemoryManager, NoRoom
from server.scheduler.saved import SavedFolder
from server.scheduler.slots import Slot
from server.scheduler.spare import Spares
from server.scheduler.stream import RequestStream, StreamItem
from server.worker import messages
from server.worker.process import DEFAULT_COMMAND, WorkerProcess

log = logging.getLogger("spectral.scheduler")


class Scheduler:
    """Owns every worker. `command` replaces the worker's command line (tests give one without torch)."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        command: Sequence[str] = DEFAULT_COMMAND,
        events: EventLog | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.events = events
        self._spares = Spares(settings.memory.spare_workers or 0, command, metrics)
        self.saved = SavedFolder(settings.sessions)
        self._closing = False
        self.slots: dict[str, Slot] = {model.name: Slot(model) for model in settings.models}
        for name in self.slots:
            metrics.set_state(name, "cold")
        self.memory = MemoryManager(self)

    def start(self) -> None:
        """Begin to load the startup models; returns at once."""
        self.memory.start()
        for slot in self.slots.values():
            if slot.settings.load == "startup":
                self._launch(slot)
        self._spares.fill(self.slots.values())
        self.saved.start()

    def slot(self, name: str) -> Slot:
        """The slot of a model by name or alias. Raises ApiError 404."""
        model = self.settings.find(name)
        if model is None:
            raise errors.model_not_found(name, list(self.slots))
        return self.slots[model.name]

    @property
    def all_startup_hot(self) -> bool:
        """True where the server is ready."""
        return all(slot.state == "hot" for slot in self.slots.values() if slot.settings.load == "startup")

    async def startup_settled(self) -> None:
        """Return when each startup model is hot or has failed."""
        for slot in self.slots.values():
            while slot.settings.load == "startup" and slot.state not in ("hot", "failed"):
                await slot.changed.wait()

    async def ensure(self, slot: Slot, keep_alive: float | None = None, tenant: str = "") -> WorkerProcess:
        """The model's hot worker; starts one load for all who wait. `keep_alive`: seconds that the model stays hot
        after this request, negative for ever, None as configured; `tenant`: who asks. Raises ApiError 429 or 503."""
        self.memory.requested(slot, keep_alive)
        if slot.state == "hot" and slot.worker is not None:
            return slot.worker
        try:
            with slot.waits(tenant, policy.retry_after(slot.state, slot.next_start - time.monotonic())):
                self._tell_waiting(slot)
                return await within(self.settings.server.load_wait_seconds, self._until_hot(slot))
        except asyncio.TimeoutError:
            raise self._unavailable(slot) from None
        finally:
            self._tell_waiting(slot)

    def _tell_waiting(self, slot: Slot) -> None:
        self.metrics.waiting.labels(slot.name).set(slot.waiting)
        self.memory.report(slot)

    async def _until_hot(self, slot: Slot) -> WorkerProcess:
        while True:
            if self._closing:
                raise errors.shutting_down()
            if slot.state == "hot" and slot.worker is not None:
                return slot.worker
            idle = slot.task is None or slot.task.done()
            if idle and (slot.state == "cold" or time.monotonic() >= slot.next_start):
                self._launch(slot)
            elif slot.state == "failed" and not slot.killed:  # one that was killed is back within seconds
                raise self._unavailable(slot)
            await slot.changed.wait()

    def _unavailable(self, slot: Slot) -> errors.ApiError:
        wait = policy.retry_after(slot.state, slot.next_start - time.monotonic())
        why = slot.error if slot.state == "failed" else slot.stage if slot.stage.startswith(WAITS) else ""
        return errors.model_unavailable(slot.name, slot.state, why, wait)

    def worker_lost(self, slot: Slot) -> errors.ApiError:
        """Why a stream ended without its end."""
        return errors.shutting_down() if self._closing else errors.worker_lost(slot.name)

    def was_cancelled(self) -> errors.ApiError:
        """Why the worker gave up a request that its client did not cancel: the time for the shutdown was over."""
        return errors.shutting_down() if self._closing else errors.cancelled()

    def submit(
        self, slot: Slot, worker: WorkerProcess, message: messages.Submit | messages.Tokenize, seconds_left: float
    ) -> RequestStream:
        """Send a request to the worker; its messages arrive in the stream. Raises ApiError 429.

        The worker keeps its own queue; the limit here is for one that does not read, so that nothing piles up for it.
        """
        limits = slot.settings.limits
        if len(slot.streams) >= 2 * (limits.max_queue + limits.max_concurrency):
            raise errors.queue_full("this model has too many open requests", slot.admission.retry_after())
        choices = message.sampling.n if isinstance(message, messages.Submit) else 1
        if isinstance(message, messages.Submit):
            try:
                longest = slot.admission.enter(slot.room, message.request_id, message.tenant, choices)
            except Refusal as refusal:
                raise errors.queue_full(str(refusal), refusal.retry_after) from None
            message = msgspec.structs.replace(message, queue_s=longest)
            slot.has_sessions = slot.has_sessions or message.session is not None
        stream = RequestStream(message.request_id, seconds_left, choices)
        if slot.worker is not worker:
            slot.admission.leave(slot.room, message.request_id, answered=False)
            stream.put(None)
            return stream
        slot.streams[message.request_id] = stream
        worker.send(message)
        self.memory.report(slot)
        return stream

    def release(self, slot: Slot, stream: RequestStream, *, cancel: bool) -> None:
        """Nobody reads this stream any more; with `cancel` the worker drops the request before its next step."""
        stream.close()
        answered = stream.begun and not cancel and slot.worker is not None
        slot.admission.leave(slot.room, stream.request_id, answered=answered)
        if slot.streams.pop(stream.request_id, None) is not None and cancel and slot.worker is not None:
            slot.worker.send(messages.Cancel(stream.request_id))
        self.memory.report(slot)

    # ------------------------------------------------------------------------------------------ by hand

    def add(self, settings: ModelSettings, prepare: Callable[[Slot], None]) -> None:
        """Serve one more model; it is loaded now if it is a startup model. `prepare` gets its slot before that."""
        slot = self.slots[settings.name] = Slot(settings)
        prepare(slot)
        self.memory.adopt(slot)
        self.metrics.set_state(slot.name, "cold")
        if settings.load == "startup":
            self._launch(slot)

    async def unload(self, slot: Slot, drain_s: float, reason: str) -> None:
        """End a model's worker; running requests get `drain_s` seconds. It stays cold until somebody asks for it."""
        if (task := slot.task) is None or task.done():
            self._set(slot, "cold", reason)
            return
        slot.unloading = True
        if (save_s := self._shut_down(slot, drain_s, reason)) is not None:
            await asyncio.wait({task}, timeout=drain_s + save_s + 1.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        slot.unloading = False
        self._set(slot, "cold", reason)
        slot.failures, slot.error = 0, ""

    def _shut_down(self, slot: Slot, drain_s: float, reason: str = "") -> float | None:
        """Have a worker finish what runs and save its sessions; seconds for the latter. None: it has neither to do."""
        save_s = self.saved.seconds(slot)
        if slot.worker is None or not (slot.state == "hot" or (slot.state == "asleep" and save_s)):
            return None
        slot.worker.send(messages.Shutdown(drain_s if slot.streams else 0.0))
        self._set(slot, "stopping", reason)
        return save_s

    async def command(self, slot: Slot, make: Callable[[str], messages.ToWorker], within_s: float) -> None:
        """Send a hot model's worker a command and wait until it is carried out. Raises ApiError 409, 503 or 504."""
        if slot.state != "hot" or slot.worker is None:
            raise errors.ApiError(409, f"{slot.name!r} is {slot.state}; load it first", code="not_hot")
        try:
            await self.memory.moves.ask(slot, make, within_s)
        except asyncio.TimeoutError:
            raise errors.deadline_exceeded(within_s) from None

    def set_state(self, slot: Slot, state: str, reason: str = "") -> None:
        """For the memory manager: a model fell asleep, or is hot again."""
        self._set(slot, state, reason)

    def launch(self, slot: Slot) -> None:
        """For the memory manager: begin to load, as soon as there is room."""
        self._launch(slot)

    def note(self, kind: str, reason: str, slot: Slot, **detail: Any) -> None:
        """Write an event about a model."""
        if self.events is not None:
            device = slot.ready.device if slot.ready is not None else None
            self.events.add(kind, reason, model=slot.name, device=device, **detail)

    async def stop(self) -> None:
        """End all workers; running requests and the saving of sessions get the configured time. Safe to call twice."""
        self._closing = True
        await self.saved.stop()
        await self._spares.stop()
        drain = self.settings.server.drain_seconds if any(slot.streams for slot in self.slots.values()) else 0.0
        tasks = [slot.task for slot in self.slots.values() if slot.task is not None]
        save_s = max((self.saved.seconds(slot) for slot in self.slots.values()), default=0.0)
        for slot in self.slots.values():
            if slot.state != "stopping" and self._shut_down(slot, drain) is None and slot.task is not None:
                slot.task.cancel()  # a worker that loads answers nobody: there is nothing to wait for
            self._notify(slot)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=drain + save_s + 1.0)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self.slots.values():
            self._set(slot, "cold")
        await self.memory.stop()

    def hurry(self) -> None:
        """Let a running or coming :meth:`stop` wait for nobody."""
        self._closing = True
        for slot in self.slots.values():
            if slot.task is not None:
                slot.task.cancel()

    # ------------------------------------------------------------------------------------------ supervision

    def _launch(self, slot: Slot) -> None:
        if slot.task is None or slot.task.done():
            self._set(slot, "loading")
            slot.task = asyncio.create_task(self._supervise(slot), name=f"supervise {slot.name}")

    async def _supervise(self, slot: Slot) -> None:
        while not self._closing and not slot.unloading:
            slot.permanent = slot.killed = False
            self._set(slot, "loading")
            try:
                slot.granted = await self.memory.room(slot)
                slot.stage = "starting its worker"
                slot.load_began = time.monotonic()
                await self._run_worker(slot)
            except NoRoom as error:
                slot.error, slot.permanent = str(error), True
            except OSError as error:
                slot.error = f"its worker cannot be started: {error}"
            except Exception as error:  # whatever it is, the other models go on and this one is tried again
                log.exception("model %s: the supervision of its worker failed", slot.name)
                slot.error = f"internal error: {type(error).__name__}: {error}"
            finally:
                self.memory.gone(slot)
            if self._closing or slot.unloading:
                break
            hot_for = None if slot.hot_since is None else time.monotonic() - slot.hot_since
            load_s = 0.0 if slot.hot_since is None else slot.hot_since - slot.load_began
            slot.hot_since = None
            slot.failures = policy.failures_after(slot.failures, hot_for, load_s)
            delay = policy.restart_delay(slot.failures, killed=slot.killed)
            delay = policy.RETRY_PERMANENT_S if slot.permanent else delay
            slot.next_start = time.monotonic() + delay
            log.error("model %s: %s", slot.name, slot.error)
            if slot.permanent:
                self._set(slot, "failed", slot.error)
                return
            slot.restarts += 1
            self.note("worker_lost", slot.error, slot, restarts=slot.restarts)
            self.metrics.restarts.labels(slot.name).inc()
            if delay:
                self._set(slot, "failed", slot.error)
                await self._pause(slot, delay)

    async def _pause(self, slot: Slot, seconds: float) -> None:
        """Wait out the back-off, or until the server closes."""
        until = time.monotonic() + seconds
        while not self._closing and (left := until - time.monotonic()) > 0:
            try:
                await within(left, slot.changed.wait())
            except asyncio.TimeoutError:
                return

    async def _run_worker(self, slot: Slot) -> None:
        """One life of a worker, from its start to its end; afterwards slot.error says why it ended."""
        slot.error, slot.load_began = "", time.monotonic()
        worker = await self._spares.take(slot.name, slot.settings.threads)
        slot.worker, slot.last_pong = worker, time.monotonic()
        pings = asyncio.create_task(watch(slot, worker, self.settings.server.worker_silence_seconds))
        try:
            worker.send(msgspec.structs.replace(slot.load_message(), sessions=self.saved.bounds))
            while received := await worker.receive():
                for message in received:
                    self._take(slot, message)
        except messages.BadFrame as error:
            slot.error = f"its worker sent bad bytes ({error})"
        finally:
            pings.cancel()
            try:
                self._forget_worker(slot)
            finally:
                how = await worker.stop(grace_s=1.0)
        slot.killed = not slot.error and how in policy.KILLED
        slot.error = slot.error or f"its worker (pid {worker.pid}) ended with {how}"

    def _forget_worker(self, slot: Slot) -> None:
        """Nobody works for this slot any more: its streams end, its gauges are zero."""
        slot.worker, slot.ready, slot.has_sessions = None, None, False
        if slot.state in ("hot", "asleep"):
            self._set(slot, "loading")
        for stream in slot.streams.values():
            stream.put(None)
        slot.streams.clear()
        for answer in slot.commands.values():
            if not answer.done():
                answer.set_exception(self.worker_lost(slot))
        self._take_stats(slot, messages.Stats())
        self.metrics.weights.labels(slot.name).set(0)

    def _take(self, slot: Slot, message: messages.ToParent) -> None:
        slot.last_pong = time.monotonic()
        if type(message) is messages.Delta or isinstance(message, StreamItem):
            stream = slot.streams.get(message.request_id)
            if stream is not None:
                stream.put(message)
                if stream.overflowed:
                    log.warning("model %s: a client reads too slowly; its request is cancelled", slot.name)
                    self.release(slot, stream, cancel=True)
        elif isinstance(message, messages.Stats):
            self._take_stats(slot, message)
        elif isinstance(message, messages.Done):
            answer, (footprint, slot.footprint) = slot.commands.get(message.command_id), (slot.footprint, None)
            if answer is not None and not answer.done():
                refusal = errors.ApiError(409, message.error, code="refused_by_worker") if message.error else None
                answer.set_exception(refusal) if refusal is not None else answer.set_result(footprint)
        elif isinstance(message, messages.Loading):
            slot.stage, slot.fraction = message.stage, message.fraction
        elif isinstance(message, messages.Footprint):
            slot.footprint = message
            self.memory.books.footprint(slot, message)
        elif isinstance(message, messages.Ready):
            self._take_ready(slot, message)
        elif isinstance(message, messages.LoadFailed):
            slot.error, slot.permanent = message.message, message.permanent
            self.metrics.loads.labels(slot.name, "failed").inc()

    def _take_ready(self, slot: Slot, message: messages.Ready) -> None:
        """The first one of a worker says that it is hot; later ones say what its setting is now."""
        before, slot.ready = slot.state, message
        self.metrics.set_ready(slot.name, message)
        if before == "loading":
            slot.hot_since, slot.error = time.monotonic(), ""
            took = slot.hot_since - slot.load_began
            self.metrics.loads.labels(slot.name, "hot").inc()
            self.metrics.load_duration.labels(slot.name).observe(took)
            self.memory.hot(slot, took)
            self._set(slot, "hot", f"setting {message.setting}")
        else:
            self.memory.described(slot)

    def _take_stats(self, slot: Slot, stats: messages.Stats) -> None:
        slot.stats = stats
        self.metrics.set_stats(slot.name, stats)
        self.memory.report(slot)

    def _set(self, slot: Slot, state: str, reason: str = "") -> None:
        if slot.state != state:
            log.info("model %s: %s -> %s", slot.name, slot.state, state)
            self.note("state", f"{slot.state} -> {state}" + (f": {reason}" if reason else ""), slot, state=state)
        slot.state = state
        self.metrics.set_state(slot.name, state)
        self._notify(slot)
        self._spares.fill(self.slots.values())

    def _notify(self, slot: Slot) -> None:
        """Wake all who wait for a change; later waiters wait for the next one."""
        slot.changed.set()
        slot.changed = asyncio.Event()

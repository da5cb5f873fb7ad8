"""What the administrator's routes do: the scheduler, the profile store, the jobs and the state brought together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from server import errors, reload, state_tables
from server.config import ConfigError, Settings, load_settings
from server.events import EventLog
from server.jobs import Jobs
from server.profiles import ROLLBACK, ProfileStore
from server.scheduler.demand import ASLEEP, HOT, Placement
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot
from server.scheduler.steward import Action
from server.state import State
from server.state_schema import StateUnusable
from server.worker import messages

log = logging.getLogger("spectral.admin")
SWITCH_SECONDS = 600.0


class Admin:
    """Made before the event loop runs (what was decided in earlier runs is in force from the first load on)."""

    def __init__(
        self,
        state: State,
        events: EventLog,
        scheduler: Scheduler,
        config_file: Path | None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.state, self.events, self.scheduler = state, events, scheduler
        self.store = ProfileStore(state, scheduler.settings.server.max_profile_bytes)
        self.jobs = Jobs(state, self.store, events)
        self.config_file, self._given = config_file, dict(given or {})  # the command line wins over the file
        self._fingerprints: dict[str, str] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        state.run_now(state_tables.interrupted_actions)
        state.run_now(state_tables.interrupted_jobs)
        choices = state.run_now(state_tables.choices)
        active = state.run_now(state_tables.active)
        for name, slot in scheduler.slots.items():
            self._remember(slot, choices.get(name, {}), active.get(name))

    def _remember(self, slot: Slot, choices: dict[str, Any], sha256: str | None) -> None:
        slot.pinned, slot.setting = bool(choices.get("pinned")), choices.get("setting")
        self.scheduler.metrics.pinned.labels(slot.name).set(int(slot.pinned))
        self._fingerprints[slot.name] = choices.get("fingerprint") or ""
        if sha256 is None:
            return
        path = self.store.path(sha256)
        if path.is_file():
            slot.profile = str(path)
        else:
            log.error("model %s: its activated profile %s is gone; the shipped one is used", slot.name, sha256[:12])

    def start(self) -> None:
        """Begin to write events and to work on jobs."""
        self.events.start()
        self.jobs.start()

    async def stop(self) -> None:
        """End the jobs, write what is left."""
        await self.jobs.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.events.stop()

    @asynccontextmanager
    async def audited(self, actor: str, action: str, target: str, **detail: Any) -> AsyncIterator[None]:
        """Record an action before it happens and how it ended."""
        ident = await self.state.run(lambda db: state_tables.begin_action(db, actor, action, target, detail))
        outcome, message = "done", ""
        try:
            yield
        except errors.ApiError as error:
            outcome, message = "refused", error.message
            raise
        except BaseException as error:
            outcome, message = "failed", f"{type(error).__name__}: {error}".rstrip(": ")
            raise
        finally:
            try:
                await asyncio.shield(self.state.run(lambda db: state_tables.end_action(db, ident, outcome, message)))
            except StateUnusable as error:  # what was done stays done; its row says "begun", then "interrupted"
                log.error("the end of %s %s cannot be recorded: %s", action, target, error)

    # -- models ---------------------------------------------------------------------------------------------------

    def load(self, slot: Slot) -> None:
        """Begin to load a model; returns at once. A model that failed for good is tried again."""
        if slot.state in ("hot", "loading"):
            return
        slot.next_start = 0.0
        task = asyncio.create_task(self._ensure(slot), name=f"load {slot.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ensure(self, slot: Slot) -> None:
        try:
            await self.scheduler.ensure(slot)
        except errors.ApiError as error:  # told by the model's state
            log.info("model %s: %s", slot.name, error.message)

    async def unload(self, slot: Slot, drain_s: float, force: bool) -> None:
        """End a model's worker. Raises ApiError 409 for a pinned model without force."""
        if slot.pinned and not force:
            raise errors.ApiError(409, f"{slot.name!r} is pinned; unpin it first, or send force: true", code="pinned")
        async with self._lock(slot):
            await self.scheduler.unload(slot, drain_s, "unloaded by an administrator")

    async def pin(self, slot: Slot, pinned: bool) -> None:
        """A pinned model stays where it is: neither the scheduler nor a plain unload takes it away."""
        await self.state.run(lambda db: state_tables.choose(db, slot.name, "pinned", int(pinned)))
        slot.pinned = pinned
        self.scheduler.metrics.pinned.labels(slot.name).set(int(pinned))
        self.scheduler.memory.adopt(slot)
        self.scheduler.note("pin", "pinned" if pinned else "unpinned", slot)

    async def sleep(self, slot: Slot) -> None:
        """Move a model's weights to host memory. Raises ApiError 409 where it does not sleep, with the reason."""
        if slot.state != "hot" or slot.ready is None:
            raise errors.ApiError(409, f"{slot.name!r} is {slot.state}; only a hot model can sleep", code="not_hot")
        memory, before = self.scheduler.memory, self.events.recent()[-1:]
        if slot.name not in memory.steward.wards:  # a cluster's nodes see to that themselves
            raise errors.ApiError(409, "in a cluster nodes put models to sleep; set models.keep_alive", code="not_here")
        if slot.pinned:
            raise errors.ApiError(409, f"{slot.name!r} is pinned; unpin it first", code="pinned")
        ward = memory.steward.wards[slot.name]
        now = ward.now
        target = Placement(ASLEEP, now.devices, slot.ready.setting)
        action = Action("sleep", slot.name, target, 0, "by hand")
        async with self._lock(slot):
            ward.laid_down = True  # or the next plan would find room for it and wake it
            memory.steward.begin(action)
            await memory.moves.carry_out(slot, action)
        if ward.now.residency == HOT:
            ward.laid_down = False
            since = before[0]["id"] if before else 0
            later = [event for event in self.events.recent(since) if event["model"] == slot.name]
            said = [event["reason"] for event in later if event["kind"] == "refused"]
            raise errors.ApiError(409, said[-1] if said else f"{slot.name!r} did not fall asleep", code="not_asleep")

    async def choose_setting(self, slot: Slot, setting: str, live: bool = False) -> None:
        """Use another setting of the ladder; "auto" takes the configured one again. Kept over restarts.

        New requests use it; with `live` a coarser one also re-encodes what running requests hold.
        """
        wanted = None if setting == "auto" else setting
        async with self._lock(slot):
            target = wanted or slot.settings.setting
            if slot.state == "hot":
                known = [row.name for row in slot.ready.ladder] if slot.ready is not None else []
                if target not in ("exact", "auto", *known):
                    choices = ", ".join(("auto", "exact", *known))
                    message = f"setting: {setting!r} is not in the ladder of {slot.name!r}; choose one of {choices}"
                    raise errors.bad_request(message, "setting")
            earlier = slot.setting
            await self.state.run(lambda db: state_tables.choose(db, slot.name, "setting", wanted))
            if slot.state == "hot":
                before = slot.ready.setting if slot.ready is not None else ""
                try:
                    await self._set_setting(slot, target, live)
                except BaseException:  # also a cancellation: what is kept must be what the worker has
                    await asyncio.shield(
                        self.state.run(lambda db: state_tables.choose(db, slot.name, "setting", earlier))
                    )
                    raise
                after = slot.ready.setting if slot.ready is not None else target
                self.scheduler.note("setting", f"{before} -> {after}, by hand", slot, before=before, after=after)
            slot.setting = wanted
            self.scheduler.memory.adopt(slot)

    async def _set_setting(self, slot: Slot, target: str, live: bool) -> None:
        if live and target != "auto":
            try:
                await self.scheduler.command(slot, partial(messages.SetSetting, setting=target), SWITCH_SECONDS)
                return
            except errors.ApiError as error:
                if error.code != "refused_by_worker":
                    raise
                log.info("model %s: %s; new requests get %s", slot.name, error.message, target)
        command = partial(messages.SetProfile, setting=target, reload=False)
        await self.scheduler.command(slot, command, SWITCH_SECONDS)

    # -- profiles -------------------------------------------------------------------------------------------------

    async def fingerprint(self, slot: Slot) -> str:
        """The model's own fingerprint, from its worker or from an earlier run; "" where it was never loaded."""
        told = slot.ready.fingerprint if slot.ready is not None else ""
        if told and told != self._fingerprints.get(slot.name):
            self._fingerprints[slot.name] = told
            await self.state.run(lambda db: state_tables.choose(db, slot.name, "fingerprint", told))
        return self._fingerprints.get(slot.name, "")

    async def activate(self, slot: Slot, sha256: str | None, reason: str) -> None:
        """Make a profile the one in force (None: the configured or shipped one).

        A hot model's worker reads it first; only where it fits is the switch recorded. New requests then use it and
        running ones end on the pages that the earlier one encoded.
        """
        with self.store.kept(sha256):
            await self._switch(slot, sha256, reason)
        self.scheduler.note("profile", f"{reason}: {sha256[:12] if sha256 else 'the shipped one'}", slot, sha256=sha256)

    async def _switch(self, slot: Slot, sha256: str | None, reason: str) -> None:
        async with self._lock(slot):
            path = None if sha256 is None else str(await self.store.usable_path(sha256))
            if slot.state == "hot":
                given, wanted = path or slot.settings.profile, slot.load_message().setting
                command = partial(messages.SetProfile, profile=given, setting=wanted)
                await self.scheduler.command(slot, command, SWITCH_SECONDS)
            try:
                await self.store.record_activation(slot.name, sha256, reason)
            except BaseException:  # what was not recorded is not in force
                if slot.state == "hot":
                    given = slot.profile or slot.settings.profile
                    back = partial(messages.SetProfile, profile=given, setting=slot.load_message().setting)
                    await self.scheduler.command(slot, back, SWITCH_SECONDS)
                raise
            slot.profile = path

    async def roll_back(self, slot: Slot) -> str | None:
        """Undo the last switch that is in force; the profile that is then used."""
        sha256, switch = await self.store.previous(slot.name)
        await self.activate(slot, sha256, f"{ROLLBACK}{switch}")
        return sha256

    def _lock(self, slot: Slot) -> asyncio.Lock:
        return self._changing.setdefault(slot.name, asyncio.Lock())

    # -- the whole ------------------------------------------------------------------------------------------------

    async def reload(self) -> dict[str, Any]:
        """Read the configuration file again. Raises ApiError 400 with every fault, and then nothing has changed."""
        try:
            new: Settings = await asyncio.to_thread(partial(load_settings, self.config_file, **self._given))
        except ConfigError as error:
            raise errors.ApiError(400, f"{error}\nNothing was changed.", code="invalid_config") from error
        active = await self.state.run(state_tables.active)
        choices = await self.state.run(state_tables.choices)

        def prepare(slot: Slot) -> None:
            self._remember(slot, choices.get(slot.name, {}), active.get(slot.name))

        found = await reload.apply(self.scheduler, new, prepare, drain_s=new.server.drain_seconds)
        self.events.add("config", "the configuration was read again", **found)
        return found

    async def reload_on_signal(self) -> None:
        """The same for SIGHUP; what is wrong goes to the log."""
        try:
            async with self.audited("SIGHUP", "config_reload", str(self.config_file or "")):
                await self.reload()
        except (errors.ApiError, StateUnusable) as error:
            log.error("the configuration was not read again: %s", error)

    async def memory(self) -> dict[str, Any]:
        """Who holds which bytes on which device now: the ledger, with the setting of every cache beside its bytes."""
        view = await self.scheduler.memory.vram_now()
        for device in view["devices"]:
            for part in device["segments"]:
                slot = self.scheduler.slots.get(part["model"])
                ready = slot.ready if slot is not None and part["kind"] == "kv" else None
                part["setting"] = ready.setting if ready is not None else None
        return view



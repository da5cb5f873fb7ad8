"""Memory as the loop sees it: reads the devices, keeps the ledger, asks the steward, carries out what it decides.

    tick    devices are read (on a thread: a driver may hang), the ledger is told, foreign memory is noticed
    event   a request waits, a load ended, a worker reported or is gone: the steward is told
    decide  when something is due: actions that free bytes start at once; those that need bytes start when the ledger
            has them, in order. An action that fails is reported to the steward as not done, and planned again.

A load waits in :meth:`room` until its action has its bytes. Requests for hot models never come here.
`MemoryManager` belongs to the gateway's event loop; `vram`, `plan` and `notes` are for routes and commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.aio import within
from server.config import ModelSettings
from server.scheduler.books import Books
from server.scheduler.carry_out import Moves
from server.scheduler.demand import COLD, HOST, HOT, Device, Placement, Plan
from server.scheduler.dry_run import ledger_for, wishes_for
from server.scheduler.facts import GPU_OVERHEAD, Measured, facts_for, with_ladder
from server.scheduler.ledger import Holding
from server.scheduler.nvml import Devices, Reading
from server.scheduler.patient import PatientReader
from server.scheduler.planner import PATIENT_S, plan
from server.scheduler.slots import Slot
from server.scheduler.solver import import_solver
from server.scheduler.steward import FREEING, Action, Steward

if TYPE_CHECKING:
    from server.scheduler.loop import Scheduler

log = logging.getLogger("spectral.memory")

WAITS = "waits for memory"
TOLD_BYTES = 256 << 20
"""A change of foreign memory that people are told of; drivers take and give back about 100 MiB by themselves."""
MOVING_TICK_S = 0.05
"""The devices are read so often while a model loads, sleeps, wakes or changes its setting."""


class NoRoom(Exception):
    """A model that no device could ever hold; the message says what it needs and what there is."""


class MemoryManager:
    """One per scheduler. `devices` replaces what is read (tests give scripted readings)."""

    def __init__(self, scheduler: Scheduler, devices: Devices | None = None) -> None:
        self._scheduler = scheduler
        self.ledger = ledger_for(scheduler.settings.memory)
        self.steward = Steward()
        self.devices = devices or Devices()
        state = Path(scheduler.settings.server.state_dir or ".spectral")
        self.measured = Measured(state / "measured.json")
        self.moves = Moves(scheduler, self)
        self.books = Books(self)
        self._pending: list[Action] = []
        self._grants: dict[str, asyncio.Future[Action]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._wake = asyncio.Event()
        self._read_at = -1e9
        self._reader = PatientReader()

    # ------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Begin to watch; the devices are read once before anything is loaded."""
        self._observe(self.devices.read())
        for note in self.devices.knowledge([account.reading for account in self.ledger.accounts.values()]):
            log.warning("%s", note)
        for slot in self._scheduler.slots.values():
            self.adopt(slot)
        self.spawn(self._run())

    async def stop(self) -> None:
        """End all tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.devices.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something beside the loop until it ends or the server does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def adopt(self, slot: Slot) -> None:
        """Take a slot in care, or take its changed configuration over."""
        wishes = wishes_for(slot.settings, self.ledger.accounts, slot.pinned)
        device = wishes.devices[0]
        facts = facts_for(slot.settings, device, self._setting(slot), slot.profile, self._measure(slot, device))
        facts = with_ladder(facts, self._setting(slot), slot.ready)
        ward = self.steward.wards.get(slot.name)
        if ward is None:
            self.steward.add(slot.name, facts, wishes, time.monotonic())
        else:
            ward.facts, ward.wishes, ward.pinned = facts, wishes, slot.pinned
            self.steward.changed()

    def forget(self, name: str) -> None:
        """A model is no longer served."""
        self.steward.remove(name)
        self.ledger.release(name)

    def _setting(self, slot: Slot) -> str:
        return slot.setting or slot.settings.setting

    def _measure(self, slot: Slot, device: str) -> Any:
        account = self.ledger.accounts.get(device)
        return self.measured.get(Measured.key(slot.settings, account.reading.name if account else device))

    # ------------------------------------------------------------------------------------------ events

    def requested(self, slot: Slot, keep_alive: float | None = None) -> None:
        """A request came for a model; `keep_alive` in seconds, negative for ever, None: as configured."""
        given = keep_alive is not None
        seconds = None if keep_alive is None or keep_alive < 0 else keep_alive
        if slot.name in self.steward.wards:
            self.steward.requested(slot.name, time.monotonic(), seconds, given=given)
            self.report(slot)

    def report(self, slot: Slot) -> None:
        """What a model does has changed: its streams, who waits, its worker's figures."""
        ward = self.steward.wards.get(slot.name)
        if ward is None:
            return
        ward.pinned = slot.pinned
        waiting = slot.waiting + slot.stats.queued + (slot.name in self._grants)
        running = max(len(slot.streams) - slot.stats.queued, slot.stats.running)
        now = time.monotonic()
        self.steward.report(slot.name, now, running=running, waiting=waiting, kv_tokens=slot.stats.kv_tokens)
        self.books.report(slot)
        if self._pending or self.steward.due(now):  # most requests change nothing: the loop is not even woken
            self.look()

    def look(self) -> None:
        """Something may be due."""
        self._wake.set()

    def hot(self, slot: Slot, seconds: float) -> None:
        """A load ended well: predictions give way to measures, and the worker gets its lease."""
        ready, device = slot.ready, self.books.device_of(slot)
        assert ready is not None
        settle = GPU_OVERHEAD if device != HOST else 0
        for name, share in self.books.shares_of(slot).items():
            kv = round(slot.stats.kv_bytes_allocated * share)
            holding = Holding(round(ready.weights_bytes * share), kv=kv, settle=settle)
            self.ledger.hold(slot.name, name, holding, slot.worker.pid if slot.worker is not None else 0)
        account = self.ledger.accounts[device]
        key = Measured.key(slot.settings, account.reading.name)
        self.measured.put(key, weights=ready.weights_bytes, load_s=round(seconds, 2))
        self.spawn(asyncio.to_thread(self.measured.save))
        self.adopt(slot)
        self.moves.loaded(slot)
        if sum(ward.now.residency == HOT for ward in self.steward.wards.values()) == 2:
            self.spawn(asyncio.to_thread(import_solver))

    def described(self, slot: Slot) -> None:
        """A model that is hot said that its setting is another one now."""
        self.adopt(slot)
        ward = self.steward.wards[slot.name]
        if ward.moving is None and slot.ready is not None and ward.now.residency == HOT:
            place = Placement(HOT, ward.now.devices, slot.ready.setting)
            self.steward.moved(slot.name, place, ward.lease, time.monotonic())

    def remember_wake(self, slot: Slot, seconds: float) -> None:
        """How long a wake-up took, for the next plan."""
        account = self.ledger.accounts[self.books.device_of(slot)]
        self.measured.put(Measured.key(slot.settings, account.reading.name), wake_s=round(seconds, 3))
        self.adopt(slot)

    def gone(self, slot: Slot) -> None:
        """A model's worker has ended, whatever the reason."""
        self.ledger.release(slot.name)
        if slot.name in self.steward.wards:
            self.steward.moved(slot.name, Placement(COLD), 0, time.monotonic())
        self.report(slot)

    # ------------------------------------------------------------------------------------------ loads

    async def room(self, slot: Slot) -> Action:
        """Wait until a model may load; its action says where, at which setting, with which lease. Raises NoRoom."""
        self.adopt(slot)
        self._check_possible(slot)
        grant: asyncio.Future[Action] = asyncio.get_running_loop().create_future()
        self._grants[slot.name] = grant
        self.report(slot)
        try:
            return await grant
        finally:
            self._grants.pop(slot.name, None)

    def _check_possible(self, slot: Slot) -> None:
        ward = self.steward.wards[slot.name]
        there = [self.ledger.accounts[name] for name in ward.wishes.devices if name in self.ledger.accounts]
        totals = [account.reading.total for account in there]
        largest = None if not totals else sum(totals) if ward.wishes.splittable else max(totals)
        if largest is None:
            missing = ", ".join(ward.wishes.devices)
            raise NoRoom(f"the device {missing} does not exist here; set models.device to one of {self._names()}")
        if ward.facts.weights > largest:
            have, need = largest / 2**30, ward.facts.weights / 2**30
            raise NoRoom(
                f"its weights take {need:.1f} GiB and "
                f"{'the GPUs together have' if ward.wishes.splittable else 'the largest device has'} {have:.1f} GiB; "
                "quantize it (models.quantization: nf4) or choose a smaller model"
            )

    def _names(self) -> str:
        return ", ".join(self.ledger.accounts)

    # ------------------------------------------------------------------------------------------ the loop

    async def _run(self) -> None:
        while True:
            tick = self._tick()
            with contextlib.suppress(asyncio.TimeoutError):
                await within(tick, self._wake.wait())
            self._wake.clear()
            try:
                await self._read(tick)
                self._decide()
            except Exception:  # whatever it is, models go on as they are and the next tick tries again
                log.exception("the memory loop failed once")
                await asyncio.sleep(tick)

    def _tick(self) -> float:
        """Seconds until the devices are read again: fewer while a model moves, for gigabytes come and go then."""
        tick = self._scheduler.settings.memory.tick_seconds
        moving = self._grants or any(ward.moving is not None for ward in self.steward.wards.values())
        return min(tick, MOVING_TICK_S) if moving else tick

    async def _read(self, age: float) -> None:
        """Read the devices, unless what is known is younger than `age` seconds."""
        if time.monotonic() - self._read_at >= age:
            self._observe(await self._reader.read(self.devices.read))

    def _observe(self, readings: list[Reading] | None) -> None:
        self._read_at = time.monotonic()
        if readings is None:  # the driver hangs: decisions rest on the last figures
            return
        for slot in self._scheduler.slots.values():
            self.books.resident(slot)
        for device, change in self.ledger.observe(readings, per_process=self.devices.trusts_processes).items():
            if device == HOST and not self.ledger.excess().get(HOST):
                continue  # other programs' host memory comes and goes by the second
            if abs(change) >= 64 << 20:
                self.steward.changed(urgent=change > 0)
            if abs(change) >= TOLD_BYTES:
                self.moves.note_foreign(device, change, self.ledger.accounts[device].foreign)
        if self.ledger.excess():
            self.steward.changed()

    def _decide(self) -> None:
        now = time.monotonic()
        if self.steward.due(now):
            self._pending = self.steward.decide(now, self.ledger.devices())
            self._tell_waiting()
        for action in list(self._pending):
            if self._may_start(action):
                self._pending.remove(action)
                self._begin(action)
            elif action.kind in ("load", "wake", "move"):
                break  # what needs bytes is served in order, so that a large model is not passed over for ever

    def _tell_waiting(self) -> None:
        """Why those wait who have to: /ready and the refusal of a request say it."""
        last = self.steward.last
        for name in last.unmet if last is not None else ():
            slot = self._scheduler.slots.get(name)
            if slot is not None and name in self._grants and last is not None:
                slot.stage = f"{WAITS}, {last.reasons[name]}"

    def _may_start(self, action: Action) -> bool:
        ward = self.steward.wards.get(action.model)
        if ward is None or ward.moving is not None:
            return False
        if action.kind == "load" and action.model not in self._grants:
            return False
        return action.kind in FREEING or all(self._has(action.model, d, n) for d, n in action.needs.items())

    def _has(self, model: str, device: str, needed: int) -> bool:
        """Whether a device has the bytes, beside what all other models hold and are expected to hold."""
        account = self.ledger.accounts.get(device)
        if account is None:
            return False
        others = sum(max(h.total, h.expected) for name, h in account.holdings.items() if name != model)
        return needed <= account.budget - others or not account.holdings

    def _begin(self, action: Action) -> None:
        slot = self._scheduler.slots.get(action.model)
        if slot is None:
            return
        if action.kind in ("lease", "grow"):
            self.steward.wards[action.model].lease = action.lease
            self.spawn(self.moves.set_lease(slot, action.lease))
            return
        self.steward.begin(action)
        if action.kind == "load":
            for device, size in action.expected().items():
                self.ledger.hold(action.model, device, Holding(expected=size))
            self._grants[action.model].set_result(action)
        else:
            self.spawn(self.moves.carry_out(slot, action))

    # ------------------------------------------------------------------------------------------ views

    async def vram_now(self) -> dict[str, Any]:
        """`vram`, of devices that are read for it: a model that wakes takes a gigabyte in ten milliseconds, so that no
        earlier reading will do. Those who ask at once share one."""
        await self._read(0.0)
        self.look()
        return self.vram()

    def vram(self) -> dict[str, Any]:
        """GET /admin/vram, `spectral top`: devices by kind and model, leases, and what cannot be known."""
        readings = [account.reading for account in self.ledger.accounts.values()]
        leases = {ward.name: ward.lease for ward in self.steward.wards.values() if ward.now.residency == HOT}
        devices = self.ledger.snapshot()
        for part in (part for row in devices for part in row["segments"]):
            slot = self._scheduler.slots.get(part["model"])
            part["setting"] = slot.ready.setting if slot and slot.ready and part["kind"] == "kv" else None
        return {"devices": devices, "leases": leases, "notes": self.devices.knowledge(readings)}

    async def plan(self, extra: ModelSettings | None = None, context: int | None = None) -> Plan:
        """A dry run, on a thread: what would be decided now; with one more model asked for, or a longer context."""
        demands = self.steward.demands(time.monotonic())
        if extra is not None or context is not None:
            trial = trial_demands(self, extra, context)
            demands = [d for d in demands if d.name not in {t.name for t in trial}] + trial
        devices: list[Device] = self.ledger.devices()
        return await asyncio.to_thread(partial(plan, demands, devices, time_limit_s=4 * PATIENT_S))


def trial_demands(manager: MemoryManager, extra: ModelSettings | None, context: int | None) -> list[Any]:
    """Demands of a steward of its own: with `extra` asked for, and every model at `context` tokens."""
    steward = Steward()
    now = time.monotonic()
    models = {slot.name: (slot.settings, slot.pinned) for slot in manager._scheduler.slots.values()}
    if extra is not None:
        models[extra.name] = (extra, False)
    for name, (settings, pinned) in models.items():
        changed = settings.model_copy(update={"min_context": context} if context else {})
        wishes = wishes_for(changed, manager.ledger.accounts, pinned)
        known = manager.steward.wards.get(name)
        facts = known.facts if known is not None else facts_for(settings, wishes.devices[0], settings.setting)
        ward = steward.add(name, facts, wishes, now)
        if known is not None:
            ward.now, ward.running, ward.kv_tokens = known.now, known.running, known.kv_tokens
            ward.rate, ward.rated_at = known.rate, known.rated_at
        ward.waiting = int(extra is not None and name == extra.name)
    return steward.demands(now)

"""Carrying out what the steward decided: commands to workers, in two phases, with what to do when one fails.

Every action ends with `steward.moved`, whatever happened: where the model really is. A squeeze that fails leaves the
setting; a sleep that fails leaves the model hot; a wake-up that fails leaves it asleep, or cold if its worker is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from server.aio import within
from server.scheduler.demand import ASLEEP, COLD, HOST, HOT, Placement
from server.scheduler.ledger import Holding
from server.scheduler.slots import Slot
from server.scheduler.steward import Action
from server.scheduler.words import human
from server.worker import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.scheduler.loop import Scheduler
    from server.scheduler.memory import MemoryManager

log = logging.getLogger("spectral.memory")
COMMAND_S = 30.0
MOVE_S = 120.0
GIVING = (messages.SetSetting, messages.SetProfile, messages.SetLease, messages.Sleep)
"""Commands after which a worker may hold less."""
SQUEEZE_S = 1.0
"""A squeeze that takes longer is not waited for: what can be given back without it is."""


class Refused(Exception):
    """A worker did not do what it was told; the message says why."""


class Moves:
    """Carries actions out. Belongs to the event loop."""

    def __init__(self, scheduler: Scheduler, memory: MemoryManager) -> None:
        self._scheduler, self._memory = scheduler, memory

    async def carry_out(self, slot: Slot, action: Action) -> None:
        """One action, to its end."""
        ward = self._memory.steward.wards[slot.name]
        before, lease, worker = ward.now, ward.lease, slot.worker
        how = {
            "squeeze": self._squeeze,
            "relax": self._relax,
            "sleep": self._sleep,
            "wake": self._wake,
            "evict": self._evict,
            "move": self._move,
        }[action.kind]
        began, failed = time.monotonic(), ""
        try:
            with self._memory.ledger.giving(slot.name) if action.kind in ("evict", "move") else nullcontext():
                after, lease = await how(slot, action, before, lease)
        except (Refused, asyncio.TimeoutError) as error:
            failed = str(error) or f"no answer within {COMMAND_S:g} s"
            after, lease = self._where(slot, before), ward.lease
        except asyncio.CancelledError:
            raise
        except Exception as error:  # an internal error must not leave the model "on the move" for ever
            log.exception("model %s: %s failed", slot.name, action.kind)
            failed, after, lease = f"{type(error).__name__}: {error}", self._where(slot, before), ward.lease
        if slot.name in self._memory.steward.wards and (slot.worker is worker or not failed):
            self._memory.steward.moved(slot.name, after, lease, time.monotonic(), refused=bool(failed))
        self._tell(slot, action, failed, time.monotonic() - began)
        self._memory.look()

    def _tell(self, slot: Slot, action: Action, failed: str, seconds: float) -> None:
        if failed:
            log.warning("model %s: %s was not done: %s", slot.name, action.kind, failed)
            self._scheduler.note("refused", f"{action.kind} was not done: {failed}", slot, action=action.kind)
        else:
            detail = {"seconds": round(seconds, 3), "lease_bytes": action.lease, "setting": action.target.setting}
            self._scheduler.note(action.kind, action.reason, slot, **detail)

    @staticmethod
    def _where(slot: Slot, before: Placement) -> Placement:
        """Where a model is after something failed."""
        if slot.state == "hot" and slot.ready is not None:
            return Placement(HOT, before.devices, slot.ready.setting)
        if slot.state == "asleep":
            return Placement(ASLEEP, before.devices, before.setting)
        return Placement(COLD)

    async def send(
        self, slot: Slot, make: Callable[[str], messages.ToWorker], within_s: float = COMMAND_S
    ) -> messages.Footprint | None:
        """Send a command and wait for its end; the footprint that came with it. Raises Refused or TimeoutError."""
        if slot.worker is None:
            raise Refused("its worker is gone")
        try:
            return await self.ask(slot, make, within_s)
        except asyncio.TimeoutError:
            raise
        except Exception as error:
            raise Refused(getattr(error, "message", str(error))) from error

    async def ask(
        self, slot: Slot, make: Callable[[str], messages.ToWorker], within_s: float
    ) -> messages.Footprint | None:
        """The same, for a model that has a worker. Raises what the worker's answer is taken for, or TimeoutError."""
        assert slot.worker is not None
        ident = uuid.uuid4().hex
        answer: asyncio.Future[messages.Footprint | None] = asyncio.get_running_loop().create_future()
        slot.commands[ident] = answer
        message = make(ident)
        slot.worker.send(message)
        try:
            with self._memory.ledger.giving(slot.name) if isinstance(message, GIVING) else nullcontext():
                return await within(within_s, asyncio.shield(answer))
        finally:
            slot.commands.pop(ident, None)

    def loaded(self, slot: Slot) -> None:
        """A load ended: tell the steward, and the worker its lease."""
        ward = self._memory.steward.wards[slot.name]
        lease, ready = ward.lease, slot.ready
        assert ready is not None
        if ward.moving is not None and slot.granted is not None:
            lease = slot.granted.lease
        place = Placement(HOT, tuple(sorted(self._memory.books.shares_of(slot))), ready.setting)
        self._memory.steward.moved(slot.name, place, lease, time.monotonic())
        reason = slot.granted.reason if slot.granted is not None else f"hot at {ready.setting}"
        self._scheduler.note("load", reason, slot, setting=ready.setting, lease_bytes=lease)
        slot.granted = None
        if lease:
            self._memory.spawn(self.set_lease(slot, lease, settle=True))

    def lease_message(self, slot: Slot, lease: int, settle: bool = False) -> Callable[[str], messages.SetLease]:
        """A lease, and the coarsest setting that the worker may fall back to when its device is out of memory.

        Who holds more than is planned for it, or is told to `settle`, gives back what torch holds unused: others keep
        it, for the next prompt would ask the driver for it again.
        """
        ward = self._memory.steward.wards[slot.name]
        allowed = [r.name for r in ward.facts.rungs if ward.wishes.max_kl is None or r.kl <= ward.wishes.max_kl]
        held, places = self._memory.ledger.of(slot.name), self._memory.books.shares_of(slot)
        over = sum(held[name].total for name in places if name in held) - lease - ward.facts.weights
        return partial(
            messages.SetLease,
            max_bytes=lease,
            coarsest=allowed[-1] if len(allowed) > 1 else "",
            settle=settle or over > len(places) * ward.facts.overhead,
        )

    async def set_lease(self, slot: Slot, lease: int, settle: bool = False) -> bool:
        """Tell a worker its lease; whether it took it. One that does not is told again when leases change."""
        try:
            await self.send(slot, self.lease_message(slot, lease, settle))
        except (Refused, asyncio.TimeoutError) as error:
            log.warning("model %s: its lease of %s was not taken: %s", slot.name, human(lease), error or "no answer")
            return False
        return True

    async def _squeeze(self, slot: Slot, action: Action, before: Placement, lease: int) -> tuple[Placement, int]:
        setting = action.target.setting
        relief = asyncio.create_task(self._relieve_meanwhile(slot, action))
        try:
            await self.send(slot, partial(messages.SetSetting, setting=setting))
        finally:
            relief.cancel()
        after = Placement(HOT, before.devices, setting)
        try:
            await self.send(slot, self.lease_message(slot, action.lease))
        except Refused as error:
            log.warning("model %s: squeezed, but its lease stays: %s", slot.name, error)
            return after, self._memory.steward.wards[slot.name].lease
        return after, action.lease

    async def _relieve_meanwhile(self, slot: Slot, action: Action) -> None:
        """A squeeze takes its time, its kernels or tables not being there yet: a lease of what runs now, at the setting
        it runs at, has the worker give its idle prefixes, unused pages and its allocator's reserve back at once."""
        await asyncio.sleep(SQUEEZE_S)
        ward = self._memory.steward.wards[slot.name]
        held = ward.rung.nbytes(ward.kv_tokens, ward.running) if ward.rung is not None else ward.lease
        lease = max(action.lease, min(ward.lease, round(1.1 * held)))
        self._scheduler.note("lease", f"{slot.name} is to give back what it does not use: its squeeze takes long", slot)
        before, ward.lease = ward.lease, lease  # should the squeeze fail, this is what the model has
        if not await self.set_lease(slot, lease, settle=True):
            ward.lease = before

    async def _relax(self, slot: Slot, action: Action, before: Placement, lease: int) -> tuple[Placement, int]:
        await self.send(slot, partial(messages.SetSetting, setting=action.target.setting))
        await self.send(slot, self.lease_message(slot, action.lease))
        return Placement(HOT, before.devices, action.target.setting), action.lease

    async def _sleep(self, slot: Slot, action: Action, before: Placement, lease: int) -> tuple[Placement, int]:
        if slot.state != "hot" or slot.streams or slot.waiting:
            raise Refused("requests came meanwhile")
        ledger, spare = self._memory.ledger, self._host_spare(slot)
        # Weights on a CPU stay where they are. Others count in host memory from now on: another model may follow.
        moving = 0 if slot.ready is None or HOST in ledger.of(slot.name) else slot.ready.weights_bytes
        if moving:
            ledger.hold(slot.name, HOST, Holding(expected=moving))
        self._scheduler.set_state(slot, "asleep", action.reason)  # from now on requests wait instead of being sent
        try:
            print_ = await self.send(slot, partial(messages.Sleep, keep_bytes=spare), MOVE_S)
        except (Refused, asyncio.TimeoutError):
            if slot.state == "asleep":
                self._scheduler.set_state(slot, "hot", "could not sleep")
            if moving:
                ledger.drop(slot.name, HOST)
            raise
        if print_ is not None and before.devices:
            for device, share in self._memory.books.shares_of(slot).items():
                if device != HOST:
                    ledger.hold(slot.name, device, self._rest(print_, share))
        return Placement(ASLEEP, before.devices, before.setting), 0

    def _host_spare(self, slot: Slot) -> int:
        """Host memory that is left beside the model's weights: so much of its cache may be kept there."""
        host = self._memory.ledger.accounts.get(HOST)
        weights = slot.ready.weights_bytes if slot.ready is not None else 0
        return max(0, host.budget - host.claimed - weights) if host is not None else 0

    @staticmethod
    def _rest(print_: messages.Footprint, share: float) -> Holding:
        """What a sleeping worker still holds on a device that has this share of it."""
        rest = max(0, print_.reserved_bytes - print_.kv_bytes)
        return Holding(0, round(rest * share), 0, round(print_.kv_bytes * share))

    async def _wake(self, slot: Slot, action: Action, before: Placement, lease: int) -> tuple[Placement, int]:
        elsewhere = HOST not in action.target.devices
        for device, size in action.expected().items() if elsewhere else ():
            self._memory.ledger.hold(slot.name, device, Holding(expected=size))
        began = time.monotonic()
        await self.send(slot, messages.Wake, MOVE_S)
        if elsewhere:
            self._memory.ledger.drop(slot.name, HOST)
        setting = slot.ready.setting if slot.ready is not None else before.setting
        self._memory.remember_wake(slot, time.monotonic() - began)
        if action.target.setting != setting:
            await self.send(slot, partial(messages.SetSetting, setting=action.target.setting))
        await self.send(slot, self.lease_message(slot, action.lease))
        self._scheduler.set_state(slot, "hot", action.reason)
        return Placement(HOT, action.target.devices, action.target.setting), action.lease

    async def _evict(self, slot: Slot, action: Action, before: Placement, lease: int) -> tuple[Placement, int]:
        if slot.streams or slot.waiting:
            raise Refused("requests came meanwhile")
        await self._scheduler.unload(slot, 0.0, action.reason)
        return Placement(COLD), 0

    async def _move(self, slot: Slot, action: Action, before: Placement, lease: int) -> tuple[Placement, int]:
        """To another device: the worker ends and another begins; the load then waits for room as any other does."""
        if slot.streams:
            raise Refused("requests came meanwhile")
        await self._scheduler.unload(slot, 0.0, action.reason)
        self._scheduler.launch(slot)
        return Placement(COLD), 0

    def note_foreign(self, device: str, change: int, total: int) -> None:
        """Somebody else took or gave back memory."""
        what = "took" if change > 0 else "gave back"
        reason = f"others {what} {human(abs(change))} on {device}; they hold {human(total)} there"
        if self._scheduler.events is not None:
            self._scheduler.events.add("foreign", reason, device=device, bytes=change, total_bytes=total)
        log.info("%s", reason)


__all__: list[Any] = ["Moves", "Refused"]

"""What workers report of themselves, put down in the ledger, and what it measures for the next plan.

Belongs to the gateway's event loop, as MemoryManager, whose part it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.scheduler.demand import HOST
from server.scheduler.facts import Measured
from server.scheduler.ledger import Holding
from server.scheduler.slots import Slot
from server.worker import messages

if TYPE_CHECKING:
    from server.scheduler.memory import MemoryManager

NEWS_BYTES = 64 << 20
"""What a model takes beside weights and cache is measured anew when it has grown by so much."""


class Books:
    """One per MemoryManager."""

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._ledger, self._steward = memory.ledger, memory.steward

    def device_of(self, slot: Slot) -> str:
        """Where a model is, or is going."""
        ward = self._steward.wards[slot.name]
        place = ward.moving or ward.now
        if place.devices:
            return place.devices[0]
        if slot.ready is not None and slot.ready.device != "cpu":
            return "cuda:0" if slot.ready.device == "cuda" else slot.ready.device
        return HOST

    def shares_of(self, slot: Slot) -> dict[str, float]:
        """The devices that a model lies on, and each one's part of its bytes."""
        if slot.ready is not None and len(slot.ready.shares) > 1:
            return slot.ready.shares
        return {self.device_of(slot): 1.0}

    def report(self, slot: Slot) -> None:
        """A worker's running figures: its cache, and all that torch holds for it."""
        held, shares, stats = self._ledger.of(slot.name), self.shares_of(slot), slot.stats
        for device in held.keys() & shares.keys():
            holding, part = held[device], shares[device]
            if holding.expected:
                continue
            kv, work = round(stats.kv_bytes_allocated * part), holding.workspace
            if stats.reserved_bytes:
                work = max(0, round(stats.reserved_bytes * part) - holding.weights - kv)
            self._ledger.hold(slot.name, device, Holding(holding.weights, work, 0, kv))
            if len(shares) == 1 and device != HOST and holding.weights:
                self._measure(slot, device, stats.beside_bytes)

    def footprint(self, slot: Slot, message: messages.Footprint) -> None:
        """A worker's own report of its bytes, after a command; where it is settled it holds nothing in reserve."""
        device = self.device_of(slot)
        if device != HOST:
            workspace = max(0, message.reserved_bytes - message.weights_bytes - message.kv_bytes)
            sizes, shares = (message.weights_bytes, workspace, 0, message.kv_bytes), self.shares_of(slot)
            for name, share in shares.items():
                holding = Holding(*(round(size * share) for size in sizes))
                self._ledger.hold(slot.name, name, holding, slot.worker.pid if slot.worker is not None else 0)
            if len(shares) == 1:
                context = self._ledger.of(slot.name)[device].context
                self._steward.wards[slot.name].residue = context + (0 if message.weights_bytes else workspace)
                if message.weights_bytes and message.settled:
                    self._measure(slot, device, workspace)
        if message.host_bytes:
            self._ledger.hold(slot.name, HOST, Holding(weights=message.host_bytes))
        if slot.ready is not None and slot.ready.context_length != message.context_length:
            slot.update_ready(context_length=message.context_length)

    def _measure(self, slot: Slot, device: str, work: int) -> None:
        """What a model takes beside weights and cache, at its largest; a plan that was made with less is made again."""
        context = self._ledger.of(slot.name)[device].context
        if not context:  # not told yet
            return
        measured = self._memory.measured
        key = Measured.key(slot.settings, self._ledger.accounts[device].reading.name)
        known = measured.get(key)
        if known is None or context + work > known.overhead + (NEWS_BYTES if known.overhead else 0):
            measured.put(key, overhead=context + work)
            self._memory.adopt(slot)

    def resident(self, slot: Slot) -> None:
        """A CPU worker's memory beside weights and cache, as the kernel counts it."""
        holding = self._ledger.of(slot.name).get(HOST)
        if holding is None or holding.expected or slot.worker is None or self.device_of(slot) != HOST:
            return
        rest = max(0, self._memory.devices.resident(slot.worker.pid) - holding.weights - holding.kv)
        self._ledger.hold(slot.name, HOST, Holding(holding.weights, rest, 0, holding.kv))
        ward = self._steward.wards[slot.name]
        if abs(rest - ward.beside) > NEWS_BYTES:  # not kept for later starts: memory that was freed counts for a while
            ward.beside = rest
            self._steward.changed()

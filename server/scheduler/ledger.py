"""Who holds which bytes on which device. Belongs to the scheduler's loop; no I/O, no clock.

Three sources are reconciled: readings of the devices (the truth about used and free), workers' own reports
(attribution: weights, cache), and predictions (for a load that is under way). What is used and not explained is
foreign; while a model loads, growth up to its prediction counts as the model's and not as foreign, and while one gives
bytes back (`giving`), what is gone from the device counts as the model's, for its report comes later.

    budget of a GPU = min(max_vram, total - reserve) - foreign         bytes that may be ours, everything included
    budget of host memory = min(max_host, total - reserve - foreign)

`snapshot` is what GET /admin/vram, `spectral top` and metrics show; kinds of one device add up to its total.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from server.scheduler.demand import HOST, Device
from server.scheduler.nvml import Reading

KINDS = ("weights", "workspace", "context", "kv")


@dataclass(frozen=True)
class Holding:
    """One model's bytes on one device. `expected`: what it will hold when its load is done; 0 for one that is done.
    `settle`: so many bytes that nobody explains are its context, if they are there at the next observation."""

    weights: int = 0
    workspace: int = 0
    context: int = 0
    kv: int = 0
    expected: int = 0
    settle: int = 0

    @property
    def total(self) -> int:
        """Bytes held now, as far as reported."""
        return self.weights + self.workspace + self.context + self.kv


@dataclass
class Account:
    """One device: its cap and reserve, its last good reading, and what each model holds there."""

    name: str
    cap: int | None = None
    reserve: int = 0
    reading: Reading = field(default_factory=lambda: Reading(""))
    stale: bool = False
    foreign: int = 0
    holdings: dict[str, Holding] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> int:
        """Bytes that our workers report."""
        return sum(holding.total for holding in self.holdings.values())

    @property
    def claimed(self) -> int:
        """Bytes that our workers report or are expected to hold."""
        return sum(max(h.total, h.expected) for h in self.holdings.values())

    @property
    def budget(self) -> int:
        """Bytes that may be ours. A cap on a GPU is shared with other programs; one on host memory is ours alone."""
        most, cap = max(0, self.reading.total - self.reserve), self.cap
        if cap is None or self.name == HOST:
            return min(max(0, most - self.foreign), most if cap is None else cap)
        return max(0, min(cap, most) - self.foreign)

    @property
    def excess(self) -> int:
        """Bytes of ours, expected ones included, that are over the budget."""
        return max(0, self.claimed - self.budget)


class Ledger:
    """All devices. `caps`, `reserves`: by device name; "*" stands for every GPU without its own."""

    def __init__(self, caps: Mapping[str, int | None] | None = None, reserves: Mapping[str, int] | None = None) -> None:
        self._caps, self._reserves = dict(caps or {}), dict(reserves or {})
        self.accounts: dict[str, Account] = {}
        self._giving: Counter[str] = Counter()

    def observe(self, readings: Iterable[Reading], *, per_process: bool = False) -> dict[str, int]:
        """Take new readings; returns by how many bytes foreign use changed, for the devices where it did.

        `per_process`: NVML's bytes per process can be matched to our workers, which then says what they really hold.
        """
        changed = {}
        for reading in readings:
            account = self.accounts.get(reading.device)
            if account is None:
                account = self.accounts[reading.device] = self._open(reading.device)
            if reading.error:
                account.stale = True  # the last good figures stay; the loop lets nothing grow on a stale device
                continue
            account.stale, account.reading = False, reading
            if per_process:
                self._take_processes(account)
            self._settle(account)
            before, account.foreign = account.foreign, self._foreign(account)
            if account.foreign != before:
                changed[account.name] = account.foreign - before
        return changed

    def _open(self, name: str) -> Account:
        default = None if name == HOST else "*"
        cap = self._caps.get(name, self._caps.get(default) if default else None)
        reserve = self._reserves.get(name, self._reserves.get(default, 0) if default else 0)
        return Account(name, cap, reserve)

    def _take_processes(self, account: Account) -> None:
        """What a worker's process holds beyond weights and cache is its context and workspace."""
        for model, pid in account.pids.items():
            measured, holding = account.reading.processes.get(pid), account.holdings.get(model)
            if measured is None or holding is None or holding.expected:
                continue
            rest = max(0, measured - holding.weights - holding.kv - holding.workspace)
            account.holdings[model] = Holding(holding.weights, holding.workspace, rest, holding.kv)

    def _settle(self, account: Account) -> None:
        """Processes that have just loaded hold contexts that nobody reports: what came with them, unexplained. While
        another one loads, what is its and what is theirs cannot be told."""
        settling = {model: holding for model, holding in account.holdings.items() if holding.settle}
        if not settling or any(holding.expected for holding in account.holdings.values()):
            return
        grown = max(0, account.reading.used - account.ours - account.foreign)
        for model, holding in settling.items():
            context = holding.context + min(grown // len(settling), holding.settle)
            account.holdings[model] = Holding(holding.weights, holding.workspace, context, holding.kv)

    def _foreign(self, account: Account) -> int:
        """Used bytes that nobody of ours explains."""
        unexplained = account.reading.used - account.ours
        loading = sum(max(0, h.expected - h.total) for h in account.holdings.values() if h.expected)
        gone = sum(h.total for model, h in account.holdings.items() if self._giving[model])
        # A model that loads holds something between what it reported and what is expected of it. What was foreign
        # before stays foreign as long as the growth can be the model's, or the loss that of one that gives back.
        low, high = max(0, unexplained - loading), max(0, unexplained + gone)
        return min(max(account.foreign, low), high)

    def hold(self, model: str, device: str, holding: Holding, pid: int = 0) -> None:
        """Record what a model holds, or is expected to hold, on a device."""
        account = self.accounts.setdefault(device, self._open(device))
        before = account.holdings.get(model)
        if before is not None and not holding.context:  # the process is the same, and so is its context
            settle = max(before.settle, holding.settle)
            sizes = holding.weights, holding.workspace, before.context, holding.kv
            holding = Holding(*sizes, holding.expected, settle)
        account.holdings[model] = holding
        if pid:
            account.pids[model] = pid

    def release(self, model: str) -> None:
        """The model's worker has ended: it holds nothing anywhere."""
        for account in self.accounts.values():
            account.holdings.pop(model, None)
            account.pids.pop(model, None)

    def drop(self, model: str, device: str) -> None:
        """The model holds nothing on this device any more."""
        if device in self.accounts:
            self.accounts[device].holdings.pop(model, None)

    @contextmanager
    def giving(self, model: str) -> Iterator[None]:
        """Inside, a model gives bytes back."""
        self._giving[model] += 1
        try:
            yield
        finally:
            self._giving[model] -= 1

    def of(self, model: str) -> dict[str, Holding]:
        """What a model holds, by device."""
        return {a.name: a.holdings[model] for a in self.accounts.values() if model in a.holdings}

    def devices(self) -> list[Device]:
        """The devices with their budgets, for the planner. On a stale device nothing may grow beyond what is there."""
        return [Device(a.name, min(a.budget, a.ours) if a.stale else a.budget) for a in self.accounts.values()]

    def excess(self) -> dict[str, int]:
        """Devices on which we hold more than we may, and by how much."""
        return {a.name: a.excess for a in self.accounts.values() if a.excess > 0}

    def snapshot(self) -> list[dict[str, Any]]:
        """Every device: total, budget, and bytes by kind and model. JSON-ready.

        `segments` with `foreign_bytes` and `free_bytes` add up to `total_bytes`. What a loading worker holds and has
        not reported is its workspace.
        """
        return [self._row(account) for account in self.accounts.values()]

    def _row(self, account: Account) -> dict[str, Any]:
        ours = self._reported(account)
        known = sum(size for sizes in ours.values() for size in sizes.values())
        used = max(account.reading.used, known)
        foreign = min(account.foreign, used - known)
        rest = used - known - foreign
        segments = []
        for model, sizes in ours.items():
            holding = account.holdings[model]
            growth = min(rest, max(0, holding.expected - holding.total)) if holding.expected else 0
            rest -= growth
            sizes["workspace"] += growth
            segments += [{"model": model, "kind": k, "bytes": n} for k, n in sizes.items() if n or k != "context"]
        return {
            "device": account.name,
            "name": account.reading.name,
            "total_bytes": max(account.reading.total, used),
            "budget_bytes": account.budget,
            "max_vram_bytes": account.cap,
            "reserve_bytes": account.reserve,
            "free_bytes": max(0, account.reading.total - used),
            "foreign_bytes": foreign + rest,
            "stale": account.stale,
            "segments": segments,
        }

    def _reported(self, account: Account) -> dict[str, dict[str, int]]:
        """Bytes by model and kind. Where models report more than the device says is in use beside foreign bytes, those
        that give back have given that much already: the cache first, then the rest."""
        found = {
            model: {kind: getattr(holding, kind) for kind in KINDS}
            for model, holding in sorted(account.holdings.items())
        }
        over = account.ours + account.foreign - account.reading.used
        for model in (model for model in found if self._giving[model]):
            for kind in ("kv", "workspace", "weights"):
                gone = max(0, min(over, found[model][kind]))
                found[model][kind] -= gone
                over -= gone
        return found

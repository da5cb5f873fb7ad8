"""One configured model and what the loop knows about its worker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from server import errors
from server.config import ModelSettings
from server.scheduler.admission import SHARE, Admission, Room
from server.scheduler.steward import Action
from server.scheduler.stream import RequestStream
from server.worker import messages
from server.worker.process import WorkerProcess


@dataclass
class Slot:
    """One configured model and what is known about its worker."""

    settings: ModelSettings
    state: str = "cold"
    stage: str = ""
    fraction: float = 0.0
    error: str = ""
    permanent: bool = False
    killed: bool = False  # its last worker was killed by somebody else
    failures: int = 0
    restarts: int = 0
    next_start: float = 0.0
    hot_since: float | None = None
    last_pong: float = 0.0
    worker: WorkerProcess | None = None
    has_sessions: bool = False  # a request with one came to this worker: it may have something to save
    ready: messages.Ready | None = None
    stats: messages.Stats = field(default_factory=messages.Stats)
    streams: dict[str, RequestStream] = field(default_factory=dict)
    waiting: int = 0
    line: Counter[str] = field(default_factory=Counter)  # those who wait for the model to be hot, by key
    pinned: bool = False
    profile: str | None = None  # the file of an activated profile, instead of the configured or shipped one
    setting: str | None = None  # chosen by hand, instead of the configured one
    unloading: bool = False
    granted: Action | None = None  # where and how the next load happens
    footprint: messages.Footprint | None = None  # until the end of its command comes
    load_began: float = 0.0
    commands: dict[str, asyncio.Future[messages.Footprint | None]] = field(default_factory=dict)
    admission: Admission = field(default_factory=Admission)
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def room(self) -> Room:
        """How many requests may run and wait, and how long."""
        limits = self.settings.limits
        return Room(limits.max_concurrency, limits.max_queue, limits.longest_wait_seconds)

    @property
    def name(self) -> str:
        """The model's configured name."""
        return self.settings.name

    @contextmanager
    def waits(self, tenant: str, retry_after: int) -> Iterator[None]:
        """One more waits for the model to be hot. Raises ApiError 429 where the line is full, or has no room left for a
        key that has many in it: as in the queue of a hot model, one key alone fills two thirds of it."""
        most, held = self.settings.limits.max_queue + self.settings.limits.max_concurrency, self.line[tenant]
        if self.waiting >= most:
            raise errors.queue_full("too many requests wait for this model to load", retry_after)
        if tenant and held and held + 1 > max(1, SHARE * (most - self.waiting)):
            said = f"{held} requests of this key wait for this model, and the room that is left is for others too"
            raise errors.queue_full(said, retry_after)
        self.waiting += 1
        self.line[tenant] += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self.line[tenant] -= 1
            if not self.line[tenant]:
                del self.line[tenant]

    def load_message(self) -> messages.Load:
        """What the worker is told to load: as configured, with what was chosen since, where the scheduler wants it."""
        message = self.settings.load_message()
        changes: dict[str, Any] = {"profile": self.profile, "setting": self.setting}
        if self.granted is not None:
            target = self.granted.target
            changes["device"] = target.devices[0]
            if len(target.devices) > 1:
                changes["max_memory"] = {name: self.granted.weights[name] for name in target.devices}
            if self.setting is None and message.setting == "auto" and target.setting != "exact":
                changes["setting"] = target.setting
        return msgspec.structs.replace(message, **{name: value for name, value in changes.items() if value is not None})

    def update_ready(self, **changes: Any) -> None:
        """The worker's figures with some of them changed."""
        if self.ready is not None:
            self.ready = msgspec.structs.replace(self.ready, **changes)

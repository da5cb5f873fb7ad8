"""The engines of one worker: one that takes new requests, and those that finish what began under an earlier choice.

A profile is changed by making another engine over the same weights: new requests go to it, running ones end on the
pages that their own profile encoded. Until they have ended both caches are held, each within max_kv_bytes. A setting
is changed within the engine (Engine.set_setting).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.worker import messages as wire
from server.worker.child_load import describe
from spectral.dispatch import READ, wanted
from spectral.engine import types
from spectral.errors import SpectralError
from spectral.residency import Timer

if TYPE_CHECKING:
    from spectral.engine.build import Built
    from spectral.engine.engine import Engine
    from spectral.foresight import Foresight

log = logging.getLogger("spectral.worker")

PRESENT = (
    "running", "queued", "kv_bytes_allocated", "kv_bytes_used", "kv_tokens",
    "prefix_bytes", "parked", "parked_bytes", "sessions",
)  # fmt: skip
"""What a snapshot says about now; its other figures count since the start."""

IDLE_KEEP_BYTES = 256 << 20
"""Unused memory of the cache that an idle model's captured steps may keep: without it, every request after a pause
would have to capture them again, half a second each."""

NO_WORK = types.EngineStats(0, 0, 0, 0, 0, 0, 0, 0, {})


class Engines:
    """Has the part of an engine's interface that the worker's loop uses."""

    def __init__(self, built: Built) -> None:
        self._foresight: Foresight | None = None
        self.built = built
        self._retiring: list[Engine] = []
        self._give_back_at = 0.0
        self._past = NO_WORK  # counters of engines that have retired

    @property
    def built(self) -> Built:
        """What takes new requests."""
        return self._built

    @built.setter
    def built(self, built: Built) -> None:
        self._built = built
        if built.profile is None or not wanted(built.engine.loaded.device, READ):
            return  # without kernels a change of setting takes little
        from spectral.foresight import Foresight

        if self._foresight is None or self._foresight.profile is not built.profile:
            if self._foresight is not None:
                self._foresight.end()
            self._foresight = Foresight(built.profile, lambda: self.current.lanes.keep())
        self._foresight.begin(built.engine.setting)

    def foresee(self) -> None:
        """The tables in use have come back from host memory: see to their next change again."""
        if self._foresight is not None:
            self._foresight.begin(self.current.setting)

    @property
    def current(self) -> Engine:
        """The engine that takes new requests."""
        return self.built.engine

    @property
    def has_work(self) -> bool:
        """True if `step` has something to do or to tell."""
        return any(engine.has_work for engine in self.all)

    @property
    def live(self) -> list[str]:
        """Ids of the requests that wait or run."""
        return [ident for engine in self.all for ident in engine.live]

    @property
    def all(self) -> list[Engine]:
        """Every engine that holds a cache."""
        return [*self._retiring, self.current]

    def replace(self, built: Built) -> None:
        """From now on `built` takes new requests; the engine before it retires when its last request has ended."""
        self._retiring.append(self.current)
        self.built = built
        self._retire()

    def set_setting(self, setting: str) -> None:
        """Another setting of the profile in use. Raises SettingError or ProfileError, and then nothing has changed."""
        engine, profile = self.current, self.built.profile
        engine.set_setting(setting)
        row = None if engine.setting == "exact" or profile is None else profile.row(engine.setting)
        self.built = dataclasses.replace(self.built, row=row)

    def cancel(self, request_id: str) -> None:
        """End a request, whichever engine has it."""
        for engine in self.all:
            engine.cancel(request_id)

    def step(self) -> list[types.Event]:
        """One step of every engine that has work."""
        events = [event for engine in self.all if engine.has_work for event in engine.step()]
        self._retire()
        return events

    def trim(self) -> None:
        """Give back memory that no request uses, to the driver or the kernel too; to the kernel as often as costs a
        twentieth of the time. A little stays under captured steps: a lease takes it where it is wanted."""
        from spectral.residency import give_back

        for engine in self.all:
            engine.trim(keep_bytes=IDLE_KEEP_BYTES)
        kind, now = self.current.loaded.device.type, time.monotonic()
        if kind == "cuda":
            give_back(kind)
        elif now >= self._give_back_at:
            give_back(kind)
            took = time.monotonic() - now
            self._give_back_at = now + 20 * took

    def stats(self) -> types.EngineStats:
        """The sum over all engines, counters of retired ones included."""
        total = self._past
        for engine in self.all:
            total = _sum(total, engine.stats())
        return total

    def _retire(self) -> None:
        for engine in [engine for engine in self._retiring if not engine.has_work]:
            self._retiring.remove(engine)
            engine.trim(prefixes=True)
            last = engine.stats()
            gone: dict[str, Any] = dict.fromkeys(PRESENT, 0)
            self._past = _sum(self._past, dataclasses.replace(last, **gone))


def _sum(a: types.EngineStats, b: types.EngineStats) -> types.EngineStats:
    """Field by field; mappings key by key; of texts the later one."""
    total: dict[str, Any] = {}
    for name in types.EngineStats.__dataclass_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, dict):
            total[name] = {key: left.get(key, 0) + right.get(key, 0) for key in sorted(left.keys() | right.keys())}
        else:
            total[name] = right if isinstance(right, str) else left + right
    return types.EngineStats(**total)


class Preparation:
    """What another setting needs, made on a thread of its own while requests run; then it comes into the inbox, and
    the command is carried out between two steps. Whatever goes wrong here goes wrong there again, and is told there.

    `seconds`: what this took; `waited`: how long it is over.
    """

    def __init__(self, command: wire.SetSetting, engines: Engines, done: Callable[[Preparation], None]) -> None:
        self.command, self.seconds, self.waited = command, 0.0, Timer()
        self._lanes, self._done = engines.current.lanes, done
        threading.Thread(target=self._run, name="setting", daemon=True).start()

    def _run(self) -> None:
        try:
            self._lanes.prepare(self.command.setting)
        except Exception as error:  # see above
            log.debug("setting %s could not be prepared: %s", self.command.setting, error)
        self.seconds, self.waited = self.waited.seconds, Timer()
        self._done(self)


class Change:
    """A change of profile or setting that is being prepared on a thread of its own: reading a large profile takes
    seconds, in which the running requests go on. The outcome comes into the inbox."""

    def __init__(self, command: wire.SetProfile, engines: Engines, done: Callable[[Change], None]) -> None:
        self.command = command
        self.outcome: Built | Exception | None = None
        self._known = engines.built
        self._engines, self._done = engines, done
        threading.Thread(target=self._run, name="profile", daemon=True).start()

    def _run(self) -> None:
        try:
            self.outcome = self._build()
        except Exception as error:  # told to whoever asked for the change
            self.outcome = error
        self._done(self)

    def _build(self) -> Built:
        from spectral.engine.build import build_engine, find_profile

        if not self.command.reload:
            self._known.engine.lanes.prepare(self.command.setting)
            return self._known
        loaded = self._known.engine.loaded
        profile = find_profile(loaded, self.command.profile)
        return build_engine(loaded, profile, setting=self.command.setting, limits=self._engines.current.limits)

    def apply(self) -> list[wire.ToParent]:
        """On the inference thread: the switch, and what the gateway is told."""
        outcome = self.outcome
        assert outcome is not None
        if not isinstance(outcome, Exception):
            try:
                if self.command.reload:
                    outcome.engine.warm_up(tune=False)  # streams wait for this
                    self._engines.replace(outcome)
                else:
                    self._engines.set_setting(self.command.setting)
            except Exception as error:  # too little memory for a second cache, most likely; the first one goes on
                outcome = error
            else:
                return [describe(self._engines.built), wire.Done(self.command.command_id)]
        known = isinstance(outcome, SpectralError)
        message = str(outcome) if known else f"{type(outcome).__name__}: {outcome}"
        return [wire.Done(self.command.command_id, message)]

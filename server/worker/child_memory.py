"""A worker's part in the scheduler's moves: leases, settings, sleep and wake-up, and what it reports about its bytes.

Everything runs on the inference thread between two steps, so nothing reads the cache or the weights meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.worker import messages as wire
from server.worker.child_load import describe
from spectral.errors import SpectralError

if TYPE_CHECKING:
    from server.worker.child_engines import Engines, Preparation

log = logging.getLogger("spectral.worker")
EXIT_DAMAGED = 4
COMMANDS = (wire.SetLease, wire.SetSetting, wire.Sleep, wire.Wake)


class MemoryControl:
    """Carries out the memory commands of one worker."""

    def __init__(self, engines: Engines, configured: int | None, tell: Callable[..., None]) -> None:
        self._engines, self._tell = engines, tell
        self._configured = configured  # limits.max_kv_bytes: no lease is above it
        self._lease = configured
        self._coarsest = ""
        self._sleeper: Any = None
        self._kv, self._beside = -1, 0
        self._settled = True
        self._spent: dict[str, float] = {}  # the parts of a command's time, by their names in a Footprint

    @property
    def asleep(self) -> bool:
        """Whether the weights are in host memory: nothing can run."""
        return self._sleeper is not None and self._sleeper.asleep

    def handle(self, message: wire.ToWorker, prepared: Preparation | None = None) -> list[wire.ToParent]:
        """Carry out a command; the answers, a Done the last of them. A failure changes nothing and is told.
        `prepared`: what was made for it before."""
        from spectral.residency import Timer

        assert isinstance(message, COMMANDS)
        timer, self._settled = Timer(), True
        self._spent = {} if prepared is None else {"tables_s": prepared.seconds, "waited_s": prepared.waited.seconds}
        try:
            if isinstance(message, wire.SetLease):
                answers, freed = self._set_lease(message)
            elif isinstance(message, wire.SetSetting):
                answers, freed = self._set_setting(message.setting)
            elif isinstance(message, wire.Sleep):
                answers, freed = self._sleep(message.keep_bytes)
            else:
                answers, freed = self._wake()
        except Exception as error:  # told to the scheduler, which decides; the model goes on as it was
            known = isinstance(error, SpectralError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            if not known:
                log.exception("a memory command failed")
            return [self.footprint(0, timer.seconds), wire.Done(message.command_id, text)]
        return [*answers, self.footprint(freed, timer.seconds), wire.Done(message.command_id)]

    @property
    def _devices(self) -> set[Any]:
        loaded = self._engines.current.loaded
        return {loaded.device, *loaded.layer_devices}

    def watch(self, kv: int) -> tuple[int, int]:
        """The bytes that torch holds on the devices now; and the most that tensors beside weights and a cache of `kv`
        bytes ever held between two looks at which the cache was the same: one that grows holds old and new at once."""
        from spectral.residency import peak_nbytes, reserved_nbytes

        peak = sum(peak_nbytes(device, anew=True) for device in self._devices)
        if kv == self._kv and not self.asleep:
            self._beside = max(self._beside, peak - self._engines.current.loaded.weights_nbytes - kv)
        self._kv = kv
        return sum(map(reserved_nbytes, self._devices)), self._beside

    def footprint(self, freed: int = 0, seconds: float = 0.0) -> wire.Footprint:
        """What this worker holds now."""
        from spectral.residency import reserved_nbytes

        loaded = self._engines.current.loaded
        host = self._sleeper.host_nbytes if self._sleeper is not None else 0
        return wire.Footprint(
            lease=self._lease,
            context_length=self._engines.current.context_length,
            weights_bytes=0 if self.asleep else loaded.weights_nbytes,
            reserved_bytes=sum(map(reserved_nbytes, self._devices)),
            host_bytes=host,
            kv_bytes=0 if self.asleep else self._engines.stats().kv_bytes_allocated,
            freed_bytes=freed,
            seconds=seconds,
            settled=self._settled,
            **self._spent,
        )

    def _set_lease(self, message: wire.SetLease) -> tuple[list[wire.ToParent], int]:
        from spectral.engine.lease import set_lease
        from spectral.residency import give_back

        bounds = [size for size in (message.max_bytes, self._configured) if size is not None]
        lease = min(bounds) if bounds else None
        freed = sum(set_lease(engine, lease) for engine in self._engines.all)
        self._settled = message.settle
        if message.settle:
            give_back(self._engines.current.loaded.device.type)
        self._lease, self._coarsest = lease, message.coarsest
        for engine in self._engines.all:
            engine.faults.relief = self._relieve
        return [], freed

    def _set_setting(self, setting: str) -> tuple[list[wire.ToParent], int]:
        from spectral.aside import wait
        from spectral.residency import Timer, give_back, giving_back

        built, timer, given = self._engines.built, Timer(), giving_back.seconds
        freed = built.engine.set_setting(setting)
        wait(built.engine.loaded.device)  # the codes' kernels; memory could not be given back before
        encoded_s = timer.seconds - (giving_back.seconds - given)
        row = None if setting == "exact" or built.profile is None else built.profile.row(setting)
        self._engines.built = replace(built, row=row)
        give_back(built.engine.loaded.device.type)
        self._spent |= {"encoded_s": encoded_s, "given_back_s": giving_back.seconds - given}
        return [describe(self._engines.built)], freed

    def _relieve(self) -> int:
        """Out of memory in a step: the next coarser setting, where the scheduler allows one; the bytes freed."""
        built = self._engines.built
        if built.profile is None or built.row is None or not self._coarsest:
            return 0
        names = [row.name for row in built.profile.ladder]
        at, last = names.index(built.row.name), names.index(self._coarsest) if self._coarsest in names else -1
        if at >= last:
            return 0
        messages, freed = self._set_setting(names[at + 1])
        self._tell(*messages)
        return freed

    def _sleep(self, keep_bytes: int) -> tuple[list[wire.ToParent], int]:
        from spectral.engine.lease import sleep
        from spectral.errors import CacheError
        from spectral.residency import Sleeper

        if self._engines.has_work:
            raise CacheError("requests run on this model; it cannot sleep")
        loaded = self._engines.current.loaded
        if self._sleeper is None:
            kind = loaded.device.type if loaded.device.type != "cpu" else "cuda"
            self._sleeper = Sleeper(loaded.model, kind, _damaged)
        return [], sleep(self._engines.all, self._sleeper, keep_bytes)

    def _wake(self) -> tuple[list[wire.ToParent], int]:
        if self._sleeper is None:
            return [], 0
        woken = int(self._sleeper.wake())
        self._engines.foresee()
        return [], -woken


def _damaged() -> None:
    """Whatever this process answers is wrong: another one loads the weights from the disk."""
    log.error("the weights were damaged in host memory while they slept; this worker ends")
    os._exit(EXIT_DAMAGED)

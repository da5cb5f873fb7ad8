"""What an engine does when the device is out of memory, and which errors end the process.

Out of memory in a step: the step is taken back, memory is freed (unused, idle prefixes, and whatever `relief` finds,
such as a coarser setting), and the step is tried again. If it fails once more before any step succeeds, only the
newest request of the step fails. An error after which CUDA answers nothing any more (a context is lost for good) is
not for one request: it is raised, the worker ends, and a new one starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from spectral.engine.lanes import Lanes
    from spectral.engine.sequence import Sequence

log = logging.getLogger("spectral.engine")

_STICKY = ("CUDA error", "device-side assert", "an illegal memory access", "unspecified launch failure")


class DeviceLost(Exception):
    """The device does not answer this process any more; only a new process can use it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError)


def is_sticky(error: BaseException) -> bool:
    """Whether every later call on the device will fail as well."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return any(words in str(error) for words in _STICKY)


class Faults:
    """Counts failures in a row. `relief`: called when memory is out, frees what it can, returns the bytes."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._failed = False
        self.relief: Callable[[], int] | None = None
        self.count = 0

    def succeeded(self) -> None:
        """A step ran."""
        self._failed = False

    def victims(self, error: Exception, work: Iterable[tuple[Sequence, int]]) -> list[Sequence]:
        """Whose requests fail: nobody (the step is tried again), the newest, or all. Raises DeviceLost."""
        sequences = [sequence for sequence, _ in work]
        if is_sticky(error):
            raise DeviceLost(f"the device is lost to this process: {error}") from error
        if not is_out_of_memory(error):
            log.error("a step of %d sequences failed", len(sequences), exc_info=error)
            return sequences
        self.count += 1
        again, self._failed = not self._failed, True
        freed = self._free()
        log.warning("out of memory in a step of %d sequences; %d bytes freed", len(sequences), freed)
        return [] if again else [max(sequences, key=lambda s: s.order)]

    def _free(self) -> int:
        before = self._lanes.nbytes
        try:
            self._lanes.free_idle(before)
            self._lanes.trim()
            freed = before - self._lanes.nbytes
            if self.relief is not None:
                freed += self.relief()
        except torch.OutOfMemoryError:  # packing and re-encoding need some memory themselves
            freed = before - self._lanes.nbytes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return freed

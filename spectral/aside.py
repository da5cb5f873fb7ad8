"""Work on a GPU beside what another thread runs there."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import numpy as np
import torch

STAGED_BYTES = 16 << 20
"""Pinned host memory from which arrays are copied while a thread works aside."""


class Staging:
    """Pinned memory that arrays pass through on their way to GPUs: a copy from there returns at once, where one from
    ordinary memory waits until it is done, and with it for what the GPU is busy with."""

    def __init__(self, streams: list[torch.cuda.Stream], size: int = STAGED_BYTES) -> None:
        self._streams = streams
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=bool(streams))
        self._used = 0

    def wait(self) -> None:
        """Until all copies are done: the memory may be written again."""
        for stream in self._streams:
            stream.synchronize()
        self._used = 0

    def copy(self, x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """x, contiguous on the CPU, on a device."""
        size = x.numel() * x.element_size()
        if not size or size > self._bytes.numel():
            return x.to(device)
        if self._used + size > self._bytes.numel():
            self.wait()
        staged = self._bytes[self._used : self._used + size].view(x.dtype).view(x.shape)
        self._used += -(-size // 64) * 64
        staged.copy_(x)
        return staged.to(device, non_blocking=True, copy=True)


_current = threading.local()


def fetch(x: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, once what makes it is done. For whoever waits long: a copy from a GPU to ordinary memory
    waits inside CUDA with a lock held, and every call of every other thread waits with it; one to pinned memory does
    not wait, and an event is waited for without that lock."""
    if x.device.type != "cuda":
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))
    done.synchronize()
    return host


def to_device(array: np.ndarray, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array as a tensor of its own on a device, of another type if wanted; inside `aside` without waiting."""
    x = torch.from_numpy(np.ascontiguousarray(array if array.flags.writeable else array.copy()))
    if torch.device(device).type == "cpu":
        return x.to(dtype or x.dtype, copy=True)  # the array may be somebody else's
    x = x.to(dtype or x.dtype)
    staging: Staging | None = getattr(_current, "staging", None)
    return x.to(device) if staging is None else staging.copy(x, device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # for many short kernels: each would wait for a long one's blocks


@contextmanager
def aside(devices: Iterable[torch.device]) -> Iterator[None]:
    """What this thread launches and copies inside does not wait for what other threads have launched since, and is done
    at the end. (On the usual stream every small copy from the host waits for the step that runs.)

    What is made inside may be used anywhere after that. Nothing that is freed meanwhile by another thread may have been
    made in here before: its memory could be taken while a step still reads it. On other devices nothing changes.
    """
    streams = [_stream(device) for device in dict.fromkeys(devices) if device.type == "cuda"]
    if not streams:
        yield
        return
    with ExitStack() as stack:
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            stack.enter_context(torch.cuda.stream(stream))
        _current.staging = staging = Staging(streams)
        try:
            yield
        finally:
            _current.staging = None
            staging.wait()

"""Work on a GPU beside what another thread runs there."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
import torch

PARCEL_ALIGN = 64
"""Bytes: kernels are compiled for addresses that are multiples of 16."""
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


class Fetched:
    """A tensor on its way to the CPU, behind what makes it: launched here, waited for by `get`.

    For whoever waits long: a copy from a GPU to ordinary memory waits inside CUDA with a lock held, and every call of
    every other thread waits with it; one to pinned memory does not wait, and an event is waited for without that lock.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if x.device.type != "cuda":
            self._host = x.cpu()
            return
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._done = _recorded(x.device)

    def get(self) -> torch.Tensor:
        """The tensor, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


def fetch(x: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, once what makes it is done; see `Fetched`."""
    return Fetched(x).get()


def wait(device: torch.device) -> None:
    """Until what this thread has launched on a GPU is done, as `Fetched` waits."""
    if device.type == "cuda":
        _recorded(device).synchronize()


def _recorded(device: torch.device) -> torch.cuda.Event:
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return done


def to_device(array: np.ndarray, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array as a tensor of its own on a device, of another type if wanted; inside `aside` without waiting."""
    x = torch.from_numpy(np.ascontiguousarray(array if array.flags.writeable else array.copy()))
    if torch.device(device).type == "cpu":
        return x.to(dtype or x.dtype, copy=True)  # the array may be somebody else's
    x = x.to(dtype or x.dtype)
    staging: Staging | None = getattr(_current, "staging", None)
    return x.to(device) if staging is None else staging.copy(x, device)


@dataclass(frozen=True)
class Parcel:
    """Arrays behind one another, so that one copy brings all of them to a device.

    Attributes:
        data: uint8; parts: of each array its place, type and shape.
    """

    data: np.ndarray
    parts: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Parcel:
        """Arrays of types that torch knows."""
        parts, end = [], 0
        for array in arrays:
            parts.append((end, torch.from_numpy(np.empty(0, array.dtype)).dtype, array.shape))
            end += -(-array.nbytes // PARCEL_ALIGN) * PARCEL_ALIGN
        data: np.ndarray = np.zeros(end, dtype=np.uint8)
        for (at, _, _), array in zip(parts, arrays, strict=True):
            data[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return cls(data, tuple(parts))

    def to(self, device: torch.device | str) -> list[torch.Tensor]:
        """The arrays as tensors on a device, views of one storage there."""
        there, out = to_device(self.data, device), []
        for at, dtype, shape in self.parts:
            size = prod(shape) * dtype.itemsize
            out.append(there[at : at + size].view(dtype).view(shape))
        return out


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

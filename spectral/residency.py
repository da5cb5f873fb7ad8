"""A model's weights out of device memory and back, in place: every storage keeps its tensors.

Storages are moved, not parameters: quantized modules (bitsandbytes) hold tensors in objects of their own, and int8
modules cannot be moved as modules. All tensors that a model's modules reach are found, and each storage is moved once.
A model on the CPU has nothing to move.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from spectral.checks import checksum
from spectral.errors import CacheError

PREFAULT_THREADS = 8
PIECE = 64 << 20
"""Bytes of a checksum between two looks at whether it is still wanted: some milliseconds."""
LEAST_BYTES = 1 << 18
APART_BYTES = 1 << 20
"""Larger storages lie in torch's segments for large ones, where gaps between them cost something."""
SLIDES = 8
"""Most passes of `close_gaps`. By torch's rule (the smallest gap that fits) three to five close all gaps of models of
28 and 36 layers, whichever order their weights were loaded in."""
_DEPTH = 6
"""How deep tensors hide in the objects of a module: a quantization state has a state of its own."""


class Sleeper:
    """Moves one model's weights. Not thread-safe: nothing may run on the model meanwhile.

    Host memory is one pinned buffer, taken when the model goes to sleep and given back when it is awake (by a thread:
    the kernel takes longer to free it than the weights take to come back). CUDA graphs captured before a sleep point to
    addresses that are gone: capture them again.

    Threads take a checksum of what sleeps and look at it again after the wake-up, which does not wait for them.
    `damaged` is called where something changed in host memory: the weights that were copied back are wrong.
    """

    def __init__(self, model: torch.nn.Module, kind: str = "cuda", damaged: Callable[[], None] = lambda: None) -> None:
        self._model, self._kind, self._damaged = model, kind, damaged
        self._asleep: list[tuple[torch.UntypedStorage, int, int]] = []
        self._host: torch.Tensor | None = None
        self._sum: Summed | None = None

    @property
    def asleep(self) -> bool:
        """Whether the weights are in host memory."""
        return self._host is not None

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory held."""
        return 0 if self._host is None else self._host.numel()

    def sleep(self, modules: Iterable[torch.nn.Module] = (), tensors: Iterable[torch.Tensor] = ()) -> int:
        """Move all storages to host memory; returns the bytes that the device has again.

        `modules`, `tensors`: what else is to go, the tables of a cache and its pools; of the tables only those of
        LEAST_BYTES or more, since every copy takes its microseconds. Raises CacheError where the host has too little
        memory; the model is then as it was.
        """
        if self.asleep:
            return 0
        storages = list(storages_of(self._model, self._kind))
        tables = (s for module in modules for s in storages_of(module, self._kind) if s.nbytes() >= LEAST_BYTES)
        pools = (t.untyped_storage() for t in tensors if t.device.type == self._kind and t.untyped_storage().nbytes())
        storages = list({storage._cdata: storage for storage in (*storages, *tables, *pools)}.values())
        total = sum(storage.nbytes() for storage in storages)
        if not total:
            return 0
        try:
            host = _pinned(total)
        except RuntimeError as error:
            raise CacheError(f"host memory for {total} bytes of weights cannot be had: {error}") from error
        at = 0
        for storage in storages:
            size = storage.nbytes()
            _view(host, at, size).copy_(bytes_of(storage), non_blocking=True)
            self._asleep.append((storage, at, size))
            at += size
        synchronize({storage.device for storage in storages})
        for storage in storages:
            storage.resize_(0)
        self._host, self._sum = host, Summed(host)
        give_back(self._kind)
        return total

    def wake(self) -> int:
        """Move them back; returns the bytes. A failure (out of memory) leaves the model asleep, and is raised."""
        if self._host is None:
            return 0
        try:
            for storage, at, size in self._asleep:
                storage.resize_(size)
                bytes_of(storage).copy_(_view(self._host, at, size), non_blocking=True)
            synchronize({storage.device for storage, _, _ in self._asleep})
        except Exception:
            for storage, _, _ in self._asleep:
                storage.resize_(0)
            give_back(self._kind)
            raise
        total, host, expected = self._host.numel(), self._host, self._sum.stop() if self._sum is not None else None
        self._asleep, self._host, self._sum = [], None, None
        held = [host]
        del host
        threading.Thread(target=self._release, args=[held, expected], name="host memory", daemon=True).start()
        return total

    def _release(self, held: list[torch.Tensor], expected: bytes | None) -> None:
        """Free a pinned buffer, the last reference to it: it is taken from the list."""
        right = expected is None or Summed(held[0]).result() == expected
        host = held.pop()
        if torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
        if not right:
            self._damaged()


class Summed:
    """A checksum of a buffer, taken by a thread of its own, piece by piece."""

    def __init__(self, host: torch.Tensor) -> None:
        self._stop = threading.Event()
        self._found: bytes | None = None
        self._thread = threading.Thread(target=self._run, args=[host], name="checksum", daemon=True)
        self._thread.start()

    def _run(self, host: torch.Tensor) -> None:
        found = b""
        for at in range(0, host.numel(), PIECE):
            if self._stop.is_set():
                return
            found = hashlib.blake2b(found + checksum([host[at : at + PIECE]]), digest_size=16).digest()
        self._found = found

    def result(self) -> bytes | None:
        """The checksum, when it is there; None where it was stopped before."""
        self._thread.join()
        return self._found

    def stop(self) -> bytes | None:
        """The checksum, None where it is not complete: then it is not taken."""
        self._stop.set()
        return self.result()


def storages_of(model: torch.nn.Module, kind: str) -> Iterator[torch.UntypedStorage]:
    """Every storage on a kind of device that the modules of a model reach, once."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in _tensors(vars(module), _DEPTH, set()):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type == kind and key not in seen and storage.nbytes():
                seen.add(key)
                yield storage


def _tensors(value: Any, depth: int, visited: set[int]) -> Iterator[torch.Tensor]:
    if depth < 0 or id(value) in visited or isinstance(value, (str, bytes, int, float, torch.nn.Module, type)):
        return
    visited.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        children: Any = [getattr(value, "quant_state", None), value.grad]
        children += [v for k, v in list(vars(value).items()) if k not in ("_backward_hooks",)]
    elif isinstance(value, dict):
        children = list(value.values())  # another thread may make meanwhile what is first asked for
    elif isinstance(value, (list, tuple, set)):
        children = list(value)
    elif hasattr(value, "__dict__"):
        children = list(vars(value).values())
    else:
        return
    for child in children:
        yield from _tensors(child, depth - 1, visited)


def close_gaps(model: torch.nn.Module, kind: str = "cuda") -> int:
    """Move a model's large storages together; the bytes that torch has returned to the driver for it.

    What is freed while a model is made ready (projections that became one) leaves a gap in every layer, and torch
    returns whole pieces of memory only: of an 8B model it kept 1.5 GiB for nothing. Storages go, from the lowest
    address up, through a buffer and into the smallest gap that they fit in, often that right below them, until none
    moves any more. All tensors stay valid; addresses change, so nothing may have been captured before. Where the device
    has no memory for the buffer, everything stays where it is.
    """
    places: dict[torch.device, list[torch.UntypedStorage]] = {}
    for storage in storages_of(model, kind):
        if storage.nbytes() > APART_BYTES:
            places.setdefault(storage.device, []).append(storage)
    give_back(kind)
    before = sum(map(reserved_nbytes, places))
    for device, storages in places.items():
        try:
            buffer = torch.empty(max(s.nbytes() for s in storages), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            continue
        for _ in range(SLIDES):
            if not _slide(storages, buffer):
                break
        del buffer
    give_back(kind)
    return before - sum(map(reserved_nbytes, places))


def _slide(storages: list[torch.UntypedStorage], buffer: torch.Tensor) -> bool:
    """Every storage once to where the allocator puts it now; whether one moved."""
    moved = False
    for storage in sorted(storages, key=lambda storage: storage.data_ptr()):
        at, size = storage.data_ptr(), storage.nbytes()
        kept = buffer[:size].copy_(bytes_of(storage))
        storage.resize_(0)
        storage.resize_(size)
        bytes_of(storage).copy_(kept)
        moved |= storage.data_ptr() != at
    return moved


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole storage as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _view(host: torch.Tensor, at: int, size: int) -> torch.Tensor:
    return host[at : at + size]


def _pinned(size: int) -> torch.Tensor:
    """Host memory of exactly this size, pinned where there is CUDA: torch's own pinned allocator rounds up to powers
    of two and keeps what is freed."""
    host = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available():
        # The kernel hands out pages one by one as they are first written: several threads are faster than one.
        step = -(-size // PREFAULT_THREADS)
        with ThreadPoolExecutor(PREFAULT_THREADS) as pool:
            list(pool.map(lambda at: host[at : at + step].zero_(), range(0, size, step)))
        status = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister failed with status {int(status)}")
    return host


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for the copies from and to these devices, and make a context on no other."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Spent:
    """Seconds that something took in this process, since the start."""

    def __init__(self) -> None:
        self.seconds = 0.0


giving_back = Spent()
"""In `give_back`."""


def give_back(kind: str) -> None:
    """Hand freed memory of torch's allocator back to the driver, or of the C library's to the kernel, where other
    processes can take it."""
    timer = Timer()
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)
    giving_back.seconds += timer.seconds


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return None
    return found


def reserved_nbytes(device: torch.device) -> int:
    """Bytes of a device that torch holds in this process, used or not; 0 on a CPU, where nobody counts them."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def peak_nbytes(device: torch.device, *, anew: bool = False) -> int:
    """The most bytes of a device that tensors of this process held at once, since the start or since the last call
    with `anew`; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = int(torch.cuda.max_memory_allocated(device))
    if anew:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self._began

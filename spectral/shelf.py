"""Tables of settings that were used before: in host memory while nobody uses them, and by copy back on their device.

What codecs and kernels of a setting hold on a GPU is hundreds of megabytes for a large model, and making it takes
thousands of small operations: a quarter of a second beside a running model, most of a squeeze. The same few settings
are used again and again. So the codecs of a `Codebook` that nobody has any more are not forgotten: their storages lose
their memory on the device, in place, and get it back when the setting is wanted again.

Their bytes are copied to host memory ahead of that (`Shelf.keep`), a piece at a time, because freeing memory must not
wait for copies. What was not copied in time is forgotten, as it would be without all this, and made anew.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import torch

from spectral.aside import aside
from spectral.codec import Codebook
from spectral.residency import bytes_of, storages_of

log = logging.getLogger("spectral.engine")

SHELF_BYTES = 3 << 30
"""Most host memory for such tables, and at most SHELF_PART of the machine's: those of four settings of an 8B model."""
SHELF_PART = 1 / 32
PIECE = 16 << 20
"""Bytes of a block of host memory: a power of two, which is what torch's allocator of pinned memory hands out."""
LEAST_BYTES = 1 << 16
"""Smaller storages stay on the device: a copy takes its microseconds. All of a large model's together are 5 MB."""
PIECE_S = 0.05
"""Seconds that a layer's copy may be waited for."""

Parts = list[tuple[torch.UntypedStorage, torch.Tensor]]


def shelf_nbytes() -> int:
    """What a shelf may take on this machine."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # not a system that says so
        return SHELF_BYTES
    return min(SHELF_BYTES, int(there * SHELF_PART))


class _Kept:
    """One setting's codecs. Storages and host memory are touched with `lock` held.

    Attributes:
        book: its layers and figures; never given to anybody, so that the life of what is given can be told.
        given: whoever has it, weakly.
        parts: storages and their bytes in host memory; whole: all of them are there; coming: those of a copy that is
            being made; nbytes: of host memory; resting: the device has none of them.
    """

    def __init__(self, book: Codebook) -> None:
        self.book: Codebook | None = replace(book)
        self.given = weakref.ref(book)
        self.lock = threading.Lock()
        self.parts: Parts = []
        self.coming: Parts = []
        self.nbytes = 0
        self.whole = self.resting = False

    def storages(self, layer: int, kind: str) -> list[torch.UntypedStorage]:
        """What a layer holds on a kind of device that is worth a copy; nothing where this was dropped."""
        codec = None if self.book is None else self.book.layers[layer]
        found = [] if codec is None else storages_of(codec, kind)
        return [storage for storage in found if storage.nbytes() >= LEAST_BYTES]

    def rest(self) -> None:
        """Give the device's memory back."""
        for storage, _ in self.parts:
            storage.resize_(0)
        self.resting = True

    def wake(self) -> None:
        """Have it again. A failure, out of memory, leaves it resting and is raised."""
        try:
            for storage, host in self.parts:
                storage.resize_(host.numel())
                bytes_of(storage).copy_(host, non_blocking=True)
        except Exception:
            self.rest()
            raise
        self.resting = False

    def drop(self) -> None:
        """Hold nothing any more; who was given the codecs goes on with them."""
        self.book, self.parts, self.coming, self.nbytes, self.whole = None, [], [], 0, False


class Shelf:
    """The settings of one model that are in use or were. For any threads.

    Args:
        kind: of the devices whose memory is meant, "cuda" or "cpu".
        max_bytes: of host memory; None: see `shelf_nbytes`.
    """

    def __init__(self, kind: str, max_bytes: int | None = None) -> None:
        self._kind, self._max_bytes = kind, shelf_nbytes() if max_bytes is None else max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first
        self._lock = threading.RLock()  # a finalizer may run wherever this is held

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values())

    def known(self) -> list[str]:
        """Settings whose tables need not be made."""
        with self._lock:
            return [name for name, kept in self._kept.items() if kept.whole]

    def adopt(self, book: Codebook) -> None:
        """Take a codebook in care from now on. Its tables go, or go to rest, with its last user."""
        with self._lock:
            known = self._kept.get(book.setting)
            if known is not None and known.given() is book:
                return
            if known is not None:
                self._forget(known)
            kept = self._kept[book.setting] = _Kept(book)
        self._watch(book, kept)

    def _watch(self, book: Codebook, kept: _Kept) -> None:
        weakref.finalize(book, self._ended, kept).atexit = False

    def find(self, setting: str) -> Codebook | None:
        """A setting's codebook, its tables on their devices, if it is known; inside `aside` without waiting for what
        others do there. Raises what torch raises without memory."""
        with self._lock:
            kept = self._kept.get(setting)
            if kept is None:
                return None
            self._kept.move_to_end(setting)
        with kept.lock:
            book, own = kept.given(), kept.book
            if book is not None or not kept.resting or own is None:
                return book
            kept.wake()
            book = replace(own)
            kept.given = weakref.ref(book)
        self._watch(book, kept)
        return book

    def keep(self, setting: str) -> Iterator[None]:
        """Copy a setting's tables to host memory, a layer at a time, where there is room for them; yields after every
        layer. A thread of its own may do this, and may stop at any time."""
        with self._lock:
            kept = self._kept.get(setting)
            count = 0 if kept is None or kept.book is None else len(kept.book.layers)
        if kept is None:
            return
        known = {storage._cdata: host for storage, host in kept.parts}  # and nothing that holds a device's memory:
        kept.coming, blocks = [], _Blocks(pinned=self._kind == "cuda")  # what is dropped meanwhile is to be gone
        for layer in range(count):
            with kept.lock:
                if kept.book is None or kept.resting or not self._copy(kept, layer, known, blocks):
                    kept.coming = []
                    return
            yield
        with kept.lock:
            if kept.book is not None and not kept.resting:
                kept.parts, kept.coming, kept.whole = kept.coming, [], True
                blocks_held = {host.untyped_storage()._cdata: host.untyped_storage().nbytes() for _, host in kept.parts}
                kept.nbytes = sum(blocks_held.values())
                log.debug("tables of setting %s: %d bytes in host memory", setting, kept.nbytes)

    def _copy(self, kept: _Kept, layer: int, known: dict[int, torch.Tensor], blocks: _Blocks) -> bool:
        """Copy what is not known of a layer; False where there is no room, or where another setting has it too."""
        storages = kept.storages(layer, self._kind)
        others = self._others(kept)
        shared = [other for other in others if {s._cdata for s, _ in other.parts} & {s._cdata for s in storages}]
        if shared:
            for other in shared:
                self._forget(other)
            return False
        new = [storage for storage in storages if storage._cdata not in known]
        size = sum(storage.nbytes() for storage in new) + PIECE
        if not self._room(kept, blocks.nbytes + size):
            return False
        with aside({storage.device for storage in new}):
            for storage in storages:
                host = known.get(storage._cdata)
                if host is None:
                    host = blocks.take(storage.nbytes())
                    host.copy_(bytes_of(storage), non_blocking=True)
                kept.coming.append((storage, host))
        return True

    def _others(self, kept: _Kept) -> list[_Kept]:
        with self._lock:
            return [other for other in self._kept.values() if other is not kept]

    def _room(self, kept: _Kept, nbytes: int) -> bool:
        """Whether so many bytes more may be held for a setting; those that were used longest ago make room."""
        if kept.nbytes + nbytes > self._max_bytes:
            return False
        for other in self._others(kept):
            if self.nbytes + nbytes <= self._max_bytes:
                break
            if other.nbytes:
                with other.lock:  # it may be on its way back
                    self._forget(other)
        return self.nbytes + nbytes <= self._max_bytes

    def clear(self) -> None:
        """Hold nothing in host memory, and touch no storage any more: whoever calls this moves them. What is in use
        stays in use."""
        with self._lock:
            held, self._kept = list(self._kept.values()), OrderedDict()
        for kept in held:
            with kept.lock:
                kept.drop()
        empty_host = getattr(torch.accelerator, "empty_host_cache", None)
        if held and self._kind == "cuda" and empty_host is not None:
            empty_host()

    def _ended(self, kept: _Kept) -> None:
        """The last user of a setting is gone. This may run anywhere, also where the lock is held."""
        if kept.lock.acquire(timeout=PIECE_S):
            try:
                if kept.whole and kept.given() is None:
                    kept.rest()
                    return
            finally:
                kept.lock.release()
        self._forget(kept)

    def _forget(self, kept: _Kept) -> None:
        with self._lock:
            if kept.book is not None and self._kept.get(kept.book.setting) is kept:
                del self._kept[kept.book.setting]
        kept.drop()


class _Blocks:
    """Host memory, pinned where copies are to run beside other work, in blocks that torch's allocator of such memory
    hands out whole."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned, self._block, self._used = pinned, torch.empty(0, dtype=torch.uint8), 0
        self.nbytes = 0

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size]"""
        if self._used + size > self._block.numel():
            self._block = torch.empty(max(size, PIECE), dtype=torch.uint8, pin_memory=self._pinned)
            self._used = 0
            self.nbytes += self._block.numel()
        part = self._block[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        return part

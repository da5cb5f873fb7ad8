"""Rows outside their store: parked in host memory to come back by copy, and windows as snapshots.

Pinned memory is used where the store is on a CUDA device: copies then run at the bus's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spectral.checks import checksum
from spectral.codec import Codebook
from spectral.errors import CacheError, DamagedPages
from spectral.pages import PageStore, Row
from spectral.pools import squeezed
from spectral.windows import WindowGroup, make_window

Snapshot = list[list[torch.Tensor]]
"""A row's windows in host memory: for every group of windows its tensors [layers, H, places, ...]."""


@dataclass(frozen=True)
class Parked:
    """A row in host memory. `codebook`: the setting of its pages; `length`: tokens; `page_count`: of every layer that
    has any; `pages`: uint8 [page_count, bytes] for each of them; `windows`: its exact windows; `check`: of all that, as
    it is when this is made."""

    codebook: Codebook
    length: int
    page_count: int
    pages: list[torch.Tensor | None]
    windows: Snapshot
    check: bytes = b""

    def __post_init__(self) -> None:
        if not self.check:
            object.__setattr__(self, "check", self._sums())

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(p.numel() for p in self.pages if p is not None) + snapshot_nbytes(self.windows)

    def verify(self) -> None:
        """Raises DamagedPages where the bytes are not those that were put here."""
        if self._sums() != self.check:
            raise DamagedPages(f"a row of {self.length} tokens was damaged in host memory")

    def _sums(self) -> bytes:
        return checksum([*self.pages, *snapshot_tensors(self.windows)])


def snapshot_nbytes(windows: Snapshot) -> int:
    """Bytes of a snapshot."""
    return sum(tensor.numel() * tensor.element_size() for group in windows for tensor in group)


def snapshot_tensors(windows: Snapshot) -> list[torch.Tensor]:
    """The tensors of a snapshot, in order."""
    return [tensor for group in windows for tensor in group]


def take_windows(store: PageStore, row: Row) -> Snapshot:
    """A copy of a row's windows."""
    windows = [[_to_host(t) for t in group.slot_tensors(row.slot, row.length)] for group in store.groups]
    _finish(store)
    return windows


def put_windows(store: PageStore, row: Row, windows: Snapshot) -> None:
    """Fill the windows of a row of the same length and setting."""
    for group, tensors in zip(store.groups, windows, strict=True):
        for target, source in zip(group.slot_tensors(row.slot, row.length), tensors, strict=True):
            target.copy_(source)


def park(store: PageStore, row: Row) -> Parked:
    """Copy a row to host memory. The row stays open: the caller closes it."""
    index = torch.tensor(row.pages, dtype=torch.long, device=store.device)
    pages = [None if pool is None else _to_host(pool.index_select(0, index.to(pool.device))) for pool in store.pools]
    return Parked(store.codebook, row.length, len(row.pages), pages, take_windows(store, row))


def unpark(store: PageStore, parked: Parked, shared: Sequence[int] = ()) -> Row:
    """A parked row in the store again, bit for bit; re-encoded where the store has been squeezed meanwhile.

    `shared`: pages of the store with the same content as the row's first ones. Raises OutOfPages or DamagedPages, with
    nothing changed.
    """
    parked.verify()
    first = len(shared)
    old_book, new_book = parked.codebook, store.codebook
    same = (old_book.profile_hash, old_book.setting) == (new_book.profile_hash, new_book.setting)
    row = store.admit(parked.length, parked.page_count - first, shared)
    try:
        place = torch.tensor(row.pages[first:], dtype=torch.long, device=store.device)
        for pool, source, old, new in zip(
            store.pools, parked.pages, old_book.layers, new_book.layers, strict=True
        ):
            if pool is not None and source is not None and old is not None and new is not None:
                pages = source[first:].to(pool.device)
                pool[place.to(pool.device)] = pages if same else squeezed(pages, old, new)
        put_windows(store, row, _coarser(store, parked))
    except BaseException:
        store.close(row)
        raise
    return row


def host_store(like: PageStore, codebook: Codebook, window_dtype: torch.dtype) -> PageStore:
    """An empty store in host memory for the same layers, at any setting, without a limit: rows go to files from there
    and come into it, so that no device needs room for them."""
    return PageStore(like.shape, codebook, window_dtype=window_dtype)


def regrouped(parked: Parked, source: PageStore, target: PageStore) -> Parked:
    """A row parked from one store as another store of the same layers takes it: of a model that is spread over several
    devices the windows lie in groups by device. Raises DamagedPages where there is something to change."""
    if source.group_of == target.group_of:
        return parked
    parked.verify()
    layers: list[list[int]] = [[] for _ in target.groups]
    for layer, (group, _) in sorted(target.group_of.items(), key=lambda item: item[1]):
        layers[group].append(layer)
    windows = []
    for members in layers:
        places = [source.group_of[layer] for layer in members]
        count = len(parked.windows[places[0][0]])
        windows.append([torch.stack([parked.windows[g][i][at] for g, at in places]) for i in range(count)])
    return Parked(parked.codebook, parked.length, parked.page_count, parked.pages, windows)


def _coarser(store: PageStore, parked: Parked) -> Snapshot:
    """A parked row's windows in the number format that the store has now."""
    old, new = parked.codebook, store.codebook
    if old.window_bits == new.window_bits:
        return parked.windows
    if new.window_bits > old.window_bits:
        raise CacheError(f"a row parked at {old.setting!r} cannot come back at {new.setting!r}, which is finer")
    out = []
    for number, (group, tensors) in enumerate(zip(store.groups, parked.windows, strict=True)):
        window = group.windows[0]
        if any(new.layers[layer] is None for layer, (found, _) in store.group_of.items() if found == number):
            out.append(tensors)
            continue
        shape, places, home = window.shape, (window.sinks, window.ring), window.store.device
        kinds = [
            WindowGroup([make_window(shape, *places, window.store.dtype, home, bits) for _ in group.windows])
            for bits in (old.window_bits, new.window_bits)
        ]
        for kind in kinds:
            kind.resize(1)
        for target, source in zip(kinds[0].slot_tensors(0, parked.length), tensors, strict=True):
            target.copy_(source)
        place = torch.arange(sum(places), device=home)
        tokens = kinds[0].read(0, len(group.windows), place[:1])[:, 0]  # [layers, H, places, d + dv]
        kinds[1].write(0, torch.zeros_like(place), place, tokens.transpose(1, 2))
        out.append(kinds[1].slot_tensors(0, parked.length))
    return out


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; on CUDA it is complete after `_finish`."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor, non_blocking=True)


def _finish(store: PageStore) -> None:
    for device in {*store.devices}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

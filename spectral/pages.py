"""The paged store: compressed pages, exact windows, and one forward's worth of work on them.

A sequence (`Row`) of length n holds, in every full-attention layer:
    sinks        tokens [0, S)                     exact, in the row's window slot
    pages        tokens [S, S + P * len(pages))    packed codes, immutable once written
    recent       the rest, between W and W + P - 1 tokens (fewer at the start), a ring in the window slot: exact, or
                 nearly so (spectral.windows)
Page i of a row covers tokens S + i*P .. S + (i+1)*P - 1, and page ids are shared by all full layers: page p of layer l
is row p of that layer's pool. Layers with sliding attention keep a rolling exact window of their own and no pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from spectral.codec import Codebook
from spectral.errors import CacheError, OutOfPages
from spectral.page_ids import PageIds
from spectral.pools import copied, exact_codebook, grow, remake, squeeze_fill
from spectral.shapes import LayerShape, ModelShape
from spectral.step_batch import StepBatch
from spectral.windows import ExactWindow, WindowGroup, coarser_windows, make_window

_generations = itertools.count(1)

__all__ = ["Hold", "LayerShape", "ModelShape", "PageStore", "Row", "StepBatch", "exact_codebook"]


@dataclass
class Row:
    """One sequence in the store. `slot`: its window slot; `pages`: its page ids, oldest first; `length`: tokens."""

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    open: bool = True


@dataclass(eq=False)
class Hold:
    """An owner of pages that is no row: what a prefix cache keeps for the next row that begins alike."""

    pages: list[int]


class PageStore:
    """All KV memory of one model at one setting. Pages may have several owners; nobody changes them once written.

    Args:
        shape: the model's layers.
        codebook: the setting, or None for "exact".
        device: where pages live.
        max_bytes: limit on allocated bytes (pages and windows), None for no limit.
        window_dtype: dtype of exact windows; bf16 unless a test wants bit-equality with a float32 cache.
        devices: where each layer's pages and windows live; None: all on `device`.
        elsewhere: bytes that count towards max_bytes and are not in this store (other stores of the same model).
    """

    def __init__(
        self,
        shape: ModelShape,
        codebook: Codebook | None = None,
        *,
        device: torch.device | str = "cpu",
        max_bytes: int | None = None,
        window_dtype: torch.dtype = torch.bfloat16,
        elsewhere: Callable[[], int] = lambda: 0,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.shape = shape
        self._elsewhere = elsewhere
        self.codebook = codebook if codebook is not None else exact_codebook(shape, window_dtype)
        self.device = torch.device(device)
        self.devices = [self.device] * len(shape.layers) if devices is None else list(devices)
        self.max_bytes = max_bytes
        book = self.codebook
        if len(book.layers) != len(shape.layers):
            raise CacheError(f"the setting has {len(book.layers)} layers and the model {len(shape.layers)}")
        if book.page_tokens <= 0 or book.window % book.page_tokens:
            raise CacheError(f"the window ({book.window}) must be a multiple of the page ({book.page_tokens} tokens)")
        self.ring = book.window + book.page_tokens
        self.windows: list[ExactWindow] = []
        self.pools: list[torch.Tensor | None] = []
        alike: dict[tuple[LayerShape, bool, torch.device], list[int]] = {}
        for index, (layer, codec, home) in enumerate(zip(shape.layers, book.layers, self.devices, strict=True)):
            alike.setdefault((layer, codec is None, home), []).append(index)
            sizes = (0, layer.sliding or 1, 16) if codec is None else (book.sinks, self.ring, book.window_bits)
            self.windows.append(make_window(layer, *sizes[:2], window_dtype, home, sizes[2]))
            pool = None if codec is None else torch.zeros((0, codec.page_nbytes), dtype=torch.uint8, device=home)
            self.pools.append(pool)
        self.groups = [WindowGroup([self.windows[i] for i in layers]) for layers in alike.values()]
        self.group_of = {i: (g, at) for g, layers in enumerate(alike.values()) for at, i in enumerate(layers)}
        """Layer -> its window's group, and its place there."""
        self.slot_capacity = 0
        self.generation = next(_generations)
        """Another one, of all stores, whenever a pool or window may have got another address."""
        self._ids = PageIds()
        self._free_slots: list[int] = []
        self._rows: dict[int, Row] = {}
        self._holds: set[Hold] = set()
        self._begun: set[StepBatch] = set()  # neither committed nor aborted
        self._page_nbytes = book.page_nbytes()
        self._slot_nbytes = sum(window.slot_nbytes for window in self.windows)

    # -- rows -----------------------------------------------------------------------------------------------------

    def open(self) -> Row:
        """A new, empty sequence. Raises OutOfPages when its window does not fit."""
        if not self._free_slots:
            self._grow_slots(max(1, min(16, self.slot_capacity)))
        row = Row(self._free_slots.pop())
        for group in self.groups:
            group.clear(row.slot)
        self._rows[row.slot] = row
        return row

    def close(self, row: Row) -> None:
        """Free everything a row holds. Closing twice is an error."""
        if not row.open:
            raise CacheError("this row is closed already")
        row.open = False
        self._release(row.pages)
        row.pages = []
        self._free_slots.append(row.slot)
        del self._rows[row.slot]

    def pages_at(self, length: int) -> int:
        """Pages that a row of this length has."""
        book = self.codebook
        return max(0, (length - book.sinks - book.window) // book.page_tokens)

    def begin(self, work: list[tuple[Row, int]]) -> StepBatch:
        """Reserve what one forward over `work` (row, new tokens; in flattened order) needs.

        Raises OutOfPages, with nothing changed, when the pages do not fit.
        """
        needs = {}
        for row, count in work:
            if not row.open or count <= 0:
                raise CacheError("a step needs open rows and at least one new token for each")
            # A row that was cut may have more pages than its length asks for: they are whole, so they stay.
            needs[row.slot] = max(0, self.pages_at(row.length + count) - len(row.pages))
        self._have(sum(needs.values()))
        batch = StepBatch(self, work, list(self._ids.grant(needs).values()))
        self._begun.add(batch)
        return batch

    def foresee(self, rows: Sequence[Row], needs: Sequence[int]) -> list[list[int]] | None:
        """Free pages that `begin` will grant to rows that then need so many, if they still are free; None where there
        are too few."""
        found = self._ids.foresee({row.slot: need for row, need in zip(rows, needs, strict=True)})
        return None if found is None else list(found.values())

    def admit(self, length: int, pages: int, shared: Sequence[int] = ()) -> Row:
        """A new row that claims a length and a number of pages, for a caller who fills both (a row saved elsewhere).

        `shared`: its first pages, which others own and have filled; `pages` come after them. Raises OutOfPages, with
        nothing changed, when it does not fit.
        """
        row = self.open()
        try:
            row.pages = self._take(pages)
        except CacheError:
            self.close(row)
            raise
        self._ids.share(shared)
        row.pages[:0] = shared
        row.length = length
        return row

    def hold(self, pages: Iterable[int]) -> Hold:
        """Own pages of a row beside it: they stay when it closes."""
        hold = Hold(list(pages))
        self._ids.share(hold.pages)
        self._holds.add(hold)
        return hold

    def drop(self, hold: Hold) -> None:
        """Give a hold's pages up; those that nobody else owns are free."""
        self._holds.remove(hold)
        self._release(hold.pages)

    def unshared(self, pages: Iterable[int]) -> int:
        """How many of these pages have one owner only, so that their owner's end would free them."""
        return sum(self._ids.owners(page) == 1 for page in pages)

    def read_pages(self, layer: int, row: Row) -> torch.Tensor:
        """A copy of a row's pages in a layer that has any: uint8 [pages, page_nbytes], oldest first."""
        pool = self._pool(layer)
        return pool[torch.tensor(row.pages, dtype=torch.long, device=pool.device)]

    def write_pages(self, layer: int, row: Row, pages: torch.Tensor) -> None:
        """Fill a new row's pages in a layer with uint8 [pages, page_nbytes]: for a row that was saved elsewhere."""
        pool = self._pool(layer)
        pool[torch.tensor(row.pages, dtype=torch.long, device=pool.device)] = pages.to(pool.device)

    def _pool(self, layer: int) -> torch.Tensor:
        pool = self.pools[layer]
        if pool is None:
            raise CacheError(f"layer {layer} has no pages: it stays exact in a rolling window")
        return pool

    # -- memory ---------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        """Free page ids, now the caller's, the next one last. Raises OutOfPages, with nothing changed."""
        self._have(count)
        return self._ids.take(count)[::-1]

    def _have(self, count: int) -> None:
        if count > self._ids.free:
            self._grow_pages(count - self._ids.free)

    def _release(self, pages: list[int]) -> None:
        self._ids.release(pages)

    def times_taken(self, pages: Iterable[int]) -> list[int]:
        """See `PageIds`."""
        return self._ids.times_taken(pages)

    def _spare(self) -> int | None:
        """Bytes that may still be allocated; None for no limit."""
        return None if self.max_bytes is None else self.max_bytes - self.nbytes - self._elsewhere()

    def _room(self, needed: int) -> None:
        spare = self._spare()
        if spare is not None and needed > spare:
            raise OutOfPages(needed, max(0, spare))

    def reserve(self, pages: int) -> None:
        """Have so many free pages, if a quarter of what may still be allocated holds those that lack."""
        missing, spare = pages - self._ids.free, self._spare()
        if missing > 0 and (spare is None or missing * self._page_nbytes <= spare // 4):
            with suppress(OutOfPages):
                self._grow_pages(missing)

    def _grow_pages(self, missing: int) -> None:
        # By half as long as pools are small: whatever has been captured over them is to be captured again.
        step = max(missing, 64, min(self.page_capacity // 2, 256), self.page_capacity // 4)
        spare = self._spare()
        if spare is not None and self._page_nbytes:
            step = max(missing, min(step, spare // self._page_nbytes // 4))  # other stores may need the rest
        self._room(step * self._page_nbytes)
        capacity = self.page_capacity + step
        self.generation = next(_generations)
        try:
            grow(self.pools, capacity)
        except torch.OutOfMemoryError as error:  # others took the device's memory: room is made as for a limit
            raise OutOfPages(step * self._page_nbytes, 0) from error
        self._ids.grow(capacity)

    def _grow_slots(self, step: int) -> None:
        spare = self._spare()
        if spare is not None:
            step = max(1, min(step, spare // max(1, self._slot_nbytes) // 4))
        self._room(step * self._slot_nbytes)
        self.generation = next(_generations)
        try:
            for group in self.groups:
                group.resize(self.slot_capacity + step)
        except torch.OutOfMemoryError as error:
            raise OutOfPages(step * self._slot_nbytes, 0) from error
        self._free_slots[:0] = range(self.slot_capacity + step - 1, self.slot_capacity - 1, -1)
        self.slot_capacity += step

    def trim(self) -> int:
        """Give all unused pages and slots back to the device, between two steps: pages and slots that lie behind
        unused ones move to the front. Returns the bytes freed."""
        before = self.nbytes
        if self._ids.free or self._free_slots:
            self.generation = next(_generations)
        if self._ids.free:
            sizes = [0 if pool is None else pool.shape[1] for pool in self.pools]
            remake(self.pools, self._pack(), sizes, copied)
        if self._free_slots:
            slots = sorted(self._rows)
            for group in self.groups:
                group.keep(torch.tensor(slots, dtype=torch.long, device=group.windows[0].store.device))
            self._rows = {new: self._rows[old] for new, old in enumerate(slots)}
            for slot, row in self._rows.items():
                row.slot = slot
            self._free_slots, self.slot_capacity = [], len(slots)
        return before - self.nbytes

    def _pack(self) -> torch.Tensor | None:
        """Number the pages with owners anew, from 0; their old ids, ascending. None where all have owners."""
        if not self._ids.free:
            return None
        kept = self._ids.compact()
        place = {old: new for new, old in enumerate(kept)}
        granted = [pages for batch in self._begun for pages in batch.new_pages]
        for pages in (*(owner.pages for owner in self._owners()), *granted):
            pages[:] = [place[page] for page in pages]
        return torch.tensor(kept, dtype=torch.long, device=self.device)

    def squeeze(self, codebook: Codebook) -> int:
        """Re-encode everything held at a coarser setting of the same profile, between two steps. Returns bytes freed.

        Rows and lengths stay; unused pages are given up. Layer by layer, see `remake`. Raises CacheError, with nothing
        changed, for a setting that is not coarser, or of another profile or exact window.
        """
        old, new = self.codebook, codebook
        kept = [(b.profile_hash, b.sinks, b.window, b.page_tokens) for b in (old, new)]
        if old.setting == "exact" or new.setting == "exact" or kept[0] != kept[1]:
            names = f"{old.setting!r} cannot be squeezed to {new.setting!r}"
            raise CacheError(f"a cache at {names}: both must be settings of one profile")
        if new.page_nbytes() >= old.page_nbytes() or new.window_bits > old.window_bits:
            raise CacheError(f"{new.setting!r} is not coarser than {old.setting!r}: a cache can only be squeezed")
        before, fill = self.nbytes, squeeze_fill(old.layers, new.layers)
        groups = self.groups if new.window_bits == old.window_bits else self._coarser_windows(new)
        self.generation = next(_generations)
        sizes = [0 if codec is None else codec.page_nbytes for codec in new.layers]
        remake(self.pools, self._pack(), sizes, fill)
        self.groups, self.codebook = groups, new
        self.windows = [groups[number].windows[at] for _, (number, at) in sorted(self.group_of.items())]
        self._page_nbytes = new.page_nbytes()
        self._slot_nbytes = sum(window.slot_nbytes for window in self.windows)
        return before - self.nbytes

    def _coarser_windows(self, book: Codebook) -> list[WindowGroup]:
        """The groups of windows with those of compressed layers rewritten with fewer bits."""
        out = []
        for number, group in enumerate(self.groups):
            if any(book.layers[layer] is None for layer, (found, _) in self.group_of.items() if found == number):
                out.append(group)
                continue
            out.append(coarser_windows(group, book.window_bits, self.slot_capacity, self._rows))
        return out

    def tensors(self) -> list[torch.Tensor]:
        """Everything that holds keys and values: pools and windows."""
        return [pool for pool in self.pools if pool is not None] + [stack for g in self.groups for stack in g._stacks]

    @property
    def page_capacity(self) -> int:
        """Pages that the pools hold, used or not."""
        return self._ids.capacity

    def _owners(self) -> list[Row | Hold]:
        return [*self._rows.values(), *self._holds]

    @property
    def rows(self) -> int:
        """Open rows."""
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """Tokens held, over all rows."""
        return sum(row.length for row in self._rows.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pools and windows, used or not."""
        pools = sum(pool.numel() for pool in self.pools if pool is not None)
        return pools + sum(window.nbytes for window in self.windows)

    @property
    def used_nbytes(self) -> int:
        """Bytes that open rows hold; a page that several share counts once."""
        pages = {page for row in self._rows.values() for page in row.pages}
        return len(pages) * self._page_nbytes + len(self._rows) * self._slot_nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes that rows and holds own: what is left of `nbytes` after `trim`."""
        return self._ids.used * self._page_nbytes + len(self._rows) * self._slot_nbytes

    def row_nbytes(self, row: Row) -> int:
        """Bytes one row holds: its pages in all layers, shared or not, and its whole window slot, filled or not."""
        return self.nbytes_of(len(row.pages))

    def nbytes_of(self, pages: int, slots: int = 1) -> int:
        """Bytes of a number of pages in all layers, and of window slots."""
        return pages * self._page_nbytes + slots * self._slot_nbytes

    def bytes_per_token(self, context: int) -> float:
        """All-in bytes per token of one sequence of `context` tokens: codes, gains, sinks, window, unfilled places."""
        return (self.pages_at(context) * self._page_nbytes + self._slot_nbytes) / context

    def check(self) -> None:
        """Assert the store's invariants, between two steps: every page's owners are counted right, every slot has one
        owner, lengths match page counts, and the bytes are those of the tensors."""
        assert not self._begun, "a step was neither committed nor aborted"
        self._ids.check(page for owner in self._owners() for page in owner.pages)
        slots = list(self._rows) + self._free_slots
        assert sorted(slots) == list(range(self.slot_capacity)), "a slot is lost or owned twice"
        assert all(row.slot == slot and row.open for slot, row in self._rows.items()), "a row is not in its slot"
        assert self.nbytes == self.nbytes_of(self.page_capacity, self.slot_capacity), "bytes are not what is allocated"
        for row in self._rows.values():
            assert len(row.pages) >= self.pages_at(row.length), "a row has fewer pages than its length needs"
            whole = max(0, row.length - self.codebook.sinks) // self.codebook.page_tokens
            assert len(row.pages) <= whole, "a row has pages beyond its length"
        for pool in self.pools:
            assert pool is None or pool.shape[0] == self.page_capacity, "pools differ in size"

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

from dataclasses import dataclass, field
from itertools import accumulate

import torch

from spectral.codec import Codebook, ExactCodec, LayerCodec, PageCodec
from spectral.errors import CacheError, OutOfPages
from spectral.shapes import LayerShape, ModelShape
from spectral.windows import ExactWindow, WindowGroup, make_window

EXACT_PAGE_TOKENS = 16

__all__ = ["LayerShape", "ModelShape", "PageStore", "Row", "StepBatch", "exact_codebook"]


def exact_codebook(shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> Codebook:
    """The "exact" setting: bf16 pages. With float32, generation equals an uncompressed float32 cache's bit for bit."""
    layers: list[PageCodec | None] = [
        None
        if layer.sliding
        else ExactCodec(
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            page_tokens=EXACT_PAGE_TOKENS,
            dtype=dtype,
        )
        for layer in shape.layers
    ]
    return Codebook("exact", "", 0, 0, EXACT_PAGE_TOKENS, layers)


@dataclass
class Row:
    """One sequence in the store. `slot`: its window slot; `pages`: its page ids, oldest first; `length`: tokens."""

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    open: bool = True


class PageStore:
    """All KV memory of one model at one setting.

    Args:
        shape: the model's layers.
        codebook: the setting, or None for "exact".
        device: where pages live.
        max_bytes: limit on allocated bytes (pages and windows), None for no limit.
        window_dtype: dtype of exact windows; bf16 unless a test wants bit-equality with a float32 cache.
    """

    def __init__(
        self,
        shape: ModelShape,
        codebook: Codebook | None = None,
        *,
        device: torch.device | str = "cpu",
        max_bytes: int | None = None,
        window_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.shape = shape
        self.codebook = codebook if codebook is not None else exact_codebook(shape, window_dtype)
        self.device = torch.device(device)
        self.max_bytes = max_bytes
        book = self.codebook
        if len(book.layers) != len(shape.layers):
            raise CacheError(f"the setting has {len(book.layers)} layers and the model {len(shape.layers)}")
        if book.page_tokens <= 0 or book.window % book.page_tokens:
            raise CacheError(f"the window ({book.window}) must be a multiple of the page ({book.page_tokens} tokens)")
        self.ring = book.window + book.page_tokens
        self.windows: list[ExactWindow] = []
        self.pools: list[torch.Tensor | None] = []
        alike: dict[tuple[LayerShape, bool], list[int]] = {}
        for index, (layer, codec) in enumerate(zip(shape.layers, book.layers, strict=True)):
            alike.setdefault((layer, codec is None), []).append(index)
            if codec is None:
                self.windows.append(make_window(layer, 0, layer.sliding or 1, window_dtype, self.device))
                self.pools.append(None)
            else:
                self.windows.append(
                    make_window(layer, book.sinks, self.ring, window_dtype, self.device, book.window_bits)
                )
                self.pools.append(torch.zeros((0, codec.page_nbytes), dtype=torch.uint8, device=self.device))
        self.groups = [WindowGroup([self.windows[i] for i in layers]) for layers in alike.values()]
        self.group_of = {i: (g, at) for g, layers in enumerate(alike.values()) for at, i in enumerate(layers)}
        """Layer -> its window's group, and its place there."""
        self.page_capacity = self.slot_capacity = 0
        self._free_pages: list[int] = []
        self._free_slots: list[int] = []
        self._rows: dict[int, Row] = {}
        self._page_nbytes = book.page_nbytes()
        self._slot_nbytes = sum(window.slot_nbytes for window in self.windows)

    # -- rows -----------------------------------------------------------------------------------------------------

    def open(self) -> Row:
        """A new, empty sequence. Raises OutOfPages when its window does not fit."""
        if not self._free_slots:
            self._grow_slots(max(1, min(8, self.slot_capacity)))
        row = Row(self._free_slots.pop())
        self._rows[row.slot] = row
        return row

    def close(self, row: Row) -> None:
        """Free everything a row holds. Closing twice is an error."""
        if not row.open:
            raise CacheError("this row is closed already")
        row.open = False
        self._free_pages.extend(reversed(row.pages))
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
        needs = []
        for row, count in work:
            if not row.open or count <= 0:
                raise CacheError("a step needs open rows and at least one new token for each")
            # A row that was cut may have more pages than its length asks for: they are whole, so they stay.
            needs.append(max(0, self.pages_at(row.length + count) - len(row.pages)))
        taken = self._take(sum(needs))
        granted = [[taken.pop() for _ in range(need)] for need in needs]
        return StepBatch(self, work, granted)

    def admit(self, length: int, pages: int) -> Row:
        """A new row that claims a length and a number of pages, for a caller who fills both (a row saved elsewhere).

        Raises OutOfPages, with nothing changed, when it does not fit.
        """
        row = self.open()
        try:
            row.pages = self._take(pages)
        except CacheError:
            self.close(row)
            raise
        row.length = length
        return row

    def read_pages(self, layer: int, row: Row) -> torch.Tensor:
        """A copy of a row's pages in a layer that has any: uint8 [pages, page_nbytes], oldest first."""
        return self._pool(layer)[torch.tensor(row.pages, dtype=torch.long, device=self.device)]

    def write_pages(self, layer: int, row: Row, pages: torch.Tensor) -> None:
        """Fill a new row's pages in a layer with uint8 [pages, page_nbytes]: for a row that was saved elsewhere."""
        self._pool(layer)[torch.tensor(row.pages, dtype=torch.long, device=self.device)] = pages.to(self.device)

    def _pool(self, layer: int) -> torch.Tensor:
        pool = self.pools[layer]
        if pool is None:
            raise CacheError(f"layer {layer} has no pages: it stays exact in a rolling window")
        return pool

    # -- memory ---------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        """Free page ids, now the caller's, the next one last. Raises OutOfPages, with nothing changed."""
        if count > len(self._free_pages):
            self._grow_pages(count - len(self._free_pages))
        return [self._free_pages.pop() for _ in range(count)][::-1]

    def _room(self, needed: int) -> None:
        if self.max_bytes is not None and self.nbytes + needed > self.max_bytes:
            raise OutOfPages(needed, max(0, self.max_bytes - self.nbytes))

    def _grow_pages(self, missing: int) -> None:
        step = max(missing, 64, self.page_capacity // 4)
        if self.max_bytes is not None and self._page_nbytes:
            step = max(missing, min(step, (self.max_bytes - self.nbytes) // self._page_nbytes))
        self._room(step * self._page_nbytes)
        self._resize_pages(self.page_capacity + step)

    def _resize_pages(self, capacity: int) -> None:
        for index, pool in enumerate(self.pools):
            if pool is not None:
                new = torch.empty((capacity, pool.shape[1]), dtype=torch.uint8, device=self.device)
                kept = min(capacity, pool.shape[0])
                new[:kept] = pool[:kept]
                self.pools[index] = new
        self._free_pages = [p for p in self._free_pages if p < capacity]
        self._free_pages[:0] = range(capacity - 1, self.page_capacity - 1, -1)
        self.page_capacity = capacity

    def _grow_slots(self, step: int) -> None:
        if self.max_bytes is not None:
            step = max(1, min(step, (self.max_bytes - self.nbytes) // max(1, self._slot_nbytes)))
        self._room(step * self._slot_nbytes)
        for group in self.groups:
            group.resize(self.slot_capacity + step)
        self._free_slots[:0] = range(self.slot_capacity + step - 1, self.slot_capacity - 1, -1)
        self.slot_capacity += step

    def trim(self) -> int:
        """Give unused pages and slots at the end of the pools back to the device. Returns the bytes freed."""
        before = self.nbytes
        used_pages = max((max(row.pages, default=-1) for row in self._rows.values()), default=-1) + 1
        used_slots = max(self._rows, default=-1) + 1
        if used_pages < self.page_capacity:
            self._resize_pages(used_pages)
        if used_slots < self.slot_capacity:
            for group in self.groups:
                group.resize(used_slots)
            self._free_slots = [s for s in self._free_slots if s < used_slots]
            self.slot_capacity = used_slots
        return before - self.nbytes

    def squeeze(self, codebook: Codebook) -> int:
        """Re-encode everything held at a coarser setting of the same profile, between two steps. Returns bytes freed.

        Rows, page ids and lengths stay. New pools are complete before old ones go, so a failure changes nothing.
        Raises CacheError for a setting that is not coarser, or of another profile or exact window.
        """
        old, new = self.codebook, codebook
        kept = [(b.profile_hash, b.sinks, b.window, b.page_tokens) for b in (old, new)]
        if old.setting == "exact" or new.setting == "exact" or kept[0] != kept[1]:
            raise CacheError(
                f"a cache at {old.setting!r} cannot be squeezed to {new.setting!r}: "
                "both must be settings of one profile"
            )
        if new.page_nbytes() >= old.page_nbytes() or new.window_bits > old.window_bits:
            raise CacheError(f"{new.setting!r} is not coarser than {old.setting!r}: a cache can only be squeezed")
        before = self.nbytes
        pools = [
            pool if pool is None or a is None or b is None else squeezed(pool, a, b)
            for pool, a, b in zip(self.pools, old.layers, new.layers, strict=True)
        ]
        groups = self.groups if new.window_bits == old.window_bits else self._coarser_windows(new)
        self.pools, self.groups, self.codebook = pools, groups, new
        self.windows = [groups[number].windows[at] for _, (number, at) in sorted(self.group_of.items())]
        self._page_nbytes = new.page_nbytes()
        self._slot_nbytes = sum(window.slot_nbytes for window in self.windows)
        return before - self.nbytes

    def _coarser_windows(self, book: Codebook) -> list[WindowGroup]:
        """The groups of windows with those of compressed layers rewritten with fewer bits."""
        out = []
        for number, group in enumerate(self.groups):
            window, count = group.windows[0], len(group.windows)
            if any(book.layers[layer] is None for layer, (found, _) in self.group_of.items() if found == number):
                out.append(group)
                continue
            kind = window.shape, window.sinks, window.ring, window.store.dtype, self.device, book.window_bits
            coarse = WindowGroup([make_window(*kind) for _ in range(count)])
            coarse.resize(self.slot_capacity)
            place = torch.arange(window.sinks + window.ring, device=self.device)
            for slot in self._rows:
                slots = torch.full_like(place, slot)
                tokens = group.read(0, count, slots[:1])[:, 0]  # [layers, H, places, d + dv]
                coarse.write(0, slots, place, tokens.transpose(1, 2))
            out.append(coarse)
        return out

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
        """Bytes that open rows hold."""
        return sum(self.row_nbytes(row) for row in self._rows.values())

    def row_nbytes(self, row: Row) -> int:
        """Bytes one row holds: its pages in all layers and its whole window slot, filled or not."""
        return len(row.pages) * self._page_nbytes + self._slot_nbytes

    def bytes_per_token(self, context: int) -> float:
        """All-in bytes per token of one sequence of `context` tokens: codes, gains, sinks, window, unfilled places."""
        return (self.pages_at(context) * self._page_nbytes + self._slot_nbytes) / context

    def check(self) -> None:
        """Assert the store's invariants: every page and slot is owned once, and lengths match page counts."""
        owned = [p for row in self._rows.values() for p in row.pages] + self._free_pages
        assert sorted(owned) == list(range(self.page_capacity)), "a page is lost or owned twice"
        slots = list(self._rows) + self._free_slots
        assert sorted(slots) == list(range(self.slot_capacity)), "a slot is lost or owned twice"
        for row in self._rows.values():
            assert len(row.pages) >= self.pages_at(row.length), "a row has fewer pages than its length needs"
            whole = max(0, row.length - self.codebook.sinks) // self.codebook.page_tokens
            assert len(row.pages) <= whole, "a row has pages beyond its length"
        for pool in self.pools:
            assert pool is None or pool.shape[0] == self.page_capacity, "pools differ in size"

    def _release(self, pages: list[int]) -> None:
        self._free_pages.extend(reversed(pages))


def squeezed(pool: torch.Tensor, old: PageCodec, new: PageCodec, step: int = 1024) -> torch.Tensor:
    """A pool of pages [n, bytes] at another setting, `step` pages at a time."""
    assert isinstance(old, LayerCodec) and isinstance(new, LayerCodec)
    out = torch.empty((pool.shape[0], new.page_nbytes), dtype=torch.uint8, device=pool.device)
    for begin in range(0, pool.shape[0], step):
        out[begin : begin + step] = old.squeeze(pool[begin : begin + step], new)
    return out


class StepBatch:
    """The rows of one forward and the pages reserved for it. Attention reads it; the engine commits or aborts it.

    Attributes:
        work: (row, new tokens) in flattened order; starts: offset of each row's first new token.
        new_pages: page ids granted to each row.
    """

    def __init__(self, store: PageStore, work: list[tuple[Row, int]], granted: list[list[int]]) -> None:
        self.store = store
        self.work = work
        self.new_pages = granted
        self.starts = [0, *accumulate(count for _, count in work)][:-1]
        self.done = False
        self.plans: dict[str, object] = {}  # index tensors that all layers share, made by spectral.attention
        self.kept: dict[int, list[tuple[int, torch.Tensor]]] = {}
        """New tokens [B, H, d + dv] of decode rows by group and place in it: written when the step is committed."""
        self.spots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Where they go: slot [B] and place [B] by group."""

    def commit(self) -> None:
        """The forward succeeded: lengths advance."""
        self._finish()
        for number, kept in self.kept.items():
            group, (slot, place) = self.store.groups[number], self.spots[number]
            if [at for at, _ in kept] == list(range(len(group.windows))):
                group.write(0, slot, place, torch.stack([tokens for _, tokens in kept]))
            else:  # a forward that skipped layers
                for at, tokens in kept:
                    group.write(at, slot, place, tokens[None])
        for (row, count), pages in zip(self.work, self.new_pages, strict=True):
            row.length += count
            row.pages.extend(pages)

    def abort(self) -> None:
        """The forward failed: pages go back and lengths stay, but rings may be half-written: close the step's rows."""
        self._finish()
        for pages in self.new_pages:
            self.store._release(pages)

    def _finish(self) -> None:
        if self.done:
            raise CacheError("this step was committed or aborted already")
        self.done = True

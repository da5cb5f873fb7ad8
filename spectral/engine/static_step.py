"""A decode step over buffers that stay where they are, so that a CUDA graph of it can be replayed.

    fill (host) -> seal pages that became full -> forward and window writes -> logits

Everything that differs from step to step lies in two host buffers, which are copied to the device before the launch:
numbers by row, and page tables. Whatever the attention needs beyond them (places in rings, masks) is computed from them
on the device, so nothing in between waits for it. Rows beyond the real ones do as the first row does, and write what it
writes.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from spectral.attention import DecodePlan
from spectral.beside import abreast
from spectral.code_dispatch import codes_for
from spectral.codec import LayerCodec, PageCodec
from spectral.dispatch import kernels_for
from spectral.engine.sampler import BROKEN
from spectral.few_rows import captured
from spectral.hf import LoadedModel, attending
from spectral.pages import PageStore, Row, StepBatch
from spectral.prefill import encode_pages, read_tokens
from spectral.row_by_row import row_by_row

if TYPE_CHECKING:
    from spectral.engine.sequence import Sequence
    from spectral.kernels.decode import StepTables
    from spectral.windows import ExactWindow, WindowGroup

INTEGERS = ("token", "position", "slot", "pages", "source", "before", "last", "sink", "top_k", "choice")
FLOATS = ("temperature", "top_p", "min_p", "uniform", "repetition", "frequency", "presence")
BLANK: tuple[list[int], list[float]] = [0, 0], [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
"""What the device's sampler is told of rows that it does not choose for: top_k and choice, and FLOATS."""

SEALED_AT_ONCE = 4
"""Layers whose pages are sealed side by side: a page's launches are too small to fill a GPU. Every lane has a workspace
of the library for products: 32 MiB on Hopper, 8 elsewhere."""

BLOCK_PAGES = 32
"""A page table's width is this times a bucket."""


def bucket(count: int) -> int:
    """The next power of two up to 16, then the next multiple of 16."""
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16


def table_width(pages: int, least: int = 1) -> int:
    """The width of a page table for rows of up to so many pages: 0, or at least `least` blocks."""
    return BLOCK_PAGES * bucket(max(-(-pages // BLOCK_PAGES), least)) if pages else 0


def most_pages(context: int, page_tokens: int) -> int:
    """The widest page table that a row of a model's context needs."""
    return table_width(context // page_tokens + 1)


class Sent:
    """Integers int64 [fields, n] that are sent to a device again and again, also before those sent last have arrived.

    Attributes:
        there: the tensor on the device.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.there = torch.zeros(shape, dtype=torch.int64, device=device)
        self._pinned = device.type == "cuda"
        self._hosts = [torch.zeros(shape, dtype=torch.int64, pin_memory=self._pinned) for _ in range(2)]
        self._read: list[torch.cuda.Event | None] = [None, None]

    def send(self, columns: Rows[Rows[int]]) -> None:
        """By column the fields' values; does not wait for the copy, only for the last but one."""
        host, read = self._hosts[0], self._read[0]
        if read is not None:
            read.synchronize()
        host.numpy().T[:] = columns
        self.there.copy_(host, non_blocking=True)
        if self._pinned:
            read = self._read[0] = read or torch.cuda.Event()
            read.record()
        self._hosts.reverse()
        self._read.reverse()


class Small(NamedTuple):
    """Of Numbers what kernels read, as int32 [rows]."""

    position: torch.Tensor
    slot: torch.Tensor
    pages: torch.Tensor


class Numbers:
    """What rows are told of a step: one host and one device buffer, by field [rows] each.

    source: the row whose new token is written; before: how many rows right before this one are tokens of the same
    chunk; last, sink: the first ones name the rows whose logits are wanted, and those that are sinks (these three for
    spectral.engine.chunk_step); choice: 0 for greedy, 1 for a draw from everything, 2 for one from a shortlist. Floats
    are the same 64 bits as the integers, seen as float64.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        shape = (len(INTEGERS) + len(FLOATS), rows)
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(shape, dtype=torch.int64, device=device)
        integers, floats = self._device[: len(INTEGERS)], self._device[len(INTEGERS) :].view(torch.float64)
        self.field = dict(zip((*INTEGERS, *FLOATS), (*integers, *floats), strict=True))
        self._integers = self._host[: len(INTEGERS)].numpy()
        self._floats = self._host[len(INTEGERS) :].view(torch.float64).numpy()
        # Each field from a multiple of 16 bytes on: kernels are compiled for that, whatever the number of rows.
        self._small = torch.zeros((len(Small._fields), -(-rows // 4) * 4), dtype=torch.int32, device=device)
        self.broken = torch.tensor(BROKEN, device=device)
        self.logits: torch.Tensor | None = None
        """float32 [rows, V], from the first forward on: what the last one left."""

    def send(self, integers: Rows[Rows[int]], floats: Rows[Rows[float]]) -> None:
        """By row the fields' values; the copy to the device does not wait."""
        self._integers.T[:] = integers
        self._floats.T[:] = floats
        self._device.copy_(self._host, non_blocking=True)

    def send_choices(self, sampling: Rows[tuple[list[int], list[float]]]) -> None:
        """By row top_k and choice, and floats, for the sampler; the other fields stay. As `send`."""
        first = len(INTEGERS) - len(BLANK[0])
        self._integers[first:].T[:] = [whole for whole, _ in sampling]
        self._floats.T[:] = [real for _, real in sampling]
        self._device[first:].copy_(self._host[first:], non_blocking=True)

    def small(self) -> Small:
        """As they are now. Launches only."""
        first = INTEGERS.index(Small._fields[0])
        self._small[:, : self.rows].copy_(self._device[first : first + len(Small._fields)])
        return Small(*self._small[:, : self.rows])

    def go_on(self, tokens: torch.Tensor) -> None:
        """The rows' next step: the tokens [rows] that were chosen, one place further on. Launches only."""
        torch.index_select(tokens, 0, self.field["source"], out=self.field["token"])
        self.field["position"].add_(1)


class StaticStep:
    """A decode step of up to `rows` rows with up to `width` pages each in one store, as long as the store's tensors
    stay where they are. `numbers`: of so many rows, shared with the sampler; its logits are what the step leaves.
    """

    def __init__(self, loaded: LoadedModel, store: PageStore, rows: int, width: int, numbers: Numbers) -> None:
        self.store, self.rows, self.width, self.numbers = store, rows, width, numbers
        self.inputs = numbers
        """What the model's rows are told."""
        self._model = loaded.model
        self._device = store.device
        self._host = torch.zeros((rows, width), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._array = self._host.numpy()
        self._pages = torch.zeros((rows, width), dtype=torch.int32, device=self._device)
        self._order = torch.arange(rows, device=self._device)
        self._alone = torch.zeros(rows, dtype=torch.int32, device=self._device)
        self._written: list[tuple[Row | None, int]] = [(None, 0)] * rows  # by row of the table: whose, how many pages
        self._no_mask = loaded.no_mask
        self.seals_first = bool(store.codebook.window)
        """Without a window a page is full with the new token: it is sealed behind the step, and read from then on."""
        self._kinds = self._find_kinds(loaded)
        self._firsts = {
            name: torch.full((rows,), self.store.windows[layer].sinks, dtype=torch.int32, device=self._device)
            for name, (layer, _, _) in self._kinds.items()
        }
        """By kind the oldest token that only the ring holds, where no page is."""
        self.by_kernels = any(codec is not None and codes_for(codec) is not None for codec in store.codebook.layers)
        """Whether the kernels that make pages run on this device."""

    def _find_kinds(self, loaded: LoadedModel) -> dict[str, tuple[int, bool, bool]]:
        """Kinds of layers as spectral.attention names them: one of the layers, read by kernels, read by reference."""
        kinds: dict[str, tuple[int, bool, bool]] = {}
        book, dtype = self.store.codebook, next(self._model.parameters()).dtype
        for layer, (window, codec) in enumerate(zip(self.store.windows, book.layers, strict=True)):
            if isinstance(codec, LayerCodec):
                # Rows may grow up to the model's context; tables that grew later would lie elsewhere.
                codec.frame.reserve(max(self.width, most_pages(loaded.context_length, codec.page_tokens)))
            group = loaded.shape.query_heads // window.shape.kv_heads
            found = kernels_for(codec, book.window, group, dtype)
            if found is not None:
                found.units(group)  # copied from the host, which no capture may do
            kernels = found is not None
            name = f"decode:{window.sinks}:{window.ring}:{codec is None}"
            _, by_kernels, by_reference = kinds.get(name, (layer, False, False))
            kinds[name] = layer, by_kernels or kernels, by_reference or not kernels
        return kinds

    def fill(
        self, sequences: Rows[Sequence], new_pages: list[list[int]], sampling: list[tuple[list[int], list[float]]]
    ) -> None:
        """Tell the device of this step's rows; `sampling`: for each its top_k and choice, and its floats."""
        integers, floats = [], []
        changed = False
        for at, (sequence, fresh, (whole, real)) in enumerate(zip(sequences, new_pages, sampling, strict=True)):
            row = sequence.row
            count = len(row.pages) + (len(fresh) if self.seals_first else 0)
            changed |= self._fill_table(at, row, fresh if self.seals_first else [])
            integers.append((sequence.tokens[row.length], row.length, row.slot, count, at, 0, 0, 0, *whole))
            floats.append(tuple(real))
        spare = self.rows - len(sequences)
        if spare:
            first = integers[0]
            pages = 0 if self.seals_first else first[3]  # where windows are written at once, do exactly the same
            integers += [(*first[:3], pages, *first[4:])] * spare
            floats += [floats[0]] * spare
            if pages:
                for at in range(len(sequences), self.rows):
                    self._array[at] = self._array[0]
                    self._written[at] = (None, 0)
                changed = True
        self.numbers.send(integers, floats)
        if changed:
            self._pages.copy_(self._host, non_blocking=True)

    def _fill_table(self, at: int, row: Row, fresh: list[int]) -> bool:
        """A row's page table, from where it differs from what was written; True if anything was."""
        owner, known = self._written[at]
        if owner is not row or known > len(row.pages):
            known = 0
        found = row.pages[known:] + fresh
        self._array[at, known : known + len(found)] = found
        self._written[at] = row, len(row.pages)  # fresh ones are the row's only when the step is committed
        return bool(found)

    def extend(self, seals: torch.Tensor) -> None:
        """Let rows read pages that were sealed for them, each its last one: int64 [5, n], the fields of Seal. Launches
        only."""
        _, _, page, number, row = seals
        self._pages[row, number] = page.int()
        self.inputs.field["pages"][row] = number + 1

    def plans(self) -> dict[str, object]:
        """What spectral.attention asks for by kind of layer, made of the buffers on the device."""
        field = self.inputs.field
        small, found = self.inputs.small(), dict[str, object]()
        for name, (layer, by_kernels, by_reference) in self._kinds.items():
            window, codec = self.store.windows[layer], self.store.codebook.layers[layer]
            sinks, ring = window.sinks, window.ring
            first = self._firsts[name]
            if codec is not None:
                first = torch.add(first, small.pages, alpha=codec.page_tokens)
            table = self._pages if codec is not None else self._pages[:, :0]
            plan = DecodePlan(
                slot=field["slot"], write=self.places(sinks, ring), table=table, seal_slot=None, seal_place=None,
                seal_page=None, seal_index=None, rows=self._order, write_first=0, counts=[], firsts=[], lengths=[],
            )  # fmt: skip
            if by_kernels:
                plan.step = self.tables(small, first)
            if by_reference:
                paged = 0 if codec is None else codec.page_tokens * self.width
                held = self.held(plan, first, sinks, ring, codec is None)
                if paged:
                    within = torch.arange(paged, device=self._device) < (first - sinks)[:, None]
                    held = torch.cat([held, within], 1)
                bias = torch.zeros_like(held, dtype=torch.float32).masked_fill_(~held, float("-inf"))
                plan.bias = bias[:, None, None]
            found[name] = plan
        return found

    def places(self, sinks: int, ring: int) -> torch.Tensor:
        """Where the rows' new tokens, none of them a sink, lie in a window: [B]."""
        return (self.inputs.field["position"] - sinks) % ring + sinks

    def tables(self, small: Small, first: torch.Tensor) -> StepTables:
        """What the kernels are told; `first`: int32 [B] the oldest tokens that only the ring holds."""
        from spectral.kernels.decode import StepTables

        return StepTables(self._pages, small.pages, small.slot, small.position, first, self._alone)

    def held(self, plan: DecodePlan, first: torch.Tensor, sinks: int, ring: int, sliding: bool) -> torch.Tensor:
        """Places that rows may see behind their pages, for the reference: bool [B, sinks + ring]."""
        return held_places(self.inputs.field["position"], first, sinks, ring, sliding)

    def wanted(self) -> Any:
        """The rows whose logits are wanted, as transformers' `logits_to_keep`: 0 is its word for all."""
        return 0

    def forward(self) -> None:
        """Run the model on the buffers: logits, and the new tokens into the windows. Launches only."""
        field = self.inputs.field
        batch = StepBatch(self.store, [(Row(0), 1)] * self.rows, [[]] * self.rows)
        batch.plans = self.plans()
        with attending(self._model, batch), captured(), row_by_row(self._device.type == "cpu"):
            out = self._model(
                input_ids=field["token"][None],
                attention_mask=self._no_mask,
                position_ids=field["position"][None],
                use_cache=False,
                logits_to_keep=self.wanted(),
            )
        if self.numbers.logits is None:
            self.numbers.logits = out.logits[0].float()
        else:
            self.numbers.logits.copy_(out.logits[0])
        for group, first, spot, tokens in batch.new_tokens():
            self.keep(group, first, *spot, tokens)

    def keep(
        self, group: WindowGroup, first: int, slot: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Write the rows' new tokens [n, B, H, d + dv] into n windows of a group, from `first` on."""
        if self.rows > 1:  # a row by itself is no spare one
            tokens = tokens.index_select(1, self.inputs.field["source"])
        group.write(first, slot, place, tokens, recent=True, kernels=self.by_kernels)


def held_places(position: torch.Tensor, first: torch.Tensor, sinks: int, ring: int, sliding: bool) -> torch.Tensor:
    """Places of a window that a row may see, its new token included: bool [B, sinks + ring].

    position: [B] the new token's; first: [B] the oldest that only the ring holds.
    """
    place = torch.arange(sinks + ring, device=position.device)
    if sliding:
        return place < (position + 1).clamp_max(ring)[:, None]
    age = (place - sinks - (first - sinks)[:, None]) % ring
    recent = (place >= sinks) & (age <= (position - first)[:, None])
    return recent | ((place < sinks) & (place <= position[:, None]))


class Seal(NamedTuple):
    """A page to be encoded: its row's slot, its first place there, its id, its number in the row, and the row of the
    step that it belongs to."""

    slot: int
    place: int
    page: int
    number: int
    row: int


class SealStep:
    """Up to `pages` pages, encoded from what the windows hold, in all layers of one store. `bound`: more pages than a
    row can have.

    Attributes:
        numbers: int64 [5, pages] on the device, the fields of Seal.
    """

    def __init__(self, store: PageStore, pages: int, bound: int) -> None:
        self.store, self.pages, self.bound = store, pages, bound
        device = store.device
        self._sent = Sent((len(Seal._fields), pages), device)
        self.numbers = self._sent.there
        self._inside = torch.arange(store.codebook.page_tokens, device=device)

    def fill(self, seals: list[Seal]) -> None:
        """Tell the device which pages. Spare ones do the last's."""
        self._sent.send(seals + [seals[-1]] * (self.pages - len(seals)))

    def run(self) -> None:
        """Encode them. Launches only."""
        slot, place, page, number, _ = self.numbers
        places = place[:, None] + self._inside
        slots = slot.repeat_interleave(places.shape[1])
        spots = {torch.int64: (page, number), torch.int32: (page.int(), number.int())}

        def seal(window: ExactWindow, codec: PageCodec, pool: torch.Tensor) -> None:
            kernels = codes_for(codec) is not None
            held = read_tokens(window, slots, places.view(-1), kernels)  # [H, n * P, d + dv]
            keys, values = held[:, :0].split([window.shape.key_dim, window.shape.value_dim], -1)
            page, number = spots[torch.int32 if kernels else torch.int64]
            encode_pages(codec, window, held, keys, values, number, self.bound, pool, page)

        layers = zip(self.store.windows, self.store.codebook.layers, self.store.pools, strict=True)
        with abreast(self.numbers.device, SEALED_AT_ONCE) as run:
            for window, codec, pool in layers:
                if codec is not None and pool is not None:
                    run(partial(seal, window, codec, pool))


def seals_of(
    store: PageStore, rows: Rows[Row], new_pages: Rows[list[int]], held: Rows[int] | None = None
) -> list[Seal]:
    """The pages that a step grants its rows. `held`: how many pages they have before it; None: as many as now."""
    book = store.codebook
    window = next((w for w, codec in zip(store.windows, book.layers, strict=True) if codec is not None), None)
    if window is None:
        return []
    held = [len(row.pages) for row in rows] if held is None else held
    return [
        Seal(row.slot, window.index(window.sinks + number * book.page_tokens), page, number, at)
        for at, (row, pages, first) in enumerate(zip(rows, new_pages, held, strict=True))
        for number, page in enumerate(pages, start=first)
    ]

"""A short chunk of a prompt as rows of a decode step: a second request with the same prefix has few tokens to compute,
and so has a short question.

An ordinary forward of twenty tokens is dozens of launches from the host for every layer; a captured step is one. Each
token is a row, with its chunk's slot and page table. What a row sees is what it would see in an ordinary forward: pages
and window as they were before the chunk, and the chunk's earlier tokens exactly as the model made them (`before` of
them, the rows right before it). So nothing is written before all layers have run, a ring keeps what its rows read, and
pages that the chunk completes are encoded ahead, where nobody reads them yet: their tokens all lie in the ring, since a
chunk is no longer than the exact window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from spectral.attention import DecodePlan
from spectral.dispatch import kernels_for
from spectral.engine.static_step import BLANK, INTEGERS, Numbers, Small, StaticStep, held_places, table_width

if TYPE_CHECKING:
    from spectral.engine.scheduler import Work
    from spectral.engine.sequence import Sequence
    from spectral.hf import LoadedModel
    from spectral.kernels.choices import Shape
    from spectral.kernels.decode import StepTables
    from spectral.pages import PageStore
    from spectral.windows import WindowGroup

MOST_TOKENS = 64
"""Rows of a step: up to here it costs hardly more than one with a single row, which reads the same weights."""
MOST_CHUNKS = 8
FEW_ROWS = 16
MOST_READ = 1 << 17
"""Rows times the width of their page tables: above, reading pages row by row takes longer than launching a forward."""
MOST_COPIED = 256 << 20
"""Bytes of one layer's pages and window that the reference makes for all rows."""


def chunk_rows(work: Work) -> tuple[int, int]:
    """Rows of the step for chunks, and how many of their last tokens have logits. Few different ones: each is a
    capture, and spare rows cost little."""
    if len(work) > 1:
        return MOST_TOKENS, MOST_CHUNKS
    return max(FEW_ROWS, 1 << (work[0][1] - 1).bit_length()), 1


def wide_blocks(rows: int, programs: int, shared: int) -> int:
    """Blocks that page tables of so many rows have at least (a power of two, at most 4,096 tokens of 16 a page);
    programs: of a block, 0 where they may not be wider than needed; shared: blocks by unit and head group up to which
    several programs share each (spectral.kernels.choices)."""
    return min(8, 1 << max(1, shared // (rows * programs)).bit_length() - 1) if programs else 1


class Bounds:
    """How long chunks over one store may be to run like this, and how wide page tables of steps are.

    A store without an exact window has none: a page there can be full with the chunk's own tokens.
    """

    def __init__(self, loaded: LoadedModel, store: PageStore) -> None:
        book, dtype = store.codebook, next(loaded.model.parameters()).dtype
        self.tokens = min(MOST_TOKENS, book.window)
        self.sinks = book.sinks
        self._page = self._window = self._token = 0
        programs = 1
        self._most: tuple[torch.device, Shape] | None = None
        for window, codec in zip(store.windows, book.layers, strict=True):
            if codec is None:
                self.tokens = min(self.tokens, window.ring)
            group = loaded.shape.query_heads // window.shape.kv_heads
            kernels = kernels_for(codec, book.window, group, dtype)
            if kernels is not None:
                own = len(kernels.unit_heads) * kernels.head_groups(group)
                if self._most is None or own > programs:
                    programs, self._most = own, (kernels.key_basis.device, kernels.shape(group))
            else:
                size = 4 * window.shape.kv_heads * window.shape.head_numbers
                self._token = max(self._token, size)
                self._page = max(self._page, 0 if codec is None else size * codec.page_tokens)
                self._window = max(self._window, size * (window.sinks + window.ring))
        self._programs = programs if store.device.type == "cuda" and not self._page else 0
        """Of one block of a row, where kernels read all pages on a GPU."""

    @property
    def _shared(self) -> int:
        """Looked up anew: warming up may measure it."""
        if self._most is None:
            return 0
        from spectral.kernels.choices import DecodeChoices, known

        return known(DecodeChoices, *self._most).choices.shared_blocks

    def width(self, rows: int, pages: int) -> int:
        """Of the page tables of a step of so many rows, each with up to `pages` pages.

        Where kernels read them, few rows have wide ones from their first page on, as long as several programs share
        each block (spectral.kernels.decode): those without pages end at once, and a row that grows needs no other step.
        The reference copies pages for the whole width.
        """
        return table_width(pages, wide_blocks(rows, self._programs, self._shared))

    def begin(self, sequence: Sequence, count: int) -> bool:
        """Whether a sequence's chunk is a prompt's beginning that may run so."""
        named = MOST_CHUNKS * self.sinks <= MOST_TOKENS and self.sinks <= FEW_ROWS
        return not sequence.row.length and count > self.sinks and named and self.hold([(sequence, count)])

    def hold(self, work: Work) -> bool:
        """Whether these chunks may run as one step."""
        rows, _ = chunk_rows(work)
        tokens = sum(count for _, count in work)
        if len(work) > MOST_CHUNKS or tokens > rows or any(count > self.tokens for _, count in work):
            return False
        width = table_width(max(len(sequence.row.pages) for sequence, _ in work))
        copied = rows * (width * self._page + self._window + rows * self._token)
        return rows * width <= MOST_READ and copied <= MOST_COPIED


class ChunkStep(StaticStep):
    """A step for chunks of up to `rows` tokens together, as `StaticStep`. `numbers`: of as many rows as chunks have
    logits, shared with the sampler."""

    def __init__(self, loaded: LoadedModel, store: PageStore, rows: int, width: int, numbers: Numbers) -> None:
        super().__init__(loaded, store, rows, width, numbers)
        self.inputs = Numbers(rows, store.device)
        self._answers = numbers.rows

    def fill_chunks(self, work: Work, sampling: list[tuple[list[int], list[float]]]) -> None:
        """Tell the device of this step's chunks; `sampling`: for the first of them their top_k and choice, and their
        floats."""
        whole, real = BLANK
        integers: list[list[int]] = []
        last: list[int] = []
        for sequence, count in work:
            row, at = sequence.row, len(integers)
            pages = len(row.pages)
            self._array[at : at + count, :pages] = row.pages
            tokens = sequence.tokens[row.length : row.length + count]
            integers += [
                [token, row.length + i, row.slot, pages, at + i, i, 0, 0, *whole] for i, token in enumerate(tokens)
            ]
            last.append(at + count - 1)
        first, real_rows = integers[0], len(integers)  # spare rows are another first token, which reads no pages
        integers += [[*first[:3], 0, *first[4:]] for _ in range(self.rows - real_rows)]
        self.place(integers, real_rows)
        for at in range(self._answers):
            integers[at][6] = last[at] if at < len(last) else last[0]
        self.inputs.send(integers, [real] * self.rows)
        self._pages.copy_(self._host, non_blocking=True)
        known = [*sampling, *[BLANK] * (self._answers - len(sampling))]
        none = [0] * (len(INTEGERS) - len(BLANK[0]))
        self.numbers.send([[*none, *whole] for whole, _ in known], [real for _, real in known])

    def place(self, integers: list[list[int]], real: int) -> None:
        """Say where tokens go, in INTEGERS of all rows, `real` of them no spare ones."""

    def wanted(self) -> Any:
        """As `StaticStep.wanted`: the chunks' last tokens."""
        return self.inputs.field["last"][: self._answers]

    def places(self, sinks: int, ring: int) -> torch.Tensor:
        """As `StaticStep.places`, of sinks too."""
        position = self.inputs.field["position"]
        return torch.where(position < sinks, position, super().places(sinks, ring))

    def tables(self, small: Small, first: torch.Tensor) -> StepTables:
        """As `StaticStep.tables`."""
        tables, before = super().tables(small, first), self.inputs.field["before"].int()
        return replace(tables, length=tables.length - before, before=before)

    def held(self, plan: DecodePlan, first: torch.Tensor, sinks: int, ring: int, sliding: bool) -> torch.Tensor:
        """As `StaticStep.held`, and the step's new tokens behind it: bool [B, sinks + ring + B]."""
        position, before = self.inputs.field["position"], self.inputs.field["before"]
        newest = position - before - 1  # in the window
        back = self._order[:, None] - self._order
        plan.visible = (back >= 0) & (back <= before[:, None])
        if sliding:  # a token sees ring - 1 others
            age = (newest[:, None] - torch.arange(ring, device=position.device)) % ring
            past = (age <= newest[:, None]) & (age < (ring - 1 - before)[:, None])
        else:
            past = held_places(newest, first, sinks, ring, False)
        return torch.cat([past, plan.visible], 1)


class FirstStep(ChunkStep):
    """A step for short prompts from their beginning: each has sinks, and more tokens than these."""

    def place(self, integers: list[list[int]], real: int) -> None:
        """Sinks are named, and in their place (and that of spare rows) some other token is written once more."""
        sinks = self.store.codebook.sinks
        source, sink = INTEGERS.index("source"), INTEGERS.index("sink")
        found = [at for at in range(real) if integers[at][1] < sinks]
        for at in (*found, *range(real, len(integers))):
            integers[at][source] = sinks  # the first prompt's first token that is none
        for at in range(self._answers * sinks):
            integers[at][sink] = found[at] if at < len(found) else found[0]

    def keep(
        self, group: WindowGroup, first: int, slot: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """As `StaticStep.keep`."""
        if not group.windows[0].sinks:  # of sliding layers; a spare row is as the first one there
            group.write(first, slot, place, tokens, recent=True, kernels=self.by_kernels)
            return
        field = self.inputs.field
        others, sinks = field["source"], field["sink"][: self._answers * group.windows[0].sinks]
        tokens_left = tokens.index_select(1, others)
        group.write(first, slot[others], place[others], tokens_left, recent=True, kernels=self.by_kernels)
        group.write_sinks(first, slot[sinks], place[sinks], tokens.index_select(1, sinks))

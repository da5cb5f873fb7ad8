"""What the decode kernels know of pages at compile time, against the layout itself."""

from __future__ import annotations

import random
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spectral.basis import holding
from spectral.bits import CHANNEL_GROUP, FIELDS, WIDTHS, frequency_classes, row_classes
from spectral.kernels import flat
from spectral.kernels.cells import SHARED, held_runs
from spectral.kernels.classes import class_rows, first_row, strip_bits, strip_class, strip_order
from spectral.kernels.flat import ENTRIES, STAGES, flat_fits
from spectral.kernels.score import CHUNK, OPERAND, STAGE, block_runs
from spectral.kernels.tables import PIECE_KINDS, PIECE_WARPS, RUN_SLACK, layer_tables, step_entries
from spectral.layout import PLANE_ORDER, PLANES, PageLayout, page_layout


def random_widths(classes: int, runs: int, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    return np.array([[rng.choice(WIDTHS) for _ in range(runs)] for _ in range(classes)]).repeat(CHANNEL_GROUP, axis=1)


def codec_of(layouts: list[PageLayout], sides: list[str] | None = None) -> Any:
    """What tables ask of a layer whose units have these layouts, every deviation 1 and every step .5."""
    steps = {w: 0.5 for w in WIDTHS if w}
    units = [
        SimpleNamespace(layout=layout, class_deviation=np.ones(layout.widths.shape), steps=steps, side=side)
        for layout, side in zip(layouts, sides or ["both"] * len(layouts), strict=True)
    ]
    return SimpleNamespace(
        units=units,
        starts=[0, *accumulate(layout.nbytes for layout in layouts)],
        key_units=holding((unit.side for unit in units), "key"),
        value_units=holding((unit.side for unit in units), "value"),
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("page", [8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_strips_lie_in_the_order_in_which_the_kernel_reads_them(page: int, seed: int, flat: bool) -> None:
    classes = 1 if flat else len(frequency_classes(page))
    layout = page_layout(random_widths(classes, 9, seed), page)
    found = [(strip.bits, strip.number) for strip in layout.strips]
    order = [(strip_bits(classes, s), strip_class(classes, s)) for s in range(4 * classes)]
    assert order == strip_order(classes)
    assert found == [kind for kind in order if kind in found]
    for number, rows in enumerate(row_classes(page, classes)):
        assert len(rows) == class_rows(number, classes, page) and rows[0] == first_row(number, classes)
    ends = [0, *(strip.stop for strip in layout.strips)]
    assert [strip.start for strip in layout.strips] == ends[:-1], "a strip begins where the one before it ends"


def test_cells_never_cross_the_end_of_a_chunk() -> None:
    for seed in range(6):
        for strip in page_layout(random_widths(5, 11, seed), 16).strips:
            for start in range(strip.start, strip.stop, strip.cell_nbytes):
                assert start // 128 == (start + strip.cell_nbytes - 1) // 128


def test_entries_of_a_unit_follow_each_other_in_the_order_of_its_cells() -> None:
    layouts = [page_layout(random_widths(5, 7, seed), 16) for seed in (1, 2)]
    tables = layer_tables(codec_of(layouts))
    entry = tables.entry[:, 0, 2] // 32
    at = 0
    for unit, layout in enumerate(layouts):
        assert tables.share[unit, 0, 2] == at, "a unit's first share begins at its first entry"
        for strip in layout.strips:
            assert tables.cells[unit, strip.number, PLANE_ORDER.index(strip.bits)] == strip.cells
            assert list(entry[at : at + len(strip.runs)]) == list(strip.runs)
            at += strip.cells * (2 if strip.bits == 1 else 1)
        assert tables.cells[unit].sum() == sum(strip.cells for strip in layout.strips)
    assert len(entry) == at + RUN_SLACK and not tables.entry[at:].any()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("page", [8, 16])
def test_steps_of_entries_never_cross_the_end_of_a_chunk_or_strip(page: int, flat: bool) -> None:
    classes = 1 if flat else len(frequency_classes(page))
    step = step_entries(classes)
    layouts = [page_layout(random_widths(classes, runs, runs), page) for runs in (3, 23)]
    tables = layer_tables(codec_of(layouts))
    own = tables.entry
    for unit, layout in enumerate(layouts):
        at = 0
        for strip in layout.strips:
            width = 2 if strip.bits == 1 else 1
            cell = 0
            while cell < strip.cells:  # what the kernel does: steps of some entries to the end of the chunk or strip
                end = (strip.start + cell * strip.cell_nbytes) // int(CHUNK) * int(CHUNK) + int(CHUNK)
                here = min(strip.cells - cell, (end - strip.start) // strip.cell_nbytes - cell)
                assert (tables.stepped[unit, at : at + here * width] == own[: here * width]).all()
                steps = -(-here * width // step)
                assert not tables.stepped[unit, at + here * width : at + steps * step].any()
                at, own, cell = at + steps * step, own[here * width :], cell + here
        rest = tables.stepped[unit, at:]
        assert len(rest) >= 2 * step and not rest.any()


@pytest.mark.parametrize(
    ("runs", "warps"),
    [(1, 2), (64, 2), (65, 2), (69, 2), (70, 2), (52, 4), (53, 4), (128, 4), (18, 8), (19, 8), (128, 8)],
)
def test_a_block_holds_its_query_only_where_it_fits(runs: int, warps: int) -> None:
    room = block_runs(runs, warps, 5)
    rings = warps * 2 * int(STAGE) + 2 * step_entries(5) * int(OPERAND)
    assert rings <= SHARED, "without the query it must fit"
    assert room == 0 or (room >= runs and room * 512 + rings <= SHARED)
    assert room or runs * 512 + rings > SHARED


def test_cells_of_sixteen_rows_never_cross_the_end_of_a_chunk() -> None:
    for seed in range(6):
        for strip in page_layout(random_widths(1, 11, seed), 16).strips:
            for start in range(strip.start, strip.stop, strip.cell_nbytes):
                assert start // int(CHUNK) == (start + strip.cell_nbytes - 1) // int(CHUNK)


def test_what_a_flat_block_has_in_shared_memory_fits() -> None:
    assert 4 * int(STAGES) * int(flat.STAGE) + int(ENTRIES) * int(OPERAND) <= SHARED
    assert flat_fits(512, 32) and flat_fits(640, 16)
    assert not flat_fits(656, 32), "a plane may have more entries than there is room for"
    assert not flat_fits(512, 64), "blocks of 64 pages have eight warps' stages"


def test_entries_of_flat_pages_say_which_have_two_fields_together() -> None:
    layouts = [page_layout(random_widths(1, runs, seed), 16) for runs, seed in ((7, 1), (12, 2))]
    tables = layer_tables(codec_of(layouts))
    ends = 0
    for (first, count), layout in zip(tables.span, layouts, strict=True):
        assert first == ends, "a unit's entries follow those of the one before it"
        at = int(first)
        for strip in layout.strips:
            size = strip.cells * (2 if strip.bits == 1 else 1)
            assert list(tables.entry[at : at + len(strip.runs), 0, 2] // 32) == list(strip.runs)
            assert (tables.entry[at : at + size, :, 3] == (strip.bits == 4)).all()
            at += size
        ends += count
        assert at == ends
    assert not tables.entry[ends:].any()


@pytest.mark.parametrize("warps", [PIECE_WARPS, 2 * PIECE_WARPS])
@pytest.mark.parametrize("runs", [1, 2, 3, 11, 32])
def test_pieces_cover_every_quarter_of_every_cell_once(runs: int, warps: int) -> None:
    """Two units; whatever is summed lies where combine_kernel looks for it, and warps have about equal work."""
    layouts = [page_layout(random_widths(1, runs, seed), 16) for seed in (runs, runs + 1)]
    tables = layer_tables(codec_of(layouts))
    piece, pieces = (tables.piece, tables.pieces) if warps == PIECE_WARPS else (tables.piece_two, tables.pieces_two)
    assert piece.shape[:2] == pieces.shape == (2, warps)
    for unit, (layout, start) in enumerate(zip(layouts, (0, layouts[0].nbytes), strict=True)):
        planes = {strip.bits: (start + strip.start, strip) for strip in layout.strips}
        seen: dict[int, list[int]] = {bits: [] for bits in planes}
        loads = [0] * warps
        for warp in range(warps):
            for kind, offset, column, quarters in piece[unit, warp, : pieces[unit, warp]]:
                bits, eights = PIECE_KINDS[kind]
                first, _ = planes[bits]
                quarter = (offset - first) // (16 * max(1, bits // 2))
                assert (offset - first) % (16 * max(1, bits // 2)) == 0
                assert 0 < quarters <= 8 * eights
                seen[bits] += range(quarter, quarter + quarters)
                base = int(piece[unit, ..., 2][piece[unit, ..., 1] == first].min())
                assert column == base + quarter * (8 if bits == 1 else 4), "columns follow quarters"
                loads[warp] += eights * (2 if bits == 1 else 1)
        for bits, (_, strip) in planes.items():
            assert sorted(seen[bits]) == list(range(4 * strip.cells))
        assert max(loads) <= sum(loads) / warps + 3


@pytest.mark.parametrize("nbytes", [0, 3840, 47 * 1024])
@pytest.mark.parametrize("runs", [1, 64, 65, 86, 87, 94, 95])
def test_a_query_is_held_only_where_it_fits(runs: int, nbytes: int) -> None:
    room = held_runs(runs, nbytes)
    assert room == 0 or (room >= runs and room * 512 + nbytes <= SHARED)
    assert room or runs * 512 + nbytes > SHARED


def test_scores_know_the_units_with_keys_and_mixing_those_with_values() -> None:
    """Three units of keys, then three of values, each side with its own largest rank."""
    keys = [page_layout(random_widths(5, runs, runs), 16) for runs in (3, 7, 5)]
    values = [page_layout(random_widths(5, runs, runs), 16) for runs in (4, 9, 2)]
    apart = layer_tables(codec_of([*keys, *values], ["key"] * 3 + ["value"] * 3))
    for name in ("cells", "entry", "stepped", "share", "key_offset"):
        assert (getattr(apart, name) == getattr(layer_tables(codec_of(keys)), name)).all(), name
    alone = layer_tables(codec_of(values))
    for name in ("source", "source_factor", "offset"):
        assert (getattr(apart, name) == getattr(alone, name)).all(), name
    moved = alone.item.copy()
    moved[:, 3] += sum(layout.nbytes for layout in keys)  # values lie behind the keys
    assert (apart.item == moved).all() and apart.outputs == alone.outputs


def test_fields_are_as_many_as_planes() -> None:
    assert tuple(len(PLANES.get(width, ())) for width in WIDTHS) == FIELDS

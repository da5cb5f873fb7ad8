"""What the decode kernels know of pages at compile time, against the layout itself."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spectral.bits import CHANNEL_GROUP, WIDTHS, frequency_classes
from spectral.kernels.classes import class_rows, first_row, strip_bits, strip_class, strip_order
from spectral.kernels.joint import CHUNK, OPERAND, STEP, joint_runs
from spectral.kernels.joint import STAGE as JOINT_STAGE
from spectral.kernels.score import SHARED, STAGE, STAGES, held_runs
from spectral.kernels.tables import RUN_SLACK, layer_tables
from spectral.layout import page_layout


def random_widths(classes: int, runs: int, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    return np.array([[rng.choice(WIDTHS) for _ in range(runs)] for _ in range(classes)]).repeat(CHANNEL_GROUP, axis=1)


@pytest.mark.parametrize("page", [8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_strips_lie_in_the_order_in_which_the_kernel_reads_them(page: int, seed: int) -> None:
    classes = len(frequency_classes(page))
    layout = page_layout(random_widths(classes, 9, seed), page)
    found = [(strip.bits, strip.number) for strip in layout.strips]
    order = [(strip_bits(classes, s), strip_class(classes, s)) for s in range(4 * classes)]
    assert order == strip_order(classes)
    assert found == [kind for kind in order if kind in found]
    assert all(len(rows) == class_rows(c) and rows[0] == first_row(c) for c, rows in enumerate(frequency_classes(page)))
    ends = [0, *(strip.stop for strip in layout.strips)]
    assert [strip.start for strip in layout.strips] == ends[:-1], "a strip begins where the one before it ends"


def test_cells_never_cross_the_end_of_a_chunk() -> None:
    for seed in range(6):
        for strip in page_layout(random_widths(5, 11, seed), 16).strips:
            for start in range(strip.start, strip.stop, strip.cell_nbytes):
                assert start // 128 == (start + strip.cell_nbytes - 1) // 128


def test_entries_of_a_unit_follow_each_other_in_the_order_of_its_cells() -> None:
    layouts = [page_layout(random_widths(5, 7, seed), 16) for seed in (1, 2)]
    tables = layer_tables([(layout, np.ones((5, 112))) for layout in layouts], {w: 0.5 for w in WIDTHS if w})
    entry = tables.entry[:, 0, 2] // 32
    for unit, layout in enumerate(layouts):
        at = int(tables.first_run[unit])
        for strip in layout.strips:
            assert list(entry[at : at + len(strip.runs)]) == list(strip.runs)
            at += strip.cells * (2 if strip.bits == 1 else 1)
    assert len(entry) == at + RUN_SLACK and not tables.entry[at:].any()


@pytest.mark.parametrize("page", [8, 16])
def test_steps_of_joint_entries_never_cross_the_end_of_a_chunk_or_strip(page: int) -> None:
    classes = len(frequency_classes(page))
    layouts = [page_layout(random_widths(classes, runs, runs), page) for runs in (3, 23)]
    parts = [(layout, np.ones((classes, layout.channels))) for layout in layouts]
    tables = layer_tables(parts, {w: 0.5 for w in WIDTHS if w})
    for unit, layout in enumerate(layouts):
        at, own = 0, tables.entry[int(tables.first_run[unit]) :]
        for strip in layout.strips:
            width = 2 if strip.bits == 1 else 1
            cell = 0
            while cell < strip.cells:  # what the kernel does: steps of STEP entries to the end of the chunk or strip
                end = (strip.start + cell * strip.cell_nbytes) // int(CHUNK) * int(CHUNK) + int(CHUNK)
                here = min(strip.cells - cell, (end - strip.start) // strip.cell_nbytes - cell)
                assert (tables.joint[unit, at : at + here * width] == own[: here * width]).all()
                steps = -(-here * width // int(STEP))
                assert not tables.joint[unit, at + here * width : at + steps * int(STEP)].any()
                at, own, cell = at + steps * int(STEP), own[here * width :], cell + here
        rest = tables.joint[unit, at:]
        assert len(rest) >= 4 * int(STEP) and not rest.any()


@pytest.mark.parametrize(("runs", "warps"), [(1, 2), (51, 4), (52, 4), (53, 4), (40, 8), (200, 2)])
def test_a_joint_query_is_held_only_where_it_fits(runs: int, warps: int) -> None:
    room = joint_runs(runs, warps)
    rings = warps * 2 * int(JOINT_STAGE) + 2 * int(STEP) * int(OPERAND)
    assert room == 0 or (room >= runs and room * 512 + rings <= SHARED)
    assert room or runs * 512 + rings > SHARED


@pytest.mark.parametrize(("runs", "warps"), [(1, 2), (16, 4), (17, 4), (51, 4), (64, 4), (65, 4), (64, 8), (200, 2)])
def test_a_query_is_held_only_where_it_fits(runs: int, warps: int) -> None:
    room = held_runs(runs, warps)
    stages = warps * int(STAGES) * int(STAGE)
    assert room == 0 or (room >= runs and room * 512 + stages <= SHARED)
    assert room or runs * 512 + stages > SHARED

"""What programs that score packed pages know of cells and of the query, those of a block (spectral.kernels.score) and
those of a share of one (spectral.kernels.shares)."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.lanes import product
from spectral.kernels.staging import close_stage, copy_pieces, held_two, held_word
from spectral.kernels.words import two_words, word

FIELD_UNIT = tl.constexpr(2.0**20)
"""2^24, which fields lack, over SCORE_UNIT, which their factors have too much."""

SHARED = 47 * 1024
"""Bytes of shared memory that a kernel may declare, of the 48 KiB; Triton needs some itself."""


def held_runs(runs: int, nbytes: int) -> int:
    """Room, in runs of 16 latents, that a program keeps in shared memory for a block's projected query beside `nbytes`
    of others; 0 where `runs` do not fit. The same for all settings of a model, if possible: each size is compiled, and
    a squeeze must not wait for a compiler."""
    room = (SHARED - nbytes) // 512
    return next((size for size in (64, room) if runs <= size <= room), 0)


@triton.jit
def quarter_rows(at, page, BITS: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr):
    """All rows of the lane's quarter of a cell, as words; at: its address in shared memory; page: its pointer."""
    NBYTES: tl.constexpr = ROWS * max(1, BITS // 2)
    if FAST:
        if NBYTES <= 4:
            return (held_word(at, NBYTES),)
        else:
            x = ()
            for i in tl.static_range(NBYTES // 8):  # eight at once: a page may lie eight bytes beside sixteen
                x = x + held_two(at + 8 * i)
            return x
    elif NBYTES <= 4:
        return (word(page, NBYTES, FAST),)
    else:
        x = ()
        for i in tl.static_range(NBYTES // 8):
            x = x + two_words(page + 8 * i, FAST)
        return x


@triton.jit
def query_words(at, q0, q1, offset, HOLD: tl.constexpr, FAST: tl.constexpr):
    """The query's latents 4 t .. of a run, heads g and g + 8: from shared memory, or by the lane's pointers.

    offset: 32 times the run's first latent.
    """
    if FAST and HOLD > 0:
        a0, a2 = held_two(at + offset)
        a1, a3 = held_two(at + offset + 256)
    else:
        a0, a2 = two_words(q0 + offset // 32, FAST)
        a1, a3 = two_words(q1 + offset // 32, FAST)
    return a0, a1, a2, a3


@triton.jit
def scaled(a, entry, FAST: tl.constexpr):
    """A run's operands times what its fields stand for."""
    return (
        product(a[0], entry[0], FAST),
        product(a[1], entry[0], FAST),
        product(a[2], entry[1], FAST),
        product(a[3], entry[1], FAST),
    )


@triton.jit
def behind(page):
    """How far a page's bytes lie behind the sixteen that the first of them is in."""
    return (page.to(tl.int64) & 8).to(tl.int32)


@triton.jit
def page_start(ids, number, count, page_nbytes):
    """Where page `number` of a block begins in the pool; the last one for those behind it."""
    return tl.load(ids + tl.minimum(number, count - 1)).to(tl.int64) * page_nbytes


@triton.jit
def query_row(q_ptr, head, row, head_stride, runs, GROUP: tl.constexpr):
    """A head's projected query for one block; row: of the first query head of its KV head."""
    return q_ptr + (head // GROUP).to(tl.int64) * head_stride + (row + head % GROUP).to(tl.int64) * (16 * runs)


@triton.jit
def hold_query(held_q, q_lane, i, runs, WARPS: tl.constexpr):
    """Ask for a block's projected query: a lane has half a run of one head; warps take turns with runs."""
    source = q_lane.to(tl.int64)
    for k in range((runs + WARPS - 1) // WARPS):
        run = tl.minimum(k * WARPS + i // 32, runs - 1)
        copy_pieces(held_q + (run * 512 + i % 32 * 16), source + run * 32, 1)
    close_stage(i)


@triton.jit
def part_of(c, FIRST: tl.constexpr, ROWS: tl.constexpr):
    out = ()
    for i in tl.static_range(4 * ROWS):
        out = out + (c[4 * FIRST + i],)
    return out


@triton.jit
def with_part(c, part, FIRST: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr):
    out = ()
    for i in tl.static_range(4 * P):
        if i < 4 * FIRST or i >= 4 * (FIRST + ROWS):
            out = out + (c[i],)
        else:
            out = out + (part[i - 4 * FIRST],)
    return out

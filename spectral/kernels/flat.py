"""Scores of packed pages whose rows are tokens, and weights from them: one program for blocks of pages of one sequence
and unit, as spectral.kernels.score has it for pages that are transformed.

All cells have sixteen rows, so there are few of them: the operands of all are made at once, by all warps of a program,
before any is multiplied with, and lie in shared memory. Nothing else but the bytes of pages goes through it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import (
    FIELD_UNIT,
    SHARED,
    behind,
    page_start,
    quarter_rows,
    query_row,
    query_words,
    scaled,
)
from spectral.kernels.lanes import less, score_rows, sum_rows
from spectral.kernels.score import CHUNK, OPERAND, PITCH, STAGE, page_copies, plain_cell
from spectral.kernels.staging import close_stage, copy_part, held_four, hold_four, prefetch, stage, wait_stages
from spectral.kernels.weights import largest, over_quad, quad, softcapped, store_weights
from spectral.kernels.words import four_words

ENTRIES = tl.constexpr(40)
"""Entries of the table for whose operands shared memory has room. Of a block that has more they are made plane by
plane: a plane has at most one for every run of latents. (Units of more runs are left to spectral.kernels.score.)"""

STAGES = tl.constexpr(3)
"""Chunks of its eight pages that a warp has in shared memory."""


def flat_fits(latents: int, pages: int) -> bool:
    """Whether flat_score_kernel serves units of so many latents, and blocks of so many pages."""
    nbytes = pages // 8 * int(STAGES) * int(STAGE) + int(ENTRIES) * int(OPERAND)
    return latents <= 16 * int(ENTRIES) and nbytes <= SHARED


@triton.jit
def _ask_chunk(copies, chunk, chunks, lane):
    """Ask for a chunk of the warp's eight pages, if there is one; it counts as a stage even so."""
    if chunk < chunks:
        copy_part(copies[0] + chunk % STAGES * STAGE, copies[1] + chunk * CHUNK, copies[2], CHUNK // 64)
    close_stage(lane)


@triton.jit
def _ask_first(copies, chunks, lane):
    """Ask for what a warp has before it begins."""
    for chunk in tl.static_range(STAGES - 1):
        _ask_chunk(copies, chunk, chunks, lane)


@triton.jit
def _cell_counts(p):
    """Of the four planes."""
    return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)


@triton.jit
def _make_operands(made, q0, q1, ops, count, i, WARPS: tl.constexpr):
    """Leave the operands of all entries in shared memory. The warps of a program take turns, each with five at once:
    what they are made of is two accesses away."""
    for n in range(0, count, 5 * WARPS):
        e = ()
        q = ()
        for k in tl.static_range(5):
            e = e + (four_words(ops + tl.minimum(n + k * WARPS + i // 32, count - 1) * 16, True),)
        for k in tl.static_range(5):
            q = q + (query_words(i, q0, q1, e[k][2], 0, True),)
        for k in tl.static_range(5):
            a = scaled(q[k], e[k], True)
            pairs = e[k][3] != 0
            hold_four(
                made + tl.minimum(n + k * WARPS + i // 32, count - 1) * OPERAND,
                less(a[0], tl.where(pairs, a[2], 0)), less(a[1], tl.where(pairs, a[3], 0)), a[2], a[3],
            )  # fmt: skip


@triton.jit
def _remake_operands(made, q0, q1, ops, count, i, WARPS: tl.constexpr):
    """The same in place of what all warps have multiplied with."""
    tl.debug_barrier()
    _make_operands(made, q0, q1, ops, count, i, WARPS)
    tl.debug_barrier()


@triton.jit
def _query_nearer(
    q_ptr, head, own, part, row, head_stride, runs, i, GROUP: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Ask for a block's projected query to come into the first-level cache; a line has four runs."""
    q = query_row(q_ptr, head + tl.minimum(part * 16 + i % 16, own - 1), row, head_stride, runs, GROUP)
    for first in range(0, runs, 8 * WARPS):
        prefetch(q + tl.minimum(first + i // 16 * 4, runs - 1) * 16)


@triton.jit
def _strip(
    c, off, cells, held, page, copies, chunks, made, ops, entry, q0, q1, lane,
    BITS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a plane's cells to the scores. off: of the first in the page; made: where its first operands lie; entry: the
    number of its first entry."""
    U: tl.constexpr = max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    quarter = lane % 4 * (16 * U)
    for _ in range(cells):
        if FAST:
            if off & (CHUNK - 1) == 0:
                wait_stages(lane, STAGES - 2)
                _ask_chunk(copies, (off >> 8) + STAGES - 1, chunks, lane)
            at = held + (quarter + ((off >> 8) % STAGES * STAGE + (off & (CHUNK - 1))))
            a = held_four(made)
            if BITS == 1:
                a = a + held_four(made + OPERAND)
            c = score_rows(c, quarter_rows(at, page, BITS, 16, True), a, BITS, 16, WARPS, True, BITS == 4)
            made += RUNS * OPERAND
        else:
            c = plain_cell(c, page + (off + quarter), ops + 16 * entry, q0, q1, BITS, 16, WARPS)
            entry += RUNS
        off += 64 * U
    if FAST:
        entry += RUNS * cells
    return c, off, made, entry


@triton.jit
def _all_strips(
    cells, entries, held, page, copies, chunks, made, ops, q0, q1, i, WARPS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Sums of fields and operands, 4 numbers a token (heads g and g + 8, pages 2 t and 2 t + 1)."""
    c = (tl.zeros([32 * WARPS], tl.float32),) * 64
    off = tl.full([], 0, tl.int32)
    at, entry = made, tl.full([], 0, tl.int32)
    for s in tl.static_range(4):
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if entries > ENTRIES:
                _remake_operands(made, q0, q1, ops + 16 * entry, cells[s] * (2 if s == 3 else 1), i, WARPS)
                at = made
        c, off, at, entry = _strip(
            c, off, cells[s], held, page, copies, chunks, at, ops, entry, q0, q1, i % 32, 8 >> s, WARPS, FAST
        )
    return c


@triton.jit
def _weights(
    c, FIRST: tl.constexpr, shift, now, next, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Weights of one head in two pages, whose sums are numbers FIRST and FIRST + 1 of every row, and what they are
    relative to: the largest score of all eight pages. shift: the mean's score less what all codes are too high by; now,
    next: whether there are the two pages. (Where there is none the last one's bytes were read, which are no larger.)"""
    x = ()
    y = ()
    for r in tl.static_range(16):
        if SOFTCAP > 0:
            x = x + (c[4 * r + FIRST] * FIELD_UNIT + shift,)
            y = y + (c[4 * r + FIRST + 1] * FIELD_UNIT + shift,)
        else:
            x = x + (c[4 * r + FIRST],)
            y = y + (c[4 * r + FIRST + 1],)
    if SOFTCAP > 0:
        x, y = softcapped(x, 16, SOFTCAP), softcapped(y, 16, SOFTCAP)
    UNIT: tl.constexpr = 1.0 if SOFTCAP > 0 else FIELD_UNIT
    top = over_quad(tl.maximum(largest(x, 16), largest(y, 16)), WARPS, FAST) * UNIT
    here, there = tl.where(now, -top, float("-inf")), tl.where(next, -top, float("-inf"))
    u = ()
    v = ()
    for r in tl.static_range(16):
        u = u + (tl.exp2(x[r] * UNIT + here),)
        v = v + (tl.exp2(y[r] * UNIT + there),)
    if SOFTCAP > 0:
        return u, v, top
    else:
        return u, v, top + shift


@triton.jit
def _sum_page(total, u, v, WARPS: tl.constexpr, FAST: tl.constexpr):
    """Add a page's weights to their sums."""
    for k in tl.static_range(4):
        x = quad(u, v, 4 * k, FAST)
        total = sum_rows(total, (x[0], x[2], x[1], x[3]), WARPS, FAST)
    return total


@triton.jit
def _leave(
    c, shift0, shift1, number, count, blk, place, max_ptr, total_ptr, block, pages_max, i,
    SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Weights of a block, their sums and what they are relative to. number: of the lane's first page in the block;
    place: where the row's weights are left; block: the block's number among all."""
    g, t = i % 32 // 4, i % 4
    here, next = number < count, number + 1 < count
    u0, u1, top0 = _weights(c, 0, shift0, here, next, SOFTCAP, WARPS, FAST)
    v0, v1, top1 = _weights(c, 2, shift1, here, next, SOFTCAP, WARPS, FAST)
    store_weights(place, pages_max, blk * (8 * WARPS) + number, g, t, u0, u1, v0, v1, 16, True, FAST)
    total = (tl.zeros([32 * WARPS], tl.float32),) * 4
    total = _sum_page(_sum_page(total, u0, v0, WARPS, FAST), u1, v1, WARPS, FAST)
    at = (block * WARPS + i // 32) * 16 + g
    tl.store(max_ptr + at, top0, mask=t == 0)
    tl.store(max_ptr + at + 8, top1, mask=t == 0)
    tl.store(total_ptr + at, total[0] * 16777216.0, mask=t == 0)
    tl.store(total_ptr + at + 8, total[2] * 16777216.0, mask=t == 0)


@triton.jit(
    do_not_specialize=[
        "table_stride", "page_nbytes", "runs", "blocks", "pages_max", "units", "heads", "each",
    ]
)  # fmt: skip
def flat_score_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, cells_ptr, entry_ptr, span_ptr, weight_ptr,
    max_ptr, total_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, pages_max, units, heads, each,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Some blocks (8 pages a warp) of one sequence, unit and 16 of its query heads, one after another.

    Arguments as spectral.kernels.score has them, but entry_ptr, span_ptr: LayerTables.entry and .span. Weights are
    relative to the largest score of a warp's eight pages: max_ptr, and total_ptr, sums of their weights: fp32
    [sequence, unit, head groups, blocks * WARPS, 16]. each: blocks of a program.
    """
    P: tl.constexpr = 16
    PB: tl.constexpr = 8 * WARPS
    BYTES: tl.constexpr = WARPS * STAGES * STAGE
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    seq = tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held, made = i, i
    if FAST:
        held = stage(i, BYTES + ENTRIES * OPERAND) + i // 32 * (STAGES * STAGE)
        made = held - i // 32 * (STAGES * STAGE) + BYTES + lane * 16
    count = tl.load(count_ptr + seq)
    b0 = tl.program_id(1) * each
    b1 = tl.minimum(b0 + each, (count + PB - 1) // PB)
    if b0 < b1:
        g, t = lane // 4, lane % 4
        chunks = (tl.load(unit_ptr + unit * 4 + 3) + CHUNK - 1) // CHUNK
        head = tl.load(unit_ptr + unit * 4)
        own = tl.load(unit_ptr + unit * 4 + 1)
        pages = pages_ptr + tl.load(unit_ptr + unit * 4 + 2)
        cells, entries = _cell_counts(cells_ptr + unit * 4), tl.load(span_ptr + unit * 2 + 1)
        ops = entry_ptr + tl.load(span_ptr + unit * 2) * 16 + t * 4
        head0, head1 = head + tl.minimum(part * 16 + g, own - 1), head + tl.minimum(part * 16 + g + 8, own - 1)
        mine = i // 32 * 8
        where = (seq * units + unit) * GROUPS + part
        place = (weight_ptr + where.to(tl.int64) * pages_max * (16 * P)).to(tl.pointer_type(tl.int32))
        ids = table_ptr + seq * table_stride
        start = page_start(ids + b0 * PB, mine + g, count - b0 * PB, page_nbytes)
        if FAST:
            _ask_first(page_copies(held, pages, start, lane), chunks, lane)
        for blk in range(b0, b1):
            here = count - blk * PB
            after = tl.load(ids + tl.minimum((blk + 1) * PB + mine + g, count - 1)).to(tl.int64) * page_nbytes
            row = (seq * blocks + blk) * GROUP
            q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
            q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
            const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
            if FAST:  # noqa: SIM102 (a constant and a tensor)
                if entries <= ENTRIES:
                    _remake_operands(made, q0, q1, ops, entries, i, WARPS)
            k0, k1 = tl.load(const + head0 * 8), tl.load(const + head1 * 8)
            mean0, mean1 = tl.load(const + head0 * 8 + 7), tl.load(const + head1 * 8 + 7)
            page = pages + start
            c = _all_strips(
                cells, entries, held + g * PITCH + behind(page), page, page_copies(held, pages, start, lane), chunks,
                made, ops, q0, q1, i, WARPS, FAST,
            )  # fmt: skip
            if blk + 1 < b1:
                start = after
                if FAST:
                    _ask_first(page_copies(held, pages, start, lane), chunks, lane)
                    _query_nearer(q_ptr, head, own, part, row + GROUP, q_head_stride, runs, i, GROUP, WARPS)
            _leave(
                c, mean0 - k0, mean1 - k1, mine + 2 * t, here, blk, place, max_ptr, total_ptr, where * blocks + blk,
                pages_max, i, SOFTCAP, WARPS, FAST,
            )  # fmt: skip

"""Scores of packed pages whose rows are tokens, and weights from them: one program for a block of pages of one sequence
and unit, as spectral.kernels.score has it for pages that are transformed.

All cells have sixteen rows, so there are few of them: the operands of all are made at once, by all warps of a program,
before any is multiplied with, and lie in shared memory. Nothing else but the bytes of pages goes through it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import FIELD_UNIT, behind, page_start, quarter_rows, query_row, query_words, scaled
from spectral.kernels.lanes import less, score_rows, sum_rows
from spectral.kernels.score import CHUNK, OPERAND, PITCH, STAGE, ask_chunk, copied, next_chunk, plain_cell
from spectral.kernels.staging import hold_four, held_four, stage
from spectral.kernels.weights import all_warps, block_weights, largest, over_lanes, quad, store_weights, tokens
from spectral.kernels.words import four_words

ENTRIES = tl.constexpr(48)
"""Entries of the table for whose operands shared memory has room; what has more is left to spectral.kernels.score."""


@triton.jit
def _make_operands(made, q0, q1, ops, count, i, WARPS: tl.constexpr):
    """Leave the operands of all entries in shared memory: the warps of a program take turns."""
    for n in range(0, count, WARPS):
        entry = tl.minimum(n + i // 32, count - 1)
        e = four_words(ops + entry * 16, True)
        a = scaled(query_words(i, q0, q1, e[2], 0, True), e, True)
        pairs = e[3] != 0
        hold_four(
            made + entry * OPERAND,
            less(a[0], tl.where(pairs, a[2], 0), True), less(a[1], tl.where(pairs, a[3], 0), True), a[2], a[3],
        )  # fmt: skip


@triton.jit
def _strip(
    c, off, cells, held, page, copies, chunks, made, ops, q0, q1, lane,
    BITS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a plane's cells to the scores. off: of the first in the page; made, ops: of its first entry."""
    U: tl.constexpr = max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    quarter = lane % 4 * (16 * U)
    for _ in range(cells):
        if FAST:
            if off & (CHUNK - 1) == 0:
                next_chunk(copies, off >> 8, chunks, lane)
            at = held + (quarter + ((off >> 8 & 1) * STAGE + (off & (CHUNK - 1))))
            a = held_four(made)
            if BITS == 1:
                a = a + held_four(made + OPERAND)
            c = score_rows(c, quarter_rows(at, page, BITS, 16, True), a, BITS, 16, WARPS, True, BITS == 4)
            made += RUNS * OPERAND
        else:
            c = plain_cell(c, page + (off + quarter), ops, q0, q1, BITS, 16, WARPS)
            ops += 16 * RUNS
        off += 64 * U
    return c, off, made, ops


@triton.jit
def _all_strips(
    cells_ptr, held, page, copies, chunks, made, ops, q0, q1, lane, WARPS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Sums of fields and operands, 4 numbers a token (heads g and g + 8, pages 2 t and 2 t + 1)."""
    c = (tl.zeros([32 * WARPS], tl.float32),) * 64
    off = tl.full([], 0, tl.int32)
    for s in tl.static_range(4):
        c, off, made, ops = _strip(
            c, off, tl.load(cells_ptr + s), held, page, copies, chunks, made, ops, q0, q1, lane, 8 >> s, WARPS, FAST
        )
    return c


@triton.jit
def _above_mean(c, k0, k1):
    """Scores without what all codes are too high by."""
    out = ()
    for r in tl.static_range(16):
        out = out + (
            c[4 * r] * FIELD_UNIT - k0,
            c[4 * r + 1] * FIELD_UNIT - k0,
            c[4 * r + 2] * FIELD_UNIT - k1,
            c[4 * r + 3] * FIELD_UNIT - k1,
        )
    return out


@triton.jit
def _sum_page(total, u, v, WARPS: tl.constexpr, FAST: tl.constexpr):
    """Add a page's weights to their sums."""
    for k in tl.static_range(4):
        x = quad(u, v, 4 * k, FAST)
        total = sum_rows(total, (x[0], x[2], x[1], x[3]), WARPS, FAST)
    return total


@triton.jit(
    do_not_specialize=["table_stride", "page_nbytes", "runs", "blocks", "pages_max", "units", "heads", "entry_stride"]
)
def flat_score_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, cells_ptr, entry_ptr, entries_ptr,
    weight_ptr, max_ptr, total_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, pages_max, units, heads, entry_stride,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One block (8 pages a warp) of one sequence, unit and 16 of its query heads.

    Arguments as spectral.kernels.score has them, but entry_ptr, entries_ptr: LayerTables.whole and .wholes; total_ptr:
    fp32 [sequence, unit, head groups, blocks, 16]: sums of a block's weights.
    """
    P: tl.constexpr = 16
    PB: tl.constexpr = 8 * WARPS
    BYTES: tl.constexpr = WARPS * 2 * STAGE
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    blk, seq = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held, made = i, i
    if FAST:
        held = stage(i, BYTES + ENTRIES * OPERAND) + i // 32 * (2 * STAGE)
        made = held - i // 32 * (2 * STAGE) + BYTES + lane * 16
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        g, t = lane // 4, lane % 4
        chunks = (tl.load(unit_ptr + unit * 4 + 3) + CHUNK - 1) // CHUNK
        head = tl.load(unit_ptr + unit * 4)
        own = tl.load(unit_ptr + unit * 4 + 1)
        row = (seq * blocks + blk) * GROUP
        ids = table_ptr + seq * table_stride + blk * PB
        pages = pages_ptr + tl.load(unit_ptr + unit * 4 + 2)
        mine = i // 32 * 8
        copies = copied(held, ids, pages, mine, count, page_nbytes, lane)
        if FAST:
            ask_chunk(copies, 0, lane)
        page = pages + page_start(ids, mine + g, count, page_nbytes)
        head0, head1 = head + tl.minimum(part * 16 + g, own - 1), head + tl.minimum(part * 16 + g + 8, own - 1)
        q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
        q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
        const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
        ops = entry_ptr + unit * entry_stride + t * 4
        if FAST:
            _make_operands(made, q0, q1, ops, tl.load(entries_ptr + unit), i, WARPS)
            tl.debug_barrier()
        k0, k1 = tl.load(const + head0 * 8), tl.load(const + head1 * 8)
        mean0, mean1 = tl.load(const + head0 * 8 + 7), tl.load(const + head1 * 8 + 7)
        c = _all_strips(
            cells_ptr + unit * 4, held + g * PITCH + behind(page), page, copies, chunks, made, ops, q0, q1, lane,
            WARPS, FAST,
        )  # fmt: skip
        s = _above_mean(c, k0, k1)
        number = mine + 2 * t
        here, next = number < count, number + 1 < count
        x0, x1 = tokens(s, 0, mean0, here, P, True, SOFTCAP, FAST), tokens(s, 1, mean0, next, P, True, SOFTCAP, FAST)
        y0, y1 = tokens(s, 2, mean1, here, P, True, SOFTCAP, FAST), tokens(s, 3, mean1, next, P, True, SOFTCAP, FAST)
        top0 = over_lanes(tl.maximum(largest(x0, P), largest(x1, P)), WARPS)
        top1 = over_lanes(tl.maximum(largest(y0, P), largest(y1, P)), WARPS)
        u0, u1 = block_weights(x0, top0, P, True, FAST), block_weights(x1, top0, P, True, FAST)
        v0, v1 = block_weights(y0, top1, P, True, FAST), block_weights(y1, top1, P, True, FAST)
        where = (seq * units + unit) * GROUPS + part
        place = (weight_ptr + where.to(tl.int64) * pages_max * (16 * P)).to(tl.pointer_type(tl.int32))
        store_weights(place, pages_max, blk * PB + number, g, t, u0, u1, v0, v1, P, True, FAST)
        total = (tl.zeros([32 * WARPS], tl.float32),) * 4
        total = _sum_page(_sum_page(total, u0, v0, WARPS, FAST), u1, v1, WARPS, FAST)
        sum0, sum1 = all_warps(total[0], WARPS), all_warps(total[2], WARPS)
        at = (where * blocks + blk) * 16 + g
        first = t + i // 32 == 0
        tl.store(max_ptr + at, top0, mask=first)
        tl.store(max_ptr + at + 8, top1, mask=first)
        tl.store(total_ptr + at, sum0 * 16777216.0, mask=first)
        tl.store(total_ptr + at + 8, sum1 * 16777216.0, mask=first)

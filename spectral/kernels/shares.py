"""Scores where few pages would leave most of a GPU idle: the cells of eight pages in shares, and weights from their
sums. Two launches do what spectral.kernels.score does in one, in a fraction of its time."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import class_rows, first_row
from spectral.kernels.score import (
    CHUNK,
    FIELD_UNIT,
    PITCH,
    STAGE,
    STAGES,
    all_strips,
    behind,
    copied,
    copy_chunk,
    hold_query,
    next_chunk,
    page_start,
    query_row,
)
from spectral.kernels.staging import close_stage, prefetch, stage, wait_stages
from spectral.kernels.weights import block_weights, largest, store_column, token_scores


@triton.jit(do_not_specialize=["table_stride", "page_nbytes", "runs", "blocks", "units", "octets"])
def share_kernel(
    q_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, share_ptr, entry_ptr, sum_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, units, octets,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    SHARES: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One share of a unit's cells in eight pages of a sequence, for 16 query heads; one warp. Arguments as
    spectral.kernels.score has them.

    share_ptr: LayerTables.share; sum_ptr: fp32 [sequence, unit, head groups, octets, SHARES, 4 P, 32]: what each lane
    has summed.
    """
    share, part = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES % GROUPS
    unit = tl.program_id(0) // (SHARES * GROUPS)
    octet, seq = tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, 32)
    held_q = lane
    held = lane
    if FAST:
        held_q = stage(lane, 512 * HOLD + STAGES * STAGE)
        held = held_q + 512 * HOLD
    count = tl.load(count_ptr + seq) - octet * 8
    if count > 0:
        g, t = lane // 4, lane % 4
        own = share_ptr + (unit * SHARES + share) * (4 + 4 * CLASSES)
        off, end, entry = tl.load(own), tl.load(own + 1), entry_ptr + tl.load(own + 2) * 16
        chunks = (end + CHUNK - 1) // CHUNK
        if FAST:  # two entries a line
            prefetch(entry + tl.minimum(2 * lane, tl.maximum(tl.load(own + 3) - 1, 0)) * 16)
        head = tl.load(unit_ptr + unit * 5)
        heads = tl.load(unit_ptr + unit * 5 + 1)
        row = (seq * blocks + octet * 8 // PB) * GROUP
        ids = table_ptr + seq * table_stride + octet * 8
        pages = pages_ptr + tl.load(unit_ptr + unit * 5 + 2)
        copies = copied(held, ids, pages, 0, count, page_nbytes, lane)
        if FAST:
            if HOLD > 0:
                held_head = head + tl.minimum(part * 16 + lane // 2, heads - 1)
                q = query_row(q_ptr, held_head, row, q_head_stride, runs, GROUP) + lane % 2 * 8
                hold_query(held_q, q, lane, runs, 1)
            for ahead in tl.static_range(STAGES - 1):
                if (off >> 7) + ahead < chunks:
                    copy_chunk(copies, (off >> 7) + ahead)
                close_stage(lane)
        page = pages + page_start(ids, g, count, page_nbytes)
        head0, head1 = head + tl.minimum(part * 16 + g, heads - 1), head + tl.minimum(part * 16 + g + 8, heads - 1)
        q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
        q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
        if FAST:
            if HOLD > 0:
                wait_stages(lane, STAGES - 1)
            if off & (CHUNK - 1) != 0:  # a chunk that another share begins
                next_chunk(copies, off >> 7, chunks, lane)
        c = all_strips(
            own + 4, off, held + g * PITCH + behind(page), page, copies, chunks, held_q + g * 32 + t * 8, q0, q1,
            entry + t * 4, lane, 1, CLASSES, P, 1, HOLD, FAST,
        )  # fmt: skip
        where = (((seq * units + unit) * GROUPS + part) * octets + octet) * SHARES + share
        out = sum_ptr + where.to(tl.int64) * (128 * P) + lane
        for k in tl.static_range(4 * P):
            tl.store(out + 32 * k, c[k])


@triton.jit
def _summed(sums, here, SHARES: tl.constexpr, P: tl.constexpr):
    """One number of every row, over shares; sums: the lane's place in the first share's, of row 0."""
    s = ()
    for row in tl.static_range(P):
        x = tl.load(sums + 128 * row, mask=here, other=0.0)
        for share in tl.static_range(1, SHARES):
            x += tl.load(sums + share * (128 * P) + 128 * row, mask=here, other=0.0)
        s = s + (x,)
    return s


@triton.jit
def _above_mean(s, const, CLASSES: tl.constexpr):
    """Scores of all rows without the mean's part; const: of the lane's head, what all codes of a class are too high
    by."""
    out = ()
    for number in tl.static_range(CLASSES):
        k = tl.load(const + number)
        for r in tl.static_range(class_rows(number)):
            out = out + (s[first_row(number) + r] * FIELD_UNIT - k,)
    return out


@triton.jit(do_not_specialize=["blocks", "pages_max", "units", "octets", "heads"])
def gather_kernel(
    sum_ptr, const_ptr, count_ptr, unit_ptr, weight_ptr, max_ptr,
    blocks, pages_max, units, octets, heads,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, SHARES: tl.constexpr,
    SOFTCAP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Weights of one block from what the shares have summed, as spectral.kernels.score leaves them.

    Eight pages have four warps, one for each of the four numbers that a lane of share_kernel has of a row: heads g
    and g + 8, pages 2 t and 2 t + 1.
    """
    OCTETS: tl.constexpr = PB // 8
    N: tl.constexpr = 128 * OCTETS
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    blk, seq = tl.program_id(1), tl.program_id(2)
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        i = tl.arange(0, N)
        lane, side, odd = i % 32, i // 64 % 2, i // 32 % 2
        g, t = lane // 4, lane % 4
        number = i // 128 * 8 + 2 * t + odd
        here = number < count
        where = (seq * units + unit) * GROUPS + part
        octet = (where * octets + blk * OCTETS + i // 128).to(tl.int64)
        sums = sum_ptr + octet * (SHARES * 128 * P) + (2 * side + odd) * 32 + lane
        own = tl.load(unit_ptr + unit * 5 + 1)
        head = tl.load(unit_ptr + unit * 5) + tl.minimum(part * 16 + g + 8 * side, own - 1)
        const = const_ptr + ((seq * blocks + blk).to(tl.int64) * heads + head) * 8
        s = _above_mean(_summed(sums, here, SHARES, P), const, CLASSES)
        x = token_scores(s, tl.load(const + 7), here, P, SOFTCAP, FAST)
        top = tl.max(tl.max(tl.reshape(largest(x, P), [OCTETS, 2, 2, 8, 4]), 4), 2)  # [octet, side, g]
        top = tl.max(top, 0)[None, :, None, :, None]
        top = tl.reshape(tl.broadcast_to(top, [OCTETS, 2, 2, 8, 4]), [N])
        u = block_weights(x, top, P, FAST)
        place = (weight_ptr + where.to(tl.int64) * pages_max * (16 * P)).to(tl.pointer_type(tl.int32))
        store_column(place, pages_max, blk * PB + number, g, side, u, P, FAST)
        tl.store(max_ptr + (where * blocks + blk) * 16 + g + 8 * side, top, mask=(t + odd + i // 128) == 0)

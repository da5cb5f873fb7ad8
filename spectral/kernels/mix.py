"""Sums of packed values with weights, over tokens: one item of a class over a split of a sequence.

The warps of a program take turns with blocks. What a step of 16 rows needs is asked for two steps ahead
(spectral.kernels.items), the weights in the order in which the score kernel left them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import class_kind, first_row, item_quarters, item_tiles, kind_rows, log2
from spectral.kernels.items import lane_offset, lane_rows, page_ids
from spectral.kernels.lanes import mix_rows, product, store_numbers, sum_rows, twice
from spectral.kernels.staging import held_float, hold_float, stage
from spectral.kernels.words import four_words, word


@triton.jit
def _steps_pages(n, PER: tl.constexpr, STEP: tl.constexpr, PB: tl.constexpr, WARPS: tl.constexpr):
    """How far the first page of step n of a warp lies behind its first block's. (Shifts: signed division is long.)"""
    return (n >> log2(PER)) * (WARPS * PB) + (n & (PER - 1)) * STEP


@triton.jit
def _factors(factor, blk, b1, g, FAST: tl.constexpr):
    """A block's factors for heads g and g + 8: two words. Nothing weighs beyond the split."""
    some = blk < b1
    f = factor + tl.minimum(blk, b1 - 1) * 16 + g
    return tl.where(some, word(f, 4, FAST), 0), tl.where(some, word(f + 8, 4, FAST), 0)


@triton.jit
def _column(tile, t, odd, BITS: tl.constexpr):
    """Where the latents of a tile and the three behind it are in an item's output, of column 2 t + odd, and the cell
    they are of."""
    column = 2 * t + odd
    if item_quarters(BITS) == 4:
        return 16 * column + tile, column
    half = column % 2 * 8
    if BITS == 8:
        return 16 * (column // 2) + half + tile, column // 2
    return 16 * (2 * (column // 2) + tile // 4 % 2) + half + tile // 8 * 4, column // 2


@triton.jit
def _store_sums(
    c, out, cells, outputs, shared, warp, g, t,
    BITS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums over warps, stored: c holds 4 numbers of a lane for every tile: heads g, g, g + 8, g + 8 and columns 2 t, 2
    t + 1, 2 t, 2 t + 1 (in plain Triton as spectral.kernels.lanes has it)."""
    TILES: tl.constexpr = item_tiles(BITS)
    if FAST:
        tl.static_assert(WARPS == 4)
        lane = g * 4 + t
        for half in tl.static_range(TILES // 8):  # a warp sums one of a tile's four numbers
            tl.debug_barrier()
            for k in tl.static_range(32):
                hold_float(shared + (warp * 128 + lane * 4 + k * 512), c[32 * half + k])
            tl.debug_barrier()
            x = ()
            for tile in tl.static_range(8):
                at = shared + (lane * 4 + tile * 2048 + warp * 512)
                y = held_float(at)
                for w in tl.static_range(1, WARPS):
                    y += held_float(at + w * 128)
                x = x + (y,)
            for k in tl.static_range(2):
                column, cell = _column(8 * half + 4 * k, t, warp % 2, BITS)
                p = out + ((g + warp // 2 * 8) * outputs + column)
                store_numbers(p, x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3], (cell < cells).to(tl.int32))
    else:
        head, column = tl.arange(0, 8)[:, None, None], tl.arange(0, 8)[None, :, None]
        n = tl.arange(0, TILES)[None, None, :]
        place, cell = _column(n // 4 * 4, column // 2, column % 2, BITS)
        p = out + head * outputs + place + n % 4
        tl.store(p, tl.sum(c[0], 0), mask=cell < cells)
        tl.store(p + 8 * outputs, tl.sum(c[1], 0), mask=cell < cells)


@triton.jit
def _step(
    base, id, page_nbytes, w, number, lane, BITS: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr
):
    """What a step needs: the lane's rows, and their weights."""
    ROWS: tl.constexpr = kind_rows(KIND)
    x = lane_rows(base, id, page_nbytes, BITS, KIND, FAST)
    return x, four_words(w + ((number >> log2(16 // ROWS)) * 128 + lane * 4), FAST)


@triton.jit
def _mix(
    base, ids, b0, b1, last, page_nbytes, w, factor, shared, warp, g, t, out, cells, outputs, sums, wanted,
    BITS: tl.constexpr, KIND: tl.constexpr, PB: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One item of one plane and class over blocks b0 .. b1 - 1 of a sequence: warps take turns with blocks."""
    ROWS: tl.constexpr = kind_rows(KIND)
    STEP: tl.constexpr = 16 // ROWS  # pages that make 16 rows
    PER: tl.constexpr = PB // STEP
    AHEAD: tl.constexpr = min(PER, 2)
    N: tl.constexpr = 32 * WARPS
    if FAST:
        c = (tl.zeros([N], tl.float32),) * (4 * item_tiles(BITS))
    else:
        c = (tl.zeros([WARPS, 8, 8, item_tiles(BITS)], tl.float32),) * 2
    total = (tl.zeros([N], tl.float32),) * 4
    lane = g * 4 + t
    base += lane_offset(g, t, BITS, KIND)
    end = b1 * PB - STEP  # a warp without a block takes the last one's bytes, and no weight of them
    mine = (b0 + warp) * PB
    steps = ()
    id = ()
    for s in tl.static_range(AHEAD):
        number = tl.minimum(mine + _steps_pages(s, PER, STEP, PB, WARPS), end)
        this = page_ids(ids, number, last, t, KIND, FAST)
        steps = steps + (_step(base, this, page_nbytes, w, number, lane, BITS, KIND, FAST),)
        number = tl.minimum(mine + _steps_pages(s + AHEAD, PER, STEP, PB, WARPS), end)
        id = id + (page_ids(ids, number, last, t, KIND, FAST),)
    f0, f1 = _factors(factor, b0 + warp, b1, g, FAST)
    for turn in range((b1 - b0 + WARPS - 1) // WARPS):
        for first in range(0, PER, AHEAD):
            new = ()
            following = ()
            for s in tl.static_range(AHEAD):
                x = steps[s][0]
                a0, a2, a1, a3 = steps[s][1]
                a = (product(a0, f0, FAST), product(a1, f1, FAST), product(a2, f0, FAST), product(a3, f1, FAST))
                c = mix_rows(c, x, a, BITS, ROWS, WARPS, FAST)
                if wanted > 0:
                    total = sum_rows(total, a, WARPS, FAST)
                n = turn * PER + first + s
                number = tl.minimum(mine + _steps_pages(n + AHEAD, PER, STEP, PB, WARPS), end)
                new = new + (_step(base, id[s], page_nbytes, w, number, lane, BITS, KIND, FAST),)
                number = tl.minimum(mine + _steps_pages(n + 2 * AHEAD, PER, STEP, PB, WARPS), end)
                following = following + (page_ids(ids, number, last, t, KIND, FAST),)
            steps = new
            id = following
        f0, f1 = _factors(factor, b0 + (turn + 1) * WARPS + warp, b1, g, FAST)
    _store_sums(c, out, cells, outputs, shared, warp, g, t, BITS, WARPS, FAST)
    i = tl.arange(0, 32)
    if wanted > 0:
        p = sums + i // 4
        tl.store(p, _all_warps(total[0], WARPS) * 16777216.0, mask=i % 4 == 0)
        tl.store(p + 8, _all_warps(total[2], WARPS) * 16777216.0, mask=i % 4 == 0)


@triton.jit
def _all_warps(x, WARPS: tl.constexpr):
    """The sum over warps, by lane."""
    if WARPS == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [WARPS, 32]), 0)


@triton.jit
def _mix_class(
    plane, base, ids, b0, b1, last, page_nbytes, w, factor, shared, warp, g, t, out, cells, outputs, sums, wanted,
    KIND: tl.constexpr, PB: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    for number in tl.static_range(4):
        if plane == number:
            _mix(
                base, ids, b0, b1, last, page_nbytes, w, factor, shared, warp, g, t, out, cells, outputs, sums, wanted,
                8 >> number, KIND, PB, WARPS, FAST,
            )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "units", "splits", "split_blocks"])
def factor_kernel(
    count_ptr, max_ptr, factor_ptr, top_ptr, blocks, units, splits, split_blocks,
    GROUPS: tl.constexpr, PB: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """What the weights of each block of a split are too large or small by: two equal halves in a word, and the
    split's largest. SB blocks at a time.

    factor_ptr: int32 [sequence, unit, head groups, blocks, 16]; top_ptr: fp32 [sequence, split, unit, head groups, 16].
    """
    unit = tl.program_id(0)  # and head group
    split = tl.program_id(1)
    seq = tl.program_id(2)
    b0 = split * split_blocks
    b1 = tl.minimum(b0 + split_blocks, (tl.load(count_ptr + seq) + PB - 1) // PB)
    if b0 < b1:
        head = tl.arange(0, 16)
        own = (seq * units * GROUPS + unit) * blocks
        top = tl.full([16], float("-inf"), tl.float32)
        for first in range(b0, b1, SB):
            b = first + tl.arange(0, SB)
            place = (own + b[:, None]) * 16 + head[None, :]
            top = tl.maximum(top, tl.max(tl.load(max_ptr + place, mask=(b < b1)[:, None], other=float("-inf")), 0))
        for first in range(b0, b1, SB):
            b = first + tl.arange(0, SB)
            place = (own + b[:, None]) * 16 + head[None, :]
            m = tl.load(max_ptr + place, mask=(b < b1)[:, None], other=float("-inf"))
            tl.store(factor_ptr + place, twice(tl.exp2(m - top[None, :])), mask=(b < b1)[:, None])
        tl.store(top_ptr + ((seq * splits + split) * units * GROUPS + unit) * 16 + head, top)


@triton.jit(
    do_not_specialize=[
        "table_stride", "page_nbytes", "blocks", "pages_max", "units", "splits", "outputs", "split_blocks",
    ]
)  # fmt: skip
def mix_kernel(
    pages_ptr, table_ptr, count_ptr, item_ptr, weight_ptr, factor_ptr, out_ptr, sum_ptr,
    table_stride, page_nbytes, blocks, pages_max, units, splits, outputs, split_blocks,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One item over one split of a sequence's blocks, for 16 query heads.

    out_ptr: fp32 [sequence, split, head groups, 16, outputs]: sums of weight times field; sum_ptr: fp32 [sequence,
    split, unit, head groups, CLASSES, 16]: of the weights of a class's rows.
    """
    seq = tl.program_id(0)
    split = tl.program_id(1)
    entry = item_ptr + tl.program_id(2) // GROUPS * 8
    part = tl.program_id(2) % GROUPS
    pages = tl.load(count_ptr + seq)
    b0 = split * split_blocks
    b1 = tl.minimum(b0 + split_blocks, (pages + PB - 1) // PB)
    i = tl.arange(0, 32 * WARPS)
    shared = i
    if FAST:
        shared = stage(i, 32 * 128 * WARPS)
    if b0 < b1:
        unit = tl.load(entry)
        kind = tl.load(entry + 1)
        plane = tl.load(entry + 2)
        base = pages_ptr + tl.load(entry + 3)
        cells = tl.load(entry + 4)
        wanted = tl.load(entry + 6)
        where = (seq * units + unit) * GROUPS + part
        factor = factor_ptr + where * blocks * 16
        sums = sum_ptr + (((seq * splits + split) * units + unit) * GROUPS + part) * (CLASSES * 16)
        out = out_ptr + (((seq * splits + split) * GROUPS + part) * 16).to(tl.int64) * outputs + tl.load(entry + 5)
        ids = table_ptr + seq * table_stride
        for number in tl.static_range(CLASSES):
            if kind == number:
                # 16 rows of a class are 256 halves; the classes before it have first_row rows a page
                w = weight_ptr + (where.to(tl.int64) * P + first_row(number, CLASSES)) * pages_max * 16
                _mix_class(
                    plane, base, ids, b0, b1, pages - 1, page_nbytes, w.to(tl.pointer_type(tl.int32)), factor, shared,
                    i // 32, (i % 32) // 4, i % 4, out, cells, outputs, sums + number * 16, wanted,
                    class_kind(number, CLASSES, P), PB, WARPS, FAST,
                )  # fmt: skip

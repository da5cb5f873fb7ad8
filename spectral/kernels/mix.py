"""Sums of packed values with weights, over tokens: one item of a class over a split of a sequence.

The warps of a program take turns with blocks; what a step needs is asked for three steps ahead
(spectral.kernels.items), the weights in the order in which the score kernel left them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import class_rows, first_row, log2
from spectral.kernels.items import STAGE, STAGES, copied_pages, copy_step, item_step
from spectral.kernels.lanes import mix_cell, product, store_two, take, twice, word
from spectral.kernels.staging import held_float, hold_float, stage, wait_stages


@triton.jit
def _masks(parity, BITS: tl.constexpr):
    """For each tile of 8 latents the bits that this lane's latent has in a row's bytes (8 bits: the bytes to take)."""
    if BITS == 1:
        return 0x00010001 << parity, 0x00040004 << parity, 0x00100010 << parity, 0x00400040 << parity
    elif BITS == 2:
        return 0x00030003 << (2 * parity), 0x00300030 << (2 * parity)
    elif BITS == 4:
        return 0x000F000F << (4 * parity), 0x000F000F << (4 * parity)
    else:
        return parity | ((4 + parity) << 8), (2 + parity) | ((6 + parity) << 8)


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
def _store_sums(
    c, out, cells, outputs, shared, warp, lane,
    CELLS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums over warps, stored: c holds 4 numbers of a lane for every tile of 8 latents of every cell."""
    if FAST:
        EACH: tl.constexpr = 32 // WARPS  # of 32 numbers a lane, summed by one warp
        wait_stages(lane, 0)
        for half in tl.static_range(CELLS * TILES // 8):
            tl.debug_barrier()
            for k in tl.static_range(32):
                hold_float(shared + (warp * 128 + lane * 4 + k * (WARPS * 128)), c[32 * half + k])
            tl.debug_barrier()
            x = ()
            for k in tl.static_range(EACH):
                at = shared + (warp * (EACH * WARPS * 128) + lane * 4 + k * (WARPS * 128))
                y = held_float(at)
                for w in tl.static_range(1, WARPS):
                    y += held_float(at + w * 128)
                x = x + (y,)
            for k in tl.static_range(EACH // 4):
                n = 8 * half + warp * (EACH // 4) + k  # tile
                tile = n % TILES
                p = out + (lane // 4 * outputs + 4 * (lane % 4) + 8 * TILES * (n // TILES))
                p += 16 * (tile // 2) + 2 * (tile % 2)
                keep = (n // TILES < cells).to(tl.int32)
                store_two(p, x[4 * k], x[4 * k + 1], keep, FAST)
                store_two(p + 8 * outputs, x[4 * k + 2], x[4 * k + 3], keep, FAST)
    else:
        i = tl.arange(0, 32)
        p0 = out + (i // 4) * outputs + 4 * (i % 4)
        for cell in tl.static_range(CELLS):
            keep = tl.full([32], 1, tl.int32) * (cells > cell)
            for tile in tl.static_range(TILES):
                p = p0 + 8 * TILES * cell + 16 * (tile // 2) + 2 * (tile % 2)
                k = 4 * (TILES * cell + tile)
                store_two(p, _all_warps(c[k], WARPS), _all_warps(c[k + 1], WARPS), keep, FAST)
                p += 8 * outputs
                store_two(p, _all_warps(c[k + 2], WARPS), _all_warps(c[k + 3], WARPS), keep, FAST)


@triton.jit
def _mix(
    base, ids, b0, b1, last, page_nbytes, w, factor, held, warp, g, t, out, cells, outputs, sums, wanted,
    BITS: tl.constexpr, CLASS: tl.constexpr, CELLS: tl.constexpr, PB: tl.constexpr, P: tl.constexpr,
    WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One item of one plane and class over blocks b0 .. b1 - 1 of a sequence: warps take turns with blocks."""
    ROWS: tl.constexpr = class_rows(CLASS)
    STEP: tl.constexpr = 16 // ROWS  # pages that make 16 rows
    PER: tl.constexpr = PB // STEP
    TILES: tl.constexpr = 4 if BITS == 1 else 2
    WORDS: tl.constexpr = max(1, BITS // 2)
    N: tl.constexpr = 32 * WARPS
    m = _masks(g % 2, BITS)
    c = (tl.zeros([N], tl.float32),) * (CELLS * TILES * 4)
    total = (tl.zeros([N], tl.float32),) * 8
    one = tl.full([N], 0x00010001, tl.int32)
    lane = g * 4 + t
    turns = (b1 - b0 + WARPS - 1) // WARPS
    end = b1 * PB - STEP  # a warp without a block takes the last one's bytes, and no weight of them
    mine = (b0 + warp) * PB
    id = ()
    if FAST:
        for ahead in tl.static_range(STAGES - 1):
            number = tl.minimum(mine + _steps_pages(ahead, PER, STEP, PB, WARPS), end)
            id = copied_pages(ids, number, last, lane, BITS, CELLS, CLASS)
            copy_step(base, id, page_nbytes, held, w, number, ahead, lane, BITS, CELLS, CLASS)
        number = tl.minimum(mine + _steps_pages(STAGES - 1, PER, STEP, PB, WARPS), end)
        id = copied_pages(ids, number, last, lane, BITS, CELLS, CLASS)
    f0, f1 = _factors(factor, b0 + warp, b1, g, FAST)
    for turn in range(turns):
        for k in range(PER):
            n = turn * PER + k
            if FAST:
                wait_stages(lane, STAGES - 2)
                number = tl.minimum(mine + _steps_pages(n + STAGES - 1, PER, STEP, PB, WARPS), end)
                copy_step(base, id, page_nbytes, held, w, number, n + STAGES - 1, lane, BITS, CELLS, CLASS)
                number = tl.minimum(mine + _steps_pages(n + STAGES, PER, STEP, PB, WARPS), end)
                id = copied_pages(ids, number, last, lane, BITS, CELLS, CLASS)
            number = tl.minimum(mine + _steps_pages(n, PER, STEP, PB, WARPS), end)
            x, a = item_step(base, ids, number, last, page_nbytes, held, w, n, g, t, cells, BITS, CLASS, CELLS, FAST)
            s = (product(a[0], f0, FAST), product(a[1], f1, FAST), product(a[2], f0, FAST), product(a[3], f1, FAST))
            new = ()
            for cell in tl.static_range(CELLS):
                new = new + mix_cell(
                    take(c, 4 * TILES * cell, 4 * TILES),
                    take(x, WORDS * cell, WORDS),
                    s,
                    m,
                    cells > cell,
                    BITS,
                    WARPS,
                    FAST,
                )
            c = new
            if wanted > 0:
                total = mix_cell(total, (one * 0x101,), s, (one, one), cells >= 0, 2, WARPS, FAST)
        f0, f1 = _factors(factor, b0 + (turn + 1) * WARPS + warp, b1, g, FAST)
    _store_sums(c, out, cells, outputs, held - warp * (STAGES * STAGE), warp, lane, CELLS, TILES, WARPS, FAST)
    i = tl.arange(0, 32)
    if wanted > 0:
        p = sums + CLASS * 16 + i // 4
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
    plane, base, ids, b0, b1, last, page_nbytes, w, factor, held, warp, g, t, out, cells, outputs, sums, wanted,
    CLASS: tl.constexpr, PB: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    if plane == 0:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, held, warp, g, t, out, cells, outputs, sums, wanted,
            8, CLASS, 4, PB, P, WARPS, FAST,
        )  # fmt: skip
    if plane == 1:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, held, warp, g, t, out, cells, outputs, sums, wanted,
            4, CLASS, 8, PB, P, WARPS, FAST,
        )  # fmt: skip
    if plane == 2:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, held, warp, g, t, out, cells, outputs, sums, wanted,
            2, CLASS, 8, PB, P, WARPS, FAST,
        )  # fmt: skip
    if plane == 3:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, held, warp, g, t, out, cells, outputs, sums, wanted,
            1, CLASS, 4, PB, P, WARPS, FAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "units", "splits", "split_blocks"])
def factor_kernel(
    count_ptr, max_ptr, factor_ptr, top_ptr,
    blocks, units, splits, split_blocks,
    GROUPS: tl.constexpr, PB: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """What the weights of each block of a split are too large or small by: two equal halves in a word, and the
    split's largest. SB blocks at a time.

    factor_ptr: int32 [sequence, unit, head groups, blocks, 16]; top_ptr: fp32 [sequence, split, unit, head groups,
    16].
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
    held = i
    if FAST:
        held = stage(i, WARPS * STAGES * STAGE) + i // 32 * (STAGES * STAGE)
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
                # 16 rows of a class are 256 halves; the classes before it have first_row(number) rows a page
                w = weight_ptr + (where.to(tl.int64) * P + first_row(number)) * pages_max * 16
                _mix_class(
                    plane, base, ids, b0, b1, pages - 1, page_nbytes, w.to(tl.pointer_type(tl.int32)), factor, held,
                    i // 32, (i % 32) // 4, i % 4, out, cells, outputs, sums, wanted, number, PB, P, WARPS, FAST,
                )  # fmt: skip

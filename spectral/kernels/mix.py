"""Sums of packed values with weights, over tokens: one warp for up to eight cells of a class, over a split of a
sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.lanes import mix_cell, product, store_two, take, twice, two_words, word


@triton.jit
def _pair(p, q, FAST: tl.constexpr):
    """Two halves that lie apart, as a word."""
    return word(p, 2, FAST) | (word(q, 2, FAST) << 16)


@triton.jit
def _mix_weights(w, number, g, t, CLASS: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr):
    """Weights of four rows of this lane for heads g and g + 8: four words; `w`: of page 0; number: first page of 16
    rows."""
    F: tl.constexpr = 0 if CLASS == 0 else 2 ** (CLASS - 1)
    N: tl.constexpr = 16 * P
    w = w + (g * P + F)
    if CLASS >= 3:
        QUADS: tl.constexpr = 2 ** (CLASS - 3)
        p = w + (number + t // QUADS) * N + 4 * (t % QUADS)
        a0, a2 = two_words(p, FAST)
        a1, a3 = two_words(p + 8 * P, FAST)
        return a0, a1, a2, a3
    elif CLASS == 2:
        p = w + (number + 2 * t) * N
        q = p + 8 * P
        return word(p, 4, FAST), word(q, 4, FAST), word(p + N, 4, FAST), word(q + N, 4, FAST)
    else:
        p = w + (number + 4 * t) * N
        q = p + 8 * P
        return (
            _pair(p, p + N, FAST),
            _pair(q, q + N, FAST),
            _pair(p + 2 * N, p + 3 * N, FAST),
            _pair(q + 2 * N, q + 3 * N, FAST),
        )


@triton.jit
def _four_rows(bases, BITS: tl.constexpr, CLASS: tl.constexpr, FAST: tl.constexpr):
    """Words of the lane's four rows of a cell; bases: pointers to the lane's quarter, of one, two or four pages."""
    U: tl.constexpr = max(1, BITS // 2)
    if CLASS >= 3:  # four rows one after another
        if U == 1:
            return (word(bases[0], 4, FAST),)
        elif U == 2:
            return two_words(bases[0], FAST)
        else:
            return two_words(bases[0], FAST) + two_words(bases[0] + 8, FAST)
    elif CLASS == 2:  # two and two
        if U == 1:
            return (word(bases[0], 2, FAST) | (word(bases[1], 2, FAST) << 16),)
        elif U == 2:
            return word(bases[0], 4, FAST), word(bases[1], 4, FAST)
        else:
            return two_words(bases[0], FAST) + two_words(bases[1], FAST)
    else:
        r0, r1 = word(bases[0], U, FAST), word(bases[1], U, FAST)
        r2, r3 = word(bases[2], U, FAST), word(bases[3], U, FAST)
        if U == 1:
            return (r0 | (r1 << 8) | (r2 << 16) | (r3 << 24),)
        elif U == 2:
            return r0 | (r1 << 16), r2 | (r3 << 16)
        else:
            return r0, r1, r2, r3


@triton.jit
def _pages(ids, number, last, t, CLASS: tl.constexpr, FAST: tl.constexpr):
    """Ids of the pages of the lane's four rows: one, two or four."""
    if CLASS >= 3:
        return (word(ids + tl.minimum(number + t // (2 ** (CLASS - 3)), last), 4, FAST),)
    elif CLASS == 2:
        n = number + 2 * t
        return word(ids + tl.minimum(n, last), 4, FAST), word(ids + tl.minimum(n + 1, last), 4, FAST)
    else:
        n = number + 4 * t
        return (
            word(ids + tl.minimum(n, last), 4, FAST),
            word(ids + tl.minimum(n + 1, last), 4, FAST),
            word(ids + tl.minimum(n + 2, last), 4, FAST),
            word(ids + tl.minimum(n + 3, last), 4, FAST),
        )


@triton.jit
def _quarters(base, id, page_nbytes, tt, t, BITS: tl.constexpr, CLASS: tl.constexpr):
    """Pointers to the lane's quarter (of the first cell) in the pages of its four rows."""
    U: tl.constexpr = max(1, BITS // 2)
    if CLASS >= 3:
        QUADS: tl.constexpr = 2 ** (CLASS - 3)
        p = base + (tt * QUADS + t % QUADS) * (4 * U)
    elif CLASS == 2:
        p = base + tt * (2 * U)
    else:
        p = base + tt * U
    out = ()
    for i in tl.static_range(len(id)):
        out = out + (p + id[i].to(tl.int64) * page_nbytes,)
    return out


@triton.jit
def _item_rows(bases, cells, BITS: tl.constexpr, CLASS: tl.constexpr, CELLS: tl.constexpr, FAST: tl.constexpr):
    """Words of the lane's four rows of all cells of an item, cell after cell (and of what lies behind a short item)."""
    ROWS: tl.constexpr = 1 if CLASS == 0 else 2 ** (CLASS - 1)
    SIZE: tl.constexpr = 4 * ROWS * max(1, BITS // 2)
    x = ()
    for cell in tl.static_range(CELLS):
        moved = ()
        for i in tl.static_range(len(bases)):
            if FAST:
                moved = moved + (bases[i] + cell * SIZE,)
            else:
                moved = moved + (bases[i] + tl.maximum(tl.minimum(cell, cells - 1), 0) * SIZE,)
        x = x + _four_rows(moved, BITS, CLASS, FAST)
    return x


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
def _place(n, b0, b1, warp, PER: tl.constexpr, STEP: tl.constexpr, PB: tl.constexpr, WARPS: tl.constexpr):
    """Block and first page of step n of a warp; the block is b1 where the warp has none left."""
    blk = tl.minimum(b0 + (n // PER) * WARPS + warp, b1)
    return blk, blk * PB + (n % PER) * STEP


@triton.jit
def _weighted(w, factor, blk, b1, number, g, t, CLASS: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr):
    """Weights of the lane's rows and their block's factors, as they lie: six words. Nothing weighs beyond the split."""
    some = blk < b1
    f = factor + tl.minimum(blk, b1 - 1) * 16 + g
    f0 = tl.where(some, word(f, 4, FAST), 0)
    f1 = tl.where(some, word(f + 8, 4, FAST), 0)
    return _mix_weights(w, tl.where(some, number, 0), g, t, CLASS, P, FAST) + (f0, f1)


@triton.jit
def _mix(
    base, ids, b0, b1, last, page_nbytes, w, factor, warp, g, t, out, cells, outputs, sums, wanted,
    BITS: tl.constexpr, CLASS: tl.constexpr, CELLS: tl.constexpr, PB: tl.constexpr, P: tl.constexpr,
    WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One item of one plane and class over blocks b0 .. b1 - 1 of a sequence: warps take turns with blocks.

    What a step needs is loaded a step ahead, page ids two.
    """
    ROWS: tl.constexpr = 1 if CLASS == 0 else 2 ** (CLASS - 1)
    STEP: tl.constexpr = 16 // ROWS  # pages that make 16 rows
    PER: tl.constexpr = PB // STEP
    TILES: tl.constexpr = 4 if BITS == 1 else 2
    WORDS: tl.constexpr = max(1, BITS // 2)
    N: tl.constexpr = 32 * WARPS
    m = _masks(g % 2, BITS)
    c = (tl.zeros([N], tl.float32),) * (CELLS * TILES * 4)
    total = (tl.zeros([N], tl.float32),) * 8
    one = tl.full([N], 0x00010001, tl.int32)
    steps = (b1 - b0 + WARPS - 1) // WARPS * PER
    blk, number = _place(0, b0, b1, warp, PER, STEP, PB, WARPS)
    id = _pages(ids, number, last, t, CLASS, FAST)
    x = _item_rows(_quarters(base, id, page_nbytes, g // 2, t, BITS, CLASS), cells, BITS, CLASS, CELLS, FAST)
    a = _weighted(w, factor, blk, b1, number, g, t, CLASS, P, FAST)
    blk, number = _place(1, b0, b1, warp, PER, STEP, PB, WARPS)
    id = _pages(ids, number, last, t, CLASS, FAST)
    for n in range(steps):
        x1 = _item_rows(_quarters(base, id, page_nbytes, g // 2, t, BITS, CLASS), cells, BITS, CLASS, CELLS, FAST)
        a1 = _weighted(w, factor, blk, b1, number, g, t, CLASS, P, FAST)
        blk, number = _place(n + 2, b0, b1, warp, PER, STEP, PB, WARPS)
        id = _pages(ids, number, last, t, CLASS, FAST)
        s = (product(a[0], a[4], FAST), product(a[1], a[5], FAST), product(a[2], a[4], FAST), product(a[3], a[5], FAST))
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
        total = mix_cell(total, (one * 0x101,), s, (one, one), cells >= 0, 2, WARPS, FAST)
        x = x1
        a = a1
    i = tl.arange(0, 32)
    p0 = out + (i // 4) * outputs + 4 * (i % 4)
    one = tl.full([32], 1, tl.int32)
    for cell in tl.static_range(CELLS):
        keep = one * (cells > cell)
        for n in tl.static_range(TILES):
            p = p0 + 8 * TILES * cell + 16 * (n // 2) + 2 * (n % 2)
            s0 = _all_warps(c[4 * (TILES * cell + n)], WARPS)
            s1 = _all_warps(c[4 * (TILES * cell + n) + 1], WARPS)
            s2 = _all_warps(c[4 * (TILES * cell + n) + 2], WARPS)
            s3 = _all_warps(c[4 * (TILES * cell + n) + 3], WARPS)
            store_two(p, s0, s1, keep, FAST)
            store_two(p + 8 * outputs, s2, s3, keep, FAST)
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
    plane, base, ids, b0, b1, last, page_nbytes, w, factor, warp, g, t, out, cells, outputs, sums, wanted,
    CLASS: tl.constexpr, PB: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    if plane == 0:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, warp, g, t, out, cells, outputs, sums, wanted,
            8, CLASS, 4, PB, P, WARPS, FAST,
        )  # fmt: skip
    if plane == 1:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, warp, g, t, out, cells, outputs, sums, wanted,
            4, CLASS, 8, PB, P, WARPS, FAST,
        )  # fmt: skip
    if plane == 2:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, warp, g, t, out, cells, outputs, sums, wanted,
            2, CLASS, 8, PB, P, WARPS, FAST,
        )  # fmt: skip
    if plane == 3:
        _mix(
            base, ids, b0, b1, last, page_nbytes, w, factor, warp, g, t, out, cells, outputs, sums, wanted,
            1, CLASS, 4, PB, P, WARPS, FAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "units", "splits", "split_blocks"])
def factor_kernel(
    count_ptr, max_ptr, factor_ptr, top_ptr,
    blocks, units, splits, split_blocks,
    GROUPS: tl.constexpr, PB: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """What the weights of each block of a split are too large or small by: two equal halves in a word, and the
    split's largest.

    factor_ptr: int32 [sequence, unit, head groups, blocks, 16]; top_ptr: fp32 [sequence, split, unit, head groups,
    16]. SB: a power of two, at least split_blocks.
    """
    unit = tl.program_id(0)  # and head group
    split = tl.program_id(1)
    seq = tl.program_id(2)
    b0 = split * split_blocks
    b1 = tl.minimum(b0 + split_blocks, (tl.load(count_ptr + seq) + PB - 1) // PB)
    if b0 < b1:
        b = b0 + tl.arange(0, SB)
        head = tl.arange(0, 16)
        place = ((seq * units * GROUPS + unit) * blocks + b[:, None]) * 16 + head[None, :]
        m = tl.load(max_ptr + place, mask=(b < b1)[:, None], other=float("-inf"))
        top = tl.max(m, 0)
        f = twice(tl.exp2(m - top[None, :]))
        tl.store(factor_ptr + place, f, mask=(b < b1)[:, None])
        tl.store(top_ptr + ((seq * splits + split) * units * GROUPS + unit) * 16 + head, top)


@triton.jit(
    do_not_specialize=[
        "first_item", "table_stride", "page_nbytes", "blocks", "pages_max", "units", "splits", "split_blocks",
    ]
)  # fmt: skip
def mix_kernel(
    pages_ptr, table_ptr, count_ptr, item_ptr, weight_ptr, factor_ptr, out_ptr, sum_ptr,
    first_item, table_stride, page_nbytes, blocks, pages_max, units, splits, outputs, split_blocks,
    GROUPS: tl.constexpr, CLASS: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One item of a class over one split of a sequence's blocks, for 16 query heads.

    out_ptr: fp32 [sequence, split, head groups, 16, outputs]: sums of weight times field; sum_ptr: fp32 [sequence,
    split, unit, head groups, CLASSES, 16]: of the weights of a class's rows.
    """
    entry = item_ptr + (first_item + tl.program_id(0) // GROUPS) * 8
    part = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    seq = tl.program_id(2)
    pages = tl.load(count_ptr + seq)
    b0 = split * split_blocks
    b1 = tl.minimum(b0 + split_blocks, (pages + PB - 1) // PB)
    if b0 < b1:
        unit = tl.load(entry)
        plane = tl.load(entry + 2)
        base = pages_ptr + tl.load(entry + 3)
        cells = tl.load(entry + 4)
        column = tl.load(entry + 5)
        wanted = tl.load(entry + 6)
        i = tl.arange(0, 32 * WARPS)
        where = (seq * units + unit) * GROUPS + part
        w = weight_ptr + where.to(tl.int64) * pages_max * (16 * P)
        factor = factor_ptr + where * blocks * 16
        sums = sum_ptr + (((seq * splits + split) * units + unit) * GROUPS + part) * (CLASSES * 16)
        out = out_ptr + (((seq * splits + split) * GROUPS + part) * 16).to(tl.int64) * outputs + column
        ids = table_ptr + seq * table_stride
        _mix_class(
            plane, base, ids, b0, b1, pages - 1, page_nbytes, w, factor, i // 32, (i % 32) // 4, i % 4, out, cells,
            outputs, sums, wanted, CLASS, PB, P, WARPS, FAST,
        )  # fmt: skip

"""Scores of packed pages, and weights from them: one program for a block of pages of one sequence and unit.

Codes are read for all query heads of a unit. The scores of a page's frequencies become scores of its tokens, and
those weights relative to the block's largest, as frequencies again: what spectral.kernels.mix sums the codes with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.dct import dct
from spectral.kernels.lanes import halves, prefetch, score_rows, store_two, two_words, word

FIELD_UNIT = tl.constexpr(2.0**20)
"""2^24, which fields lack, over SCORE_UNIT, which their factors have too much."""


@triton.jit
def _quarter_rows(quarter, BITS: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr):
    """All rows of the lane's quarter of a cell, as words."""
    NBYTES: tl.constexpr = ROWS * max(1, BITS // 2)
    if NBYTES <= 4:
        return (word(quarter, NBYTES, FAST),)
    else:
        x = ()
        for i in tl.static_range(NBYTES // 8):
            x = x + two_words(quarter + 8 * i, FAST)
        return x


@triton.jit
def _operands(quarter, k0, k1, q0, q1, factor, BITS: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr):
    """Words of a cell, the query's latents of its runs, and their factors."""
    x = _quarter_rows(quarter, BITS, ROWS, FAST)
    a0, a2 = two_words(q0 + k0, FAST)
    a1, a3 = two_words(q1 + k0, FAST)
    a = (a0, a1, a2, a3)
    f = two_words(factor, FAST)
    if BITS == 1:
        b0, b2 = two_words(q0 + k1, FAST)
        b1, b3 = two_words(q1 + k1, FAST)
        a = a + (b0, b1, b2, b3)
        f = f + two_words(factor + 16, FAST)
    return x, a, f


@triton.jit
def _strip_scores(
    c, page, q0, q1, t, strip_ptr, run_ptr, factor_ptr,
    BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores of a class's rows through one of its planes."""
    U: tl.constexpr = max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    start = tl.load(strip_ptr)
    cells = tl.load(strip_ptr + 1)
    run = tl.load(strip_ptr + 2)
    if cells > 0:
        quarter = page + start + t * (ROWS * U)
        runs = run_ptr + run
        factor = factor_ptr + run * 16 + 4 * t
        x, a, f = _operands(quarter, tl.load(runs), tl.load(runs + RUNS - 1), q0, q1, factor, BITS, ROWS, FAST)
        for cell in range(1, cells):
            k0 = tl.load(runs + cell * RUNS)
            k1 = tl.load(runs + cell * RUNS + RUNS - 1)
            x1, a1, f1 = _operands(
                quarter + cell * (4 * ROWS * U), k0, k1, q0, q1, factor + cell * (16 * RUNS), BITS, ROWS, FAST
            )
            c = score_rows(c, x, a, f, BITS, ROWS, WARPS, FAST)
            x = x1
            a = a1
            f = f1
        c = score_rows(c, x, a, f, BITS, ROWS, WARPS, FAST)
    return c


@triton.jit
def _class_scores(
    page, q0, q1, t, const0, const1, strip_ptr, run_ptr, factor_ptr,
    CLASS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores of one class's rows: 4 numbers a row (heads g and g + 8, pages 2 t and 2 t + 1 of the octet)."""
    ROWS: tl.constexpr = 1 if CLASS == 0 else 2 ** (CLASS - 1)
    N: tl.constexpr = 4 * ROWS
    c = (tl.zeros([32 * WARPS], tl.float32),) * N
    s = strip_ptr + CLASS * 16
    c = _strip_scores(c, page, q0, q1, t, s, run_ptr, factor_ptr, 8, ROWS, WARPS, FAST)
    c = _strip_scores(c, page, q0, q1, t, s + 4, run_ptr, factor_ptr, 4, ROWS, WARPS, FAST)
    c = _strip_scores(c, page, q0, q1, t, s + 8, run_ptr, factor_ptr, 2, ROWS, WARPS, FAST)
    c = _strip_scores(c, page, q0, q1, t, s + 12, run_ptr, factor_ptr, 1, ROWS, WARPS, FAST)
    k0 = tl.load(const0 + CLASS)
    k1 = tl.load(const1 + CLASS)
    out = ()
    for row in tl.static_range(ROWS):
        out = out + (
            c[4 * row] * FIELD_UNIT - k0,
            c[4 * row + 1] * FIELD_UNIT - k0,
            c[4 * row + 2] * FIELD_UNIT - k1,
            c[4 * row + 3] * FIELD_UNIT - k1,
        )
    return out


@triton.jit
def _column(s, i: tl.constexpr, P: tl.constexpr):
    """Number i of every row."""
    out = ()
    for row in tl.static_range(P):
        out = out + (s[4 * row + i],)
    return out


@triton.jit
def _largest(x, P: tl.constexpr):
    top = x[0]
    for i in tl.static_range(1, P):
        top = tl.maximum(top, x[i])
    return top


@triton.jit
def _over_lanes(x, WARPS: tl.constexpr):
    """The largest over the lanes t of a head and over warps, for every lane."""
    x = tl.max(tl.max(tl.reshape(x, [WARPS, 8, 4]), 2), 0)
    return tl.reshape(tl.broadcast_to(x[None, :, None], [WARPS, 8, 4]), [32 * WARPS])


@triton.jit
def _softcapped(x, P: tl.constexpr, SOFTCAP: tl.constexpr):
    """Gemma's c tanh(s / c), all in units of log2."""
    out = ()
    for i in tl.static_range(P):
        z = tl.exp2(tl.abs(x[i]) * (-2.8853900817779268 / SOFTCAP))
        out = out + (tl.where(x[i] < 0, -SOFTCAP, SOFTCAP) * (1 - z) / (1 + z),)
    return out


@triton.jit
def _tokens(s, i: tl.constexpr, mean, valid, P: tl.constexpr, SOFTCAP: tl.constexpr, FAST: tl.constexpr):
    """Scores of a page's tokens for one head, -inf where there is no page."""
    x = dct(_column(s, i, P), P, True, FAST)
    out = ()
    for k in tl.static_range(P):
        out = out + (x[k] + mean,)
    if SOFTCAP > 0:
        out = _softcapped(out, P, SOFTCAP)
    masked = ()
    for k in tl.static_range(P):
        masked = masked + (tl.where(valid, out[k], float("-inf")),)
    return masked


@triton.jit
def _store_weights(x, top, place, P: tl.constexpr, FAST: tl.constexpr):
    """Weights relative to `top` as frequencies, fp16, one after another at `place`."""
    e = ()
    for k in tl.static_range(P):
        e = e + (tl.exp2(x[k] - top),)
    w = dct(e, P, False, FAST)
    place = place.to(tl.pointer_type(tl.float32))
    one = tl.full(top.shape, 1, tl.int32)
    for k in tl.static_range(P // 4):
        low, high = _two_halves(w[4 * k], w[4 * k + 1]), _two_halves(w[4 * k + 2], w[4 * k + 3])
        store_two(place + 2 * k, low, high, one, FAST)


@triton.jit
def _two_halves(x, y):
    """Two numbers as halves of one, to be stored."""
    return halves(x, y).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["table_stride", "page_nbytes", "blocks", "pages_max", "units", "heads"])
def score_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, strip_ptr, run_ptr, factor_ptr, weight_ptr, max_ptr,
    table_stride, page_nbytes, q_head_stride, q_row, blocks, pages_max, units, heads,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr,
    SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One block (8 pages a warp) of one sequence, unit and 16 of its query heads.

    q_ptr: fp16 [KV heads][sequence, block, query head of the group][row of R numbers]; const_ptr: fp32 [sequence,
    block, query heads, 8]: by class what all codes are too high by; at 7 the mean's score. unit_ptr: int32 [units,
    4]: first query head of a unit, how many, offset of its bytes in the page, how many. GROUPS: of 16 query heads, in
    the largest unit.
    weight_ptr: fp16 [sequence, unit, head groups, pages_max, 16 heads, P]; max_ptr: fp32 [sequence, unit, head
    groups, blocks, 16].
    """
    PB: tl.constexpr = 8 * WARPS
    unit = tl.program_id(0) // GROUPS
    part = tl.program_id(0) % GROUPS
    blk = tl.program_id(1)
    seq = tl.program_id(2)
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        i = tl.arange(0, 32 * WARPS)
        g = (i % 32) // 4
        t = i % 4
        octet = 8 * (i // 32)
        number = octet + g  # the page whose codes this lane reads
        id = tl.load(table_ptr + seq * table_stride + blk * PB + tl.minimum(number, count - 1)).to(tl.int64)
        page = pages_ptr + id * page_nbytes
        begin = tl.load(unit_ptr + unit * 4 + 2)
        for line in range(0, tl.load(unit_ptr + unit * 4 + 3), 512):
            prefetch(page + begin + line + 128 * t, FAST)
        first = tl.load(unit_ptr + unit * 4)
        own = tl.load(unit_ptr + unit * 4 + 1)
        head0 = first + tl.minimum(part * 16 + g, own - 1)
        head1 = first + tl.minimum(part * 16 + g + 8, own - 1)
        row = (seq * blocks + blk) * GROUP
        q0 = q_ptr + (head0 // GROUP).to(tl.int64) * q_head_stride + (row + head0 % GROUP).to(tl.int64) * q_row
        q1 = q_ptr + (head1 // GROUP).to(tl.int64) * q_head_stride + (row + head1 % GROUP).to(tl.int64) * q_row
        q0 += 4 * t
        q1 += 4 * t
        const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
        const0 = const + head0 * 8
        const1 = const + head1 * 8
        strips = strip_ptr + unit * (CLASSES * 16)
        s = _class_scores(page, q0, q1, t, const0, const1, strips, run_ptr, factor_ptr, 0, WARPS, FAST)
        s = s + _class_scores(page, q0, q1, t, const0, const1, strips, run_ptr, factor_ptr, 1, WARPS, FAST)
        s = s + _class_scores(page, q0, q1, t, const0, const1, strips, run_ptr, factor_ptr, 2, WARPS, FAST)
        s = s + _class_scores(page, q0, q1, t, const0, const1, strips, run_ptr, factor_ptr, 3, WARPS, FAST)
        if CLASSES > 4:
            s = s + _class_scores(page, q0, q1, t, const0, const1, strips, run_ptr, factor_ptr, 4, WARPS, FAST)
        mean0, mean1 = tl.load(const0 + 7), tl.load(const1 + 7)
        number = octet + 2 * t  # the first of the two pages whose scores this lane holds
        v0, v1 = number < count, number + 1 < count
        x0, x1 = _tokens(s, 0, mean0, v0, P, SOFTCAP, FAST), _tokens(s, 1, mean0, v1, P, SOFTCAP, FAST)
        x2, x3 = _tokens(s, 2, mean1, v0, P, SOFTCAP, FAST), _tokens(s, 3, mean1, v1, P, SOFTCAP, FAST)
        top0 = _over_lanes(tl.maximum(_largest(x0, P), _largest(x1, P)), WARPS)
        top1 = _over_lanes(tl.maximum(_largest(x2, P), _largest(x3, P)), WARPS)
        where = (seq * units + unit) * GROUPS + part
        place = weight_ptr + (where.to(tl.int64) * pages_max + blk * PB + number) * (16 * P) + g * P
        _store_weights(x0, top0, place, P, FAST)
        _store_weights(x1, top0, place + 16 * P, P, FAST)
        _store_weights(x2, top1, place + 8 * P, P, FAST)
        _store_weights(x3, top1, place + 24 * P, P, FAST)
        place = max_ptr + (where * blocks + blk) * 16 + g
        tl.store(place, top0, mask=i % 4 + i // 32 == 0)
        tl.store(place + 8, top1, mask=i % 4 + i // 32 == 0)

"""From scores of pages whose rows are tokens to weights, for spectral.kernels.flat."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import FIELD_UNIT
from spectral.kernels.lanes import sum_rows, take
from spectral.kernels.weights import largest, over_quad, quad, softcapped, store_page


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
    top = over_quad(tl.maximum(largest(x, 16), largest(y, 16)), False, WARPS, FAST) * UNIT
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
def _second_half_first(x, FAST: tl.constexpr):
    """Sixteen rows of a page in their order, where lanes have read the second half first (_rows)."""
    if FAST:
        return take(x, 8, 8) + take(x, 0, 8)
    else:
        return x


@triton.jit
def leave_weights(
    c, shift0, shift1, number, count, blk, place, max_ptr, total_ptr, block, i,
    SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Weights of a block, their sums and what they are relative to. Of a page four rows come after four, so that a warp
    fills whole lines: [rows 4 k ..][g][rows of head g, then of head g + 8].

    number: of the lane's first page in the block; place: where the row's weights are left; block: the block's number
    among all.
    """
    g, t = i % 32 // 4, i % 4
    here, next = number < count, number + 1 < count
    u0, u1, top0 = _weights(c, 0, shift0, here, next, SOFTCAP, WARPS, FAST)
    v0, v1, top1 = _weights(c, 2, shift1, here, next, SOFTCAP, WARPS, FAST)
    u1, v1 = _second_half_first(u1, FAST), _second_half_first(v1, FAST)
    page = place + (blk * (8 * WARPS) + number) * 128 + g * 4
    store_page(page, u0, v0, 16, 32, FAST)
    store_page(page + 128, u1, v1, 16, 32, FAST)
    total = (tl.zeros([32 * WARPS], tl.float32),) * 4
    total = _sum_page(_sum_page(total, u0, v0, WARPS, FAST), u1, v1, WARPS, FAST)
    at = (block * WARPS + i // 32) * 16 + g
    tl.store(max_ptr + at, top0, mask=t == 0)
    tl.store(max_ptr + at + 8, top1, mask=t == 0)
    tl.store(total_ptr + at, total[0] * 16777216.0, mask=t == 0)
    tl.store(total_ptr + at + 8, total[2] * 16777216.0, mask=t == 0)

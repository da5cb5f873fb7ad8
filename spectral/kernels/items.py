"""An item of the mix kernel: up to eight cells of one plane and class, and what one lane has of them.

Products over tokens take 16 rows at once: lane (g, t) of a warp has rows 4 t .. 4 t + 3, and which latents it
multiplies is free. So it takes whole cells, or halves of them where an item has four (8 bits, and 1, whose cells have
two runs): every byte is loaded once, and all its fields are used by the lane that has it. Bytes go straight into
registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import item_quarters, kind_rows
from spectral.kernels.words import two_words, word


@triton.constexpr_function
def part_nbytes(bits, kind):
    """Bytes of a lane that lie together: of one page, and of rows of eight and more in one quarter."""
    unit, rows = max(1, int(bits) // 2), kind_rows(kind)
    return 4 * unit if int(rows) >= 8 else item_quarters(bits) * min(4, int(rows)) * unit


@triton.jit
def lane_offset(g, t, BITS: tl.constexpr, KIND: tl.constexpr):
    """Where a lane's bytes begin in an item."""
    ROWS: tl.constexpr = kind_rows(KIND)
    U: tl.constexpr = max(1, BITS // 2)
    if item_quarters(BITS) == 4:
        at = g * (4 * ROWS * U)
    else:  # quarters 0 and 1, or 2 and 3
        at = g * (2 * ROWS * U)
    if ROWS >= 8:
        at += t % (ROWS // 4) * (4 * U)
    return at


@triton.jit
def page_ids(ids, number, last, t, KIND: tl.constexpr, FAST: tl.constexpr):
    """Ids of the pages of the lane's four rows: one, two or four. number: the first page of the sixteen rows."""
    if KIND >= 3:
        return (word(ids + tl.minimum(number + t // (2 ** (KIND - 3)), last), 4, FAST),)
    elif KIND == 2:
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
def _part(p, NBYTES: tl.constexpr, FAST: tl.constexpr):
    if NBYTES <= 4:
        return (word(p, NBYTES, FAST),)
    else:
        x = ()
        for i in tl.static_range(NBYTES // 8):  # eight at once: what pages are aligned to
            x = x + two_words(p + 8 * i, FAST)
        return x


@triton.jit
def lane_rows(base, id, page_nbytes, BITS: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr):
    """Words of a lane's rows: part after part, each of a page or (rows of eight and more) a quarter; parts of one or
    two bytes have a word each. base: pointer to the lane's bytes in page 0."""
    NBYTES: tl.constexpr = part_nbytes(BITS, KIND)
    x = ()
    for i in tl.static_range(len(id)):
        p = base + id[i].to(tl.int64) * page_nbytes
        if KIND >= 4:
            for q in tl.static_range(item_quarters(BITS)):
                x = x + _part(p + (kind_rows(KIND) // 4 * q) * NBYTES, NBYTES, FAST)
        else:
            x = x + _part(p, NBYTES, FAST)
    return x

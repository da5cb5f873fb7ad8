"""An item of the mix kernel: up to eight cells of one plane and class. How its bytes come to a lane, a step of 16 rows
at a time: through the warp's ring of stages (spectral.kernels.staging), or by pointers in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import class_rows, log2
from spectral.kernels.lanes import two_words, word
from spectral.kernels.staging import close_stage, copy_pieces, held_four, held_two, held_word

STAGES = tl.constexpr(4)
STAGE = tl.constexpr(1152 + 512)
"""Bytes of a stage: an item's pages, with what keeps them in different banks, and weights."""


@triton.constexpr_function
def item_nbytes(bits, cells, number):
    """Bytes of an item in one page."""
    return int(cells) * 4 * class_rows(number) * max(1, int(bits) // 2)


@triton.constexpr_function
def piece_nbytes(bits, number):
    """Bytes of one copy: what an item's start is aligned to, at most 8."""
    return min(8, 4 * class_rows(number) * max(1, int(bits) // 2))


@triton.constexpr_function
def pitch(bits, cells, number):
    """Bytes from page to page in a stage: lanes that read different pages at once meet different banks."""
    return item_nbytes(bits, cells, number) + max(4 * class_rows(number), piece_nbytes(bits, number))


@triton.constexpr_function
def copies(bits, cells, number):
    """Pieces that a lane copies in a step."""
    pages = 16 // class_rows(number)
    return pages * item_nbytes(bits, cells, number) // (32 * piece_nbytes(bits, number))


@triton.constexpr_function
def pieces(bits, cells, number):
    """Pieces of an item in a page."""
    return item_nbytes(bits, cells, number) // piece_nbytes(bits, number)


@triton.jit
def _joined_rows(r0, r1, r2, r3, U: tl.constexpr):
    """Words of four rows of U bytes each."""
    if U == 1:
        return (r0 | (r1 << 8) | (r2 << 16) | (r3 << 24),)
    elif U == 2:
        return r0 | (r1 << 16), r2 | (r3 << 16)
    else:
        return r0, r1, r2, r3


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
        return _joined_rows(r0, r1, r2, r3, U)


@triton.jit
def _held_rows(at, PITCH: tl.constexpr, BITS: tl.constexpr, CLASS: tl.constexpr):
    """The same from a stage; at: of the lane's quarter in its first page."""
    U: tl.constexpr = max(1, BITS // 2)
    if CLASS >= 3:
        if U == 1:
            return (held_word(at, 4),)
        elif U == 2:
            return held_two(at)
        else:
            return held_four(at)
    elif CLASS == 2:
        if U == 1:
            return (held_word(at, 2) | (held_word(at + PITCH, 2) << 16),)
        elif U == 2:
            return held_word(at, 4), held_word(at + PITCH, 4)
        else:
            return held_two(at) + held_two(at + PITCH)
    else:
        r0, r1 = held_word(at, U), held_word(at + PITCH, U)
        r2, r3 = held_word(at + 2 * PITCH, U), held_word(at + 3 * PITCH, U)
        return _joined_rows(r0, r1, r2, r3, U)


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
def copied_pages(ids, number, last, lane, BITS: tl.constexpr, CELLS: tl.constexpr, CLASS: tl.constexpr):
    """Ids of the pages from which a lane copies."""
    first = number + lane // pieces(BITS, CELLS, CLASS)
    out = ()
    for k in tl.static_range(copies(BITS, CELLS, CLASS)):
        out = out + (word(ids + tl.minimum(first + k * 32 // pieces(BITS, CELLS, CLASS), last), 4, True),)
    return out


@triton.jit
def copy_step(
    base, id, page_nbytes, held, w, number, step, lane, BITS: tl.constexpr, CELLS: tl.constexpr, CLASS: tl.constexpr
):
    """Ask for what one step needs: the item's bytes of its pages, and its weights."""
    PIECE: tl.constexpr = piece_nbytes(BITS, CLASS)
    PIECES: tl.constexpr = pieces(BITS, CELLS, CLASS)
    PITCH: tl.constexpr = pitch(BITS, CELLS, CLASS)
    slot = held + (step & (STAGES - 1)) * STAGE
    at = lane % PIECES * PIECE
    to = slot + (lane // PIECES * PITCH + at)
    source = base.to(tl.int64) + at
    for k in tl.static_range(len(id)):  # 32 pieces further: some pages, or a part of one
        copy_pieces(
            to + (k * 32 // PIECES * PITCH + k * 32 % PIECES * PIECE),
            (source + id[k].to(tl.int64) * page_nbytes + k * 32 % PIECES * PIECE,),
            1, PIECE, 0, 0, 0,
        )  # fmt: skip
    source = (w + lane * 4 + (number >> log2(16 // class_rows(CLASS))) * 128).to(tl.int64)
    copy_pieces(slot + (1152 + lane * 16), (source,), 1, 16, 0, 0, 0)
    close_stage(lane)


@triton.jit
def item_step(
    base, ids, number, last, page_nbytes, held, w, n, g, t, cells,
    BITS: tl.constexpr, CLASS: tl.constexpr, CELLS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Words of the lane's four rows of all cells of an item, and the rows' weights."""
    ROWS: tl.constexpr = class_rows(CLASS)
    U: tl.constexpr = max(1, BITS // 2)
    if FAST:
        slot = held + (n & (STAGES - 1)) * STAGE
        PITCH: tl.constexpr = pitch(BITS, CELLS, CLASS)
        if CLASS >= 3:
            QUADS: tl.constexpr = 2 ** (CLASS - 3)
            at = slot + t // QUADS * PITCH + (g // 2 * QUADS + t % QUADS) * (4 * U)
        elif CLASS == 2:
            at = slot + 2 * t * PITCH + g // 2 * (2 * U)
        else:
            at = slot + 4 * t * PITCH + g // 2 * U
        x = ()
        for cell in tl.static_range(CELLS):
            x = x + _held_rows(at + cell * (4 * ROWS * U), PITCH, BITS, CLASS)
        a0, a2, a1, a3 = held_four(slot + 1152 + (g * 4 + t) * 16)
    else:
        id = _pages(ids, number, last, t, CLASS, FAST)
        x = _item_rows(_quarters(base, id, page_nbytes, g // 2, t, BITS, CLASS), cells, BITS, CLASS, CELLS, FAST)
        p = w + number // (16 // ROWS) * 128 + (g * 4 + t) * 4
        a0, a2 = two_words(p, FAST)
        a1, a3 = two_words(p + 2, FAST)
    return x, (a0, a1, a2, a3)

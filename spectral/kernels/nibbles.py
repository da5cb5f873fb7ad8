"""Products of a few rows with weights of four bits, by lane (spectral.kernels.lanes).

A byte holds two numbers of a line, the first one in its high nibble. A program has a table of all 256 bytes in shared
memory, as pairs of 16-bit codes, once for every lane of a warp, so that lanes never wait for each other there: two
numbers are a byte's place in that table and one access to it. Pairs are what tensor cores multiply with. Codes are
rounded to 16 bits, weights are not: the factor of 64 numbers multiplies their sum, in fp32.

With g = lane // 4 and t = lane % 4 a lane has sixteen numbers t of a block of 64, of lines g and g + 8, and the same
ones of row g of x. Warps of a program share a line's blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.dct import stacked
from spectral.kernels.lanes import replace, take
from spectral.kernels.nibble_lanes import block, line_words, pair, row_words, table_of, two_of_row
from spectral.lean_products import finished
from spectral.overlap import gdc_launch_dependents, gdc_wait

MEMBERS = tl.constexpr(6)
"""Pointers of a matrix: weights, factors, these ones' own factors, codes and offset, bias."""


@triton.jit
def _asked(
    matrices, lines, wanted, t, SETS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, NESTED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """What a lane asks for of STEP blocks from block `wanted` on: its words of each of its lines of SETS matrices, then
    of each the factor of a block as it is stored, and where that is a byte this one's own."""
    PER_LINE: tl.constexpr = SIZE // 64
    at = tl.minimum(wanted, PER_LINE - STEP)
    there = (wanted < PER_LINE).to(tl.int32)
    words, factors, outer = (), (), ()
    for n in tl.static_range(SETS * len(lines)):
        line = lines[n % len(lines)]
        matrix = take(matrices, n // len(lines) * MEMBERS, MEMBERS)
        place = matrix[0] + line.to(tl.int64) * (SIZE // 2) + (at * 32 + t * 8)
        words = words + line_words(place.to(tl.int64), there, STEP, FAST)
        number = line * PER_LINE + tl.minimum(at + t, PER_LINE - 1)
        factors = factors + (tl.load(matrix[1] + number, mask=there != 0),)
        if NESTED:
            outer = outer + (tl.load(matrix[2] + number // 256, mask=there != 0),)
    return words + factors + outer


@triton.jit
def _factors(
    asked, matrices, wanted, t, LINES: tl.constexpr, SETS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """A lane's factors of its lines; zero of blocks that are not its step's."""
    PER_LINE: tl.constexpr = SIZE // 64
    block = tl.minimum(wanted, PER_LINE - STEP) + t
    real = (block >= wanted) & (block < PER_LINE)
    FIRST: tl.constexpr = 2 * STEP * LINES * SETS
    out = ()
    for n in tl.static_range(SETS * LINES):
        factor = asked[FIRST + n]
        if NESTED:
            matrix = take(matrices, n // LINES * MEMBERS, MEMBERS)
            factor = tl.load(matrix[3] + factor.to(tl.int32), mask=real) * asked[FIRST + SETS * LINES + n]
            factor += tl.load(matrix[4])
        out = out + (tl.where(real, factor, 0.0),)
    return out


@triton.jit
def _either(matrices, other: tl.constexpr, chosen):
    """The first matrix, or where `chosen` the one with number `other`, which comes first then."""
    out = ()
    for n in tl.static_range(MEMBERS):
        out = out + (tl.where(chosen, matrices[other * MEMBERS + n], matrices[n]),)
    return out + take(matrices, MEMBERS, 2 * MEMBERS)


@triton.jit(do_not_specialize=["rows", "outputs", "rounds", "second", "third"])
def nibbles_kernel(
    x_ptr, code_ptr,
    w_ptr, absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, bias_ptr,
    w2_ptr, absmax2_ptr, outer2_ptr, outer_code2_ptr, offset2_ptr, bias2_ptr,
    w3_ptr, absmax3_ptr, outer3_ptr, outer_code3_ptr, offset3_ptr, bias3_ptr,
    residual_ptr, out_ptr, rows, outputs, rounds, second, third,
    SIZE: tl.constexpr, STEP: tl.constexpr, SINGLE: tl.constexpr, FACTOR: tl.constexpr, NESTED: tl.constexpr,
    SEVERAL: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Outputs of up to eight rows: x [rows, SIZE], weights as spectral.lean_nibbles.Nibbles has them, residual and out
    [rows, outputs]. GATE: of a matrix of gates and a second one of what they open. SEVERAL: of three matrices, the
    second and the third from programs `second` and `third` on. SINGLE: of one row, of four blocks at least.

    TILES times 16 lines; each warp takes every WARPS-th step of STEP blocks (four, or one of lines that have fewer),
    `rounds` of them (an argument, so that the loop stays one: what is asked for ahead is moved to its use otherwise),
    the next one on its way. EARLY: as spectral.lean_products.row_kernel has it.
    """
    if EARLY:
        gdc_launch_dependents()
    KIND: tl.constexpr = x_ptr.dtype.element_ty
    SETS: tl.constexpr = 2 if GATE > 0 else 1
    LINES: tl.constexpr = 2 * TILES // SETS
    matrices = (
        w_ptr, absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, bias_ptr, w2_ptr, absmax2_ptr, outer2_ptr,
        outer_code2_ptr, offset2_ptr, bias2_ptr, w3_ptr, absmax3_ptr, outer3_ptr, outer_code3_ptr, offset3_ptr,
        bias3_ptr,
    )  # fmt: skip
    program, begin = tl.program_id(0), 0
    if SEVERAL:
        begin = tl.where(program < third, tl.where(program < second, 0, second), third)
        matrices = _either(_either(matrices, 1, program >= second), 2, program >= third)
    first = (program - begin) * (8 * LINES)
    lane = tl.arange(0, 32 * WARPS)
    g, t, wanted = lane % 32 // 4, lane % 4, lane // 32 * STEP
    lines = ()
    for n in tl.static_range(LINES):
        line = first + 8 * n + g
        lines = lines + ((line if EVEN else tl.minimum(line, outputs - 1)),)
    asked = _asked(matrices, lines, wanted, t, SETS, SIZE, STEP, NESTED, FAST)
    table = table_of(code_ptr, lane, KIND, FACTOR, WARPS, FAST)
    if EARLY:
        gdc_wait()
    if SINGLE:
        x_line = x_ptr + g // 4 * 64 + t * 16 + g % 4 * 4
    else:
        x_line = x_ptr + tl.minimum(g, rows - 1) * SIZE + t * 16
    sums = ()
    for _ in tl.static_range((2 if SINGLE else 4) * TILES):
        sums = sums + (tl.zeros([32 * WARPS], tl.float32),)
    for _ in range(rounds):
        x_step = (x_line + tl.minimum(wanted, SIZE // 64 - STEP) * 64).to(tl.int64)
        factors = _factors(asked, matrices, wanted, t, LINES, SETS, SIZE, STEP, NESTED)
        words = take(asked, 0, 4 * STEP * TILES)
        wanted += STEP * WARPS
        asked = _asked(matrices, lines, wanted, t, SETS, SIZE, STEP, NESTED, FAST)
        sums = _step(sums, words, factors, x_step, table, t, code_ptr, SINGLE, KIND, STEP, FACTOR, TILES, WARPS, FAST)
    finished(
        _together(sums, SINGLE, TILES, WARPS) * (1.0 / FACTOR), matrices[MEMBERS - 1] - begin * (8 * LINES),
        residual_ptr, out_ptr, tl.arange(0, 1 if SINGLE else 8), rows, outputs, 16 * TILES, EVEN, BIAS, GATE, RESIDUAL,
    )  # fmt: skip


@triton.jit
def _step(
    sums, words, factors, x_step, table, t, code_ptr, SINGLE: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr,
    FACTOR: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add the products of STEP blocks to a lane's sums, four a tile, or two of a single row."""
    if SINGLE:
        for j in tl.static_range(0, STEP, 2):
            x = two_of_row(x_step, j, FAST)
            for m in tl.static_range(TILES):
                near = take(words, 4 * STEP * m + 2 * j, 4)
                far = take(words, 4 * STEP * m + 2 * STEP + 2 * j, 4)
                added = pair(
                    take(sums, 2 * m, 2), near, far, x, factors[2 * m], factors[2 * m + 1], table, t, code_ptr, j, KIND,
                    FACTOR, WARPS, FAST,
                )  # fmt: skip
                sums = take(sums, 0, 2 * m) + added + take(sums, 2 * m + 2, 2 * TILES - 2 * m - 2)
    else:
        for j in tl.static_range(STEP):
            x = row_words(x_step, j, FAST)
            for m in tl.static_range(TILES):
                near = take(words, 4 * STEP * m + 2 * j, 2)
                far = take(words, 4 * STEP * m + 2 * STEP + 2 * j, 2)
                added = block(
                    take(sums, 4 * m, 4), near, far, x, factors[2 * m], factors[2 * m + 1], table, code_ptr, j, KIND,
                    FACTOR, WARPS, FAST,
                )  # fmt: skip
                sums = replace(sums, added, 4 * m, 4 * TILES)
    return sums


@triton.jit
def _together(sums, SINGLE: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    """A tuple of a lane's sums as [lines, 8 rows], or [lines, 1]: of all warps."""
    if SINGLE:
        whole = tl.reshape(stacked(sums, 2 * TILES), [WARPS, 8, 4, 2 * TILES])
        return tl.reshape(tl.permute(tl.sum(tl.sum(whole, 2), 0), (1, 0)), [16 * TILES, 1])
    else:
        pairs = ()
        for n in tl.static_range(2 * TILES):
            pairs = pairs + (tl.reshape(tl.join(sums[2 * n], sums[2 * n + 1]), [WARPS, 8, 4, 2]),)
        whole = stacked(pairs, 2 * TILES)  # [warp, g, t, column, tile and half]
        whole = tl.sum(tl.reshape(whole, [WARPS, 8, 8, 2 * TILES]), 0)
        return tl.reshape(tl.permute(whole, (2, 0, 1)), [16 * TILES, 8])

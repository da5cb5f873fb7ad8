"""What one lane of a warp does with packed codes: PTX for NVIDIA GPUs, and the same in plain Triton for the
interpreter.

A field is used where it lies: an fp16 with zero exponent and a field at bits p.. of its mantissa is the (subnormal)
number field * 2^(p - 24), exactly, and tensor cores take it at full speed. So unpacking is a byte permutation and an
AND for two codes; the factors 2^p go into the other operand, or into the sums. Operands are laid out as
`mma.sync.m16n8k16` wants them, with g = lane // 4 and t = lane % 4: A rows g and g + 8, contraction 4 t .. 4 t + 3
(its order is ours to choose); B column g, the same contraction; C rows g and g + 8, columns 2 t and 2 t + 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import item_quarters, item_tiles


@triton.constexpr_function
def mma_text(accumulator: list[str], a: list[str], b: list[str]) -> str:
    c = ", ".join(accumulator)
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{c}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{c}}};"
    )


@triton.constexpr_function
def _score_rows(bits: int, rows: int, pairs: bool) -> str:
    """Operands: C [4 rows], twice; words, a [4 per run]. pairs: of four bits (see `score_rows`)."""
    words, runs = max(1, rows * max(1, bits // 2) // 4), 2 if bits == 1 else 1
    # What leaves latents 0 and 2, or 1 and 3, of a byte that was copied to all four, or of two that were twice.
    masks = {
        1: (0x00040001, 0x00080002, 0x00400010, 0x00800020),
        2: (0x00300003, 0x00C0000C),
        4: (0x000F000F, 0x00F000F0),
    }
    out = [f"${i}" for i in range(4 * rows)]
    base = 8 * rows
    x = [f"${base + i}" for i in range(words)]
    a = [f"${base + words + i}" for i in range(4 * runs)]
    lines = ["{", ".reg .b32 y, b<4>;"]
    for row in range(rows):
        if bits == 8:
            lines += [f"and.b32 b0, {x[row]}, 0x00FF00FF;", f"prmt.b32 b1, {x[row]}, 0, 0x4341;"]
        else:
            at = 2 * (row % 2) if bits == 4 else row % 4
            source, pick = (x[row // 2], f"{at + 1}{at + 1}{at}{at}") if bits == 4 else (x[row // 4], str(at) * 4)
            if pairs:
                lines += [f"prmt.b32 b1, {source}, 0, 0x4{at + 1}4{at};", "and.b32 b0, b1, 0x000F000F;"]
                lines.append(mma_text(out[4 * row : 4 * row + 4], a, ["b0", "b1"]))
                continue
            lines.append(f"prmt.b32 y, {source}, 0, 0x{pick};")
            lines += [f"and.b32 b{i}, y, 0x{mask:08X};" for i, mask in enumerate(masks[bits])]
        for run in range(runs):
            operand = [f"b{2 * run}", f"b{2 * run + 1}"]
            lines.append(mma_text(out[4 * row : 4 * row + 4], a[4 * run : 4 * run + 4], operand))
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def row_place(bits: int, rows: int, quarter: int, row: int) -> int:
    """Byte at which row `row` of a lane's four lies in its words (spectral.kernels.items.lane_rows), of its quarter
    `quarter`; rows: of the class."""
    unit, quarters = max(1, bits // 2), item_quarters(bits)
    if rows >= 4:
        return (4 * quarter + row) * unit
    part = max(4, quarters * rows * unit)
    return row // rows * part + (quarter * rows + row % rows) * unit


@triton.constexpr_function
def _mix_rows(bits: int, rows: int) -> str:
    """Operands: C [4 per tile], twice; words, a [4]. A tile is a field of the lane's quarters, one after another."""
    tiles, quarters = item_tiles(bits), item_quarters(bits)
    words = max(2, 2 * bits) if bits < 8 else 8
    if bits == 1 and rows < 2:
        words = 4
    out = [[f"${4 * n + i}" for i in range(4)] for n in range(tiles)]
    base = 8 * tiles
    x = [f"${base + i}" for i in range(words)]
    a = [f"${base + words + i}" for i in range(4)]
    lines = ["{", ".reg .b32 u<2>, b<2>;"]
    n = 0
    for quarter in range(quarters):
        at = [row_place(bits, rows, quarter, row) for row in range(4)]
        for field in range(8 if bits == 1 else 4):
            for side in (0, 1):
                low, high = at[2 * side], at[2 * side + 1]
                pair = f"{x[low // 4]}, {x[high // 4]}"
                i, j = low % 4, high % 4 + 4
                if bits == 8:
                    lines += [f"prmt.b32 u{side}, {pair}, 0x{j + field:x}{j + field:x}{field:x}{field:x};"]
                    lines += [f"and.b32 b{side}, u{side}, 0x00FF00FF;"]
                    continue
                if bits == 4:
                    if field == 0:
                        lines.append(f"prmt.b32 u{side}, {pair}, 0x{j + 1:x}{j:x}{i + 1:x}{i:x};")
                    elif field == 2:
                        lines.append(f"shr.b32 u{side}, u{side}, 8;")
                    mask = 0x000F000F << 4 * (field % 2)
                else:
                    if field == 0:
                        lines.append(f"prmt.b32 u{side}, {pair}, 0x{j:x}{j:x}{i:x}{i:x};")
                    mask = (0x00010001 if bits == 1 else 0x00030003) << bits * field
                lines.append(f"and.b32 b{side}, u{side}, 0x{mask:08X};")
            lines.append(mma_text(out[n], a, ["b0", "b1"]))
            n += 1
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def score_text(bits, rows, pairs):
    return _score_rows(int(bits), int(rows), bool(pairs))


@triton.constexpr_function
def mix_text(bits, rows):
    return _mix_rows(int(bits), int(rows))


@triton.constexpr_function
def sum_text():
    """Operands: C [4], twice; a [4]: the other operand is the smallest fp16 number everywhere."""
    lines = ["{", ".reg .b32 b;", "mov.b32 b, 0x00010001;"]
    lines.append(mma_text([f"${i}" for i in range(4)], [f"${8 + i}" for i in range(4)], ["b", "b"]))
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def constraints(out, tied, integers):
    """out fp32 results, as many fp32 arguments, then 32-bit integers. Results are written before arguments are read."""
    return ",".join(["=&f"] * int(out) + ["f"] * int(tied) + ["r"] * int(integers))


@triton.constexpr_function
def added(sums, integers):
    """fp32 sums, the same registers as results and as the first arguments, then 32-bit integers. (As registers of their
    own they would be copied wherever loops meet.)"""
    return ",".join(["=&f"] * int(sums) + [str(n) for n in range(int(sums))] + ["r"] * int(integers))


@triton.constexpr_function
def floats(count):
    return (tl.float32,) * int(count)


@triton.jit
def take(x, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT members of a tuple."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (x[FIRST + i],)
    return out


@triton.jit
def replace(x, y, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """A tuple of SIZE members with four of them replaced by y."""
    return take(x, 0, FIRST) + y + take(x, FIRST + 4, SIZE - FIRST - 4)


@triton.jit
def store_numbers(p, a, b, c, d, keep):
    """Four fp32 numbers to sixteen aligned bytes, where `keep` is not zero."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;}",
        "=r,l,f,f,f,f,r",
        [p.to(tl.int64), a, b, c, d, keep],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def halves(x, y):
    """Two numbers as the low and the high half of a word."""
    low = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (y.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def packed(x, y, FAST: tl.constexpr):
    """The same in one instruction."""
    if FAST:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return halves(x, y)


@triton.jit
def half(x, high: tl.constexpr):
    """The low or high half of a word as an fp16 number, in fp32."""
    if high:
        x = x >> 16
    return (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _products(a, b, WARPS: tl.constexpr):
    """a, b [lanes]: sum over t of a(row g, t) b(column g', t): [WARPS, 8, 8]."""
    left = tl.reshape(a, [WARPS, 8, 1, 4])
    right = tl.reshape(b, [WARPS, 1, 8, 4])
    return tl.sum(left * right, 3)


@triton.jit
def mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, WARPS: tl.constexpr):
    """mma.sync.m16n8k16 with fp32 sums, in plain Triton: a, b int32 words of two halves."""
    top = _products(half(a0, False), half(b0, False), WARPS) + _products(half(a0, True), half(b0, True), WARPS)
    top += _products(half(a2, False), half(b1, False), WARPS) + _products(half(a2, True), half(b1, True), WARPS)
    low = _products(half(a1, False), half(b0, False), WARPS) + _products(half(a1, True), half(b0, True), WARPS)
    low += _products(half(a3, False), half(b1, False), WARPS) + _products(half(a3, True), half(b1, True), WARPS)
    d0, d1 = tl.split(tl.reshape(top, [WARPS, 8, 4, 2]))
    d2, d3 = tl.split(tl.reshape(low, [WARPS, 8, 4, 2]))
    N: tl.constexpr = WARPS * 32
    return c0 + tl.reshape(d0, [N]), c1 + tl.reshape(d1, [N]), c2 + tl.reshape(d2, [N]), c3 + tl.reshape(d3, [N])


@triton.jit
def byte(x, at):
    """Byte `at` of a word."""
    return (x >> (8 * at)) & 0xFF


@triton.jit
def times(a, s):
    """Two halves times two halves."""
    return halves(half(a, False) * half(s, False), half(a, True) * half(s, True))


@triton.jit
def product(a, b, FAST: tl.constexpr):
    """Two halves times two halves, as a word."""
    if FAST:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return times(a, b)


@triton.jit
def twice(x):
    """A number as two equal halves."""
    return halves(x, x)


@triton.jit
def score_rows(
    c, x, a, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
    PAIRS: tl.constexpr = False,
):  # fmt: skip
    """Add one cell's part to the scores of its rows.

    PAIRS: of fields of four bits two are left together in a byte, which spares an instruction of four. The second's
    operands then multiply both, and the first's must be less by them.

    Args:
        c: fp32 sums, 4 a row; x: words of the lane's quarter; a: 4 words a run: the query's latents 4 t and 4 t + 2
            of heads g and g + 8, then 4 t + 1 and 4 t + 3, times what their fields stand for.
    """
    if FAST:
        RUNS: tl.constexpr = 2 if BITS == 1 else 1
        WORDS: tl.constexpr = max(1, ROWS * max(1, BITS // 2) // 4)
        c = tl.inline_asm_elementwise(
            score_text(BITS, ROWS, PAIRS),
            added(4 * ROWS, WORDS + 4 * RUNS),
            c + x + a,
            dtype=floats(4 * ROWS),
            is_pure=True,
            pack=1,
        )
    else:
        for row in tl.static_range(ROWS):
            if BITS == 8:
                b0 = x[row] & 0x00FF00FF
                b1 = (x[row] >> 8) & 0x00FF00FF
            elif BITS == 4:
                y = byte(x[row // 2], 2 * (row % 2)) | (byte(x[row // 2], 2 * (row % 2) + 1) << 16)
                b0 = y & 0x000F000F
                b1 = y & (0x00FF00FF if PAIRS else 0x00F000F0)
            else:
                y = byte(x[row // 4], row % 4)
                y = y | (y << 16)
                if BITS == 2:
                    b0 = y & 0x00300003
                    b1 = y & 0x00C0000C
                else:
                    b0 = y & 0x00040001
                    b1 = y & 0x00080002
            r = mma(c[4 * row], c[4 * row + 1], c[4 * row + 2], c[4 * row + 3], a[0], a[1], a[2], a[3], b0, b1, WARPS)
            if BITS == 1:
                r = mma(r[0], r[1], r[2], r[3], a[4], a[5], a[6], a[7], y & 0x00400010, y & 0x00800020, WARPS)
            c = replace(c, r, 4 * row, 4 * ROWS)
    return c


@triton.jit
def _fields(x, row: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """What tensor cores take row `row` of a lane's four for in every tile: fp32 [lanes, TILES]."""
    F: tl.constexpr = 8 if BITS == 1 else 4
    n = tl.arange(0, TILES)[None, :]
    field = x[0][:, None] * 0 + n * 0
    for q in tl.static_range(TILES // F):
        place: tl.constexpr = row_place(BITS, ROWS, q, row)
        own = (x[place // 4][:, None] >> (8 * (place % 4) + BITS * (n % F))) & (2**BITS - 1)
        field = tl.where(n // F == q, own, field)
    position = 0 * n if BITS == 8 else BITS * (n % F) % 8
    return field.to(tl.float32) * (1 << position).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _mixed(c, x, a, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """`mix_rows` in plain Triton, all tiles at once: c is two tensors [WARPS, 8, 8 columns, TILES], of heads g and of
    heads g + 8."""
    TILES: tl.constexpr = item_tiles(BITS)
    top, low = c
    for row in tl.static_range(4):
        number = tl.reshape(_fields(x, row, TILES, BITS, ROWS), [WARPS, 1, 8, 4, TILES])
        first = tl.reshape(half(a[row // 2 * 2], row % 2 == 1), [WARPS, 8, 1, 4, 1])
        second = tl.reshape(half(a[row // 2 * 2 + 1], row % 2 == 1), [WARPS, 8, 1, 4, 1])
        top += tl.sum(first * number, 3)
        low += tl.sum(second * number, 3)
    return top, low


@triton.jit
def mix_rows(c, x, a, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr):
    """Add a lane's four rows of an item to the sums of its latents.

    Args:
        c: fp32 sums, 4 for each tile (spectral.kernels.items); in plain Triton as `_mixed` has them. x: words of the
        rows; a: 4 words: weights of those rows for heads g and g + 8.
    """
    if FAST:
        TILES: tl.constexpr = item_tiles(BITS)
        return tl.inline_asm_elementwise(
            mix_text(BITS, ROWS),
            added(4 * TILES, len(x) + 4),
            c + x + a,
            dtype=floats(4 * TILES),
            is_pure=True,
            pack=1,
        )
    else:
        return _mixed(c, x, a, BITS, ROWS, WARPS)


@triton.jit
def sum_rows(c, a, WARPS: tl.constexpr, FAST: tl.constexpr):
    """Add four rows' weights to their sums for heads g (c[0]) and g + 8 (c[2]), over 2^24."""
    if FAST:
        return tl.inline_asm_elementwise(
            sum_text(), added(4, 4), c + a, dtype=floats(4), is_pure=True, pack=1
        )
    else:
        one = tl.full([32 * WARPS], 0x00010001, tl.int32)
        return mma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], one, one, WARPS)

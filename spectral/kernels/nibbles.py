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

from spectral.kernels.lanes import replace, take
from spectral.kernels.staging import hold_four, stage
from spectral.lean_products import finished
from spectral.overlap import gdc_launch_dependents, gdc_wait

MEMBERS = tl.constexpr(6)
"""Pointers of a matrix: weights, factors, these ones' own factors, codes and offset, bias."""


@triton.constexpr_function
def _weights_text(blocks):
    """Operands: two words of every block, the address of the first, whether there is anything to ask for."""
    blocks = int(blocks)
    load = "@p ld.global.nc.L1::no_allocate.L2::128B.v2.b32"
    loads = [f"{load} {{${2 * j}, ${2 * j + 1}}}, [${2 * blocks}+{32 * j}];" for j in range(blocks)]
    return "\n".join(["{.reg .pred p;", f"setp.ne.b32 p, ${2 * blocks + 1}, 0;", *loads, "}"])


@triton.constexpr_function
def _numbers_text(block):
    """Operands: eight words of row g, the address of those of block 0."""
    words = [", ".join(f"${4 * half + n}" for n in range(4)) for half in (0, 1)]
    return " ".join(f"ld.global.v4.b32 {{{words[h]}}}, [$8+{128 * int(block) + 16 * h}];" for h in (0, 1))


@triton.constexpr_function
def _loaded(results, more):
    """Results are written before the address is read again."""
    return ",".join(["=&r"] * int(results) + ["l"] + ["r"] * int(more))


@triton.constexpr_function
def _words(count):
    return (tl.int32,) * int(count)


@triton.constexpr_function
def _block_text(block, kind):
    """Operands: sums (4), twice; two words of line g, two of line g + 8; eight of row g; factors of lines g and g + 8,
    of which lane t has those of block t; the table."""
    lines = ["{", ".reg .b32 a<16>, y;", ".reg .f32 c<4>, s<2>, z;", "mov.f32 z, 0f00000000;"]
    for byte in range(8):
        for line in range(2):
            lines.append(f"prmt.b32 y, ${8 + 2 * line + byte // 4}, 0, 0x444{byte % 4};")
            lines.append(f"mad.lo.u32 y, y, 128, $22; ld.shared.b32 a{2 * byte + line}, [y];")
    sums = "c0, c1, c2, c3"
    for n in range(4):
        a = ", ".join(f"a{4 * n + i}" for i in range(4))
        before = sums if n else "z, z, z, z"
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{{a}}}, "
            f"{{${12 + 2 * n}, ${13 + 2 * n}}}, {{{before}}};"
        )
    for line in range(2):
        lines.append(f"shfl.sync.idx.b32 s{line}, ${20 + line}, {int(block)}, 0x1c1f, 0xffffffff;")
        for n in (2 * line, 2 * line + 1):
            lines.append(f"fma.rn.f32 ${n}, c{n}, s{line}, ${n};")
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def _bits_of(kind):
    """What PTX calls a number's kind."""
    return {"fp16": "f16", "bf16": "bf16"}[str(kind)]


@triton.jit
def _line_words(at, there, BLOCKS: tl.constexpr, FAST: tl.constexpr):
    """A lane's two words of each of BLOCKS blocks of a line, from the address of the first; anything where `there` is
    zero."""
    if FAST:
        return tl.inline_asm_elementwise(
            _weights_text(BLOCKS), _loaded(2 * BLOCKS, 1), [at, there], dtype=_words(2 * BLOCKS), is_pure=False, pack=1
        )
    else:
        out = ()
        for n in tl.static_range(2 * BLOCKS):
            out = out + (tl.load((at + (32 * (n // 2) + 4 * (n % 2))).to(tl.pointer_type(tl.int32))),)
        return out


@triton.jit
def _row_words(at, BLOCK_NUMBER: tl.constexpr, FAST: tl.constexpr):
    """A lane's eight words of a block of row g. They are another kernel's numbers: nothing may ask for them before it
    has ended."""
    if FAST:
        return tl.inline_asm_elementwise(
            _numbers_text(BLOCK_NUMBER), _loaded(8, 0), [at], dtype=_words(8), is_pure=False, pack=1
        )
    else:
        out = ()
        for n in tl.static_range(8):
            out = out + (tl.load((at + (128 * BLOCK_NUMBER + 4 * n)).to(tl.pointer_type(tl.int32))),)
        return out


@triton.jit
def _ahead(
    w_ptr, first, outputs, lane, LINES: tl.constexpr, SIZE: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Ask for LINES lines from `first` on, as far as the second-level cache: a lane holds but the next few blocks."""
    PIECES: tl.constexpr = (SIZE // 2 + 127) // 128
    if FAST:
        for i in tl.static_range((LINES * PIECES + 32 * WARPS - 1) // (32 * WARPS)):
            piece = tl.minimum(lane + i * (32 * WARPS), LINES * PIECES - 1)
            line = tl.minimum(first + piece // PIECES, outputs - 1)
            place = w_ptr + line.to(tl.int64) * (SIZE // 2) + piece % PIECES * 128
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [place.to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _table(code_ptr, lane, KIND: tl.constexpr, FACTOR: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr):
    """Where a lane's pairs of all bytes lie in shared memory, 128 bytes apart, when all warps have put them there."""
    if FAST:
        base = stage(lane, 32768)
        for i in tl.static_range(8 // WARPS):
            byte = lane + i * (32 * WARPS)
            first = (tl.load(code_ptr + byte // 16) * FACTOR).to(KIND).to(tl.int16, bitcast=True).to(tl.int32)
            second = (tl.load(code_ptr + byte % 16) * FACTOR).to(KIND).to(tl.int16, bitcast=True).to(tl.int32)
            pair = (first & 0xFFFF) | (second << 16)
            for j in tl.static_range(8):  # lanes begin at banks of their own
                hold_four(base + byte * 128 + (lane + j) % 8 * 16, pair, pair, pair, pair)
        return tl.inline_asm_elementwise(
            "bar.sync 0;\nmov.b32 $0, $1;", "=r,r", [base + lane % 32 * 4], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return lane


@triton.jit
def _code(words, byte: tl.constexpr, second: tl.constexpr, code_ptr, KIND: tl.constexpr, FACTOR: tl.constexpr):
    """One of a byte's two codes, as the table has them, in fp32."""
    nibble = (words[byte // 4] >> (8 * (byte % 4) + (0 if second else 4))) & 15
    return (tl.load(code_ptr + nibble) * FACTOR).to(KIND).to(tl.float32)


@triton.jit
def _number(word, second: tl.constexpr, KIND: tl.constexpr):
    """One of a word's two numbers, in fp32."""
    if second:
        word = word >> 16
    return (word & 0xFFFF).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def _of_block(x, block: tl.constexpr, WARPS: tl.constexpr):
    """[lanes] -> [WARPS, 8, 1]: what lane t = block has, for every g."""
    mine = tl.arange(0, 4)[None, None, :] == block
    return tl.sum(tl.where(mine, tl.reshape(x, [WARPS, 8, 4]), 0.0), 2)[:, :, None]


@triton.jit
def _block(
    sums, near, far, x, near_scale, far_scale, table, code_ptr, BLOCK_NUMBER: tl.constexpr, KIND: tl.constexpr,
    FACTOR: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a block's products of lines g (`near`) and g + 8 with all rows to a lane's sums: of those lines, columns 2 t
    and 2 t + 1."""
    if FAST:
        return tl.inline_asm_elementwise(
            _block_text(BLOCK_NUMBER, _bits_of(KIND)),
            "=&f,=&f,=&f,=&f,0,1,2,3,r,r,r,r,r,r,r,r,r,r,r,r,f,f,r",
            sums + near + far + x + (near_scale, far_scale, table),
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        top = tl.zeros([WARPS, 8, 8], tl.float32)
        low = tl.zeros([WARPS, 8, 8], tl.float32)
        for n in tl.static_range(16):
            row = tl.reshape(_number(x[n // 2], n % 2 == 1, KIND), [WARPS, 1, 8, 4])
            first = _code(near, n // 2, n % 2 == 1, code_ptr, KIND, FACTOR)
            second = _code(far, n // 2, n % 2 == 1, code_ptr, KIND, FACTOR)
            top += tl.sum(tl.reshape(first, [WARPS, 8, 1, 4]) * row, 3)
            low += tl.sum(tl.reshape(second, [WARPS, 8, 1, 4]) * row, 3)
        top *= _of_block(near_scale, BLOCK_NUMBER, WARPS)
        low *= _of_block(far_scale, BLOCK_NUMBER, WARPS)
        d0, d1 = tl.split(tl.reshape(top, [WARPS, 8, 4, 2]))
        d2, d3 = tl.split(tl.reshape(low, [WARPS, 8, 4, 2]))
        N: tl.constexpr = 32 * WARPS
        return (
            sums[0] + tl.reshape(d0, [N]), sums[1] + tl.reshape(d1, [N]),
            sums[2] + tl.reshape(d2, [N]), sums[3] + tl.reshape(d3, [N]),
        )  # fmt: skip


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
        words = words + _line_words(place.to(tl.int64), there, STEP, FAST)
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
    SIZE: tl.constexpr, STEP: tl.constexpr, FACTOR: tl.constexpr, NESTED: tl.constexpr, SEVERAL: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Outputs of up to eight rows: x [rows, SIZE], weights as spectral.lean_nibbles.Nibbles has them, residual and out
    [rows, outputs]. GATE: of a matrix of gates and a second one of what they open. SEVERAL: of three matrices, the
    second and the third from programs `second` and `third` on.

    TILES times 16 lines; each warp takes every WARPS-th step of STEP blocks (four, or one of lines that have fewer),
    `rounds` of them (an argument, so that the loop stays one: what is asked for ahead is moved to its use otherwise),
    the next one on its way. AHEAD: all are asked for at once (see `_ahead`). EARLY: as
    spectral.lean_products.row_kernel has it.
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
    if AHEAD:
        for n in tl.static_range(SETS):
            _ahead(matrices[n * MEMBERS], first, outputs, lane, 8 * LINES, SIZE, WARPS, FAST)
    asked = _asked(matrices, lines, wanted, t, SETS, SIZE, STEP, NESTED, FAST)
    table = _table(code_ptr, lane, KIND, FACTOR, WARPS, FAST)
    if EARLY:
        gdc_wait()
    x_line = x_ptr + tl.minimum(g, rows - 1) * SIZE + t * 16
    sums = ()
    for _ in tl.static_range(4 * TILES):
        sums = sums + (tl.zeros([32 * WARPS], tl.float32),)
    for _ in range(rounds):
        x_step = (x_line + tl.minimum(wanted, SIZE // 64 - STEP) * 64).to(tl.int64)
        factors = _factors(asked, matrices, wanted, t, LINES, SETS, SIZE, STEP, NESTED)
        words = take(asked, 0, 4 * STEP * TILES)
        wanted += STEP * WARPS
        asked = _asked(matrices, lines, wanted, t, SETS, SIZE, STEP, NESTED, FAST)
        sums = _step(sums, words, factors, x_step, table, code_ptr, KIND, STEP, FACTOR, TILES, WARPS, FAST)
    finished(
        _together(sums, TILES, WARPS) * (1.0 / FACTOR), matrices[MEMBERS - 1] - begin * (8 * LINES), residual_ptr,
        out_ptr, tl.arange(0, 8), rows, outputs, 16 * TILES, EVEN, BIAS, GATE, RESIDUAL,
    )  # fmt: skip


@triton.jit
def _step(
    sums, words, factors, x_step, table, code_ptr, KIND: tl.constexpr, STEP: tl.constexpr, FACTOR: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add the products of STEP blocks to a lane's sums, four a tile."""
    for j in tl.static_range(STEP):
        x = _row_words(x_step, j, FAST)
        for m in tl.static_range(TILES):
            near = take(words, 4 * STEP * m + 2 * j, 2)
            far = take(words, 4 * STEP * m + 2 * STEP + 2 * j, 2)
            added = _block(
                take(sums, 4 * m, 4), near, far, x, factors[2 * m], factors[2 * m + 1], table, code_ptr, j, KIND,
                FACTOR, WARPS, FAST,
            )  # fmt: skip
            sums = replace(sums, added, 4 * m, 4 * TILES)
    return sums


@triton.jit
def _together(sums, TILES: tl.constexpr, WARPS: tl.constexpr):
    """A tuple of a lane's sums, four a tile, as [lines, 8 rows]: of all warps."""
    pairs = ()
    for n in tl.static_range(2 * TILES):
        pairs = pairs + (tl.reshape(tl.join(sums[2 * n], sums[2 * n + 1]), [WARPS, 8, 4, 2]),)
    whole = stacked_last(pairs, 2 * TILES)  # [warp, g, t, column, tile and half]
    whole = tl.sum(tl.reshape(whole, [WARPS, 8, 8, 2 * TILES]), 0)
    return tl.reshape(tl.permute(whole, (2, 0, 1)), [16 * TILES, 8])


@triton.jit
def stacked_last(x, COUNT: tl.constexpr):
    """COUNT tensors as one, side by side in a last axis."""
    if COUNT == 1:
        return x[0]
    else:
        half: tl.constexpr = COUNT // 2
        both = tl.join(stacked_last(x[0::2], half), stacked_last(x[1::2], half))
        return both if COUNT == 2 else _last_two(both, COUNT)


@triton.jit
def _last_two(x, COUNT: tl.constexpr):
    return tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3], COUNT])

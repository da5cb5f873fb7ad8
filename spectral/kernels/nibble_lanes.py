"""What a lane does with weights of four bits (spectral.kernels.nibbles): PTX for NVIDIA GPUs, and the same in plain
Triton for the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.staging import hold_four, stage


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
def _two_text(first):
    """Operands: two words, the address of those of block 0."""
    return f"ld.global.v2.b32 {{$0, $1}}, [$2+{128 * int(first)}];"


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
def line_words(at, there, BLOCKS: tl.constexpr, FAST: tl.constexpr):
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
def two_of_row(at, FIRST: tl.constexpr, FAST: tl.constexpr):
    """A lane's two words of the blocks FIRST and FIRST + 1 of a single row."""
    if FAST:
        return tl.inline_asm_elementwise(
            _two_text(FIRST), _loaded(2, 0), [at], dtype=_words(2), is_pure=False, pack=1
        )
    else:
        place = at + 128 * FIRST
        return tl.load(place.to(tl.pointer_type(tl.int32))), tl.load((place + 4).to(tl.pointer_type(tl.int32)))


@triton.jit
def row_words(at, BLOCK_NUMBER: tl.constexpr, FAST: tl.constexpr):
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
def table_of(code_ptr, lane, KIND: tl.constexpr, FACTOR: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr):
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
def block(
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


@triton.constexpr_function
def _pair_text(first, kind):
    """Operands: sums of lines g and g + 8, twice; four words of line g, four of line g + 8; two of the row; factors as
    in `_block_text`; the table, t."""
    first = int(first)
    lines = ["{", ".reg .b32 a<4>, y, n;", ".reg .f32 c<4>, s<2>, z;", ".reg .pred p<4>;", "mov.f32 z, 0f00000000;"]
    lines += [f"setp.eq.s32 p{i}, $17, {i};" for i in range(4)]
    lines += ["shr.u32 n, $17, 1;", f"add.u32 n, n, {first};"]
    lines += [f"shfl.sync.idx.b32 s{i}, ${14 + i}, n, 0x1c1f, 0xffffffff;" for i in range(2)]
    for n in range(8):
        for i in range(4):
            byte = 2 * (n % 4) + i // 2
            lines.append(f"prmt.b32 y, ${4 + 4 * (i % 2) + 2 * (n // 4) + byte // 4}, 0, 0x444{byte % 4};")
            lines.append(f"mad.lo.u32 y, y, 128, $16; ld.shared.b32 a{i}, [y];")
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{c0, c1, c2, c3}}, {{a0, a1, a2, a3}}, "
            f"{{$12, $13}}, {{z, z, z, z}};"
        )
        lines += [f"@p{n // 2} fma.rn.f32 ${i}, c{2 * i + n % 2}, s{i}, ${i};" for i in range(2)]
    return "\n".join([*lines, "}"])


@triton.jit
def pair(
    sums, near, far, x, near_scale, far_scale, table, t, code_ptr, FIRST: tl.constexpr, KIND: tl.constexpr,
    FACTOR: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add two blocks' products with a single row to a lane's sums of lines g and g + 8.

    An instruction multiplies with eight columns. Here they are what the eight instructions of two blocks multiply with:
    a lane has of the row what instruction g wants, and of the answers the two that are in its columns 2 t and 2 t + 1.
    So a row's numbers are loaded once instead of eight times."""
    if FAST:
        return tl.inline_asm_elementwise(
            _pair_text(FIRST, _bits_of(KIND)), "=&f,=&f,0,1,r,r,r,r,r,r,r,r,r,r,f,f,r,r",
            sums + near + far + x + (near_scale, far_scale, table, t), dtype=(tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        g = tl.arange(0, 8)[None, :, None]
        near_sum, far_sum = sums
        for n in tl.static_range(8):
            first = tl.zeros([WARPS, 8], tl.float32)
            second = tl.zeros([WARPS, 8], tl.float32)
            for i in tl.static_range(4):
                row = tl.reshape(_number(x[i // 2], i % 2 == 1, KIND), [WARPS, 8, 4])
                row = tl.sum(tl.where(g == n, row, 0.0), 1)[:, None, :]
                place: tl.constexpr = 8 * (n // 4) + 2 * (n % 4) + i // 2
                one = _code(near, place, i % 2 == 1, code_ptr, KIND, FACTOR)
                other = _code(far, place, i % 2 == 1, code_ptr, KIND, FACTOR)
                first += tl.sum(tl.reshape(one, [WARPS, 8, 4]) * row, 2)
                second += tl.sum(tl.reshape(other, [WARPS, 8, 4]) * row, 2)
            here = tl.arange(0, 4)[None, None, :] == n // 2
            first = tl.where(here, first[:, :, None] * _of_block(near_scale, FIRST + n // 4, WARPS), 0.0)
            second = tl.where(here, second[:, :, None] * _of_block(far_scale, FIRST + n // 4, WARPS), 0.0)
            near_sum += tl.reshape(first, [32 * WARPS])
            far_sum += tl.reshape(second, [32 * WARPS])
        return near_sum, far_sum

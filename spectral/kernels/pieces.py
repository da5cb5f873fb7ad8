"""Sums of packed values with weights, over tokens, for pages whose rows are tokens: a program takes a split of a
sequence and a unit, each of its warps some of the unit's latents.

A piece is eight or sixteen quarters of cells that lie together in a page, one or two columns of the matrix instruction
each. A warp sums one piece after another over all pages of the split; the weights, which all warps of a program read,
come from the first-level cache. Pieces differ in the size of their fields and warps in their pieces, so the loop over
them is one text of PTX (`pieces_text`); the interpreter does the same sums in plain Triton.

Codes are asked for eight pages before they are multiplied, into registers, and weights twelve to sixteen, into shared
memory. Pages' ids go through a few words of shared memory a warp, sixteen at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.lanes import mma_text
from spectral.kernels.staging import stage
from spectral.kernels.tables import PIECE_KINDS, PIECE_WARPS
from spectral.kernels.weights import over_quad

RING = tl.constexpr(8192)
"""Bytes of shared memory in which a warp has the weights of sixteen pages. Eights of lanes copy lines; a line's pieces
are exchanged so that those that lanes read at once lie in different banks."""

WARPS = tl.constexpr(PIECE_WARPS)


@triton.constexpr_function
def piece_bits(kind):
    """Of a piece's fields."""
    return PIECE_KINDS[int(kind)][0]


@triton.constexpr_function
def _unpack(bits: int, x: list[str]) -> list[list[str]]:
    """Of every field of a lane's four rows the lines that make its operands b0 and b1; x: the rows' words."""
    out: list[list[str]] = []
    if bits == 8:
        for f in range(4):
            pick = f"0x{4 + f:x}{4 + f:x}{f:x}{f:x}"
            lines = [f"prmt.b32 b{side}, {x[2 * side]}, {x[2 * side + 1]}, {pick};" for side in (0, 1)]
            lines += [f"and.b32 b{side}, b{side}, 0x00FF00FF;" for side in (0, 1)]
            out.append(lines)
        return out
    for f in range(8 if bits == 1 else 4):
        lines = []
        if bits == 4:
            if f == 0:
                lines = [f"mov.b32 u{side}, {x[side]};" for side in (0, 1)]
            elif f == 2:
                lines = [f"shr.b32 u{side}, u{side}, 8;" for side in (0, 1)]
            mask = 0x000F000F << 4 * (f % 2)
        else:
            if f == 0:
                lines = [f"prmt.b32 u{side}, {x[0]}, 0, 0x4{2 * side + 1}4{2 * side};" for side in (0, 1)]
            mask = (0x00010001 if bits == 1 else 0x00030003) << bits * f
        lines += [f"and.b32 b{side}, u{side}, 0x{mask:08X};" for side in (0, 1)]
        out.append(lines)
    return out


@triton.constexpr_function
def _words(bits: int) -> int:
    """Of a lane's four rows of a quarter."""
    return max(1, bits // 2)


@triton.constexpr_function
def _ask_codes(bits: int, eights: int, slot: int) -> list[str]:
    """Ask for a lane's rows of the page whose id is in one of i0 to i3, into a slot of the eight that a warp has in
    registers."""
    words = _words(bits)
    lines = [f"mad.wide.u32 at, i{slot % 4}, $4, base;"]
    for eight in range(eights):
        own = [f"x{(slot * eights + eight) * words + w}" for w in range(words)]
        place = 128 * words * eight
        if words == 1:
            lines.append(f"ld.global.nc.L1::no_allocate.L2::cache_hint.b32 {own[0]}, [at + {place}], once;")
            continue
        for w in range(0, words, 2):  # eight bytes at once: what pages are aligned to
            pair = f"{{{own[w]}, {own[w + 1]}}}"
            lines.append(f"ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {pair}, [at + {place + 4 * w}], once;")
    return lines


@triton.constexpr_function
def _ask_weights(first: int, slot: int) -> list[str]:
    """Ask for the lane's weights of four pages, into a slot of the four that a warp has in shared memory."""
    lines = []
    for k in range(4):
        at = 2048 * slot + 512 * k
        lines.append(f"cp.async.ca.shared.global [$17 + {at}], [w + {512 * (first + k)}], 16;")
    return [*lines, "cp.async.commit_group;"]


@triton.constexpr_function
def _multiply(bits: int, eights: int, slot: int, page: int) -> list[str]:
    """Products of a page's weights, times their factor, and fields."""
    words, tiles = _words(bits), 8 if bits == 1 else 4
    lines = [f"ld.shared.v4.b32 {{v0, v1, v2, v3}}, [ring + {512 * page}];"]
    for n, a in enumerate(("a0", "a2", "a1", "a3")):  # heads g, then g + 8
        lines.append(f"mul.rn.f16x2 {a}, v{n}, h{n // 2};")
    for eight in range(eights):
        first = (slot * eights + eight) * words
        for f, unpacked in enumerate(_unpack(bits, [f"x{first + w}" for w in range(words)])):
            sums = [f"c{4 * (tiles * eight + f) + n}" for n in range(4)]
            lines += [*unpacked, mma_text(sums, ["a0", "a1", "a2", "a3"], ["b0", "b1"])]
    return lines


@triton.constexpr_function
def _ask_tops(name: str, at: int) -> list[str]:
    """What eight pages' weights of heads g and g + 8 are relative to, `at` bytes on."""
    return [f"ld.global.nc.f32 {name}{side}, [tops + {at + 32 * side}];" for side in (0, 1)]


@triton.constexpr_function
def _make_factors(name: str) -> list[str]:
    """From that, what these weights are too large or small by: two equal halves in a word."""
    lines = []
    for side, top in enumerate(("$15", "$16")):
        lines += [f"sub.f32 y, {name}{side}, {top};", "ex2.approx.ftz.f32 y, y;", f"cvt.rn.f16x2.f32 h{side}, y, y;"]
    return lines


@triton.constexpr_function
def _leave(first: int, at: int) -> list[str]:
    """Four tiles' sums from tile `first` on, `at` bytes behind the lane's: columns 2 t and 2 t + 1 of heads g, then of
    heads g + 8."""
    lines = []
    for side in (0, 1):
        for odd in (0, 1):
            own = ", ".join(f"c{4 * f + 2 * side + odd}" for f in range(first, first + 4))
            lines.append(f"st.global.v4.f32 [{'o8' if side else 'o'} + {at + 16 * odd}], {{{own}}};")
    return lines


@triton.constexpr_function
def _piece(kind: int) -> list[str]:
    """One piece: all pages of the split, sixteen a turn, then its sums."""
    bits, eights = PIECE_KINDS[kind][0], PIECE_KINDS[kind][1]
    tiles = 8 if bits == 1 else 4
    lines = [f"B{kind}:", f"mad.lo.u32 off, $13, {4 * _words(bits)}, off;", "mad.wide.u32 base, off, 1, $3;"]
    lines += [f"mov.f32 c{n}, 0f00000000;" for n in range(4 * tiles * eights)]
    lines += ["mov.b64 w, $1;", "mov.b64 tops, $11;", "mov.b32 turn, 0;", "mov.b32 sm, $12;", "and.b32 l16, $13, 15;"]
    for slot in range(3):
        lines += _ask_weights(4 * slot, slot)
    lines += ["min.s32 u0, l16, $8;", "mad.wide.s32 at, u0, 4, $2;", "ld.global.nc.b32 id, [at];"]
    lines += ["shl.b32 l4, l16, 2;", "bar.warp.sync 0xffffffff;", "add.s32 u0, sm, l4;", "st.shared.b32 [u0], id;"]
    lines += ["add.s32 u0, l16, 16;", "min.s32 u0, u0, $8;", "mad.wide.s32 at, u0, 4, $2;"]
    lines += ["ld.global.nc.b32 id, [at];", *_ask_tops("f", 0), *_ask_tops("n", 64), "bar.warp.sync 0xffffffff;"]
    for slot in range(8):
        if slot % 4 == 0:
            lines.append(f"ld.shared.v4.b32 {{i0, i1, i2, i3}}, [sm + {4 * slot}];")
        lines += _ask_codes(bits, eights, slot)
    lines.append(f"L{kind}:")
    for page in range(16):
        if page % 4 == 0:
            lines += ["bar.warp.sync 0xffffffff;", *_ask_weights(page + 12, (page // 4 + 3) % 4)]
            lines += ["cp.async.wait_group 3;", "bar.warp.sync 0xffffffff;"]
            lines.append(f"ld.shared.v4.b32 {{i0, i1, i2, i3}}, [sm + {(4 * page + 32) % 64}];")
        if page % 8 == 0:
            lines += _make_factors("n" if page else "f")
        lines += _multiply(bits, eights, page % 8, page)
        lines += _ask_codes(bits, eights, page % 8)
        if page == 3:  # the next turn's pages, and those after them
            lines += ["add.s32 turn, turn, 1;", "xor.b32 sn, sm, 64;", "add.s32 u0, sn, l4;", "st.shared.b32 [u0], id;"]
            lines += ["mad.lo.s32 u0, turn, 16, l16;", "add.s32 u0, u0, 16;", "min.s32 u0, u0, $8;"]
            lines += ["mad.wide.s32 at, u0, 4, $2;", "ld.global.nc.b32 id, [at];", "setp.lt.s32 p, turn, $7;"]
            lines += ["selp.b64 at, 128, 0, p;", "add.s64 tops, tops, at;", "bar.warp.sync 0xffffffff;"]
        if page == 7:
            lines += [*_ask_tops("f", 0), "mov.b32 sm, sn;"]
    lines += [*_ask_tops("n", 64), "add.s64 w, w, 8192;", f"@p bra L{kind};", "cp.async.wait_group 0;"]
    # Of a piece that is not full some columns are no latents.
    lines += ["mad.wide.s32 o, col, 4, $9;", "setp.ge.s32 p, t2, valid;", "@p bra NEXT;"]
    if bits == 1:  # a cell has two runs of sixteen latents: 128 bytes instead of 64
        lines += ["and.b32 u0, $13, 2;", "mad.wide.s32 o, u0, 32, o;"]
    lines += ["cvt.s64.s32 at, $10;", "add.s64 o8, o, at;"]
    lines += _leave(0, 0)
    if bits == 1:
        lines += _leave(4, 64)
    if eights == 2:
        lines += ["add.s32 u0, t2, 8;", "setp.ge.s32 p, u0, valid;", "@p bra NEXT;"]
        lines += _leave(4, 128)
    return [*lines, "bra NEXT;"]


@triton.constexpr_function
def pieces_text():
    """A warp's pieces. Operands: 0 out, unused; 1: what the lane copies of the first page's weights; 2: the pages' ids;
    3: the pool; 4: bytes of a page; 5: the warp's first piece; 6: how many; 7: sixteens of pages; 8: the last page that
    there is; 9: where heads g and columns 2 t begin; 10: bytes from there to heads g + 8; 11: what the first eight
    pages' weights of heads g are relative to; 12: 128 bytes of shared memory of the warp; 13: the lane; 14: where the
    lane's weights of sixteen pages come to lie in shared memory, and 17: what it copies; 15, 16: what those of heads g
    and g + 8 are to be relative to."""
    lines = [
        "{",
        ".reg .pred p;",
        ".reg .b32 left, kind, off, col, valid, t2, turn, sm, sn, l16, l4, id, ring;",
        ".reg .b32 h<2>, u<2>, b<2>, a<4>, i<4>, v<4>, x<32>;",
        ".reg .b64 base, at, next, w, tops, o, o8, once;",
        ".reg .f32 c<32>, f<2>, n<2>, y;",
        "mov.b32 ring, $14;",
        "createpolicy.fractional.L2::evict_first.b64 once, 1.0;",  # weights, which are read again, stay
        "and.b32 t2, $13, 3;",
        "add.s32 t2, t2, t2;",
        "mov.b32 left, $6;",
        "mov.b64 next, $5;",
        "NEXT:",
        "setp.le.s32 p, left, 0;",
        "@p bra DONE;",
        "ld.global.nc.v4.b32 {kind, off, col, valid}, [next];",
        "add.s64 next, next, 16;",
        "sub.s32 left, left, 1;",
    ]
    for kind in range(1, 6):
        lines += [f"setp.eq.s32 p, kind, {kind};", f"@p bra B{kind};"]
    for kind in range(6):
        lines += _piece(kind)
    return "\n".join([*lines, "DONE:", "mov.b32 $0, 0;", "}"])


@triton.jit
def _plain_piece(
    weights, ids, last, pool, page_nbytes, valid, pages, out, outputs, tops, top, BITS: tl.constexpr
):  # fmt: skip
    """The same in plain Triton. weights, ids, tops: of the split's first page; top: the split's; pool: where the
    piece's bytes begin in page 0; out: its first output column."""
    U: tl.constexpr = max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    head = tl.arange(0, 16)[:, None, None]
    j = tl.arange(0, 16)[None, :, None]
    field = tl.arange(0, 4)[None, None, :]
    for run in tl.static_range(RUNS):
        x = tl.zeros([16, 16, 4], tl.float32)
        bit = BITS * field + 4 * run
        for page in range(pages):
            base = pool + tl.load(ids + tl.minimum(page, last)).to(tl.int64) * page_nbytes
            f = tl.exp2(tl.load(tops + page // 8 * 16 + head) - tl.load(top + head)).to(tl.float16)
            for r in range(16):
                code = tl.load(base + j * (16 * U) + r * U + bit // 8, mask=j < valid, other=0).to(tl.int32)
                value = (code >> (bit % 8)) & ((1 << BITS) - 1)
                w = tl.load(weights + (page * 256 + r // 4 * 64 + head % 8 * 8 + head // 8 * 4 + r % 4))
                x += (w * f).to(tl.float32) * (value << (bit % 8)).to(tl.float32)
        at = out + head * outputs + j // 4 * (16 * RUNS) + j % 4 * 4 + 16 * run + field
        tl.store(at, x * 5.9604644775390625e-08, mask=(j < valid) & (head >= 0) & (field >= 0))  # 2^-24


@triton.jit
def _split_tops(tops, totals, octets, g, t, FAST: tl.constexpr):
    """Of heads g and g + 8 the largest that weights of `octets` eights of pages are relative to, and the sums of all
    weights relative to that: for every lane. tops, totals: of the split's first eight pages."""
    top0 = tl.full([32 * WARPS], float("-inf"), tl.float32)
    top1 = top0
    for first in range(0, octets, 32):
        for k in tl.static_range(8):
            n = first + 4 * k + t
            top0 = tl.maximum(top0, tl.load(tops + n * 16 + g, mask=n < octets, other=float("-inf")))
            top1 = tl.maximum(top1, tl.load(tops + n * 16 + g + 8, mask=n < octets, other=float("-inf")))
    top0, top1 = over_quad(top0, False, WARPS, FAST), over_quad(top1, False, WARPS, FAST)
    total0 = tl.zeros([32 * WARPS], tl.float32)
    total1 = total0
    for first in range(0, octets, 32):
        for k in tl.static_range(8):
            n = first + 4 * k + t
            own = n < octets
            f0 = tl.exp2(tl.load(tops + n * 16 + g, mask=own, other=float("-inf")) - top0)
            f1 = tl.exp2(tl.load(tops + n * 16 + g + 8, mask=own, other=float("-inf")) - top1)
            # As what weights are multiplied with.
            total0 += tl.load(totals + n * 16 + g, mask=own, other=0.0) * f0.to(tl.float16).to(tl.float32)
            total1 += tl.load(totals + n * 16 + g + 8, mask=own, other=0.0) * f1.to(tl.float16).to(tl.float32)
    return top0, top1, over_quad(total0, True, WARPS, FAST), over_quad(total1, True, WARPS, FAST)


@triton.jit(
    do_not_specialize=[
        "table_stride", "page_nbytes", "blocks", "pages_max", "units", "splits", "outputs", "split_blocks",
        "piece_stride",
    ]
)  # fmt: skip
def pieces_kernel(
    pages_ptr, table_ptr, count_ptr, piece_ptr, pieces_ptr, weight_ptr, max_ptr, total_ptr, out_ptr, top_ptr, sum_ptr,
    table_stride, page_nbytes, blocks, pages_max, units, splits, outputs, split_blocks, piece_stride,
    GROUPS: tl.constexpr, PB: tl.constexpr, SHARES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A unit over one split of a sequence's blocks, for 16 query heads; SHARES programs have some of its pieces each.

    piece_ptr, pieces_ptr: LayerTables.piece and .pieces, of as many programs; weight_ptr, max_ptr, total_ptr: as
    flat_score_kernel leaves them; out_ptr as spectral.kernels.mix has it. top_ptr, sum_ptr: fp32 [sequence, split,
    unit, head groups, 16]: the largest score of a split, and the sum of its weights relative to that.
    """
    unit, part = tl.program_id(0) // (GROUPS * SHARES), tl.program_id(0) // SHARES % GROUPS
    share = tl.program_id(0) % SHARES
    # What was written last is read first: it may still be in the second-level cache.
    split, seq = tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    pages = tl.load(count_ptr + seq)
    b0 = split * split_blocks
    b1 = tl.minimum(b0 + split_blocks, (pages + PB - 1) // PB)
    i = tl.arange(0, 32 * WARPS)
    ids_at, ring = i, i
    if FAST:
        ring = stage(i, WARPS * (RING + 128))
        ids_at = ring + WARPS * RING + i // 32 * 128
        ring += i // 32 * RING
    if b0 < b1:
        lane, warp = i % 32, i // 32
        g, t = lane // 4, lane % 4
        where = (seq * units + unit) * GROUPS + part
        weights = weight_ptr + (where.to(tl.int64) * pages_max + b0 * PB) * 256
        ids = table_ptr + seq * table_stride + b0 * PB
        last = pages - 1 - b0 * PB
        out = out_ptr + (((seq * splits + split) * GROUPS + part) * 16).to(tl.int64) * outputs
        octet = (where * blocks + b0) * (PB * 2)
        tops = max_ptr + octet
        top0, top1, total0, total1 = _split_tops(tops, total_ptr + octet, (b1 - b0) * (PB // 8), g, t, FAST)
        own_top = top_ptr + (((seq * splits + split) * units + unit) * GROUPS + part) * 16
        own_sum = sum_ptr + (((seq * splits + split) * units + unit) * GROUPS + part) * 16
        first = warp + t + share == 0
        tl.store(own_top + g, top0, mask=first)
        tl.store(own_top + g + 8, top1, mask=first)
        tl.store(own_sum + g, total0, mask=first)
        tl.store(own_sum + g + 8, total1, mask=first)
        if FAST:
            own = (unit * SHARES + share) * WARPS + warp
            tl.inline_asm_elementwise(
                pieces_text(),
                "=r,l,l,l,r,l,r,r,r,l,r,l,r,r,r,f,f,r",
                [
                    (weights + lane * 8).to(tl.int64), ids.to(tl.int64), pages_ptr.to(tl.int64), page_nbytes,
                    (piece_ptr + own * piece_stride).to(tl.int64), tl.load(pieces_ptr + own), (b1 - b0) * (PB // 16),
                    last, (out + g * outputs + t * 8).to(tl.int64), outputs * 32, (tops + g).to(tl.int64), ids_at,
                    lane, ring + (t * 8 + (g ^ (2 * t))) * 16, top0, top1,
                    ring + (lane // 8 * 8 + ((lane % 8) ^ (lane // 8 * 2))) * 16,
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )  # fmt: skip
        else:
            for warp in range(WARPS):
                own = (unit * SHARES + share) * WARPS + warp
                for n in range(tl.load(pieces_ptr + own)):
                    piece = piece_ptr + own * piece_stride + 4 * n
                    for kind in tl.static_range(6):
                        if tl.load(piece) == kind:
                            _plain_piece(
                                weights, ids, last, pages_ptr + tl.load(piece + 1), page_nbytes, tl.load(piece + 3),
                                (b1 - b0) * PB, out + tl.load(piece + 2), outputs, tops, own_top, piece_bits(kind),
                            )  # fmt: skip

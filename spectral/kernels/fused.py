"""Scores, weights and sums of packed pages in one launch, for pages whose rows are tokens: a program takes blocks of one
sequence and unit one after another.

A block's scores are made as spectral.kernels.score makes them. Its weights, relative to the largest score so far, go
into shared memory, 512 bytes a page in the order of matrix operands, and each warp sums all of the block's pages with
them for latents of its own. Those sums are kept in global memory between blocks, where the warp that adds to them finds
them in the second-level cache; what larger scores of a later block make of the earlier ones is a factor.

What a warp sums at once is a piece: eight quarters of cells, one a column of the matrix instruction, which lie together
in a page. Pieces differ in the size of their fields and warps in their pieces, so the loop over them is one text of PTX
(`_pieces_text`); the interpreter does the same sums in plain Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import FIELD_UNIT, behind, quarter_rows, query_row, query_words, scaled
from spectral.kernels.classes import size_log2
from spectral.kernels.lanes import less, mma_text, score_rows, sum_rows
from spectral.kernels.score import CHUNK, OPERAND, PITCH, STAGE, ask_chunk, next_chunk, plain_cell
from spectral.kernels.staging import hold_four, hold_word, held_four, prefetch, stage
from spectral.kernels.weights import block_weights, largest, over_lanes, quad, store_weights, tokens
from spectral.kernels.words import four_words

ENTRIES = tl.constexpr(48)
"""Entries of the table for which shared memory has room: their operands lie where weights come to lie."""

WEIGHTS = tl.constexpr(512)
"""Bytes of a page's weights: sixteen heads, sixteen tokens, fp16."""

AHEAD = 4
"""Pages whose codes a warp asks for before it multiplies those of as many others."""


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
def _ask(bits: int, names: list[str], at: str) -> list[str]:
    """Ask for a lane's rows of AHEAD pages, whose ids lie in shared memory at `at`."""
    words = len(names) // AHEAD
    lines = [f"ld.shared.v4.b32 {{i0, i1, i2, i3}}, [{at}];"]
    for k in range(AHEAD):
        own = names[k * words : (k + 1) * words]
        lines.append(f"mad.wide.u32 at, i{k}, $4, base;")
        if words == 1:
            lines.append(f"ld.global.b32 {own[0]}, [at];")
        else:  # eight bytes at once: what pages are aligned to
            for w in range(0, words, 2):
                lines.append(f"ld.global.v2.b32 {{{own[w]}, {own[w + 1]}}}, [at + {4 * w}];")
    return lines


@triton.constexpr_function
def _multiply(bits: int, names: list[str], first: int) -> list[str]:
    """Products of AHEAD pages' weights and fields; first: number of the first page of eight."""
    words, lines = len(names) // AHEAD, []
    for k in range(AHEAD):
        lines.append(f"ld.shared.v4.b32 {{a0, a1, a2, a3}}, [pa + {512 * (first + k)}];")
        for f, unpacked in enumerate(_unpack(bits, names[k * words : (k + 1) * words])):
            sums = [f"c{4 * f + n}" for n in range(4)]
            lines += [*unpacked, mma_text(sums, ["a0", "a1", "a2", "a3"], ["b0", "b1"])]
    return lines


@triton.constexpr_function
def _add(tiles: list[int], at: int) -> list[str]:
    """Four tiles' sums to where they are kept, `at` bytes behind a lane's first: columns 2 t and 2 t + 1 of heads g, then
    of heads g + 8."""
    lines = []
    for side in (0, 1):
        where, factor = ("o", "$10") if side == 0 else ("o8", "$11")
        for odd in (0, 1):
            own = [f"c{4 * f + 2 * side + odd}" for f in tiles]
            place = f"[{where} + {at + 16 * odd}]"
            lines.append(f"@!fresh ld.global.v4.f32 {{d0, d1, d2, d3}}, {place};")
            lines += [f"@!fresh fma.rn.f32 {c}, d{n}, {factor}, {c};" for n, c in enumerate(own)]
            lines.append(f"st.global.v4.f32 {place}, {{{', '.join(own)}}};")
    return lines


@triton.constexpr_function
def _piece(bits: int) -> list[str]:
    """One piece: all pages of a block, eight a turn, then its sums."""
    words, tiles = {8: 4, 4: 2, 2: 1, 1: 1}[bits], 8 if bits == 1 else 4
    x, y = [f"x{n}" for n in range(AHEAD * words)], [f"y{n}" for n in range(AHEAD * words)]
    wide = 4 * max(1, bits // 2)  # bytes of a lane's rows
    lines = [f"B{bits}:", f"mad.lo.u32 off, $13, {wide}, off;", "mad.wide.u32 base, off, 1, $3;"]
    lines += [f"mov.f32 c{n}, 0f00000000;" for n in range(4 * tiles)]
    lines += ["mov.b32 pa, $1;", "mov.b32 ia, $2;", "mov.b32 turns, $7;"]
    lines += _ask(bits, x, "ia")
    lines.append(f"L{bits}:")
    lines += _ask(bits, y, "ia + 16")
    lines += _multiply(bits, x, 0)
    lines += ["sub.s32 turns, turns, 1;", "setp.gt.s32 p, turns, 0;", f"@!p bra M{bits};"]
    lines += _ask(bits, x, "ia + 32")
    lines.append(f"M{bits}:")
    lines += _multiply(bits, y, AHEAD)
    lines += ["add.s32 pa, pa, 4096;", "add.s32 ia, ia, 32;", f"@p bra L{bits};"]
    # Of a piece that is half full, lanes t of the second cell have nothing.
    lines += ["mad.wide.s32 o, col, 4, $8;", "setp.ge.s32 p, lane4, valid;", "@p bra NEXT;"]
    if bits == 1:  # a cell has two runs of sixteen latents: 128 bytes instead of 64
        lines += ["and.b32 u0, $13, 2;", "mad.wide.s32 o, u0, 32, o;"]
    lines += ["cvt.s64.s32 at, $9;", "add.s64 o8, o, at;"]
    lines += _add([0, 1, 2, 3], 0)
    if bits == 1:
        lines += _add([4, 5, 6, 7], 64)
    return [*lines, "bra NEXT;"]


@triton.constexpr_function
def _pieces_text(warps: int) -> str:
    """A warp's pieces, every `warps`-th. Operands: 0 out, unused; 1, 2: shared memory: where the lane's part of the
    first page's weights lies, and the pages' ids; 3: the pool; 4: bytes of a page; 5: the warp's first piece; 6: how
    many; 7: eights of pages; 8: where heads g and columns 2 t begin; 9: bytes from there to heads g + 8; 10, 11: the
    earlier sums' factors of heads g and g + 8; 12: 1 where there are none; 13: the lane."""
    lines = [
        "{",
        ".reg .pred p, fresh;",
        ".reg .b32 n, kind, off, col, valid, lane4, turns, pa, ia, u<2>, b<2>, a<4>, i<4>, x<16>, y<16>;",
        ".reg .b64 base, at, next, o, o8;",
        ".reg .f32 c<32>, d<4>;",
        "setp.ne.s32 fresh, $12, 0;",
        "and.b32 lane4, $13, 3;",
        "add.s32 lane4, lane4, lane4;",
        "mov.b32 n, $6;",
        "mov.b64 next, $5;",
        "NEXT:",
        "setp.le.s32 p, n, 0;",
        "@p bra DONE;",
        "ld.global.v4.b32 {kind, off, col, valid}, [next];",
        f"add.s64 next, next, {16 * warps};",
        "sub.s32 n, n, 1;",
    ]
    for plane, bits in enumerate((8, 4, 2)):
        lines += [f"setp.eq.s32 p, kind, {plane};", f"@p bra B{bits};"]
    for bits in (1, 2, 4, 8):
        lines += _piece(bits)
    return "\n".join([*lines, "DONE:", "mov.b32 $0, 0;", "}"])


@triton.constexpr_function
def pieces_text(warps):
    return _pieces_text(int(warps))


@triton.jit
def _sum_pieces(
    held, ids, pool, page_nbytes, piece, count, turns, out, down, f0, f1, fresh, lane, WARPS: tl.constexpr
):  # fmt: skip
    """A block's codes times its weights, added to what is kept."""
    tl.inline_asm_elementwise(
        pieces_text(WARPS),
        "=r,r,r,l,r,l,r,r,l,r,f,f,r,r",
        [held, ids, pool, page_nbytes, piece, count, turns, out, down, f0, f1, fresh, lane],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _plain_pieces(
    weights, ids, pool, page_nbytes, piece, count, pages, out, outputs, f, fresh
):  # fmt: skip
    """The same in plain Triton. weights: pointer to the block's fp16 weights in the order of store_weights; f: factors
    of the sixteen heads."""
    head = tl.arange(0, 16)[:, None, None]
    j = tl.arange(0, 8)[None, :, None]
    field = tl.arange(0, 4)[None, None, :]
    row = tl.arange(0, 16)
    for n in range(count):
        kind, off = tl.load(piece + 4 * n), tl.load(piece + 4 * n + 1)
        col, valid = tl.load(piece + 4 * n + 2), tl.load(piece + 4 * n + 3)
        bits = 8 >> kind
        unit = tl.maximum(bits // 2, 1)
        for half in range(tl.where(kind == 3, 2, 1)):
            x = tl.zeros([16, 8, 4], tl.float32)
            bit = bits * field + 4 * half
            for page in range(pages):
                base = pool + tl.load(ids + page).to(tl.int64) * page_nbytes + off
                for r in range(16):
                    code = tl.load(base + j * (16 * unit) + r * unit + bit // 8).to(tl.int32)
                    value = (code >> (bit % 8)) & ((1 << bits) - 1)
                    slot = page * 256 + head % 8 * 32 + r // 4 * 8 + head // 8 * 4 + r % 4
                    x += tl.load(weights + slot).to(tl.float32) * (value << (bit % 8)).to(tl.float32)
            at = out + head * outputs + col
            at += j // 4 * tl.where(kind == 3, 32, 16) + j % 4 * 4 + 16 * half + field
            keep = (j < valid) & (head >= 0) & (field >= 0)
            before = tl.load(at, mask=keep & (fresh == 0), other=0.0)
            tl.store(at, x * 5.9604644775390625e-08 + before * f[:, None, None], mask=keep)  # 2^-24


@triton.jit
def _hold_page(at, u, v, FAST: tl.constexpr):
    """A page's weights into shared memory, and as operands: [quad of tokens][g], heads g and g + 8."""
    out = ()
    for k in tl.static_range(4):
        x = quad(u, v, 4 * k, FAST)
        if FAST:
            hold_four(at + 128 * k, x[0], x[2], x[1], x[3])
        out = out + ((x[0], x[2], x[1], x[3]),)
    return out


@triton.jit
def _make_operands(made, q0, q1, ops, count, i, WARPS: tl.constexpr):
    """Leave the operands of all entries in shared memory: the warps of a program take turns."""
    for n in range(0, count, WARPS):
        entry = tl.minimum(n + i // 32, count - 1)
        e = four_words(ops + entry * 16, True)
        a = scaled(query_words(i, q0, q1, e[2], 0, True), e, True)
        second = e[3] != 0
        hold_four(
            made + entry * OPERAND,
            less(a[0], tl.where(second, a[2], 0), True), less(a[1], tl.where(second, a[3], 0), True), a[2], a[3],
        )  # fmt: skip


@triton.jit
def _strip(
    c, off, cells, held, page, copies, chunks, made, ops, q0, q1, lane,
    BITS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a plane's cells to the scores. off: of the first in the page; made: where its operands lie."""
    U: tl.constexpr = max(1, BITS // 2)
    SIZE: tl.constexpr = 64 * U
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    quarter = lane % 4 * (16 * U)
    end = off + cells * SIZE
    for _ in range(((off & (CHUNK - 1)) + cells * SIZE + CHUNK - 1 >> 8) * tl.minimum(cells, 1)):
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if off & (CHUNK - 1) == 0:
                next_chunk(copies, off >> 8, chunks, lane)
        here = tl.minimum(end, (off | (CHUNK - 1)) + 1) - off >> size_log2(BITS, 16)
        if FAST:
            at = held + (quarter + ((off >> 8 & 1) * STAGE + (off & (CHUNK - 1))))
            for _ in range(here):
                a = held_four(made)
                if BITS == 1:
                    a = a + held_four(made + OPERAND)
                c = score_rows(c, quarter_rows(at, page, BITS, 16, True), a, BITS, 16, WARPS, True, BITS == 4)
                made += RUNS * OPERAND
                at += SIZE
        else:
            for k in range(here):
                c = plain_cell(c, page + (off + quarter + k * SIZE), ops + 16 * RUNS * k, q0, q1, BITS, 16, WARPS)
            ops += 16 * RUNS * here
        off += here * SIZE
    return c, off, made, ops


@triton.jit
def _all_strips(
    cells_ptr, held, page, copies, chunks, made, ops, q0, q1, lane, WARPS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Sums of fields and operands, 4 numbers a token (heads g and g + 8, pages 2 t and 2 t + 1)."""
    c = (tl.zeros([32 * WARPS], tl.float32),) * 64
    off = tl.full([], 0, tl.int32)
    for s in tl.static_range(4):
        c, off, made, ops = _strip(
            c, off, tl.load(cells_ptr + s), held, page, copies, chunks, made, ops, q0, q1, lane, 8 >> s, WARPS, FAST
        )
    return c


@triton.jit
def _above_mean(c, k0, k1):
    """Scores without what all codes are too high by."""
    out = ()
    for r in tl.static_range(16):
        out = out + (
            c[4 * r] * FIELD_UNIT - k0,
            c[4 * r + 1] * FIELD_UNIT - k0,
            c[4 * r + 2] * FIELD_UNIT - k1,
            c[4 * r + 3] * FIELD_UNIT - k1,
        )
    return out


@triton.jit
def _start(ids, number, count, page_nbytes):
    """Where the lane's page of a block begins in the pool."""
    return tl.load(ids + tl.minimum(number, count - 1)).to(tl.int64) * page_nbytes


@triton.jit
def _copies(held, pages, start, lane):
    """As spectral.kernels.score has them."""
    quarter = lane % 4 * 16
    base = (pages + start).to(tl.int64) & -16
    return held + (lane // 4 * PITCH + quarter), base + quarter, (quarter == 0).to(tl.int32)


@triton.jit
def _all_warps(x, WARPS: tl.constexpr):
    """The sum over warps, by lane, for every lane."""
    x = tl.sum(tl.reshape(x, [WARPS, 32]), 0)
    return tl.reshape(tl.broadcast_to(x[None, :], [WARPS, 32]), [WARPS * 32])


@triton.jit(
    do_not_specialize=[
        "table_stride", "page_nbytes", "runs", "blocks", "units", "heads", "entry_stride", "piece_stride", "splits",
        "outputs", "split_blocks", "scratch_stride",
    ]
)  # fmt: skip
def fused_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, cells_ptr, entry_ptr, entries_ptr, piece_ptr,
    pieces_ptr, bytes_ptr, scratch_ptr, out_ptr, sum_ptr, top_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, units, heads, entry_stride, piece_stride, splits, outputs,
    split_blocks, scratch_stride,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Some blocks (8 pages a warp) of one sequence, unit and 16 of its query heads.

    q_ptr to cells_ptr: as spectral.kernels.score.score_kernel has them. entry_ptr, entries_ptr, piece_ptr, pieces_ptr:
    LayerTables.whole, .wholes, .piece and .pieces. bytes_ptr: int32 [units, 2]: where the bytes of a unit's values begin
    in a page, and how many. scratch_ptr: what the interpreter keeps weights in. out_ptr, sum_ptr, top_ptr: as
    spectral.kernels.mix leaves them.
    """
    P: tl.constexpr = 16
    PB: tl.constexpr = 8 * WARPS
    BYTES: tl.constexpr = WARPS * 2 * STAGE
    ROOM: tl.constexpr = max(ENTRIES * OPERAND, PB * WEIGHTS)
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    split, seq = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held, room, held_ids = i, i, i
    if FAST:
        held = stage(i, BYTES + ROOM + PB * 4) + i // 32 * (2 * STAGE)
        room = held - i // 32 * (2 * STAGE) + BYTES
        held_ids = room + ROOM
    count = tl.load(count_ptr + seq)
    b0 = split * split_blocks
    b1 = tl.minimum(b0 + split_blocks, (count + PB - 1) // PB)
    if b0 < b1:
        g, t = lane // 4, lane % 4
        chunks = (tl.load(unit_ptr + unit * 4 + 3) + CHUNK - 1) // CHUNK
        head = tl.load(unit_ptr + unit * 4)
        own = tl.load(unit_ptr + unit * 4 + 1)
        head0, head1 = head + tl.minimum(part * 16 + g, own - 1), head + tl.minimum(part * 16 + g + 8, own - 1)
        pages = pages_ptr + tl.load(unit_ptr + unit * 4 + 2)
        entries, pieces = tl.load(entries_ptr + unit), tl.load(pieces_ptr + unit)
        mine = i // 32 * 8
        number = mine + 2 * t
        at = (((seq * splits + split) * GROUPS + part) * 16).to(tl.int64) * outputs
        place = ((seq * splits + split) * units + unit) * GROUPS + part
        m0 = tl.full([32 * WARPS], float("-inf"), tl.float32)
        m1 = m0
        total = (tl.zeros([32 * WARPS], tl.float32),) * 4
        start = _start(table_ptr + seq * table_stride + b0 * PB, mine + g, count - b0 * PB, page_nbytes)
        if FAST:
            ask_chunk(_copies(held, pages, start, lane), 0, lane)
        for blk in range(b0, b1):
            here = count - blk * PB
            ids = table_ptr + seq * table_stride + blk * PB
            row = (seq * blocks + blk) * GROUP
            q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
            q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
            const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
            id = tl.load(ids + tl.minimum(i % PB, here - 1))
            ops = entry_ptr + unit * entry_stride + t * 4
            if FAST:
                tl.debug_barrier()  # all warps have done with the last block's weights
                values = pages_ptr + tl.load(bytes_ptr + unit * 2) + id.to(tl.int64) * page_nbytes
                for line in range(0, tl.load(bytes_ptr + unit * 2 + 1), 512):  # four lanes have a page
                    prefetch(values + line + i // PB * 128, 2)
                hold_word(held_ids + i % PB * 4, id)
                _make_operands(room + lane * 16, q0, q1, ops, entries, i, WARPS)
                tl.debug_barrier()
            k0, k1 = tl.load(const + head0 * 8), tl.load(const + head1 * 8)
            mean0, mean1 = tl.load(const + head0 * 8 + 7), tl.load(const + head1 * 8 + 7)
            page = pages + start
            c = _all_strips(
                cells_ptr + unit * 4, held + g * PITCH + behind(page), page, _copies(held, pages, start, lane), chunks,
                room + lane * 16, ops, q0, q1, lane, WARPS, FAST,
            )  # fmt: skip
            if blk + 1 < b1:
                start = _start(ids + PB, mine + g, here - PB, page_nbytes)
                if FAST:
                    ask_chunk(_copies(held, pages, start, lane), 0, lane)
            s = _above_mean(c, k0, k1)
            now, next = number < here, number + 1 < here
            x0, x1 = tokens(s, 0, mean0, now, P, True, SOFTCAP, FAST), tokens(s, 1, mean0, next, P, True, SOFTCAP, FAST)
            y0, y1 = tokens(s, 2, mean1, now, P, True, SOFTCAP, FAST), tokens(s, 3, mean1, next, P, True, SOFTCAP, FAST)
            n0 = tl.maximum(m0, over_lanes(tl.maximum(largest(x0, P), largest(x1, P)), WARPS))
            n1 = tl.maximum(m1, over_lanes(tl.maximum(largest(y0, P), largest(y1, P)), WARPS))
            f0, f1 = tl.exp2(m0 - n0), tl.exp2(m1 - n1)
            m0, m1 = n0, n1
            u0, u1 = block_weights(x0, n0, P, True, FAST), block_weights(x1, n0, P, True, FAST)
            v0, v1 = block_weights(y0, n1, P, True, FAST), block_weights(y1, n1, P, True, FAST)
            total = (total[0] * f0, total[1] * f0, total[2] * f1, total[3] * f1)
            w = _hold_page(room + number * WEIGHTS + g * 16, u0, v0, FAST)
            w = w + _hold_page(room + (number + 1) * WEIGHTS + g * 16, u1, v1, FAST)
            for k in tl.static_range(8):
                total = sum_rows(total, w[k], WARPS, FAST)
            fresh = (blk == b0).to(tl.int32)
            if FAST:
                tl.debug_barrier()
                _sum_pieces(
                    room + t * 128 + g * 16, held_ids, pages_ptr.to(tl.int64), page_nbytes,
                    (piece_ptr + unit * piece_stride + i // 32 * 4).to(tl.int64),
                    (pieces - i // 32 + WARPS - 1) // WARPS, (tl.minimum(here, PB) + 7) // 8,
                    (out_ptr + at + g * outputs + t * 8).to(tl.int64), outputs * 32, f0, f1, fresh, lane, WARPS,
                )  # fmt: skip
            else:
                scratch = scratch_ptr + place.to(tl.int64) * scratch_stride
                f = tl.join(_of_heads(f0, WARPS), _of_heads(f1, WARPS))
                store_weights(
                    scratch.to(tl.pointer_type(tl.int32)), PB, number, g, t, u0, u1, v0, v1, P, True, FAST
                )
                _plain_pieces(
                    scratch, ids, pages_ptr, page_nbytes, piece_ptr + unit * piece_stride, pieces,
                    tl.minimum(here, PB), out_ptr + at, outputs, tl.reshape(tl.trans(f), [16]), fresh,
                )  # fmt: skip
        first = t + i // 32 == 0
        tl.store(top_ptr + place * 16 + g, m0, mask=first)
        tl.store(top_ptr + place * 16 + g + 8, m1, mask=first)
        tl.store(sum_ptr + place * 16 + g, _all_warps(total[0], WARPS) * 16777216.0, mask=first)
        tl.store(sum_ptr + place * 16 + g + 8, _all_warps(total[2], WARPS) * 16777216.0, mask=first)


@triton.jit
def _of_heads(x, WARPS: tl.constexpr):
    """What all lanes of a head have, by head."""
    return tl.max(tl.max(tl.reshape(x, [WARPS, 8, 4]), 2), 0)

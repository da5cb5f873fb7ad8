"""Queries as flat_score_kernel multiplies with them: turned to every block's centre, in latents, times what fields
stand for. All of that is linear, so a layer at a setting has one matrix for it.

A warp turns sixteen or thirty-two queries, by block and head, and multiplies them from registers with one entry of the
matrix after another, which lies in the order of its lanes and comes through shared memory, for all warps of a program.
Which numbers of a head a lane turns is free: chunks of eight that lie together, and eight that are turned with them.
The instruction contracts over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from spectral.aside import to_device
from spectral.bits import CHANNEL_GROUP
from spectral.kernels.lanes import added, floats, half, mma, mma_text, packed
from spectral.kernels.staging import close_stage, copy_reused, held_four, stage, wait_stages
from spectral.kernels.tables import QUAD_ORDER, LayerTables
from spectral.kernels.weights import over_quad
from spectral.kernels.words import four_words
from spectral.overlap import gdc_wait

OPERAND_WARPS = 4

STAGES = tl.constexpr(4)
"""Entries of the matrix that a program has in shared memory."""

BUSY = 264
"""Programs that fill a GPU: with fewer, several share the entries of the same queries. Beside as many others half of
them do."""


def operands_fit(dim: int, half: int) -> bool:
    """Whether operand_kernel serves heads of so many numbers, of which twice `half` are turned: a lane has them in
    registers, and a program four entries of as many numbers in shared memory."""
    return half % 8 == 0 and (dim - 2 * half) % 16 == 0 and lane_chunks(dim, half) <= 4


def lane_chunks(dim: int, half: int) -> int:
    """Chunks of eight numbers, each with the eight that are turned with it, that a lane has of a head."""
    return -(-(half // 8 + (dim - 2 * half) // 16) // 4)


def tiles_of(dim: int, half: int) -> int:
    """Sixteens of queries that a warp has: two where their numbers leave registers for it."""
    return 2 if lane_chunks(dim, half) <= 2 else 1


def _contracted(dim: int, half: int) -> np.ndarray:
    """Which of a head's numbers the instruction contracts over: int64 [steps, 4 lanes, 2, 2], dim: none."""
    chunk = 4 * np.arange(lane_chunks(dim, half))[:, None] + np.arange(4)  # of a lane
    rest = chunk - half // 8
    low = np.where(rest < 0, 8 * chunk, 2 * half + 16 * rest)
    high = np.where(rest < 0, half + 8 * chunk, low + 8)
    first = np.stack([low, high], -1)[:, None, :, :, None] + 2 * np.arange(4).reshape(1, 4, 1, 1, 1)
    number: np.ndarray = first + np.arange(2)  # [chunks, 4, 4 lanes, 2, 2]
    there = (rest < (dim - 2 * half) // 16)[:, None, :, None, None]
    return np.where(there, number, dim).reshape(-1, 4, 2, 2)


def operand_basis(
    keys: torch.Tensor, heads: Sequence[tuple[int, int]], tables: LayerTables, half: int
) -> torch.Tensor:
    """What turned queries become operands with: fp16 [H, entries, steps, 8, 4, 2, 2, 2]: for a lane (g, t) the columns
    g of two matrix operands, of as many entries as the largest unit has.

    An entry is a run of latents in one plane. Of every four of its latents the first and third come first (QUAD_ORDER),
    each times what a field's lowest bit stands for. Fields of four bits stay two to a byte, whose second one then
    multiplies both: what the first one has too much by that is taken off here.

    Args:
        keys: float32 [H, d, R], from latents to keys; heads: KV heads of every unit, from and up to; half: of a head's
            numbers that are turned.
    """
    dim = keys.shape[1]
    order = torch.arange(CHANNEL_GROUP, device=keys.device).view(1, 4, 4)[..., QUAD_ORDER]
    out = keys.new_zeros((len(keys), dim + 1, int(tables.span[:, 1].max()), 4, 4))
    for (first, last), (start, count) in zip(heads, tables.span.tolist(), strict=True):
        entry = to_device(tables.entry[start : start + count], keys.device)
        factor = entry[..., :2].contiguous().view(torch.float16).to(keys.dtype)  # [entries, 4, 4]
        own = keys[first:last][..., entry[:, :1, 2, None] // 32 + order] * factor
        own[..., :2] -= own[..., 2:] * entry[:, :, 3, None]
        out[first:last, :dim, :count] = own
    number = to_device(_contracted(dim, half), keys.device)[:, None, :, None]
    column = np.arange(8)[:, None] // 2 * 4 + np.arange(8)[:, None] % 2 + 2 * np.arange(2)  # [g, operand]
    where = to_device(column, keys.device).view(1, 8, 1, 2, 1, 1)
    return out.half().flatten(3).transpose(1, 2)[:, :, number, where].contiguous()


@triton.constexpr_function
def _products_text(tiles):
    """Operands: sums [8 tiles], twice; the queries' words [4 tiles]; the matrix' four."""
    tiles = int(tiles)
    lines, base = [], 16 * tiles
    w = [f"${base + 4 * tiles + n}" for n in range(4)]
    for m in range(tiles):
        a = [f"${base + 4 * m + n}" for n in range(4)]
        for k in range(2):
            lines.append(mma_text([f"${8 * m + 4 * k + n}" for n in range(4)], a, w[2 * k : 2 * k + 2]))
    return "\n".join(lines)


@triton.jit
def _products(c, a, w, TILES: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr):
    """Add one step's products to the sums of an entry: 8 of each tile."""
    if FAST:
        return tl.inline_asm_elementwise(
            _products_text(TILES), added(8 * TILES, 4 * TILES + 4), c + a + w,
            dtype=floats(8 * TILES), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        out = ()
        for m in tl.static_range(TILES):
            for k in tl.static_range(2):
                s = 8 * m + 4 * k
                out = out + mma(
                    c[s], c[s + 1], c[s + 2], c[s + 3], a[4 * m], a[4 * m + 1], a[4 * m + 2], a[4 * m + 3],
                    w[2 * k], w[2 * k + 1], WARPS,
                )  # fmt: skip
        return out


@triton.jit
def _eight(p, FAST: tl.constexpr):
    """Eight numbers that lie together, as fp32."""
    out = ()
    if p.dtype.element_ty == tl.float32:
        w = four_words(p.to(tl.pointer_type(tl.int32)), FAST) + four_words((p + 4).to(tl.pointer_type(tl.int32)), FAST)
        for k in tl.static_range(8):
            out = out + (w[k].to(tl.float32, bitcast=True),)
    else:
        w = four_words(p.to(tl.pointer_type(tl.int32)), FAST)
        for k in tl.static_range(4):
            if p.dtype.element_ty == tl.bfloat16:
                out = out + ((w[k] << 16).to(tl.float32, bitcast=True), (w[k] & -65536).to(tl.float32, bitcast=True))
            else:
                out = out + (half(w[k], False), half(w[k], True))
    return out


@triton.jit
def _turned(
    q, cos, sin, vector, t, scale, CHUNKS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, WARPS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """A lane's part of one turned query as words, two for every step of the contraction, and its product with a vector.
    q, cos, sin: pointers to the row's."""
    TURNING: tl.constexpr = HALF // 8
    ALL: tl.constexpr = TURNING + (DIM - 2 * HALF) // 16
    out = ()
    shift = tl.zeros([32 * WARPS], tl.float32)
    for s in tl.static_range(CHUNKS):
        c = tl.minimum(4 * s + t, ALL - 1)
        low = tl.where(c < TURNING, 8 * c, 2 * HALF + 16 * (c - TURNING))
        high = tl.where(c < TURNING, HALF + 8 * c, low + 8)
        x, y = _eight(q + low, FAST), _eight(q + high, FAST)
        u, v = _eight(vector + low, FAST), _eight(vector + high, FAST)
        there = tl.where(4 * s + t < ALL, 1.0, 0.0)
        a = ()
        b = ()
        if TURNING > 0:
            angle = 8 * tl.minimum(c, TURNING - 1)
            fc, fs = _eight(cos + angle, FAST), _eight(sin + angle, FAST)
        for k in tl.static_range(8):
            if TURNING == 0:
                a, b = a + (x[k] * scale,), b + (y[k] * scale,)
            elif TURNING == ALL:
                a = a + ((x[k] * fc[k] + y[k] * fs[k]) * scale,)
                b = b + ((y[k] * fc[k] - x[k] * fs[k]) * scale,)
            else:
                co, si = tl.where(c < TURNING, fc[k], 1.0), tl.where(c < TURNING, fs[k], 0.0)
                a = a + ((x[k] * co + y[k] * si) * scale,)
                b = b + ((y[k] * co - x[k] * si) * scale,)
            shift += there * (a[k] * u[k] + b[k] * v[k])
        for k in tl.static_range(4):
            out = out + (packed(a[2 * k], a[2 * k + 1], FAST), packed(b[2 * k], b[2 * k + 1], FAST))
    return out, over_quad(shift, True, WARPS, FAST)


@triton.jit
def _row_words(a, STEP: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr):
    """Of one step the words that the instruction takes: rows g, rows g + 8, and both again."""
    out = ()
    for m in tl.static_range(TILES):
        for side in tl.static_range(2):
            for k in tl.static_range(2):
                out = out + (a[(2 * m + k) * 2 * STEPS + 2 * STEP + side],)
    return out


@triton.jit
def _row_sums(c, ROW: tl.constexpr, FAST: tl.constexpr):
    """Of row g (or, odd, g + 8) of a tile a lane's four sums as halves."""
    FIRST: tl.constexpr = 8 * (ROW // 2) + 2 * (ROW % 2)
    low, high = packed(c[FIRST], c[FIRST + 1], FAST), packed(c[FIRST + 4], c[FIRST + 5], FAST)
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _ask_entry(ring, source, entry, number, i, NBYTES: tl.constexpr, WARPS: tl.constexpr):
    """Ask for a program's part of the matrix, an entry of it; number: of the entry among the program's."""
    to = ring + number % STAGES * NBYTES
    for k in tl.static_range(NBYTES // (512 * WARPS)):
        at = (k * WARPS + i // 32) * 512 + i % 32 * 16
        copy_reused(to + at, source.to(tl.int64) + (entry * NBYTES + at))
    close_stage(i)


@triton.jit(do_not_specialize=["blocks", "heads", "units", "entries", "tiles", "sequences", "shares"])
def operand_kernel(
    q_ptr, cos_ptr, sin_ptr, vector_ptr, basis_ptr, count_ptr, place_ptr, out_ptr, shift_ptr,
    blocks, heads, units, entries, tiles, sequences, shares, scale,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CHUNKS: tl.constexpr,
    PB: tl.constexpr, TILES: tl.constexpr, ALONGSIDE: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Queries of one KV head: a warp has 16 TILES of them of one sequence, by block and head, and a program a share of
    the entries.

    q_ptr: [sequence, query heads, DIM], the model's dtype; cos_ptr, sin_ptr: fp32 [blocks, HALF]; vector_ptr: fp32 [KV
    heads, DIM]; basis_ptr: fp16, operand_basis; place_ptr: int32 [KV heads, 2]: unit, and its first KV head. out_ptr:
    fp16 [sequence, unit, head group, block, entry, 16 heads, 16]; shift_ptr: fp32 [sequence, block, query heads]:
    products of turned queries and the vector. All scores are in units of log2: `scale` holds the factor. tiles: what
    all warps of the longest sequence have. ALONGSIDE: launched beside the kernel before, it ends after that one.
    """
    STEPS: tl.constexpr = 4 * CHUNKS
    NBYTES: tl.constexpr = 512 * STEPS
    kv, share = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    number = tl.program_id(0) * WARPS + i // 32
    seq, tile = tl.minimum(number // tiles, sequences - 1), number % tiles
    rows = (tl.load(count_ptr + seq) + PB - 1) // PB * GROUP
    rows = tl.where(number < tiles * sequences, rows, 0)
    each = (entries + shares - 1) // shares
    first, last = share * each, tl.minimum(share * each + each, entries)
    if (first < last) & (tl.max(rows - tile * (16 * TILES), 0) > 0):
        g, t = i % 32 // 4, i % 4
        basis = basis_ptr.to(tl.pointer_type(tl.int8)) + (kv * entries).to(tl.int64) * NBYTES
        ring = i
        if FAST:
            ring = stage(i, STAGES * NBYTES)
            for n in tl.static_range(STAGES - 1):
                _ask_entry(ring, basis, tl.minimum(first + n, last - 1), n, i, NBYTES, WARPS)
        unit = tl.load(place_ptr + 2 * kv)
        before = (kv - tl.load(place_ptr + 2 * kv + 1)) * GROUP
        a, place, held = (), (), ()
        for k in tl.static_range(2 * TILES):
            m = tile * (16 * TILES) + 8 * k + g
            held = held + (m < rows,)
            m = tl.maximum(tl.minimum(m, rows - 1), 0)
            blk, head = m // GROUP, m % GROUP
            row = seq * heads + kv * GROUP + head
            words, shift = _turned(
                q_ptr + row * DIM, cos_ptr + blk * HALF, sin_ptr + blk * HALF, vector_ptr + kv * DIM, t, scale,
                CHUNKS, DIM, HALF, WARPS, FAST,
            )  # fmt: skip
            a = a + words
            own = before + head
            at = (((seq * units + unit) * GROUPS + own // 16) * blocks + blk).to(tl.int64) * entries
            place = place + (out_ptr.to(tl.pointer_type(tl.int64)) + (at * 64 + own % 16 * 4 + t),)
            at = (seq * blocks + blk) * heads + kv * GROUP + head
            tl.store(shift_ptr + at, shift, mask=held[k] & (share + t == 0))
        for n in range(first, last):
            at = ring + ((n - first) % STAGES * NBYTES + i % 32 * 16)
            if FAST:
                wait_stages(i, STAGES - 2)
                tl.debug_barrier()
                _ask_entry(ring, basis, tl.minimum(n + STAGES - 1, last - 1), n - first + STAGES - 1, i, NBYTES, WARPS)
            c = (tl.zeros([32 * WARPS], tl.float32),) * (8 * TILES)
            for k in tl.static_range(STEPS):
                if FAST:
                    w = held_four(at + 512 * k)
                else:
                    w = four_words((basis + (n * NBYTES + 512 * k + i % 32 * 16)).to(tl.pointer_type(tl.int32)), False)
                c = _products(c, _row_words(a, k, STEPS, TILES), w, TILES, WARPS, FAST)
            for k in tl.static_range(2 * TILES):
                tl.store(place[k] + n * 64, _row_sums(c, k, FAST), mask=held[k])
    if ALONGSIDE:
        gdc_wait()


def shares_of(programs: int, entries: int, others: int = 0) -> int:
    """How many programs share the entries of the same queries, of `programs` that a launch has without, beside so many
    of another one."""
    busy = BUSY // 2 if others >= BUSY // 2 else BUSY
    return max(1, min(busy // programs, entries))

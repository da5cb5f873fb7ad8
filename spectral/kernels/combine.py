"""What comes before and after the codes: queries in their blocks' frames, the exact window, and the parts put
together."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.overlap import gdc_launch_dependents


@triton.jit(do_not_specialize=["blocks", "heads", "sequences"])
def query_kernel(
    q_ptr, cos_ptr, sin_ptr, vector_ptr, framed_ptr, const_ptr,
    q_row, blocks, heads, sequences, scale,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CLASSES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """The queries of one KV head of one sequence, turned back to the centres of EACH blocks.

    q_ptr: [sequence, query heads, DIM], the model's dtype; cos_ptr, sin_ptr: fp32 [blocks, HALF]; vector_ptr: fp32 [KV
    heads, 8, DIM]. framed_ptr: fp16 [KV heads, sequence, block, GROUP, DIM]; const_ptr: fp32 [sequence, block, query
    heads, 8]: products with the vectors. All scores are in units of log2: `scale` holds the factor. G, D: powers of
    two.
    """
    kv = tl.program_id(0)
    seq = tl.program_id(2)
    g = tl.arange(0, G)
    d = tl.arange(0, D)
    mask = (g < GROUP)[:, None] & (d < DIM)[None, :]
    row = q_ptr + (seq * heads + kv * GROUP + g).to(tl.int64)[:, None] * q_row
    x = tl.load(row + d[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    turning = d < 2 * HALF
    i = tl.where(d < HALF, d, d - HALF)
    if HALF > 0:
        other = tl.where(d < HALF, d + HALF, d - HALF)
        y = tl.load(row + other[None, :], mask=mask & turning[None, :], other=0.0).to(tl.float32) * scale
        y = tl.where((d < HALF)[None, :], y, -y)
    for k in range(EACH):
        blk = tl.program_id(1) * EACH + k
        if blk < blocks:
            z = x
            if HALF > 0:
                cos = tl.load(cos_ptr + blk * HALF + i, mask=turning, other=1.0)
                sin = tl.load(sin_ptr + blk * HALF + i, mask=turning, other=0.0)
                z = x * cos[None, :] + y * sin[None, :]
            place = ((kv * sequences + seq) * blocks + blk).to(tl.int64) * GROUP + g
            tl.store(framed_ptr + place[:, None] * DIM + d[None, :], z.to(tl.float16), mask=mask)
            const = const_ptr + ((seq * blocks + blk) * heads + kv * GROUP + g).to(tl.int64) * 8
            for c in tl.static_range(8):
                if c < CLASSES or c == 7:
                    vector = tl.load(vector_ptr + (kv * 8 + c) * DIM + d, mask=d < DIM, other=0.0)
                    tl.store(const + c, tl.sum(z * vector[None, :], 1), mask=g < GROUP)


@triton.jit
def _scaled_side(high_ptr, low_ptr, scale_ptr, place, held, first, N: tl.constexpr, SIZE: tl.constexpr,
                 W: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Numbers first .. first + SIZE of ring places [T] as fp32 [T, N]: integers times the scale of their group."""
    T: tl.constexpr = place.shape[0]
    n = tl.arange(0, N)
    mask = held[:, None] & (n < SIZE)[None, :]
    at = place[:, None] * W + (first + n)[None, :]
    x = tl.load(high_ptr + at, mask=mask, other=0).to(tl.float32)
    if BITS == 10:
        low = tl.load(low_ptr + at // 4, mask=mask, other=0).to(tl.int32)
        x = x * 4 + ((low >> (2 * (at % 4).to(tl.int32))) & 3).to(tl.float32)
    if N % SCALE == 0 and SIZE % SCALE == 0 and (SCALE & (SCALE - 1)) == 0:  # a scale once, not for every number
        m = tl.arange(0, N // SCALE)
        scale = scale_ptr + place[:, None] * (W // SCALE) + (first // SCALE + m)[None, :]
        scale = tl.load(scale, mask=held[:, None] & (m < SIZE // SCALE)[None, :], other=0.0).to(tl.float32)
        return tl.reshape(tl.reshape(x, [T, N // SCALE, SCALE]) * scale[:, :, None], [T, N])
    else:
        scale = scale_ptr + place[:, None] * (W // SCALE) + ((first + n) // SCALE)[None, :]
        return x * tl.load(scale, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _attend(q, k, v, held, scale, top, total, mixed, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Online softmax over one tile: k [T, D], v [T, E] fp32, or 16 bits like q, whose products with k are scores over
    scale. EXACT: weights are not rounded to 16 bits, but two such numbers."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    if SOFTCAP > 0:
        z = tl.exp2(tl.abs(s) * (-2.8853900817779268 / SOFTCAP))
        s = tl.where(s < 0, -SOFTCAP, SOFTCAP) * (1 - z) / (1 + z)
    s = tl.where(held[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    w = tl.exp2(s - safe[:, None])
    fac = tl.exp2(top - safe)
    weight = w.to(v.dtype)
    mixed = tl.dot(weight, v, mixed * fac[:, None], input_precision="tf32x3")
    if EXACT:
        mixed = tl.dot((w - weight.to(tl.float32)).to(v.dtype), v, mixed)
    return higher, total * fac + tl.sum(w, 1), mixed


@triton.jit
def _stored_tile(
    sink_ptr, k_ptr, v_ptr, tile, own, seq, kv, kv_heads, sinks, ring, length, first, before, behind, d, e,
    DIM: tl.constexpr, VDIM: tl.constexpr, BITS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Sixteen of the places that are held as numbers, new tokens behind them: keys, values, and which count."""
    W: tl.constexpr = DIM + VDIM
    kd = (d < DIM)[None, :]
    ve = (e < VDIM)[None, :]
    stored = sinks + ring if BITS == 16 else sinks
    at = tile * 16 + tl.arange(0, 16)
    back = stored + before - at  # new tokens lie behind what is stored, this row's own last
    fresh = (at >= stored) & (back >= 0)
    held = (at < tl.minimum(sinks, length)) | fresh
    if BITS == 16:  # age: of a ring place's token after the first that counts
        held = held | ((at >= sinks) & (at < stored) & ((at + behind) % ring < length - first))
    row = sink_ptr + (own * stored + at)[:, None] * W
    kept = (held & (at < stored))[:, None]  # what is not held may be an earlier row's NaN: 0 times it is no 0
    new = ((seq - back) * kv_heads + kv).to(tl.int64)[:, None]
    k = tl.load(row + d[None, :], mask=kept & kd, other=0.0)
    v = tl.load(row + DIM + e[None, :], mask=kept & ve, other=0.0)
    new_k = tl.load(k_ptr + new * DIM + d[None, :], mask=fresh[:, None] & kd, other=0.0)
    new_v = tl.load(v_ptr + new * VDIM + e[None, :], mask=fresh[:, None] & ve, other=0.0)
    if not SHORT:
        k, v, new_k, new_v = k.to(tl.float32), v.to(tl.float32), new_k.to(tl.float32), new_v.to(tl.float32)
    return tl.where(fresh[:, None], new_k, k), tl.where(fresh[:, None], new_v, v), held


@triton.jit(do_not_specialize=["heads", "kv_heads", "sinks", "ring"])
def window_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, high_ptr, low_ptr, scale_ptr, slot_ptr, length_ptr, first_ptr, before_ptr,
    top_ptr, sum_ptr, out_ptr,
    q_row, heads, kv_heads, sinks, ring, scale,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DIM: tl.constexpr, VDIM: tl.constexpr,
    BITS: tl.constexpr, SCALE: tl.constexpr, T: tl.constexpr, SOFTCAP: tl.constexpr, PARTS: tl.constexpr,
    FIRST: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Attention of one KV head's queries over one of PARTS parts of one row's exact window, its own new token and those
    of the rows before it that are of the same chunk.

    length_ptr: int32 [sequences]: tokens before the step; first_ptr: the oldest that the ring must answer for;
    before_ptr: how many of the rows right before this one it reads. k_ptr, v_ptr: the new tokens [sequences, KV heads,
    DIM or VDIM]. sum_ptr, top_ptr: fp32 [sequences, query heads, PARTS]; out_ptr: fp32 [sequences, query heads, PARTS,
    VDIM]: sums of weight times value, not divided. First the places that are held as numbers (sinks, the ring of 16
    bits, new tokens), 16 at a time; then a ring of integers, T at a time, which is all that parts after the first do.
    FIRST: the next launch may begin beside it. SHORT: numbers and queries are of one type of 16 bits.
    """
    if FIRST:
        gdc_launch_dependents()
    W: tl.constexpr = DIM + VDIM
    kv = tl.program_id(0)
    seq = tl.program_id(1)
    part = tl.program_id(2)
    g = tl.arange(0, G)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    slot = tl.load(slot_ptr + seq)
    length = tl.load(length_ptr + seq)
    first = tl.load(first_ptr + seq)
    before = tl.load(before_ptr + seq)
    real = g < GROUP
    head = seq * heads + kv * GROUP + g
    q = tl.load(
        q_ptr + head.to(tl.int64)[:, None] * q_row + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0
    )
    exact = q if SHORT else q.to(tl.float32)
    top = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    mixed = tl.zeros([G, E], tl.float32)
    own = (slot * kv_heads + kv).to(tl.int64)
    behind = ring * (1 + first // ring) - first
    tiles = ((sinks + ring if BITS == 16 else sinks) + before + 16) // 16
    begin = part
    if BITS < 16:
        begin = tl.where(part == 0, 0, tiles)
    for tile in range(begin, tiles, PARTS if BITS == 16 else 1):
        k, v, held = _stored_tile(
            sink_ptr, k_ptr, v_ptr, tile, own, seq, kv, kv_heads, sinks, ring, length, first, before, behind, d, e,
            DIM, VDIM, BITS, SHORT,
        )  # fmt: skip
        top, total, mixed = _attend(exact, k, v, held, scale, top, total, mixed, SOFTCAP, SHORT)
    if BITS < 16:
        # Integers of 8 and 10 bits times a scale: fp16 loses a tenth of what the ring itself has lost, or less.
        q = (q.to(tl.float32) * scale).to(tl.float16)
        begin = part
        if PARTS > 1:
            begin = tl.where(part == 0, ring, part - 1)
        for tile in range(begin, (ring + T - 1) // T, PARTS - 1 if PARTS > 1 else 1):
            at = tile * T + tl.arange(0, T)
            held = (at < ring) & ((at + sinks + behind) % ring < length - first)
            place = own * ring + tl.minimum(at, ring - 1)
            k = _scaled_side(high_ptr, low_ptr, scale_ptr, place, held, 0, D, DIM, W, BITS, SCALE).to(tl.float16)
            v = _scaled_side(high_ptr, low_ptr, scale_ptr, place, held, DIM, E, VDIM, W, BITS, SCALE).to(tl.float16)
            top, total, mixed = _attend(q, k, v, held, 1.0, top, total, mixed, SOFTCAP, False)
    place = head * PARTS + part
    tl.store(top_ptr + place, top, mask=real)
    tl.store(sum_ptr + place, total, mask=real)
    tl.store(out_ptr + place.to(tl.int64)[:, None] * VDIM + e[None, :], mixed, mask=real[:, None] & (e < VDIM)[None, :])


@triton.jit
def _largest(top_ptr, used, stride, HEADS: tl.constexpr, TOPS: tl.constexpr):
    """Largest scores [HEADS] of `used` splits, `stride` numbers from one to the next, TOPS at once."""
    each = tl.arange(0, HEADS * TOPS)  # a split after another, and its heads
    tops = tl.full([HEADS * TOPS], float("-inf"), tl.float32)
    for first in range(0, used, TOPS):
        s = first + each // HEADS
        tops = tl.maximum(tops, tl.load(top_ptr + s * stride + each % HEADS, mask=s < used, other=float("-inf")))
    return tl.max(tl.reshape(tops, [TOPS, HEADS]), 0)


@triton.jit(do_not_specialize=["units", "splits", "split_blocks", "heads", "sequences"])
def combine_kernel(
    out_ptr, sum_ptr, top_ptr, count_ptr, unit_ptr, source_ptr, scale_ptr, offset_ptr, wtop_ptr, wsum_ptr, latent_ptr,
    share_ptr,
    units, splits, outputs, split_blocks, rank, heads, sequences,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    SPLITS: tl.constexpr, TOPS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A run of latents of one sequence, unit and HEADS heads: planes, classes and splits together, over the sum of all
    weights. SPLITS splits at once (their largest scores TOPS at once): one after another, a long row's many splits
    would each wait for the memory.

    wtop_ptr, wsum_ptr: fp32 [sequence, query heads, PARTS]: the exact window's largest scores and sums of weights, by
    its parts (PART: their number as a power of two). latent_ptr: fp16 [KV heads, sequence, query head of the group,
    rank]; share_ptr: fp32 [sequence, query heads, 1 + PARTS]: the pages' share of the weights, and the factors of the
    window's sums.
    """
    unit, part = tl.program_id(0) // (GROUPS * (16 // HEADS)), tl.program_id(0) // (16 // HEADS) % GROUPS
    run, seq = tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, 16)
    begin = tl.program_id(0) % (16 // HEADS) * HEADS
    own = part * 16 + begin + tl.arange(0, HEADS)
    real = own < tl.load(unit_ptr + unit * 4 + 1)
    head = tl.load(unit_ptr + unit * 4) + own
    row = seq * heads + head
    blocks = (tl.load(count_ptr + seq) + PB - 1) // PB
    used = (blocks + split_blocks - 1) // split_blocks
    w = tl.arange(0, PART)
    some = real[:, None] & (w < PARTS)[None, :]
    wtops = tl.load(wtop_ptr + row[:, None] * PARTS + w[None, :], mask=some, other=float("-inf"))
    wtop = tl.where(real, tl.max(wtops, 1), 0.0)
    tops = top_ptr + (((seq * splits) * units + unit) * GROUPS + part) * 16 + begin
    top = tl.maximum(wtop, _largest(tops, used, units * GROUPS * 16, HEADS, TOPS))
    each = tl.arange(0, HEADS * SPLITS)
    largest = tl.reshape(tl.broadcast_to(top[None, :], [SPLITS, HEADS]), [HEADS * SPLITS])
    totals = tl.zeros([HEADS * SPLITS], tl.float32)
    sums = tl.zeros([HEADS * SPLITS, 16], tl.float32)
    for first in range(0, used, SPLITS):
        s = first + each // HEADS
        at = ((seq * splits + s) * units + unit) * GROUPS + part
        fac = tl.exp2(tl.load(top_ptr + at * 16 + begin + each % HEADS, mask=s < used, other=float("-inf")) - largest)
        weights = sum_ptr + at * (CLASSES * 16) + begin + each % HEADS
        totals += fac * tl.load(weights, mask=s < used, other=0.0)
        source = out_ptr + (((seq * splits + s) * GROUPS + part) * 16 + (begin + each % HEADS)).to(tl.int64) * outputs
        for c in tl.static_range(CLASSES):
            k = unit * CLASSES + c
            for side in tl.static_range(2):
                column = tl.multiple_of(tl.load(source_ptr + (k * 2 + side) * (rank // 16) + run), 16)
                if column >= 0:
                    scale = tl.load(scale_ptr + (k * 2 + side) * rank + run * 16 + n)
                    x = tl.load(source[:, None] + (column + n)[None, :], mask=(s < used)[:, None], other=0.0)
                    if side == 0:  # all-zero codes lie below the mean; a run without a first plane has no codes
                        below = tl.load(offset_ptr + k * rank + run * 16 + n)
                        weight = tl.load(weights + c * 16, mask=s < used, other=0.0)
                        sums += fac[:, None] * (x * scale[None, :] - weight[:, None] * below[None, :])
                    else:
                        sums += fac[:, None] * (x * scale[None, :])
    total = tl.sum(tl.reshape(totals, [SPLITS, HEADS]), 0)
    mixed = tl.sum(tl.reshape(sums, [SPLITS, HEADS, 16]), 0)
    if CLASSES > 1:
        total = total * tl.sqrt(P * 1.0)  # frequency 0 is the sum over a page's tokens, over the root of their number
    window = tl.exp2(wtops - top[:, None])
    wsums = tl.load(wsum_ptr + row[:, None] * PARTS + w[None, :], mask=some, other=0.0)
    weight = tl.where(real, total + tl.sum(window * wsums, 1), 1.0)
    place = ((head // GROUP) * sequences + seq) * GROUP + head % GROUP
    place = latent_ptr + place.to(tl.int64)[:, None] * rank + (run * 16 + n)[None, :]
    tl.store(place, (mixed / weight[:, None]).to(tl.float16), mask=real[:, None] & (n >= 0)[None, :])
    if run == 0:
        tl.store(share_ptr + row * (1 + PARTS), total / weight, mask=real)
        shares = share_ptr + row[:, None] * (1 + PARTS) + 1 + w[None, :]
        tl.store(shares, window / weight[:, None], mask=some)


@triton.jit(do_not_specialize=["count", "runs"])
def value_kernel(
    latent_ptr, share_ptr, basis_ptr, mean_ptr, window_ptr, out_ptr, count, runs,
    GROUP: tl.constexpr, HEADS: tl.constexpr, VDIM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """N numbers of the answers of M query heads that share a KV head: latents times the basis, pages' mean, window.

    latent_ptr: fp16 [KV heads, count, 16 * runs]; count: sequences times GROUP; basis_ptr: fp16 [KV heads, 16 * runs,
    VDIM]; share_ptr, window_ptr, out_ptr: [sequence, query heads, ..], as combine_kernel, window_kernel and the caller
    have them; mean_ptr: fp32 [KV heads, VDIM].
    """
    kv, rank = tl.program_id(1), runs * 16
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(2) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    held = (m < count)[:, None] & (n < VDIM)[None, :]
    row = m // GROUP * HEADS + kv * GROUP + m % GROUP
    share = tl.load(share_ptr + row * (1 + PARTS), mask=m < count, other=0.0)
    x = share[:, None] * tl.load(mean_ptr + kv * VDIM + n, mask=n < VDIM, other=0.0)[None, :]
    for part in tl.static_range(PARTS):
        fac = tl.load(share_ptr + row * (1 + PARTS) + 1 + part, mask=m < count, other=0.0)
        place = (row * PARTS + part).to(tl.int64)[:, None] * VDIM + n[None, :]
        x += fac[:, None] * tl.load(window_ptr + place, mask=held, other=0.0)
    latent = latent_ptr + (kv * count + m).to(tl.int64)[:, None] * rank
    basis = basis_ptr + kv * rank * VDIM + n[None, :]
    for first in range(0, rank, K):
        r = first + k
        a = tl.load(latent + r[None, :], mask=(m < count)[:, None] & (r < rank)[None, :], other=0.0)
        b = tl.load(basis + r[:, None] * VDIM, mask=(r < rank)[:, None] & (n < VDIM)[None, :], other=0.0)
        x = tl.dot(a, b, x)
    place = row.to(tl.int64)[:, None] * VDIM + n[None, :]
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=held)

"""Pages to keys and values in fp16, for a chunk of queries that reads them all.

    codes -> coefficients (`expand_kernel`) -> a matrix product -> the inverse DCT, the mean, the turn
    (`restore_kernel`)

The DCT goes over a page's tokens and the basis over numbers, so the product may come first; it then skips nothing, but
runs at the tensor cores' full speed, and both kernels only move what it reads and writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral.kernels.check_tensors import HALF, INT32, TOKENS, check, check_pool
from spectral.kernels.code_layer import TILE, CodeLayer, Side


@triton.jit(do_not_specialize=["lanes", "count", "nbytes", "stride"])
def expand_kernel(
    pages_ptr, id_ptr, table_ptr, zero_ptr, size_ptr, out_ptr,
    lanes, count, nbytes, stride,
    DOUBLE: tl.constexpr, LANES: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """LANES quads of PAGES pages as coefficients.

    pages_ptr: int32 words of [pages, nbytes]; id_ptr: int32 [count] pages to open; table_ptr: int32 [6, lanes],
    zero_ptr: fp32 [lanes] (see QuadTable); size_ptr: fp32, by place. out_ptr: [count, stride] quads of fp16, as
    int64.
    """
    # Lanes come first: among dimensions without known contiguity the compiler runs threads along the first.
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < lanes
    word = tl.load(table_ptr + lane, mask=real, other=0)[:, None]
    bit = tl.load(table_ptr + lanes + lane, mask=real, other=0)[:, None]
    bits = tl.load(table_ptr + 2 * lanes + lane, mask=real, other=1)[:, None]
    quad = tl.load(table_ptr + 5 * lanes + lane, mask=real, other=0)
    zero = tl.load(zero_ptr + lane, mask=real, other=0.0)[:, None]
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    own = tl.load(id_ptr + page, mask=page < count, other=0).to(tl.int64)[None, :]
    inside = real[:, None] & (page < count)[None, :]
    source = pages_ptr + own * (nbytes // 4)
    x = tl.load(source + word, mask=inside, other=0) >> bit
    mask = (1 << bits) - 1
    if DOUBLE:
        low = tl.load(table_ptr + 3 * lanes + lane, mask=real, other=0)[:, None]
        low_bit = tl.load(table_ptr + 4 * lanes + lane, mask=real, other=0)[:, None]
        y = tl.load(source + low, mask=inside, other=0) >> low_bit
    packed = tl.zeros([LANES, PAGES], tl.int64)
    for i in tl.static_range(4):
        code = (x >> (i * bits)) & mask
        if DOUBLE:
            code = code * 4 + ((y >> (2 * i)) & 3)
        size = tl.load(size_ptr + 4 * quad + i, mask=real, other=0.0)[:, None]
        value = ((code.to(tl.float32) - zero) * size * 0.25).to(tl.float16)
        packed |= (value.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << (16 * i)
    target = out_ptr + page.to(tl.int64)[None, :] * stride + quad[:, None]
    tl.store(target, packed, mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "out_head", "rounds", "every"])
def restore_kernel(
    z_ptr, transform_ptr, mean_ptr, column_ptr, cos_ptr, sin_ptr, out_ptr,
    rows, first, z_row, out_head, rounds, root, every,
    P: tl.constexpr, DIM: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head's numbers of TILE * rounds tokens: from a page's frequencies to its tokens, with the mean, turned back.

    z_ptr: fp16 [rows, z_row], a quarter of frequency f of page p in row p P + f; transform_ptr: fp32 [TILE, TILE];
    `first`: index of the first page in its sequence, BLOCK pages a block. The mean is in every `every`-th row, times
    `root`, its root: in a page's first frequency, or in every token. out_ptr: fp16 [heads, rows, DIM].
    """
    head = tl.program_id(0)
    r = tl.arange(0, TILE)
    c = tl.arange(0, C)
    real = (c < DIM)[None, :]
    column = tl.load(column_ptr + head) + c
    mean = tl.load(mean_ptr + head * DIM + c, mask=c < DIM, other=0.0) * (root * 0.25)
    back = (tl.load(transform_ptr + r[None, :] * TILE + r[:, None]) * 4.0).to(tl.float16)  # [token, frequency]
    if HALF > 0:
        turning = c < 2 * HALF
        pair = tl.where(c < HALF, c, c - HALF)
        other = tl.where(c < HALF, HALF, -HALF)
        other_mean = tl.load(mean_ptr + head * DIM + c + other, mask=turning, other=0.0) * (root * 0.25)
    for turn in range(rounds):
        at = (tl.program_id(1) * rounds + turn) * TILE + r
        held = (at < rows)[:, None] & real
        still = (at % every == 0)[:, None]
        row = z_ptr + at.to(tl.int64)[:, None] * z_row + column[None, :]
        x = tl.load(row, mask=held, other=0.0).to(tl.float32) + tl.where(still, mean[None, :], 0.0)
        if HALF > 0:
            both = held & turning[None, :]
            y = tl.load(row + other[None, :], mask=both, other=0.0).to(tl.float32)
            y += tl.where(still, other_mean[None, :], 0.0)
            if P == TILE:  # one page, so one angle for all rows
                tile = tl.program_id(1) * rounds + turn
                angle = ((first + tile) // BLOCK * HALF + pair)[None, :]
                known = (turning & (tile * TILE + 0 * c < rows))[None, :]
            else:
                angle = ((first + at // P) // BLOCK)[:, None] * HALF + pair[None, :]
                known = both
            cos = tl.load(cos_ptr + angle, mask=known, other=1.0)
            sin = tl.load(sin_ptr + angle, mask=known, other=0.0)
            x = x * cos + y * tl.where(c < HALF, -1.0, 1.0)[None, :] * sin
        out = tl.dot(back, x.to(tl.float16))
        out = tl.minimum(tl.maximum(out, -65504.0), 65504.0)
        target = out_ptr + head.to(tl.int64) * out_head + at.to(tl.int64)[:, None] * DIM + c[None, :]
        tl.store(target, out.to(tl.float16), mask=held)


def expand(
    layer: CodeLayer, pool: torch.Tensor, ids: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Open pages of one sequence.

    Args:
        pool: uint8 [pages, page_nbytes], contiguous; ids: int32 [n] pages of it; first: index of ids[0] in its
            sequence.
        keys: fp16 [H, n * P, d] post-RoPE, values: fp16 [H, n * P, dv]: written; a head's tokens contiguous.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Page ids are not checked against the
    pool: they lie on the device, and the host would have to wait for it.
    """
    _check(layer, pool, ids, first, keys, values)
    codec, count = layer.codec, ids.numel()
    if not count:
        return
    tokens = codec.page_tokens
    most = min(count, max(1, layer.choices().slice_tokens // tokens))
    # Coefficients without bits are never written: they stay 0.
    coefficients = torch.zeros((most * tokens, layer.latents), dtype=torch.float16, device=pool.device)
    numbers = torch.empty((most * tokens, layer.numbers), dtype=torch.float16, device=pool.device)
    bases = [layer.basis(number) for number in range(len(codec.units))]
    last = layer.block(first + count - 1)
    for begin in range(0, count, most):
        some = ids[begin : begin + most]
        _coefficients(layer, pool, some, coefficients)
        rows = some.numel() * tokens
        for number, basis in enumerate(bases):
            latents = coefficients[:rows, layer.columns[number] : layer.columns[number + 1]]
            torch.mm(latents, basis.T, out=numbers[:rows, layer.spans[number] : layer.spans[number + 1]])
        span = slice(begin * tokens, begin * tokens + rows)
        for side, out, turned in ((layer.keys, keys, True), (layer.values, values, False)):
            _restore(layer, numbers[:rows], side, first + begin, last, out[:, span], turned)


def _coefficients(layer: CodeLayer, pool: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Quarters of the coefficients of pages: fp16 [n * P, S], those with bits."""
    words, quads, choices = pool.view(torch.int32), out.view(torch.int64), layer.choices()
    for part in layer.quads:
        lanes = part.zero.numel()
        if lanes:
            grid = (triton.cdiv(lanes, choices.open_lanes), triton.cdiv(ids.numel(), choices.open_pages))
            expand_kernel[grid](
                words, ids, part.table, part.zero, layer.size, quads,
                lanes, ids.numel(), layer.codec.page_nbytes, layer.codec.page_tokens * layer.latents // 4,
                DOUBLE=part.double, LANES=choices.open_lanes, PAGES=choices.open_pages, num_warps=choices.open_warps,
            )  # fmt: skip


def _restore(
    layer: CodeLayer, numbers: torch.Tensor, side: Side, first: int, last: int, out: torch.Tensor, turned: bool
) -> None:
    """Keys (turned) or values fp16 [H, rows, dim] from numbers fp16 [rows, all units'] by frequency; `last`: block."""
    cos, sin, half = layer.turns(last + 1) if turned else (side.mean, side.mean, 0)
    rows, codec, choices = numbers.shape[0], layer.codec, layer.choices()
    every = codec.page_tokens if codec.classes > 1 else 1
    rounds = min(choices.restore_rounds, triton.cdiv(rows, TILE))
    restore_kernel[(codec.kv_heads, triton.cdiv(rows, TILE * rounds))](
        numbers, layer.transform, side.mean, side.column, cos, sin, out,
        rows, first, numbers.stride(0), out.stride(0), rounds, every**0.5, every,
        P=codec.page_tokens, DIM=side.dim, C=max(16, triton.next_power_of_2(side.dim)), HALF=half,
        BLOCK=max(1, codec.frame.pages), TILE=TILE, num_warps=choices.restore_warps, num_stages=1,
    )  # fmt: skip


def _check(
    layer: CodeLayer, pool: torch.Tensor, ids: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Raise ValueError naming what does not fit."""
    codec, device = layer.codec, layer.device
    check_pool("pool", pool, "pages", codec.page_nbytes, device)
    check("ids", ids, INT32, ("pages",), device)
    if first < 0:
        raise ValueError(f"first must be the index of a page in its sequence, 0 at least, got {first}")
    tokens = ids.numel() * codec.page_tokens
    for name, x, dim in (("keys", keys, codec.key_dim), ("values", values, codec.value_dim)):
        check(name, x, HALF, (codec.kv_heads, tokens, dim), device, TOKENS)
        if codec.kv_heads > 1 and x.stride(0) < tokens * dim:
            raise ValueError(f"{name} must have room of its own for every head, got strides {list(x.stride())}")

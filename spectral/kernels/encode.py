"""Keys and values to pages.

    tokens as the window keeps them, turned, centred, transformed (`prepare_kernel`) -> a matrix product -> codes,
    packed into their pages (`pack_kernel`)

The DCT goes over a page's tokens and the projection over numbers, so the transform may come first: then codes follow
from the product element by element, and a lane makes one byte of a page. Each byte is written exactly once. Numbers are
divided by about their standard deviation before they become fp16, and the projection is multiplied by it, so neither
leaves fp16's range where keys have large and small dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from spectral.kernels.check_tensors import FLOATS, INT32, NUMBERS, SINGLE, check, check_pool
from spectral.kernels.code_layer import TILE, CodeLayer, Side

COLUMNS = 1024
"""Latents that a program of `scale_kernel` takes: mostly all of a unit."""


@triton.jit
def _kept(x, TOP: tl.constexpr, T: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """Numbers [T, GROUPS * WIDE] as a window of integers up to TOP gives them back (spectral.windows)."""
    x = tl.reshape(x, [T, GROUPS, WIDE])
    scale = tl.max(tl.abs(x), 2) * (1.0005 / TOP)
    scale = tl.minimum(tl.maximum(scale, 6e-5), 6e4).to(tl.float16).to(tl.float32)[:, :, None]
    code = tl.div_rn(x, tl.broadcast_to(scale, [T, GROUPS, WIDE]))
    code = (code + 12582912.0) - 12582912.0  # rounds half to even, as torch does
    code = tl.minimum(tl.maximum(code, -TOP * 1.0), TOP * 1.0)
    return tl.reshape(code * scale, [T, GROUPS * WIDE])


@triton.jit(do_not_specialize=["rows", "held", "held_head", "held_row", "new_head", "new_row"])
def prepare_kernel(
    held_ptr, new_ptr, page_ptr, transform_ptr, mean_ptr, spread_ptr, column_ptr, cos_ptr, sin_ptr, out_ptr,
    rows, held, held_head, held_row, new_head, new_row, out_row,
    P: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
    TOP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head's numbers of TILE tokens: of the first `held` as the window gave them, of the others as it would.

    held_ptr: fp32, new_ptr: the model's dtype: [heads, tokens, DIM] by their strides; page_ptr: int32 [pages]:
    indices in their sequences; transform_ptr: fp32 [TILE, TILE]. out_ptr: fp16 [rows, out_row], frequency f of page p
    in row p P + f. Numbers lie in GROUPS groups of GROUP, WIDE places each (a power of two); TOP 0: nothing is
    rounded.
    """
    C: tl.constexpr = GROUPS * WIDE
    head = tl.program_id(0)
    r = tl.arange(0, TILE)
    c = tl.arange(0, C)
    d = c // WIDE * GROUP + c % WIDE
    real = (c % WIDE < GROUP) & (d < DIM)
    at = tl.program_id(1) * TILE + r
    old = at < held
    inside = at < rows
    row = held_ptr + head.to(tl.int64) * held_head + at.to(tl.int64)[:, None] * held_row + d[None, :]
    x = tl.load(row, mask=old[:, None] & real[None, :], other=0.0)
    row = new_ptr + head.to(tl.int64) * new_head + (at - held).to(tl.int64)[:, None] * new_row + d[None, :]
    new = tl.load(row, mask=(inside & (at >= held))[:, None] & real[None, :], other=0.0).to(tl.float32)
    if TOP > 0:
        new = _kept(new, TOP, TILE, GROUPS, WIDE)
    x = tl.where(old[:, None], x, new)
    if HALF > 0:
        turning = real & (d < 2 * HALF)
        other = tl.where(d < HALF, d + HALF, d - HALF)
        place = tl.where(turning, other // GROUP * WIDE + other % GROUP, c)
        y = tl.gather(x, tl.broadcast_to(place[None, :], [TILE, C]), 1)
        pair = tl.where(d < HALF, d, other)
        if P == TILE:  # one page, so one angle for all rows
            block = tl.load(page_ptr + tl.program_id(1)) // BLOCK
            angle = (block * HALF + pair)[None, :]
            known = turning[None, :]
        else:
            block = tl.load(page_ptr + at // P, mask=inside, other=0) // BLOCK
            angle = block[:, None] * HALF + pair[None, :]
            known = inside[:, None] & turning[None, :]
        cos = tl.load(cos_ptr + angle, mask=known, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=known, other=0.0)
        x = x * cos + y * tl.where(d < HALF, 1.0, -1.0)[None, :] * sin
    mean = tl.load(mean_ptr + head * DIM + d, mask=real, other=0.0)
    spread = tl.load(spread_ptr + head * DIM + d, mask=real, other=1.0)
    x = (x - mean[None, :]) / spread[None, :]
    x = tl.where(inside[:, None], x, 0.0)
    transform = tl.load(transform_ptr + r[:, None] * TILE + r[None, :])
    out = tl.dot(transform, x, input_precision="tf32x3")
    out = tl.minimum(tl.maximum(out, -65504.0), 65504.0)
    target = out_ptr + at.to(tl.int64)[:, None] * out_row + (tl.load(column_ptr + head) + d)[None, :]
    tl.store(target, out.to(tl.float16), mask=inside[:, None] & real[None, :])


@triton.jit(do_not_specialize=["lanes", "count", "nbytes", "stride"])
def pack_kernel(
    y_ptr, id_ptr, at_ptr, table_ptr, gain_ptr, pages_ptr,
    lanes, count, nbytes, stride,
    BITS: tl.constexpr, LANES: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """LANES bytes with fields of BITS bits of PAGES pages.

    y_ptr: fp16 [count, stride] coefficients, by place; id_ptr: int32 [count]: where the pages go; at_ptr: int32
    [lanes], table_ptr: int32 [Q, 3, lanes] (see FieldTable); gain_ptr: fp32, by place; pages_ptr: uint8 [pages,
    nbytes].
    """
    COUNT: tl.constexpr = 4 if BITS <= 2 else 8 // BITS
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < lanes
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    some = page < count
    source = y_ptr + page.to(tl.int64)[None, :] * stride
    byte = tl.zeros([LANES, PAGES], tl.int32)
    for q in tl.static_range(2 if BITS == 1 else 1):
        row = table_ptr + q * 3 * lanes + lane
        place = tl.load(row, mask=real, other=-1)
        width = tl.load(row + lanes, mask=real, other=0)
        shift = tl.load(row + 2 * lanes, mask=real, other=0)[:, None]
        held = place >= 0
        levels = (1 << width).to(tl.float32)[:, None]
        for i in tl.static_range(COUNT):
            gain = tl.load(gain_ptr + place + i, mask=held, other=0.0)[:, None]
            y = tl.load(source + (place + i)[:, None], mask=held[:, None] & some[None, :], other=0.0).to(tl.float32)
            code = tl.floor(y * gain + levels * 0.5)
            code = tl.minimum(tl.maximum(code, 0.0), levels - 1.0).to(tl.int32)
            byte |= ((code >> shift) & ((1 << BITS) - 1)) << (BITS * (4 * q + i))
    own = tl.load(id_ptr + page, mask=some, other=0).to(tl.int64)
    at = tl.load(at_ptr + lane, mask=real, other=0)
    tl.store(
        pages_ptr + own[None, :] * nbytes + at[:, None], byte.to(tl.uint8), mask=real[:, None] & some[None, :]
    )


@triton.jit
def scale_kernel(x_ptr, scale_ptr, out_ptr, columns, TILE: tl.constexpr):
    """A row of a matrix times its number, from fp32 to fp16, in one pass."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
    tl.store(out_ptr + row * columns + column, (x * tl.load(scale_ptr + row)).to(tl.float16), mask=column < columns)


@dataclass
class Tokens:
    """Tokens of whole pages, in order, in two parts; d keys and dv values.

    held: float32 [H, t, d + dv]: as the window gave them. keys [H, n, d], values [H, n, dv]: as the model made them,
    to be rounded as a window of integers up to `top` would, `group` to a scale (0: not at all).
    """

    held: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    top: int = 0
    group: int = 1


def encode(
    layer: CodeLayer, tokens: Tokens, page: torch.Tensor, blocks: int, pool: torch.Tensor, ids: torch.Tensor
) -> None:
    """Encode tokens of n pages.

    Args:
        page: int32 [n]: each page's index in its sequence, all in the sequence's first `blocks` blocks.
        pool: uint8 [pages, page_nbytes], contiguous; ids: int32 [n]: the pages of it that are written.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Whether ids lie in the pool and indices
    in these blocks is not checked: they lie on the device, and the host would have to wait for it.
    """
    _check(layer, tokens, page, blocks, pool, ids)
    codec, count = layer.codec, ids.numel()
    if not count or not codec.page_nbytes:
        return
    rows = count * codec.page_tokens
    numbers = torch.empty((rows, layer.numbers), dtype=torch.float16, device=pool.device)
    kinds = (
        (layer.keys, tokens.held[..., : codec.key_dim], tokens.keys, blocks),
        (layer.values, tokens.held[..., codec.key_dim :], tokens.values, 0),
    )
    for side, held, new, turned in kinds:
        _prepare(layer, side, held, new, tokens, page, turned, numbers)
    y = torch.empty((rows, layer.latents), dtype=torch.float16, device=pool.device)
    for number in range(len(codec.units)):
        out = y[:, layer.columns[number] : layer.columns[number + 1]]
        torch.mm(numbers[:, layer.spans[number] : layer.spans[number + 1]], projection(layer, number), out=out)
    choices = layer.choices()
    for part in layer.fields:
        lanes = part.at.numel()
        pack_kernel[(triton.cdiv(lanes, choices.pack_lanes), triton.cdiv(count, choices.pack_pages))](
            y, ids, part.at, part.table, layer.gain, pool,
            lanes, count, codec.page_nbytes, codec.page_tokens * layer.latents,
            BITS=part.bits, LANES=choices.pack_lanes, PAGES=choices.pack_pages, num_warps=choices.pack_warps,
        )  # fmt: skip


def projection(layer: CodeLayer, number: int) -> torch.Tensor:
    """A unit's numbers over their spread to latents: fp16 [numbers of the unit, R]. Made anew each time: kept, those of
    all layers would weigh as much as another setting's tables."""
    project = layer.codec.units[number].project.contiguous()
    out = torch.empty(project.shape, dtype=torch.float16, device=project.device)
    rows, columns = project.shape
    scale_kernel[(rows, triton.cdiv(columns, COLUMNS))](
        project, layer.spread[number], out, columns, TILE=COLUMNS, num_warps=4
    )
    return out


def _prepare(
    layer: CodeLayer,
    side: Side,
    held: torch.Tensor,
    new: torch.Tensor,
    tokens: Tokens,
    page: torch.Tensor,
    blocks: int,
    out: torch.Tensor,
) -> None:
    """Keys (where blocks > 0) or values into out [rows, numbers]: by frequency, centred, over their spread."""
    cos, sin, half = layer.turns(blocks) if blocks else (side.mean, side.mean, 0)
    codec, rows, group = layer.codec, out.shape[0], tokens.group if tokens.top else side.dim
    wide = triton.next_power_of_2(group)
    groups = max(triton.next_power_of_2(side.dim // group), 16 // wide)
    prepare_kernel[(codec.kv_heads, triton.cdiv(rows, TILE))](
        held, new, page, layer.transform, side.mean, side.spread, side.column, cos, sin, out,
        rows, held.shape[1], held.stride(0), held.stride(1), new.stride(0), new.stride(1), out.stride(0),
        P=codec.page_tokens, DIM=side.dim, GROUP=group, GROUPS=groups, WIDE=wide,
        TOP=tokens.top, HALF=half, BLOCK=max(1, codec.frame.pages), TILE=TILE,
        num_warps=layer.choices().prepare_warps, num_stages=1,
    )  # fmt: skip


def _check(
    layer: CodeLayer, tokens: Tokens, page: torch.Tensor, blocks: int, pool: torch.Tensor, ids: torch.Tensor
) -> None:
    """Raise ValueError naming what does not fit."""
    codec, device, held = layer.codec, layer.device, tokens.held
    check_pool("pool", pool, "pages", codec.page_nbytes, device)
    check("ids", ids, INT32, ("pages",), device)
    check("page", page, INT32, (ids.numel(),), device)
    if blocks < 1:
        raise ValueError(f"blocks must be 1 at least, got {blocks}")
    numbers = codec.key_dim + codec.value_dim
    check("held", held, SINGLE, (codec.kv_heads, "tokens", numbers), device, NUMBERS)
    new = ids.numel() * codec.page_tokens - held.shape[1]
    if new < 0:
        raise ValueError(f"held must be {new + held.shape[1]} tokens at most, as the pages have, got {held.shape[1]}")
    for name, x, dim in (("keys", tokens.keys, codec.key_dim), ("values", tokens.values, codec.value_dim)):
        check(name, x, FLOATS, (codec.kv_heads, new, dim), device, NUMBERS)
        if tokens.top and (tokens.group < 1 or dim % tokens.group):
            raise ValueError(f"{name} of {dim} numbers do not fall into groups of {tokens.group}")

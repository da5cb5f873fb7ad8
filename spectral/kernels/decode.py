"""Decode attention with the kernels: what a layer's codec must become once, and one step's launches.

    queries in their blocks' frames -> projected queries -> weights of blocks -> sums of codes -> latents -> values

Nothing here waits for the device; launch shapes depend on the sizes of the tensors alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import triton

from spectral.aside import to_device
from spectral.beside import Beside
from spectral.codec import LayerCodec
from spectral.errors import SettingError
from spectral.kernels.check_tensors import (
    ANY,
    FLOATS,
    INT32,
    SHORT,
    check,
    check_heads,
    check_pool,
    check_window,
    fault,
)
from spectral.kernels.choices import DecodeChoices, Shape, block_pages, chosen, layer_shape
from spectral.kernels.combine import combine_kernel, query_kernel, value_kernel
from spectral.kernels.flat import ENTRIES, flat_fits
from spectral.kernels.operands import (
    OPERAND_WARPS,
    lane_chunks,
    operand_basis,
    operand_kernel,
    operands_fit,
    shares_of,
    tiles_of,
)
from spectral.kernels.recent_attention import read_window, window_parts
from spectral.kernels.scoring import Asked, Sums, by_lane, flat_sums, sums_of_weights, weights
from spectral.kernels.tables import QUAD_ORDER, LayerTables, layer_tables
from spectral.overlap import alongside
from spectral.shapes import LayerShape
from spectral.windows import ExactWindow

LOG2E = math.log2(math.e)
VALUE_COLUMNS = 32
"""Numbers of a value that a program of value_kernel makes."""

FEW_ROWS = 32
"""Rows, by unit, up to which many parts are put together 32 at a time: more fill a GPU with eight after eight."""


def unsupported(codec: LayerCodec, window: int) -> str:
    """Why the kernels cannot serve a layer with this codec and exact window, in words; "" where they can."""
    if codec.page_tokens not in (8, 16):
        return f"pages of {codec.page_tokens} tokens (8 or 16 are supported)"
    if block_pages(codec) not in (16, 32, 64):
        return f"blocks of {block_pages(codec)} pages (16, 32 or 64 are supported)"
    if any(not unit.rank for unit in codec.units):
        return "a unit without any bits"
    spans = [[codec.units[number].heads for number in side] for side in (codec.key_units, codec.value_units)]
    if spans[0] != spans[1]:
        return "keys and values in units of different heads"
    return "" if window else "a setting without an exact window"


@dataclass(frozen=True)
class StepTables:
    """Where a decoding step's rows lie, shared by all layers; contiguous but for `pages`, whose rows may lie apart.

    Attributes:
        pages: int32 [B, m] page ids (any where a row has fewer); count: int32 [B] pages of a row, the one sealed in
            this step included; slot: int32 [B]; length: int32 [B] tokens before the step; first: int32 [B] the
            oldest token that only the ring holds; before: int32 [B] how many of the rows right before a row hold
            tokens of the same chunk before its own, which it reads as they are (0 in decoding).
    """

    pages: torch.Tensor
    count: torch.Tensor
    slot: torch.Tensor
    length: torch.Tensor
    first: torch.Tensor
    before: torch.Tensor

    @cached_property
    def fault(self) -> str:
        """What kernels would read otherwise, in words; "" where all is right. Found once for all layers."""
        pages = self.pages
        if pages.dtype != torch.int32 or pages.ndim != 2 or (pages.shape[1] > 1 and pages.stride(1) != 1):
            found = f"{pages.dtype} {list(pages.shape)} with strides {list(pages.stride())}"
            return f"step.pages must be int32 [rows, pages] with contiguous rows, got {found}"
        columns = ("count", "slot", "length", "first", "before")
        each = (fault(f"step.{x}", getattr(self, x), INT32, (len(pages),), pages.device) for x in columns)
        return next(filter(None, each), "")


class LayerKernels:
    """One layer's codec, as the kernels want it. Raises SettingError for a codec that they cannot serve."""

    def __init__(self, codec: LayerCodec) -> None:
        reason = unsupported(codec, 1)
        if reason:
            raise SettingError(f"SPECTRAL_ATTENTION=triton cannot serve {reason}; use SPECTRAL_ATTENTION=reference")
        self.codec = codec
        units = [codec.units[number] for number in codec.key_units]
        values = [codec.units[number] for number in codec.value_units]
        device = units[0].mean.device
        tables: LayerTables = layer_tables(codec)
        self.tables, self._arrays = tables.to(device), tables
        self.outputs, self.classes = tables.outputs, len(units[0].class_deviation)
        self.items = len(tables.item)
        most = max(unit.channels for unit in units)  # of any setting: a squeeze must not wait for a compiler
        self.many = int(tables.span[:, 1].max()) > int(ENTRIES)
        """Whether the kernels for pages whose rows are tokens have a block's operands plane by plane."""
        self.key_rank, self.rank = tables.key_offset.shape[2], tables.offset.shape[2]
        decode = torch.cat([_wide(unit.value_decode, self.rank) for unit in values])
        self.value_basis = decode.half().transpose(1, 2).contiguous()
        self.value_mean = torch.cat([unit.value_mean[:, 0] for unit in values]).contiguous()  # [H, dv]
        self.unit_heads = [unit.heads for unit in units]
        places = [(number, first) for number, (first, last) in enumerate(self.unit_heads) for _ in range(first, last)]
        self.places = to_device(np.array(places, dtype=np.int32), device)  # of KV heads: unit, and its first one
        self._bytes = [codec.starts[number : number + 2] for number in codec.key_units]
        self._units: dict[int, torch.Tensor] = {}
        self._shapes: dict[int, Shape] = {}
        self.sizes = LayerShape(codec.kv_heads, codec.key_dim, codec.value_dim)
        self.flat = False
        fit = flat_fits(most, block_pages(codec)) and operands_fit(codec.key_dim, frame_half(codec))
        self.read_tokens(self.classes == 1 and codec.page_tokens == 16 and fit)

    def read_tokens(self, flat: bool) -> None:
        """Make what turns queries into latents, or (flat) into operands of the kernels for pages whose rows are tokens,
        and let those serve or not."""
        codec, tables = self.codec, self._arrays
        units = [codec.units[number] for number in codec.key_units]
        keys = torch.cat([_wide(unit.key_decode, self.key_rank) for unit in units])  # [H, d, R]
        below = keys.new_zeros((codec.kv_heads, codec.key_dim, self.classes))
        for number, unit in enumerate(units):
            own = to_device(tables.key_offset[number], keys.device)  # [C, R]
            below[slice(*unit.heads)] = torch.matmul(keys[slice(*unit.heads)], own.T)
        mean = torch.cat([unit.key_mean[..., 0] for unit in units])
        self.flat = flat
        """Whether the kernels for pages whose rows are tokens serve."""
        if flat:
            self.key_basis = operand_basis(keys, self.unit_heads, tables, frame_half(codec))
            self.vectors = mean - below[..., 0]
        else:
            self.key_basis = keys.half().unflatten(2, (-1, 4))[..., QUAD_ORDER].flatten(2)
            self.vectors = keys.new_zeros((codec.kv_heads, 8, codec.key_dim))
            self.vectors[:, : self.classes], self.vectors[:, 7] = below.transpose(1, 2), mean

    def choices(self, group: int) -> DecodeChoices:
        """What launches choose, for `group` heads a KV head."""
        return chosen(DecodeChoices, self.key_basis.device, self.shape(group))

    def shape(self, group: int) -> Shape:
        """What choices are kept for."""
        if group not in self._shapes:
            self._shapes[group] = layer_shape(self.codec, group)
        return self._shapes[group]

    def units(self, group: int) -> torch.Tensor:
        """int32 [units, 4]: first query head, query heads, offset of the bytes of the unit's keys, how many; `group`
        heads a KV head."""
        if group not in self._units:
            spans = zip(self.unit_heads, self._bytes, strict=True)
            rows = [[a * group, (b - a) * group, start, stop - start] for (a, b), (start, stop) in spans]
            self._units[group] = torch.tensor(rows, dtype=torch.int32, device=self.key_basis.device)
        return self._units[group]

    def head_groups(self, group: int) -> int:
        """Groups of 16 query heads in the largest unit."""
        return max(-(-(b - a) * group // 16) for a, b in self.unit_heads)


def frame_half(codec: LayerCodec) -> int:
    """Half of a key's numbers that are turned into its block's frame."""
    return int(codec.frame._table(1)[0].shape[1]) if codec.frame.turns else 0


def _wide(x: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, rank - x.shape[-1]))


def decode_attention(
    layer: LayerKernels,
    pool: torch.Tensor,
    window: ExactWindow,
    step: StepTables,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one new token of each of B rows over sinks, pages, recent tokens, those before it in its chunk, and
    itself.

    Args:
        pool: uint8 [pages, page_nbytes], contiguous, with spectral.layout.POOL_SLACK readable bytes behind it.
        window: of the layer's heads and sizes.
        query: [B, Hq, d]; key: [B, H, d]; value: [B, H, dv]; post-RoPE, one dtype, not yet in the window; by any
            strides. fp16, bf16 or fp32, or (pages that are transformed) fp64.

    Returns:
        [B, Hq, dv] in the query's dtype.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Page ids, counts, slots and lengths are
    not checked against pool, table and window: they lie on the device, and the host would have to wait for it.
    """
    codec = layer.codec
    _check(layer, pool, window, step, query, key, value)
    rows, heads, _ = query.shape
    group = heads // codec.kv_heads
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    scale, cap = scaling * LOG2E, 0.0 if softcap is None else softcap * LOG2E
    out = torch.empty((rows, heads, codec.value_dim), dtype=query.dtype, device=query.device)
    if not rows:
        return out
    choices = layer.choices(group)
    blocks = triton.cdiv(step.pages.shape[1], block_pages(codec))
    parts = window_parts(layer, choices, window, rows, group, blocks)
    top = torch.empty((rows, heads, parts), device=query.device)
    total, mixed = torch.empty_like(top), torch.empty((rows, heads, parts, codec.value_dim), device=query.device)
    look_back = partial(read_window, choices, window, step, query, key, value, scale, cap, top, total, mixed)
    if not step.pages.shape[1]:
        look_back()
        out.copy_((mixed / total[..., None])[:, :, 0])
        return out
    apart = alongside(query.device) if layer.flat and choices.window_early and parts == 1 else {}
    with Beside(query.device) as beside:
        if apart:  # a branch of a graph begins late; in one stream the window has its places before others take them
            look_back(first=True)
        elif choices.window_early:
            beside.begin()
        projected = (
            _operands(layer, step, query, blocks, scale, apart)
            if layer.flat
            else _project(layer, choices, query, blocks, scale)
        )
        if not apart:
            beside.run(look_back)
        asked = Asked(
            layer, choices, pool, step, *projected, layer.units(group), group, cap, layer.head_groups(group), blocks
        )
        found = flat_sums(asked) if layer.flat else sums_of_weights(asked, *weights(asked))
    latent, share = _latents(asked, found, top, total)
    value_kernel[(triton.cdiv(rows * group, 16), codec.kv_heads, triton.cdiv(codec.value_dim, VALUE_COLUMNS))](
        latent, share, layer.value_basis, layer.value_mean, mixed, out, rows * group, layer.rank // 16,
        GROUP=group, HEADS=heads, VDIM=codec.value_dim, M=16, N=VALUE_COLUMNS, K=128, PARTS=parts,
        num_warps=choices.value_warps,
    )  # fmt: skip
    return out


def _check(
    layer: LayerKernels,
    pool: torch.Tensor,
    window: ExactWindow,
    step: StepTables,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Raise ValueError naming what does not fit."""
    codec, device = layer.codec, layer.key_basis.device
    check("query", query, SHORT if layer.flat else FLOATS, ("rows", "query heads", codec.key_dim), device, ANY)
    rows, heads, _ = query.shape
    check_heads(heads, codec.kv_heads)
    kind = (query.dtype,)
    check("key", key, kind, (rows, codec.kv_heads, codec.key_dim), device, ANY)
    check("value", value, kind, (rows, codec.kv_heads, codec.value_dim), device, ANY)
    check_pool("pool", pool, "pages", codec.page_nbytes, device)
    check_window(window, layer.sizes, device)
    if step.fault:
        raise ValueError(step.fault)
    if len(step.pages) != rows or step.pages.device != device:
        raise ValueError(f"step must be of {rows} rows on {device}, got {len(step.pages)} on {step.pages.device}")


def _angles(layer: LayerKernels, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of blocks' centres; where nothing is turned something that is not read."""
    frame = layer.codec.frame
    return frame._table(blocks) if frame.turns else (layer.vectors, layer.vectors)


def _operands(
    layer: LayerKernels, step: StepTables, query: torch.Tensor, blocks: int, scale: float, apart: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, Hq, d] as spectral.kernels.operands leaves them: fp16 [B, units, head groups, blocks, entries, 16,
    16], and their products with what tokens without codes are, fp32 [B, blocks, Hq]. `apart`: how the launch is to
    begin beside the one before it, if it is."""
    codec, (rows, heads, dim) = layer.codec, query.shape
    group, units, parts = heads // codec.kv_heads, len(layer.unit_heads), layer.head_groups(heads // codec.kv_heads)
    cos, sin = _angles(layer, blocks)
    half, entries = frame_half(codec), layer.key_basis.shape[1]
    out = torch.empty((rows, units, parts, blocks, entries, 16, 16), dtype=torch.float16, device=query.device)
    shift = torch.empty((rows, blocks, heads), device=query.device)
    if query.data_ptr() % 16:
        query = query.clone()
    together, warps = tiles_of(dim, half), OPERAND_WARPS
    tiles = triton.cdiv(blocks * group, 16 * together)
    programs = triton.cdiv(tiles * rows, warps)
    shares = shares_of(codec.kv_heads * programs, entries, codec.kv_heads * rows if apart else 0)
    operand_kernel[(programs, codec.kv_heads, shares)](
        query, cos, sin, layer.vectors, layer.key_basis, step.count, layer.places, out, shift,
        blocks, heads, units, entries, tiles, rows, shares, scale,
        GROUPS=parts, GROUP=group, DIM=dim, HALF=half, CHUNKS=lane_chunks(dim, half), PB=block_pages(codec),
        TILES=together, WARPS=warps, **by_lane(warps), **(apart or {"ALONGSIDE": False}),
    )  # fmt: skip
    return out, shift


def _project(
    layer: LayerKernels, choices: DecodeChoices, query: torch.Tensor, blocks: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, Hq, d] in the frames of all blocks: in latents, fp16 [H, B * blocks * G, R], and their products with
    means and offsets, fp32 [B, blocks, Hq, 8]."""
    codec, (rows, heads, dim) = layer.codec, query.shape
    group = heads // codec.kv_heads
    cos, sin = _angles(layer, blocks)
    framed = torch.empty((codec.kv_heads, rows * blocks * group, dim), dtype=torch.float16, device=query.device)
    const = torch.empty((rows, blocks, heads, 8), device=query.device)
    each = 4 if codec.kv_heads * blocks * rows > choices.many_queries else 1
    query_kernel[(codec.kv_heads, triton.cdiv(blocks, each), rows)](
        query, cos, sin, layer.vectors, framed, const, dim, blocks, heads, rows, scale,
        GROUP=group, G=triton.next_power_of_2(group), D=triton.next_power_of_2(dim), DIM=dim,
        HALF=frame_half(codec), CLASSES=layer.classes, EACH=each,
        num_warps=choices.query_warps,
    )  # fmt: skip
    return torch.bmm(framed, layer.key_basis), const


def _latents(
    asked: Asked, found: Sums, top: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the pages' answers fp16 [H, B, G, R], over all weights, and the shares [B, Hq, 1 + parts] of pages and
    window, which has largest scores and sums of weights [B, Hq, parts]."""
    layer, codec, choices, group = asked.layer, asked.layer.codec, asked.choices, asked.group
    rows, units, parts, _ = asked.shape
    device, heads, tables = asked.pool.device, codec.kv_heads * group, layer.tables
    latent = torch.empty((codec.kv_heads, rows, group, layer.rank), dtype=torch.float16, device=device)
    share = torch.empty((rows, heads, 1 + top.shape[2]), device=device)
    together, shares, warps = 8, 2, choices.combine_warps
    if found.splits <= choices.few_splits:
        together, shares = 4, 1
    elif found.splits >= choices.most_splits and rows * units * parts <= FEW_ROWS:
        together, shares, warps = 32, 4, 4
    combine_kernel[(units * parts * shares, layer.rank // 16, rows)](
        found.outs, found.sums, found.tops, asked.step.count, asked.unit,
        tables["source"], tables["source_factor"], tables["offset"], top, total, latent, share,
        units, found.splits, layer.outputs, found.each, layer.rank, heads, rows,
        GROUPS=parts, GROUP=group, CLASSES=layer.classes, P=codec.page_tokens, PB=block_pages(codec), SPLITS=together,
        TOPS=4 * together, HEADS=16 // shares, PARTS=top.shape[2], PART=triton.next_power_of_2(top.shape[2]),
        num_warps=warps,
    )  # fmt: skip
    return latent, share

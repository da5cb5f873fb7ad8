"""A chunk of queries over a row's codes, its window and itself: pages are opened into keys and values in fp16, and
exact attention runs on them.

What is opened at once is bounded: a longer past comes in parts, merged by their log-sum-exp. Attention is the flash
kernel that PyTorch brings where it can serve (CUDA, equal head sizes that are multiples of 8, no soft-capping), and
`chunk_kernel` elsewhere.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
import triton
import triton.language as tl

from spectral.kernels.check_tensors import ANY, FLOATS, HALF, SINGLE, TOKENS, check, check_heads
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.expand import expand

log = logging.getLogger("spectral.attention")

WORKSPACE = 256 << 20
"""Bytes of keys and values that are open at once."""

LOG2E = math.log2(math.e)


TILES = {"large": (128, 128, 8, 2), "middle": (128, 64, 8, 2), "small": (64, 64, 4, 2), "wide": (64, 32, 4, 2)}
"""Queries and keys of a program's tile, its warps and stages of loads."""


@triton.jit
def _keys_of(
    q, keys, values, begin, end, past, m, top, weight, mixed, scale, cap,
    DIM: tl.constexpr, VDIM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end - 1, in tiles of N, added to what queries have seen; unless MASKED, all of them count."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    for start in range(begin, end, N):
        at = start + n
        k_row = keys + at.to(tl.int64)[None, :] * DIM + d[:, None]
        v_row = values + at.to(tl.int64)[:, None] * VDIM + e[None, :]
        if MASKED:
            k = tl.load(k_row, mask=(at < end)[None, :] & (d < DIM)[:, None], other=0.0)
        elif D == DIM:
            k = tl.load(k_row)
        else:
            k = tl.load(k_row, mask=(d < DIM)[:, None], other=0.0)
        s = tl.dot(q, k) * scale
        if CAPPED:
            z = tl.exp2(tl.abs(s) * (-2.8853900817779268 / cap))
            s = tl.where(s < 0, -cap, cap) * (1 - z) / (1 + z)
        if MASKED:
            s = tl.where((at < end)[None, :] & (at[None, :] <= (past + m)[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(p, 1)
        if MASKED:
            v = tl.load(v_row, mask=(at < end)[:, None] & (e < VDIM)[None, :], other=0.0)
        elif E == VDIM:
            v = tl.load(v_row)
        else:
            v = tl.load(v_row, mask=(e < VDIM)[None, :], other=0.0)
        mixed = tl.dot(p.to(tl.float16), v, mixed * fade[:, None])
        top = higher
    return top, weight, mixed


@triton.jit(do_not_specialize=["count", "total", "past", "k_head", "v_head"])
def chunk_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sum_ptr,
    count, total, past, k_head, v_head, scale, cap,
    GROUP: tl.constexpr, DIM: tl.constexpr, VDIM: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attention of M queries of one head over `total` keys: query i sees keys 0 .. past + i.

    q_ptr: fp16 [query heads, count, DIM]; k_ptr, v_ptr: fp16 [KV heads, total, ...]. out_ptr: fp16 [query heads, count,
    VDIM]; sum_ptr: fp32 [query heads, count]: log-sum-exp of the scores. `scale`: of scores, in units of log2; with
    CAPPED they are limited to +- cap, in the same units. All queries must see a key in the first N.
    """
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    m = tile * M + tl.arange(0, M)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    real = m < count
    place = head.to(tl.int64) * count + m
    q = tl.load(q_ptr + place[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    keys = k_ptr + (head // GROUP).to(tl.int64) * k_head
    values = v_ptr + (head // GROUP).to(tl.int64) * v_head
    top = tl.full([M], float("-inf"), tl.float32)
    weight = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, E], tl.float32)
    whole = tl.minimum(total, past + tile * M + 1) // N * N  # keys that all of these queries see
    end = tl.minimum(total, past + (tile + 1) * M)
    top, weight, mixed = _keys_of(
        q, keys, values, 0, whole, past, m, top, weight, mixed, scale, cap, DIM, VDIM, D, E, N, False, CAPPED
    )
    top, weight, mixed = _keys_of(
        q, keys, values, whole, end, past, m, top, weight, mixed, scale, cap, DIM, VDIM, D, E, N, True, CAPPED
    )
    mixed = mixed / weight[:, None]
    row = out_ptr + place[:, None] * VDIM + e[None, :]
    tl.store(row, mixed.to(tl.float16), mask=real[:, None] & (e < VDIM)[None, :])
    tl.store(sum_ptr + place, (top + tl.log2(weight)) * 0.6931471805599453, mask=real)


def part_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of n queries over t keys (one at least), the last n of which are the queries' own where `causal`.

    Args:
        query: [Hq, n, d], contiguous; keys: [H, t, d]; values: [H, t, dv]; fp16, a head's tokens contiguous.

    Returns:
        fp16 [Hq, n, dv] and the scores' log-sum-exp, fp32 [Hq, n].

    Raises ValueError for tensors of other shapes, dtypes, strides or devices.
    """
    _check_part(query, keys, values, causal)
    heads, count, dim = query.shape
    group, value_dim = heads // keys.shape[0], values.shape[2]
    if query.is_cuda and softcap is None and dim == value_dim and flash_serves(query.device, dim, group):
        return _flash(query, keys, values, causal, scaling)
    tiles = TILES["small" if max(dim, value_dim) <= 128 else "wide"]
    return tiled(query, keys, values, tiles, causal=causal, scaling=scaling, softcap=softcap)


def tiled(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: tuple[int, int, int, int],
    *,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`part_attention` through `chunk_kernel`; tiles: see TILES."""
    _check_part(query, keys, values, causal)
    heads, count, dim = query.shape
    total, value_dim = keys.shape[1], values.shape[2]
    out = torch.empty((heads, count, value_dim), dtype=torch.float16, device=query.device)
    sums = torch.empty((heads, count), device=query.device)
    chunk_kernel[(triton.cdiv(count, tiles[0]), heads)](
        query, keys, values, out, sums,
        count, total, total - count if causal else total, keys.stride(0), values.stride(0), scaling * LOG2E,
        1.0 if softcap is None else softcap * LOG2E,
        GROUP=heads // keys.shape[0], DIM=dim, VDIM=value_dim, D=max(16, triton.next_power_of_2(dim)),
        E=max(16, triton.next_power_of_2(value_dim)), M=tiles[0], N=tiles[1], CAPPED=softcap is not None,
        num_warps=tiles[2], num_stages=tiles[3],
    )  # fmt: skip
    return out, sums


def _check_part(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool) -> None:
    """Raise ValueError naming what does not fit."""
    device = query.device
    check("query", query, HALF, ("query heads", "tokens", "numbers"), device)
    heads, count, dim = query.shape
    check("keys", keys, HALF, ("KV heads", "tokens", dim), device, TOKENS)
    kv_heads, total, _ = keys.shape
    check("values", values, HALF, (kv_heads, total, "numbers"), device, TOKENS)
    check_heads(heads, kv_heads)
    least = count if causal else 1
    if total < least:
        raise ValueError(f"keys must be of {least} tokens at least ({count} queries, causal: {causal}), got {total}")


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash kernel, whose causal mask ends at the last query and the last key."""
    sides = (x[None] for x in (query, keys, values))
    found = torch.ops.aten._scaled_dot_product_flash_attention(*sides, 0.0, causal, False, scale=scaling)
    return found[0][0], found[1][0]


@cache
def flash_serves(device: torch.device, dim: int, group: int) -> bool:
    """Whether PyTorch's flash kernel gives right answers for these sizes: asked once, with fewer queries than keys."""
    if dim % 8 or dim > 256:
        return False
    rng = torch.Generator(device).manual_seed(0)
    sizes = ((2 * group, 48), (2, 200), (2, 200))
    q, k, v = (torch.randn(*s, dim, device=device, dtype=torch.float16, generator=rng) for s in sizes)
    scores = q.float() @ k.float().repeat_interleave(group, 0).transpose(1, 2) * dim**-0.5
    hidden = torch.ones(48, 200, dtype=torch.bool, device=device).triu(153)
    scores = scores.masked_fill(hidden, float("-inf"))
    wanted = scores.softmax(-1) @ v.float().repeat_interleave(group, 0)
    try:
        out, total = _flash(q, k, v, True, dim**-0.5)
        error = float((out - wanted).norm() / wanted.norm() + (total - scores.logsumexp(-1)).abs().max())
    except Exception as failure:  # an operator that is not there, or differs: our own kernel serves
        log.info("PyTorch's flash attention is not used for chunks: %s", failure)
        return False
    return error < 0.02


def attend_chunk(
    layer: CodeLayer,
    pool: torch.Tensor,
    ids: torch.Tensor,
    recent: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of a chunk over a row's pages, what its window holds beside them, and itself.

    Args:
        pool: uint8 [pages, page_nbytes]; ids: int32 [n] all pages of the row, oldest first; as `expand` wants them.
        recent: float32 [H, t, d + dv]: sinks and recent tokens that are in no page, in any order.
        query: [Hq, n, d]; key: [H, n, d]; value: [H, n, dv]; post-RoPE, one dtype; by any strides, as `recent`.

    Returns:
        [Hq, n, dv] in the query's dtype.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Page ids are not checked against the
    pool: they lie on the device, and the host would have to wait for it.
    """
    codec, heads = layer.codec, layer.codec.kv_heads
    _check_chunk(layer, recent, query, key, value)
    if not query.shape[1]:
        return query.new_empty((query.shape[0], 0, codec.value_dim))
    q, parts = query.half().contiguous(), []
    most = max(1, WORKSPACE // (2 * heads * (codec.key_dim + codec.value_dim) * codec.page_tokens))
    count = max(1, -(-ids.numel() // most))
    each = -(-ids.numel() // count)
    for part in range(count):
        some, last = ids[part * each : (part + 1) * each], part == count - 1
        paged = some.numel() * codec.page_tokens
        own = recent.shape[1] + key.shape[1] if last else 0
        sides = [
            torch.empty((heads, paged + own, dim), dtype=torch.float16, device=key.device)
            for dim in (codec.key_dim, codec.value_dim)
        ]
        expand(layer, pool, some, part * each, *(side[:, :paged] for side in sides))
        if last:
            held = recent.split([codec.key_dim, codec.value_dim], -1)
            for side, window, new in zip(sides, held, (key, value), strict=True):
                side[:, paged : paged + window.shape[1]] = window
                side[:, paged + window.shape[1] :] = new
        parts.append(part_attention(q, *sides, causal=last, scaling=scaling, softcap=softcap))
    return merged(parts).to(query.dtype)


def _check_chunk(
    layer: CodeLayer, recent: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Raise ValueError naming what does not fit; the rest is `expand`'s."""
    codec, device = layer.codec, layer.device
    heads, dim, value_dim = codec.kv_heads, codec.key_dim, codec.value_dim
    check("query", query, FLOATS, ("query heads", "tokens", dim), device, ANY)
    check_heads(query.shape[0], heads)
    kind, count = (query.dtype,), query.shape[1]
    check("key", key, kind, (heads, count, dim), device, ANY)
    check("value", value, kind, (heads, count, value_dim), device, ANY)
    check("recent", recent, SINGLE, (heads, "tokens", dim + value_dim), device, ANY)


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over all keys from attention over parts of them: (out [Hq, n, dv], log-sum-exp [Hq, n]) each."""
    if len(parts) == 1:
        return parts[0][0]
    share = torch.stack([total for _, total in parts]).softmax(0)
    return sum((out.float() * own[..., None] for (out, _), own in zip(parts, share, strict=True)), torch.zeros(()))

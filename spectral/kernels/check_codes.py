"""The kernels that make and move codes against the reference: what a process asks once before it trusts a device."""

from __future__ import annotations

import torch

from spectral.codec import LayerCodec
from spectral.kernels.chunk import attend_chunk
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.encode import Tokens, encode
from spectral.kernels.expand import expand
from spectral.kernels.squeeze import SqueezeLayer
from spectral.prefill import softcapped

PAGES = 40
"""Pages of a comparison: more than a program has in hand, and no multiple of it."""


TOLERANCE = 0.01
"""Largest relative error that counts as right; fp16 operands leave some 0.0005."""


def random_pages(codec: LayerCodec, count: int, seed: int = 0) -> torch.Tensor:
    """Pages of random bytes: uint8 [count, page_nbytes]."""
    device = codec.units[0].mean.device
    rng = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (count, codec.page_nbytes), dtype=torch.uint8, device=device, generator=rng)


def squeeze_error(layer: SqueezeLayer, old: LayerCodec, new: LayerCodec) -> str:
    """What is wrong with a squeeze, in words; "" where every byte is the reference's."""
    pages = random_pages(old, PAGES)
    out = torch.full((PAGES, new.page_nbytes), 255, dtype=torch.uint8, device=pages.device)
    layer(pages, out)
    wrong = int((out != old.squeeze(pages, new)).sum())
    return f"{wrong} of {out.numel()} bytes differ" if wrong else ""


def opened(layer: CodeLayer, pool: torch.Tensor, ids: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
    """Keys and values of pages through the kernels: fp16 [H, n * P, dim] each."""
    codec, tokens = layer.codec, ids.numel() * layer.codec.page_tokens
    sides = [
        torch.full((codec.kv_heads, tokens, dim), float("nan"), dtype=torch.float16, device=pool.device)
        for dim in (codec.key_dim, codec.value_dim)
    ]
    expand(layer, pool, ids, first, sides[0], sides[1])
    return sides


def expected(
    codec: LayerCodec, pool: torch.Tensor, ids: torch.Tensor, first: int = 0, *, plain: bool = False
) -> list[torch.Tensor]:
    """The same through the reference, float32. `plain`: as `LayerCodec.decode` has it."""
    numbers = torch.arange(first, first + ids.numel(), device=pool.device)
    return [x.transpose(0, 1).flatten(1, 2) for x in codec.decode(pool[ids.long()], numbers, plain=plain)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Error of a tensor over its norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def code_error(layer: CodeLayer) -> str:
    """What is wrong with opening, encoding or attention of a chunk, in words; "" where all are right.

    The tokens that are encoded are some that pages stand for, so that their codes are not on the edge of two; what
    comes back is compared, since directions that hardly vary may differ by more than a code.
    """
    codec = layer.codec
    pool = random_pages(codec, PAGES)
    ids = torch.randperm(PAGES, device=pool.device)[: PAGES // 2].int()
    found, wanted = opened(layer, pool, ids, 3), expected(codec, pool, ids, 3)
    errors = {"opening": max(relative(a, b) for a, b in zip(found, wanted, strict=True))}
    wanted = expected(codec, pool, ids, 3, plain=True)  # what is encoded again: lengthened, it would have other codes
    half = wanted[0].shape[1] // 2 - 3
    held = torch.cat([x[:, :half] for x in wanted], -1)
    page = torch.arange(3, 3 + ids.numel(), device=pool.device, dtype=torch.int32)
    tokens = Tokens(held, wanted[0][:, half:], wanted[1][:, half:])
    again = torch.full_like(pool, 255)
    encode(layer, tokens, page, codec.frame.blocks(3 + ids.numel()), again, ids)
    back = expected(codec, again, ids, 3, plain=True)
    errors["encoding"] = max(relative(a, b) for a, b in zip(back, wanted, strict=True))
    rng = torch.Generator(pool.device).manual_seed(1)
    shapes = [(2 * codec.kv_heads, codec.key_dim), (codec.kv_heads, codec.key_dim), (codec.kv_heads, codec.value_dim)]
    q, k, v = (torch.randn(h, 24, dim, device=pool.device, generator=rng) for h, dim in shapes)
    scaling = float(1 / wanted[0].norm(dim=-1).mean())
    mixed = attend_chunk(layer, pool, ids, held[:, :9], q, k, v, scaling=scaling)
    errors["attention"] = relative(mixed, exact_chunk(expected(codec, pool, ids), held[:, :9], q, k, v, scaling))
    return "; ".join(f"{name} is wrong by {error:.2g}" for name, error in errors.items() if not error < TOLERANCE)


def exact_chunk(
    paged: list[torch.Tensor],
    recent: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attend_chunk` in float64 on keys and values [H, t, dim] of the pages: [Hq, n, dv]."""
    window = recent.split([key.shape[-1], value.shape[-1]], -1)
    k, v = (torch.cat(x, 1).double() for x in zip(paged, window, (key, value), strict=True))
    group = query.shape[0] // key.shape[0]
    scores = softcapped(query.double() @ k.repeat_interleave(group, 0).transpose(1, 2) * scaling, softcap)
    count, total = query.shape[1], k.shape[1]
    hidden = torch.ones(count, total, dtype=torch.bool, device=k.device).triu(total - count + 1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 0)

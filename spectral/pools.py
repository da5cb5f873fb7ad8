"""Pools of packed pages: one tensor for all pages of a layer; and the setting whose pages are not packed."""

from __future__ import annotations

import torch

from spectral.codec import Codebook, ExactCodec, LayerCodec, PageCodec
from spectral.layout import POOL_SLACK
from spectral.shapes import ModelShape

EXACT_PAGE_TOKENS = 16


def empty_pool(capacity: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """A pool uint8 [capacity, nbytes]; on a GPU with POOL_SLACK bytes behind it that kernels may read (less than the
    allocator's own rounding, so not counted)."""
    total = capacity * nbytes
    slack = POOL_SLACK if device.type == "cuda" else 0
    return torch.empty(total + slack, dtype=torch.uint8, device=device)[:total].view(capacity, nbytes)


def squeezed(pool: torch.Tensor, old: PageCodec, new: PageCodec, step: int = 1024) -> torch.Tensor:
    """A pool of pages [n, bytes] at another setting: with a kernel where one serves, or `step` pages at a time."""
    from spectral.code_dispatch import squeezer

    assert isinstance(old, LayerCodec) and isinstance(new, LayerCodec)
    out = empty_pool(pool.shape[0], new.page_nbytes, pool.device)
    kernel = squeezer(old, new) if len(pool) else None
    if kernel is not None:
        kernel(pool, out)
        return out
    for begin in range(0, pool.shape[0], step):
        out[begin : begin + step] = old.squeeze(pool[begin : begin + step], new)
    return out


def exact_codebook(shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> Codebook:
    """The "exact" setting: bf16 pages. With float32, generation equals an uncompressed float32 cache's bit for bit."""
    layers: list[PageCodec | None] = [
        None
        if layer.sliding
        else ExactCodec(
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            page_tokens=EXACT_PAGE_TOKENS,
            dtype=dtype,
        )
        for layer in shape.layers
    ]
    return Codebook("exact", "", 0, 0, EXACT_PAGE_TOKENS, layers)

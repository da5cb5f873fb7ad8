"""Random tokens for a store of one kind of layer."""

from __future__ import annotations

import torch

from spectral.attention import attend
from spectral.pages import PageStore, Row


def random_sides(store: PageStore, tokens: int, group: int, seed: int) -> list[torch.Tensor]:
    """Queries, keys and values of so many tokens: [1, heads, tokens, d]."""
    shape = store.shape.layers[0]
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, tokens, shape.key_dim, generator=rng).to(store.device)
        for heads in (shape.kv_heads * group, shape.kv_heads, shape.kv_heads)
    ]


def run_chunk(
    store: PageStore, row: Row, tokens: int, group: int, seed: int, softcap: float | None = None
) -> torch.Tensor:
    """A chunk of a row, committed: [tokens, Hq, dv]."""
    batch = store.begin([(row, tokens)])
    sides = random_sides(store, tokens, group, seed)
    out = attend(batch, 0, *sides, scaling=store.shape.layers[0].key_dim**-0.5, softcap=softcap)[0]
    batch.commit()
    return out

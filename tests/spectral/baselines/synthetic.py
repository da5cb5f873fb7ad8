"""Correlated keys, values and queries with RoPE and a key bias, for the comparisons' tests."""

from __future__ import annotations

from functools import partial

import torch

from spectral.baselines import Baseline, CalibrationStats, LayerStats, Shape
from spectral.baselines.base import Restore
from spectral.baselines.transforms import rope
from spectral.prefill import causal_attention

SHAPE = Shape(layers=5, kv_heads=2, head_dim=32, query_heads=4)
SAMPLE, TOKENS, HIDDEN = 320, 96, 48


def rope_tables(rows: int, dim: int, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [rows, dim], half-split."""
    angle = torch.arange(rows)[:, None] * 10_000 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angle.cos()] * 2, 1) * scaling, torch.cat([angle.sin()] * 2, 1) * scaling


class World:
    """Hidden states with a decaying spectrum, half of it shared by all layers, and projections W_K, W_V."""

    def __init__(self, shape: Shape = SHAPE, seed: int = 0) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)
        self.cos, self.sin = rope_tables(1024, shape.head_dim)
        self.spectrum = torch.logspace(0.5, -1.5, HIDDEN)
        other = torch.Generator().manual_seed(seed + 1)
        self.output = torch.randn(shape.query_heads, shape.head_dim, HIDDEN, generator=other)
        self.output *= torch.logspace(0.3, -1.2, shape.head_dim)[:, None]
        self.weights = [self.normal(2, shape.kv_heads, shape.head_dim, HIDDEN) for _ in range(shape.layers)]
        self.stats = self._stats()

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """keys, values [L, T, H, d], positions [T], hidden states [T, hidden] of every layer."""
        shared, positions = self.normal(count, HIDDEN), torch.arange(count)
        keys, values, hidden = [], [], []
        for weight in self.weights:
            h = (0.8 * shared + 0.6 * self.normal(count, HIDDEN)) * self.spectrum
            keys.append(rope(torch.einsum("hdi,ni->nhd", weight[0], h), positions, self.cos, self.sin))
            values.append(torch.einsum("hdi,ni->nhd", weight[1], h))
            hidden.append(h)
        return torch.stack(keys), torch.stack(values), positions, hidden

    def _stats(self) -> CalibrationStats:
        keys, values, positions, hidden = self.tokens(SAMPLE)
        shape, layers = self.shape, []
        for index in range(shape.layers):
            queries = self.normal(SAMPLE, shape.query_heads, shape.head_dim) * torch.linspace(2, 0.2, shape.head_dim)
            moment = hidden[index].T @ hidden[index] / SAMPLE
            layers.append(
                LayerStats(
                    keys=keys[index],
                    values=values[index],
                    queries=queries,
                    key_weight=self.weights[index][0],
                    value_weight=self.weights[index][1],
                    hidden_moment=moment,
                    output_weight=self.output,
                    key_fisher=torch.linspace(1, 2, shape.kv_heads) / (index + 1),
                    value_fisher=torch.linspace(2, 3, shape.kv_heads) / (index + 1),
                    output_error=partial(self.output_error, index, keys[index], values[index], queries),
                )
            )
        return CalibrationStats(layers, positions, self.cos, self.sin)

    def output_error(
        self, index: int, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, restore: Restore
    ) -> float:
        """As of a layer whose stream is 2 + 4 * index times as large as what its attention adds to it."""
        places = torch.arange(len(keys))
        add, other = (self.attention(queries, *pair) for pair in ((keys, values), restore(keys, values, places)))
        return float((add - other).norm() / (add.norm() * (2 + 4 * index)))

    def attention(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[N, hidden] of causal attention and W_O; queries [N, Hq, d], keys, values [N, H, d]."""
        heads = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        out = causal_attention(*heads, scaling=self.shape.head_dim**-0.5)[0]
        return torch.einsum("hnd,hdi->ni", out, self.output)


def fitted(method: Baseline, world: World) -> Baseline:
    """The method, calibrated on the world's sample."""
    method.fit(world.stats, world.shape)
    return method


def relative_error(x: torch.Tensor, back: torch.Tensor) -> float:
    """Squared error over squared size."""
    return float((x - back).pow(2).sum() / x.pow(2).sum())

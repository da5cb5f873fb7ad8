"""AATC: a whitened SVD with attention-aware weights, bits by reverse water-filling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spectral.baselines.base import CalibrationStats, Shape, Side
from spectral.baselines.spectra import Spectra
from spectral.baselines.transforms import eigenbasis, frame, projection_moment, unrope

ROUNDS = 4
"""Key positions drawn for every query of the sample."""

RIDGE = 1e-6
"""Of the weights' mean, added to each: directions that attention never reads keep a small weight."""


@dataclass
class Aatc(Spectra):
    """`bits` per element on average, in the metric of what attention does with an error; keys before RoPE.

    Of the paper only one sentence was at hand ("whitened SVD with attention-aware weights", 5.82x within noise), so
    this is a reading of it, and a kind one. Keys are weighted by the queries that read them, turned back by the
    position of a key before them (the mean over ROUNDS such positions per query), values by W_O of their query heads;
    the SVD of the projections is taken in that metric and whitened by E[h h^T]. How it divides bits is not said: here
    as SPECTRA does.
    """

    source: ClassVar[str] = "arXiv:2608.14191 (2026), from a one-line description"
    needs: ClassVar[frozenset[str]] = frozenset({"output_weight"})

    @property
    def name(self) -> str:
        return f"aatc-{self.bits:g}bit"

    def _basis(
        self, stats: CalibrationStats, layer: int, side: Side, shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = torch.block_diag(*self._weights(stats, layer, side, shape))
        values, vectors = torch.linalg.eigh(weights.double())
        root = (values.clamp_min(0) + RIDGE * values.mean()).sqrt()
        forth, back = vectors * root @ vectors.T, vectors / root @ vectors.T
        axes = eigenbasis(forth @ projection_moment(stats, layer, side).double() @ forth)[0].double()
        sample = frame(stats, layer, side).flatten(1)
        mean, down, up = sample.mean(0), (forth @ axes).float(), (axes.T @ back).float()
        return mean, down, up, ((sample - mean) @ down).pow(2).mean(0).sqrt()

    def _weights(self, stats: CalibrationStats, layer: int, side: Side, shape: Shape) -> torch.Tensor:
        """[H, d, d]: an error e of one KV head costs e^T W e."""
        sample = stats.layers[layer]
        if side == "value":
            assert sample.output_weight is not None  # in `needs`
            read = sample.output_weight.unflatten(0, (shape.kv_heads, -1)).double()  # [H, G, d, hidden]
            return torch.einsum("hgdi,hgei->hde", read, read)
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(shape.kv_heads, shape.head_dim, shape.head_dim, dtype=torch.float64)
        total = total.to(sample.queries.device)
        for _ in range(ROUNDS):
            drawn = torch.rand(len(stats.positions), generator=generator).to(stats.positions.device)
            before = (drawn * (stats.positions + 1)).long()  # a key's position, the query's own at most
            queries = unrope(sample.queries, before, stats.cos, stats.sin).double()
            grouped = queries.unflatten(1, (shape.kv_heads, -1))
            total += torch.einsum("nhgd,nhge->hde", grouped, grouped)
        return total

    def basis_nbytes(self, shape: Shape) -> int:
        return 2 * shape.layers * shape.width * (2 * shape.width + 3) * 2

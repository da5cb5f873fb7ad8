"""Eigen Attention: calibrated low-rank bases per head, shared by queries and keys; latents stay in bf16."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import Baseline, CalibrationStats, Shape, Side
from spectral.baselines.store import Stored
from spectral.baselines.transforms import eigenbasis, rope, unrope


@dataclass
class EigenAttention(Baseline):
    """Rank `share` * head_dim: keys in the principal axes of keys and queries stacked, values in their own.

    Models with RoPE keep the latent of the key before RoPE, rebuild the key from it and rotate it then. Every layer
    gets the same rank. The published search lowers a layer's share of singular values until the output of its decoder
    layer is off by a budget; it needs the layer itself, where a comparison sees keys, values and weights: left out.
    """

    source: ClassVar[str] = "arXiv:2408.05646 (EMNLP 2024)"

    share: float = 0.6
    _basis: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"eigen-attention-{self.share:g}"

    def _rank(self, shape: Shape) -> int:
        return max(1, round(self.share * shape.head_dim))

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        tables = (stats.positions, stats.cos, stats.sin)
        for index, layer in enumerate(stats.layers):
            keys = unrope(layer.keys, *tables).double()
            queries = unrope(layer.queries, *tables).double().unflatten(1, (shape.kv_heads, -1))
            values = layer.values.double()
            stacked = torch.einsum("nhd,nhe->hde", keys, keys) + torch.einsum("nhgd,nhge->hde", queries, queries)
            own = torch.einsum("nhd,nhe->hde", values, values)
            self._basis[index, "key"] = eigenbasis(stacked)[0][..., : self._rank(shape)]
            self._basis[index, "value"] = eigenbasis(own)[0][..., : self._rank(shape)]

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        if side == "key":
            x = unrope(x, positions, *self._rope())
        latent = torch.einsum("thd,hdr->thr", x, self._basis[layer, side].to(x.device))
        return Stored(floats={"latent": latent.bfloat16()})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        latent = stored.floats["latent"].float()
        x = torch.einsum("thr,hdr->thd", latent, self._basis[layer, side].to(latent.device))
        return rope(x, positions, *self._rope()) if side == "key" else x

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        return 2 * shape.layers * tokens * shape.kv_heads * self._rank(shape) * 2

    def basis_nbytes(self, shape: Shape) -> int:
        return 2 * shape.layers * shape.width * self._rank(shape) * 2

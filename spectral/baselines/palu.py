"""Palu: grouped-head SVD of W_K and W_V with whitening; latents Hadamard-rotated and quantized per token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.quantizers import affine_decode, affine_encode, fitting_group
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import eigenbasis, hadamard, projection_bias, projection_moment, rope, unrope


@dataclass
class Palu(Baseline):
    """Rank `share` of each group of `group_heads` KV heads, `bits`-bit latents, keys before RoPE.

    Latents are those of the projection without its bias, which is added when keys and values are rebuilt. Every layer
    gets the same rank; the published search by Fisher information, which divides ranks among layers, is left out.
    """

    source: ClassVar[str] = "arXiv:2407.21118 (ICLR 2025)"

    share: float = 0.5
    bits: int = 3
    group_heads: int = 4
    _basis: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)
    _bias: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"palu-r{self.share:g}-{self.bits}bit"

    def _heads(self, shape: Shape) -> int:
        return fitting_group(shape.kv_heads, self.group_heads)

    def _rank(self, shape: Shape) -> int:
        return max(1, round(self.share * self._heads(shape) * shape.head_dim))

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        width, rank = self._heads(shape) * shape.head_dim, self._rank(shape)
        for layer in range(shape.layers):
            for side in SIDES:
                moment = projection_moment(stats, layer, side)
                self._bias[layer, side] = projection_bias(stats, layer, side)
                blocks = torch.stack([moment[i : i + width, i : i + width] for i in range(0, shape.width, width)])
                axes = eigenbasis(blocks)[0][..., :rank]
                self._basis[layer, side] = axes @ hadamard(rank).to(axes.device)  # [groups, width, rank]

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        if side == "key":
            x = unrope(x, positions, *self._rope())
        x = x - self._bias[layer, side].to(x.device)
        basis = self._basis[layer, side].to(x.device)
        latent = torch.einsum("tgw,gwr->tgr", x.reshape(len(x), basis.shape[0], -1), basis)
        codes, scale, zero = affine_encode(latent, self.bits)
        return Stored({"codes": (codes, self.bits)}, {"scale": scale, "zero": zero})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        shape = self._fitted()
        latent = affine_decode(stored.codes["codes"][0], stored.floats["scale"], stored.floats["zero"])
        x = torch.einsum("tgr,gwr->tgw", latent, self._basis[layer, side].to(latent.device))
        x = x.reshape(-1, shape.kv_heads, shape.head_dim) + self._bias[layer, side].to(x.device)
        return rope(x, positions, *self._rope()) if side == "key" else x

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        groups = shape.kv_heads // self._heads(shape)
        return 2 * shape.layers * (packed_nbytes(tokens * groups * self._rank(shape), self.bits) + 4 * tokens * groups)

    def basis_nbytes(self, shape: Shape) -> int:
        return 2 * shape.layers * shape.width * self._rank(shape) * 2

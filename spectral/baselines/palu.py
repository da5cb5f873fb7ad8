"""Palu: grouped-head SVD of W_K and W_V with whitening; latents Hadamard-rotated and quantized per token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.quantizers import affine_decode, affine_encode, fitting_group
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import eigenbasis, hadamard, projection_bias, projection_moment, rope, unrope

RANK_BLOCK = 32
"""Searched ranks are multiples of it (of the largest divisor of a group's width that is at most it)."""


def searched_ranks(fisher: list[float], share: float, width: int) -> list[int]:
    """Ranks of groups that are `width` wide: `share` of all, in proportion to their Fisher information.

    No rank is above `width`; what that leaves over is dealt out evenly among the others. Then each is rounded to
    blocks, one at least, so that the sum only comes close to what was asked for.
    """
    target = round(share * width * len(fisher))
    ideal = [target * f / max(sum(fisher), 1e-30) for f in fisher]
    ranks = [min(width, int(rank)) for rank in ideal]
    order = sorted(range(len(ranks)), key=lambda i: ideal[i] - ranks[i])
    while sum(ranks) < target:
        for i in order:
            if ranks[i] < width and sum(ranks) < target:
                ranks[i] += 1
    block = fitting_group(width, RANK_BLOCK)
    return [max(1, round(rank / block)) * block for rank in ranks]


@dataclass
class Palu(Baseline):
    """Rank `share` of each group of `group_heads` KV heads, `bits`-bit latents, keys before RoPE.

    Latents are those of the projection without its bias, which is added when keys and values are rebuilt. Every layer
    gets the same rank.
    """

    source: ClassVar[str] = "arXiv:2407.21118 (ICLR 2025)"

    share: float = 0.5
    bits: int = 3
    group_heads: int = 4
    _bases: dict[tuple[int, Side], list[torch.Tensor]] = field(init=False, repr=False, default_factory=dict)
    _bias: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"palu-r{self.share:g}-{self.bits}bit"

    def _heads(self, shape: Shape) -> int:
        return fitting_group(shape.kv_heads, self.group_heads)

    def _rank(self, shape: Shape) -> int:
        return max(1, round(self.share * self._heads(shape) * shape.head_dim))

    def _ranks(self, stats: CalibrationStats, shape: Shape) -> dict[tuple[int, Side], list[int]]:
        """Of every group of heads."""
        groups = shape.kv_heads // self._heads(shape)
        return {(layer, side): [self._rank(shape)] * groups for layer in range(shape.layers) for side in SIDES}

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        width = self._heads(shape) * shape.head_dim
        for (layer, side), ranks in self._ranks(stats, shape).items():
            moment = projection_moment(stats, layer, side)
            self._bias[layer, side] = projection_bias(stats, layer, side)
            self._bases[layer, side] = []
            for group, rank in enumerate(ranks):
                part = slice(group * width, (group + 1) * width)
                axes = eigenbasis(moment[part, part])[0][:, :rank]
                self._bases[layer, side].append(axes @ hadamard(rank).to(axes.device))  # [width, rank]

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        if side == "key":
            x = unrope(x, positions, *self._rope())
        bases = self._bases[layer, side]
        parts = (x - self._bias[layer, side].to(x.device)).reshape(len(x), len(bases), -1)
        out = Stored()
        for group, basis in enumerate(bases):
            codes, scale, zero = affine_encode(parts[:, group] @ basis.to(x.device), self.bits)
            out.codes[f"codes {group}"] = (codes, self.bits)
            out.floats |= {f"scale {group}": scale, f"zero {group}": zero}
        return out

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        shape, parts = self._fitted(), []
        for group, basis in enumerate(self._bases[layer, side]):
            scale, zero = stored.floats[f"scale {group}"], stored.floats[f"zero {group}"]
            latent = affine_decode(stored.codes[f"codes {group}"][0], scale, zero)
            parts.append(latent @ basis.T.to(latent.device))
        x = torch.cat(parts, 1).reshape(-1, shape.kv_heads, shape.head_dim)
        x = x + self._bias[layer, side].to(x.device)
        return rope(x, positions, *self._rope()) if side == "key" else x

    def _all_ranks(self, shape: Shape) -> list[int]:
        """Of every layer, side and group; before calibration what each would have if all were alike."""
        found = [basis.shape[1] for bases in self._bases.values() for basis in bases]
        return found or [self._rank(shape)] * (2 * shape.layers * (shape.kv_heads // self._heads(shape)))

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        return sum(packed_nbytes(tokens * rank, self.bits) + 4 * tokens for rank in self._all_ranks(shape))

    def basis_nbytes(self, shape: Shape) -> int:
        return 2 * self._heads(shape) * shape.head_dim * sum(self._all_ranks(shape))


@dataclass
class PaluFisher(Palu):
    """The same with the published rank search: ranks in proportion to the Fisher information of each group's weights.

    The published search reads 2,048 calibration texts, this one what the other comparisons are calibrated on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"key_fisher", "value_fisher"})

    @property
    def name(self) -> str:
        return f"palu-fisher-r{self.share:g}-{self.bits}bit"

    def _ranks(self, stats: CalibrationStats, shape: Shape) -> dict[tuple[int, Side], list[int]]:
        places = [(layer, side) for layer in range(shape.layers) for side in SIDES]
        heads, fisher = self._heads(shape), []
        for layer, side in places:
            found = stats.layers[layer].key_fisher if side == "key" else stats.layers[layer].value_fisher
            assert found is not None  # in `needs`
            fisher += found.view(-1, heads).mean(1).tolist()
        ranks = searched_ranks(fisher, self.share, heads * shape.head_dim)
        groups = shape.kv_heads // heads
        return {place: ranks[at * groups : (at + 1) * groups] for at, place in enumerate(places)}

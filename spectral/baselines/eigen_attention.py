"""Eigen Attention: calibrated low-rank bases, keys rebuilt and rotated after reading; latents stay in bf16."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.store import Stored
from spectral.baselines.transforms import eigenbasis, frame, rope, unrope

SHARE_STEP = 0.02
"""By how much the search lowers a layer's share of the singular values at a time."""

FLOOR = 0.45
"""Part of head_dim that a searched rank stays above, as in the authors' code."""

Ranks = tuple[int, int]
"""Of a layer's keys and of its values, per head."""


def latents(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What is stored of x [T, H, d] with axes [H, d, r]: [T, H, r] bf16."""
    return torch.einsum("thd,hdr->thr", x, basis.to(x.device)).bfloat16()


def rebuilt(latent: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """[T, H, d] float32 from latents [T, H, r] and axes [H, d, r]."""
    return torch.einsum("thr,hdr->thd", latent.float(), basis.to(latent.device))


@dataclass
class EigenAttention(Baseline):
    """Rank `share` * head_dim: keys in the principal axes of keys and queries stacked, values in their own.

    Models with RoPE keep the latent of the key before RoPE, rebuild the key from it and rotate it then. Every layer
    gets the same rank; the published search for ranks is `EigenBudget`.
    """

    source: ClassVar[str] = "arXiv:2408.05646 (EMNLP 2024)"

    share: float = 0.6
    _basis: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"eigen-attention-{self.share:g}"

    def _rank(self, layer: int, side: Side, shape: Shape) -> int:
        return max(1, round(self.share * shape.head_dim))

    def _moments(self, stats: CalibrationStats, layer: int) -> dict[Side, torch.Tensor]:
        """[H, d, d] per side: what the axes are those of."""
        keys, values = (frame(stats, layer, side).double() for side in SIDES)
        queries = unrope(stats.layers[layer].queries, stats.positions, stats.cos, stats.sin).double()
        queries = queries.unflatten(1, (keys.shape[1], -1))
        stacked = torch.einsum("nhd,nhe->hde", keys, keys) + torch.einsum("nhgd,nhge->hde", queries, queries)
        return {"key": stacked, "value": torch.einsum("nhd,nhe->hde", values, values)}

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        for layer in range(shape.layers):
            for side, moment in self._moments(stats, layer).items():
                self._basis[layer, side] = eigenbasis(moment)[0][..., : self._rank(layer, side, shape)]

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        if side == "key":
            x = unrope(x, positions, *self._rope())
        return Stored(floats={"latent": latents(x, self._basis[layer, side])})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        x = rebuilt(stored.floats["latent"], self._basis[layer, side])
        return rope(x, positions, *self._rope()) if side == "key" else x

    def _all_ranks(self, shape: Shape) -> int:
        return sum(self._rank(layer, side, shape) for layer in range(shape.layers) for side in SIDES)

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        return 2 * tokens * shape.kv_heads * self._all_ranks(shape)

    def basis_nbytes(self, shape: Shape) -> int:
        return 2 * shape.width * self._all_ranks(shape)


@dataclass
class EigenBudget(EigenAttention):
    """The same with the published search for ranks, as the authors' code has it for models with RoPE.

    1. Keys in the axes of keys alone, one basis for all heads of a layer; values in a basis per head.
    2. A layer starts with whole ranks. Its share of the sum of singular values is lowered in steps: keys get the rank
       that reaches it, values the largest of their heads'.
    3. The last step is kept whose error of the decoder layer's output is below `budget` and whose ranks are both above
       FLOOR of head_dim. Every layer is given what the exact model gives it.

    The authors average features over sequences before the decomposition to save memory; here every token counts. They
    search on 128 windows of 2,048 tokens, this on what `spectral.layer_outputs` reads.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"output_error"})

    budget: float = 0.025
    floor: float = FLOOR
    ranks: list[Ranks] = field(init=False, repr=False, default_factory=list)
    """Of every layer, once fitted."""

    @property
    def name(self) -> str:
        return f"eigen-attention-budget-{self.budget:g}" + ("" if self.floor == FLOOR else f"-floor-{self.floor:g}")

    def _rank(self, layer: int, side: Side, shape: Shape) -> int:
        """Before calibration as if nothing could be saved."""
        return self.ranks[layer][SIDES.index(side)] if self.ranks else shape.head_dim

    def _moments(self, stats: CalibrationStats, layer: int) -> dict[Side, torch.Tensor]:
        keys, values = (frame(stats, layer, side).double() for side in SIDES)
        shared = torch.einsum("nhd,nhe->de", keys, keys).expand(keys.shape[1], -1, -1)
        return {"key": shared, "value": torch.einsum("nhd,nhe->hde", values, values)}

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        found: list[Ranks] = []
        for layer in range(shape.layers):
            bases: list[torch.Tensor] = []
            shares: list[torch.Tensor] = []
            for moment in self._moments(stats, layer).values():
                basis, power = eigenbasis(moment)
                singular = power.double().sqrt()
                bases.append(basis)
                shares.append(singular.cumsum(-1) / singular.sum(-1, keepdim=True))  # [H, d]
            found.append(self._searched(stats, layer, bases, shares))
            for side, basis, rank in zip(SIDES, bases, found[-1], strict=True):
                self._basis[layer, side] = basis[..., :rank]
        self.ranks = found

    def _searched(
        self, stats: CalibrationStats, layer: int, bases: list[torch.Tensor], shares: list[torch.Tensor]
    ) -> Ranks:
        dim, step = shares[0].shape[-1], 0
        best = dim, dim
        while True:
            step += 1
            wanted = 1 - SHARE_STEP * step
            key, value = (min(dim, int((share < wanted).sum(-1).max()) + 1) for share in shares)
            if min(key, value) <= self.floor * dim or self._error(stats, layer, bases, (key, value)) >= self.budget:
                return best
            best = key, value

    def _error(self, stats: CalibrationStats, layer: int, bases: list[torch.Tensor], ranks: Ranks) -> float:
        """Of the decoder layer's output, with these ranks of whole bases."""
        measure, tables = stats.layers[layer].output_error, self._rope()
        assert measure is not None  # in `needs`
        cut = [basis[..., :rank] for basis, rank in zip(bases, ranks, strict=True)]

        def restore(
            keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            back = rebuilt(latents(unrope(keys, positions, *tables), cut[0]), cut[0])
            return rope(back, positions, *tables), rebuilt(latents(values, cut[1]), cut[1])

        memo: dict[tuple[int, Ranks], float] = stats.memo.setdefault("eigen-attention errors", {})
        if (layer, ranks) not in memo:
            memo[layer, ranks] = measure(restore)
        return memo[layer, ranks]

    def basis_nbytes(self, shape: Shape) -> int:
        """A basis of keys is there once for all heads."""
        keys, values = (
            sum(self._rank(layer, side, shape) for layer in range(shape.layers)) * shape.head_dim for side in SIDES
        )
        return 2 * (keys + shape.kv_heads * values)

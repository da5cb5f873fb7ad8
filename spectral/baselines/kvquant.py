"""KVQuant: keys per channel before RoPE, values per token, non-uniform levels per layer, 1 % outliers kept sparse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import frame, rope, unrope

FIT_VALUES = 1 << 18
"""Calibration elements on which a layer's levels are fitted."""


def fitted_levels(x: torch.Tensor, weight: torch.Tensor, bits: int, *, rounds: int = 60) -> torch.Tensor:
    """Weighted one-dimensional k-means: levels [2^bits], ascending, for values x [n] with weights [n]. float32."""
    order = x.argsort()
    x, weight = x[order].double(), weight[order].double()
    zero = torch.zeros(1, dtype=torch.float64, device=x.device)
    mass = torch.cat([zero, weight.cumsum(0)])
    moment = torch.cat([zero, (weight * x).cumsum(0)])
    spread = (torch.arange(2**bits, device=x.device, dtype=torch.float64) + 0.5) / 2**bits
    levels = x[(spread * (len(x) - 1)).long()].clone()
    for _ in range(rounds):
        cut = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([cut.new_zeros(1), cut, cut.new_full((1,), len(x))])
        inside = mass[edges[1:]] - mass[edges[:-1]]
        new = torch.where(inside > 0, (moment[edges[1:]] - moment[edges[:-1]]) / inside.clamp_min(1e-300), levels)
        if torch.equal(new, levels):
            break
        levels = new.sort().values
    return levels.float()


@dataclass
class KvQuant(Baseline):
    """`bits`-bit levels per layer and side, fitted to the sample; the first token exact, and no recent ones.

    Keys: each channel's range is that of the sample without its `outliers` share, half at either end; what lies outside
    is stored as it is. Values: range and outliers are each token's own. An outlier costs 32 bits: value and place. The
    published fit weights its k-means by Fisher information; here keys are weighted by the energy of the queries that
    read the channel. Two-bit levels are shifted and stretched to the sample's mean and deviation (Q-Norm).
    """

    source: ClassVar[str] = "KVQuant, arXiv:2401.18079 (NeurIPS 2024)"
    in_attention: ClassVar[bool] = (
        True  # its kernels look levels up and rotate keys on the way; nothing is written back
    )

    sinks: int = 1
    recent: int = 0
    bits: int = 3
    outliers: float = 0.01
    _levels: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)
    _range: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(init=False, repr=False, default_factory=dict)
    _found: dict[tuple[int, Side], tuple[int, int]] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"kvquant-nuq{self.bits}"

    def _kept(self, width: int) -> int:
        """Outliers of one token's values at either end."""
        return max(1, round(self.outliers * width / 2))

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        self._found = {}
        for layer in range(shape.layers):
            for side in SIDES:
                x = frame(stats, layer, side).flatten(1)
                if side == "key":
                    cut = max(1, round(self.outliers / 2 * len(x)))
                    ordered = x.sort(0).values
                    self._range[layer] = (ordered[cut - 1].half().float(), ordered[-cut].half().float())
                    energy = stats.layers[layer].query_moment().diagonal(dim1=-2, dim2=-1).flatten()
                else:
                    energy = torch.ones(shape.width, device=x.device)
                low, high = self._limits(layer, side, x)
                unit, inside = (x - low) / (high - low), (x >= low) & (x <= high)
                weight = (energy * (high - low) ** 2).expand_as(x)[inside]
                self._levels[layer, side] = self._fit(unit[inside], weight / weight.mean())

    def _fit(self, unit: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        step = max(1, len(unit) // FIT_VALUES)
        unit, weight = unit[::step].contiguous(), weight[::step]
        levels = fitted_levels(unit, weight, self.bits)
        if self.bits == 2:
            back = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
            levels = (levels - back.mean()) * (unit.std() / back.std().clamp_min(1e-6)) + unit.mean()
        return levels

    def _limits(self, layer: int, side: Side, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest inlier, [1, W] or [T, 1], with high > low."""
        if side == "key":
            low, high = (limit.to(x.device)[None] for limit in self._range[layer])
        else:
            ordered, kept = x.sort(1).values, self._kept(x.shape[1])
            low, high = (ordered[:, at : at + 1] for at in (kept, x.shape[1] - 1 - kept))
        return low, torch.maximum(high, low + 2e-3 * low.abs() + 1e-4)

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        if side == "key":
            x = unrope(x, positions, *self._rope())
        x = x.flatten(1)
        low, high = self._limits(layer, side, x)
        outside = (x < low) | (x > high)
        low, high = low.half().float(), high.half().float()  # what a decoder has
        levels = self._levels[layer, side].to(x.device)
        codes = torch.bucketize(((x - low) / (high - low)).contiguous(), (levels[1:] + levels[:-1]) / 2)
        stored = Stored({"codes": (codes.to(torch.uint8), self.bits)})
        stored.floats["outliers"] = x[outside].half()
        stored.floats["places"] = outside.nonzero()[:, 1].to(torch.int16)
        stored.floats["counts"] = outside.sum(1).to(torch.int16)
        if side == "value":
            stored.floats["low"], stored.floats["high"] = low[:, 0].half(), high[:, 0].half()
        self._found[layer, side] = (int(outside.sum()), len(x))
        return stored

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        shape, codes = self._fitted(), stored.codes["codes"][0]
        if side == "key":
            low, high = self._limits(layer, side, codes)
        else:
            low, high = (stored.floats[name].float()[:, None] for name in ("low", "high"))
        x = self._levels[layer, side].to(codes.device)[codes.long()] * (high - low) + low
        rows = torch.arange(len(codes), device=codes.device).repeat_interleave(stored.floats["counts"].long())
        x[rows, stored.floats["places"].long()] = stored.floats["outliers"].float()
        x = x.view(-1, shape.kv_heads, shape.head_dim)
        return rope(x, positions, *self._rope()) if side == "key" else x

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        """With the outliers of the last round trip, in proportion; before there was one, with as many as asked for."""
        total = 0
        for layer in range(shape.layers):
            for side in SIDES:
                expected = (self.outliers * shape.width, 1) if side == "key" else (2 * self._kept(shape.width), 1)
                count, of = self._found.get((layer, side), expected)
                total += packed_nbytes(tokens * shape.width, self.bits) + 4 * round(tokens * count / of)
                total += tokens * (2 if side == "key" else 6)
        return total

    def basis_nbytes(self, shape: Shape) -> int:
        return shape.layers * (2 * 2 * shape.width + 2 * 2 * 2**self.bits)

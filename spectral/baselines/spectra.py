"""SPECTRA: SVD of W_K and W_V weighted by E[h h^T], bits by reverse water-filling, uniform quantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.quantizers import gaussian_step, midrise_decode, midrise_encode, water_fill
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import eigenbasis, frame, projection_moment, rope, unrope


@dataclass
class _Plan:
    """One layer and side: mean [W], bits [W], step [W] of its latent channels (W = H * d), and the matrices [W, W] that
    take a row to its latents and back."""

    mean: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    bits: torch.Tensor
    step: torch.Tensor


@dataclass
class Spectra(Baseline):
    """`bits` per element on average, static steps per channel, keys before RoPE.

    Keys and values get the same budget, and one water level holds for all layers of a side (measured to be better than
    a budget for each layer, and than one level for both sides); channels whose variance lies under it get no bits.
    The basis is that of the whole projection matrix (all KV heads); `per_head=True` takes one per head. Without the
    weights, or behind a key norm, the sample's second moment stands for W E[h h^T] W^T, which it estimates.
    """

    source: ClassVar[str] = "arXiv:2608.07915 (2026)"

    bits: float = 2.0
    per_head: bool = False
    _plans: dict[tuple[int, Side], _Plan] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"spectra-{'perhead-' if self.per_head else ''}{self.bits:g}bit"

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        for side in SIDES:
            found = [self._basis(stats, layer, side, shape) for layer in range(shape.layers)]
            deviations = torch.stack([deviation for *_, deviation in found])
            bits = water_fill(deviations**2, shape.layers * self._budget(shape)).to(deviations.device)
            for layer, (mean, down, up, deviation) in enumerate(found):
                steps = [gaussian_step(b) if b else 1.0 for b in bits[layer].tolist()]
                step = (torch.tensor(steps, device=deviation.device) * deviation).clamp_min(1e-12)
                self._plans[layer, side] = _Plan(mean, down, up, bits[layer], step)

    def _basis(
        self, stats: CalibrationStats, layer: int, side: Side, shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """mean [W], the matrices [W, W] to the latents and back, and the deviations [W] of the latent channels."""
        moment = projection_moment(stats, layer, side)
        if self.per_head:
            dim = shape.head_dim
            blocks = [moment[i : i + dim, i : i + dim] for i in range(0, shape.width, dim)]
            basis = torch.block_diag(*[eigenbasis(block)[0] for block in blocks])
        else:
            basis = eigenbasis(moment)[0]
        sample = frame(stats, layer, side).flatten(1)
        mean = sample.mean(0)
        return mean, basis, basis.T, ((sample - mean) @ basis).pow(2).mean(0).sqrt()

    def _budget(self, shape: Shape) -> int:
        """Bits of one token, side and layer on average."""
        return min(int(self.bits * shape.width), 8 * shape.width)

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        plan = self._plans[layer, side]
        if side == "key":
            x = unrope(x, positions, *self._rope())
        latent = (x.flatten(1) - plan.mean.to(x.device)) @ plan.down.to(x.device)
        stored = Stored()
        for width in sorted(set(plan.bits.tolist()) - {0}):
            chosen = (plan.bits == width).to(x.device)
            codes = midrise_encode(latent[:, chosen], plan.step.to(x.device)[chosen], 2 ** (width - 1))
            stored.codes[f"width {width}"] = (codes.to(torch.uint8), width)
        return stored

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        shape, plan = self._fitted(), self._plans[layer, side]
        latent = torch.zeros(len(positions), shape.width, device=positions.device)
        for codes, width in stored.codes.values():
            chosen = (plan.bits == width).to(codes.device)
            latent[:, chosen] = midrise_decode(codes.float(), plan.step.to(codes.device)[chosen], 2 ** (width - 1))
        x = latent @ plan.up.to(latent.device) + plan.mean.to(latent.device)
        x = x.view(-1, shape.kv_heads, shape.head_dim)
        return rope(x, positions, *self._rope()) if side == "key" else x

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        if not self._plans:
            # Before calibration only the budget is known; afterwards each width's channels are a run of their own.
            return 2 * shape.layers * packed_nbytes(tokens, self._budget(shape))
        total = 0
        for plan in self._plans.values():
            widths, counts = plan.bits.unique(return_counts=True)
            total += sum(packed_nbytes(tokens * int(n), int(w)) for w, n in zip(widths, counts, strict=True))
        return total

    def basis_nbytes(self, shape: Shape) -> int:
        columns = shape.head_dim if self.per_head else shape.width
        return 2 * shape.layers * shape.width * (columns + 3) * 2

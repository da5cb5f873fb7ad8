"""Per-token integer quantization, as transformers' QuantizedCache does it, and the same after a Hadamard rotation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, ExactWindow, Shape, Side, filling_window
from spectral.baselines.quantizers import affine_decode, affine_encode, best_clip, fitting_group
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import hadamard

CLIP_TOKENS = 2048
"""Calibration tokens on which clipping is chosen."""


@dataclass
class PerToken(Baseline):
    """Asymmetric groups of `group` channels within one token and head, fp16 scale and zero point.

    New tokens stay exact until there are `recent` of them; then all of them are quantized at once (with what was
    quantized before, which changes nothing: a group's extremes are codes of their own).
    """

    source: ClassVar[str] = "transformers QuantizedCache (2024)"

    sinks: int = 0
    recent: int = 128
    bits: int = 4
    group: int = 64
    _clip: dict[tuple[int, Side], float] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"pertoken-int{self.bits}"

    def exact(self, context: int) -> ExactWindow:
        return filling_window(self.sinks, self.recent, context)

    def held(self, context: int) -> ExactWindow:
        sinks = min(self.sinks, context)
        return ExactWindow(sinks, min(self.recent // 2, context - sinks))

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        groups = x.unflatten(-1, (-1, fitting_group(x.shape[-1], self.group)))
        codes, scale, zero = affine_encode(groups, self.bits, clip=self._clip.get((layer, side), 1.0))
        return Stored({"codes": (codes.flatten(-2), self.bits)}, {"scale": scale, "zero": zero})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        scale = stored.floats["scale"]
        codes = stored.codes["codes"][0].unflatten(-1, (scale.shape[-1], -1))
        return affine_decode(codes, scale, stored.floats["zero"]).flatten(-2)

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        groups = tokens * shape.width // fitting_group(shape.head_dim, self.group)
        return 2 * shape.layers * (packed_nbytes(tokens * shape.width, self.bits) + 4 * groups)


@dataclass
class HadamardInt(PerToken):
    """Every head rotated by a Hadamard matrix, then per-token integers with one group per head (QuaRot's cache).

    The range is clipped as far as lowers the squared error of the calibration sample, per layer and side (published: by
    0.95 everywhere). Its window slides, as in all methods whose description names none.
    """

    source: ClassVar[str] = "QuaRot, arXiv:2404.00456 (2024)"
    in_attention: ClassVar[bool] = True

    sinks: int = 4
    recent: int = 32
    group: int = 1 << 30
    _rotation: torch.Tensor = field(init=False, repr=False, default_factory=lambda: torch.ones(1, 1))

    @property
    def name(self) -> str:
        return f"hadamard-int{self.bits}"

    def exact(self, context: int) -> ExactWindow:
        return Baseline.exact(self, context)

    def held(self, context: int) -> ExactWindow:
        return Baseline.exact(self, context)

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        self._rotation = hadamard(shape.head_dim)
        for index, layer in enumerate(stats.layers):
            for side, x in zip(SIDES, (layer.keys, layer.values), strict=True):
                groups = (x[:CLIP_TOKENS] @ self._rotation.to(x.device)).unflatten(
                    -1, (-1, fitting_group(x.shape[-1], self.group))
                )
                self._clip[index, side] = best_clip(groups, self.bits)

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        return super().encode(layer, side, x @ self._rotation.to(x.device), positions)

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        x = super().decode(layer, side, stored, positions)
        return x @ self._rotation.to(x.device)

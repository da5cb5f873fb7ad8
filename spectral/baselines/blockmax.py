"""llama.cpp's q4_0 and q8_0 caches: blocks of 32 channels scaled by their largest one, after a Hadamard rotation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import Baseline, CalibrationStats, Shape, Side
from spectral.baselines.quantizers import fitting_group
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import hadamard

BLOCK = 32


@dataclass
class BlockMax(Baseline):
    """One fp16 scale a block and no exact window: a token is quantized as it is written.

    Up to 4 bits the block's largest element, with its sign, becomes the lowest code (q4_0); with more the range is
    symmetric (q8_0).
    """

    source: ClassVar[str] = "llama.cpp cache types q4_0 and q8_0 (2023), rotated (2026)"
    in_attention: ClassVar[bool] = True

    sinks: int = 0
    recent: int = 0
    bits: int = 4
    _rotation: torch.Tensor = field(init=False, repr=False, default_factory=lambda: torch.ones(1, 1))

    @property
    def name(self) -> str:
        return f"llamacpp-q{self.bits}_0"

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        self._rotation = hadamard(shape.head_dim)

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        blocks = (x @ self._rotation.to(x.device)).unflatten(-1, (-1, fitting_group(x.shape[-1], BLOCK)))
        half = 2 ** (self.bits - 1)
        peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
        scale = (-peak / half if self.bits <= 4 else peak.abs() / (half - 1)).half()
        step = torch.where(scale != 0, scale.float(), 1.0)[..., None]
        codes = ((blocks / step).round() + half).clamp(0, 2 * half - 1)
        return Stored({"codes": (codes.to(torch.uint8).flatten(-2), self.bits)}, {"scale": scale})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        scale = stored.floats["scale"].float()
        codes = stored.codes["codes"][0].unflatten(-1, (scale.shape[-1], -1))
        x = ((codes.float() - 2 ** (self.bits - 1)) * scale[..., None]).flatten(-2)
        return x @ self._rotation.to(x.device)

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        blocks = tokens * shape.width // fitting_group(shape.head_dim, BLOCK)
        return 2 * shape.layers * (packed_nbytes(tokens * shape.width, self.bits) + 2 * blocks)

"""KIVI: keys quantized per channel over groups of tokens, values per token over groups of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spectral.baselines.base import Baseline, ExactWindow, Shape, Side, filling_window
from spectral.baselines.quantizers import affine_decode, affine_encode, fitting_group
from spectral.baselines.store import Stored, packed_nbytes


@dataclass
class Kivi(Baseline):
    """KIVI at `bits`; scale and zero point are fp16.

    Keys stay exact until there are `recent` of them and are then quantized together, in groups of `group` tokens: a
    query sees 1 to `recent` exact keys. Of the values the last `recent` are exact: one is quantized at every step.
    """

    source: ClassVar[str] = "arXiv:2402.02750 (2024)"
    in_attention: ClassVar[bool] = True

    sinks: int = 0
    recent: int = 128
    bits: int = 2
    group: int = 32

    @property
    def name(self) -> str:
        return f"kivi-{self.bits}bit"

    def exact(self, context: int) -> ExactWindow:
        return filling_window(self.sinks, self.recent, context)

    def exact_of(self, side: Side, context: int) -> ExactWindow:
        return self.exact(context) if side == "key" else super().exact(context)

    def held(self, context: int) -> ExactWindow:
        """The mean of both sides: half a residual of keys and a whole one of values."""
        sinks = min(self.sinks, context)
        return ExactWindow(sinks, min(3 * self.recent // 4, context - sinks))

    def nbytes(self, context: int, shape: Shape) -> int:
        sinks = min(self.sinks, context)
        keys, values = (sinks + min(count, context - sinks) for count in (self.recent // 2, self.recent))
        exact = shape.exact_nbytes(keys + values) // 2
        return exact + self._key_nbytes(context - keys, shape) + self._value_nbytes(context - values, shape)

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        tokens, heads, dim = x.shape
        if side == "value":
            codes, scale, zero = affine_encode(x.view(tokens, heads, -1, fitting_group(dim, self.group)), self.bits)
            return Stored({"codes": (codes.view(x.shape), self.bits)}, {"scale": scale, "zero": zero})
        # A last group that is not full (an evaluator may ask for one) is filled with its last token: same extremes.
        filled = torch.cat([x, x[-1:].expand(-tokens % self.group, -1, -1)])
        groups = filled.view(-1, self.group, heads, dim).permute(0, 2, 3, 1)  # [groups, H, d, group]
        codes, scale, zero = affine_encode(groups, self.bits)
        flat = codes.permute(0, 3, 1, 2).reshape(-1, heads, dim)[:tokens]
        return Stored({"codes": (flat, self.bits)}, {"scale": scale, "zero": zero})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = stored.codes["codes"][0], stored.floats["scale"], stored.floats["zero"]
        if side == "value":
            return affine_decode(codes.view(*scale.shape, -1), scale, zero).view(codes.shape)
        owner = torch.arange(len(codes), device=codes.device) // self.group
        return codes.float() * scale.float()[owner] + zero.float()[owner]

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        return self._key_nbytes(tokens, shape) + self._value_nbytes(tokens, shape)

    def _key_nbytes(self, tokens: int, shape: Shape) -> int:
        groups = -(-tokens // self.group) * shape.width
        return shape.layers * (packed_nbytes(tokens * shape.width, self.bits) + 4 * groups)

    def _value_nbytes(self, tokens: int, shape: Shape) -> int:
        groups = tokens * shape.width // fitting_group(shape.head_dim, self.group)
        return shape.layers * (packed_nbytes(tokens * shape.width, self.bits) + 4 * groups)

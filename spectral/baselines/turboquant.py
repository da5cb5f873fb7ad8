"""TurboQuant: norm, random rotation, Lloyd-Max per coordinate; optionally a 1-bit QJL sketch of the keys' residual."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.quantizers import lloyd_max
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import random_rotation


def qjl_encode(x: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
    """Signs (0 or 1) of x [..., d] under a Gaussian sketch [m, d]: uint8 [..., m]."""
    return (x @ sketch.T >= 0).to(torch.uint8)


def qjl_decode(signs: torch.Tensor, norm: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
    """The vector whose inner product with any y is an unbiased estimate of <x, y>; norm [...] is |x|."""
    return math.sqrt(math.pi / 2) / len(sketch) * norm[..., None] * ((signs.float() * 2 - 1) @ sketch)


@dataclass
class _Part:
    """Channels [n] of every head that are quantized together, at `bits`, with a rotation [n, n] and a sketch [n, n]."""

    bits: int
    rotation: torch.Tensor
    sketch: torch.Tensor


@dataclass
class TurboQuant(Baseline):
    """`bits` per coordinate and one fp16 norm per head and token.

    With `qjl`, keys spend one of their bits on the sketch of the residual and 16 more on its norm (the estimate of
    every inner product is then unbiased); values stay with the MSE quantizer, since they enter no inner product.
    With `outliers`, that share of each head's channels, the largest in the calibration sample, forms a quantizer of its
    own (norm, rotation, table) with one bit more: the published mixed precision (32 of 128 channels at 3 bits, the rest
    at 2, which its description calls 2.5 bits and which are 2.25).
    """

    source: ClassVar[str] = "arXiv:2504.19874 (2025), QJL arXiv:2406.03482 (2024)"
    in_attention: ClassVar[bool] = True

    bits: int = 3
    qjl: bool = False
    outliers: float = 0.0
    _parts: list[_Part] = field(init=False, repr=False, default_factory=list)
    _order: dict[tuple[int, Side], torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not (2 if self.qjl else 1) <= self.bits <= 8 - bool(self.outliers):
            raise ValueError(f"bits must be {2 if self.qjl else 1} to 8, got {self.bits}")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers must be a share below 1, got {self.outliers}")

    @property
    def name(self) -> str:
        return f"turboquant-{'qjl-' if self.qjl else ''}{self.bits + self.outliers:g}bit"

    def _sizes(self, dim: int) -> list[tuple[int, int]]:
        """(channels, bits) of the parts, outliers first."""
        loud = round(self.outliers * dim)
        return [(n, b) for n, b in ((loud, self.bits + 1), (dim - loud, self.bits)) if n]

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        self._parts = []
        for number, (size, bits) in enumerate(self._sizes(shape.head_dim)):
            if size < 4:
                raise ValueError(f"a part of {size} channels is too small to rotate; heads have {shape.head_dim}")
            generator = torch.Generator().manual_seed(self.seed + 1 + 2 * number)
            sketch = torch.randn(size, size, generator=generator)
            self._parts.append(_Part(bits, random_rotation(size, self.seed + 2 * number), sketch))
        self._order = {}
        for index, layer in enumerate(stats.layers):
            for side, x in zip(SIDES, (layer.keys, layer.values), strict=True):
                energy = x.pow(2).mean(0)  # [H, d]
                if self.outliers:
                    self._order[index, side] = energy.argsort(-1, descending=True)
                else:  # one part: the channels' order does not matter
                    self._order[index, side] = torch.arange(shape.head_dim, device=x.device).expand_as(energy)

    def _sketched(self, side: Side) -> bool:
        return self.qjl and side == "key"

    def _pieces(self, layer: int, side: Side, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [T, H, d] with its channels in the parts' order, split into the parts."""
        ordered = x.gather(-1, self._order[layer, side].to(x.device).expand_as(x))
        return ordered.split([len(part.rotation) for part in self._parts], -1)

    def _mse_decode(self, codes: torch.Tensor, norm: torch.Tensor, part: _Part, bits: int) -> torch.Tensor:
        levels = lloyd_max(bits, codes.shape[-1]).to(codes.device)
        return levels[codes.long()] @ part.rotation.T.to(codes.device) * norm.float()[..., None]

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        stored = Stored()
        for number, (piece, part) in enumerate(zip(self._pieces(layer, side, x), self._parts, strict=True)):
            bits = part.bits - self._sketched(side)
            norm = piece.norm(dim=-1)
            unit = piece / norm.clamp_min(1e-12)[..., None]
            levels = lloyd_max(bits, piece.shape[-1]).to(x.device)
            codes = torch.bucketize((unit @ part.rotation.to(x.device)).contiguous(), (levels[1:] + levels[:-1]) / 2)
            stored.codes[f"codes {number}"] = (codes.to(torch.uint8), bits)
            stored.floats[f"norm {number}"] = norm.half()
            if self._sketched(side):
                residual = piece - self._mse_decode(codes, stored.floats[f"norm {number}"], part, bits)
                stored.codes[f"signs {number}"] = (qjl_encode(residual, part.sketch.to(x.device)), 1)
                stored.floats[f"residual {number}"] = residual.norm(dim=-1).half()
        return stored

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        pieces = []
        for number, part in enumerate(self._parts):
            codes, bits = stored.codes[f"codes {number}"]
            piece = self._mse_decode(codes, stored.floats[f"norm {number}"], part, bits)
            if self._sketched(side):
                signs, norm = stored.codes[f"signs {number}"][0], stored.floats[f"residual {number}"].float()
                piece = piece + qjl_decode(signs, norm, part.sketch.to(piece.device))
            pieces.append(piece)
        ordered = torch.cat(pieces, -1)
        order = self._order[layer, side].to(ordered.device).expand_as(ordered)
        return torch.empty_like(ordered).scatter_(-1, order, ordered)

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        total = 0
        for side in SIDES:
            sketched = self._sketched(side)
            for size, bits in self._sizes(shape.head_dim):
                count = tokens * shape.kv_heads * size
                total += packed_nbytes(count, bits - sketched) + sketched * packed_nbytes(count, 1)
                total += (1 + sketched) * 2 * tokens * shape.kv_heads
        return shape.layers * total

    def basis_nbytes(self, shape: Shape) -> int:
        total = 0
        for size, bits in self._sizes(shape.head_dim):
            total += (1 + self.qjl) * 2 * size**2 + 4 * (2**bits + (2 ** (bits - 1) if self.qjl else 0))
        if self.outliers:
            total += 2 * shape.layers * shape.width  # which channels: one byte each
        return total

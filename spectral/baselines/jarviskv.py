"""The seed package's codec ("JarvisKV" in spectral-kv 1.0.0): as published, flaws and all, and repaired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.quantizers import gaussian_step, midrise_decode, midrise_encode
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import eigenbasis, random_rotation


@dataclass
class JarvisPublished(Baseline):
    """As published: keys only, values in fp16.

    Per head the top `rank` right singular vectors of uncentred post-RoPE keys, a random rotation, then each token's
    latents normalised to +-1 over three deviations. Its flaws, kept on purpose: the step is 6 / 2^bits on that range,
    so that a third of the levels can occur; the sign correction is half a step that was never multiplied by the
    token's scale; a code takes a whole byte whatever `bits` is; only the signs are packed.
    """

    source: ClassVar[str] = "spectral-kv 1.0.0 (2026)"
    in_attention: ClassVar[bool] = True

    sinks: int = 0
    recent: int = 0
    seed: int = 42
    rank: int = 32
    bits: int = 4
    _basis: list[torch.Tensor] = field(init=False, repr=False, default_factory=list)

    @property
    def name(self) -> str:
        return f"jarviskv-published-r{self.rank}-b{self.bits}"

    def _rank(self, shape: Shape) -> int:
        return min(self.rank, shape.head_dim)

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        rank = self._rank(shape)
        rotation = random_rotation(rank, self.seed)
        self._basis = []
        for layer in stats.layers:
            keys = layer.keys.double()
            axes = eigenbasis(torch.einsum("nhd,nhe->hde", keys, keys))[0][..., :rank]
            self._basis.append(axes @ rotation.to(axes.device))

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        if side == "value":
            return Stored(floats={"x": x.half()})
        latent = torch.einsum("thd,hdr->thr", x, self._basis[layer].to(x.device))
        mean, scale = latent.mean(-1).half(), (3 * latent.std(-1, correction=0)).clamp_min(1e-6).half()
        unit = ((latent - mean.float()[..., None]) / scale.float()[..., None]).clamp(-1, 1)
        step = 6 / 2**self.bits
        codes = torch.floor((unit + 1) / step).clamp(0, 2**self.bits - 1)
        signs = latent > self._base(codes, mean, scale)
        return Stored(
            {"codes": (codes.to(torch.uint8), 8), "signs": (signs.to(torch.uint8), 1)}, {"mean": mean, "scale": scale}
        )

    def _base(self, codes: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        step = 6 / 2**self.bits
        return ((codes.float() + 0.5) * step - 1) * scale.float()[..., None] + mean.float()[..., None]

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        if side == "value":
            return stored.floats["x"].float()
        latent = self._base(stored.codes["codes"][0], stored.floats["mean"], stored.floats["scale"])
        latent = latent + (stored.codes["signs"][0].float() - 0.5) * (6 / 2**self.bits)
        return torch.einsum("thr,hdr->thd", latent, self._basis[layer].to(latent.device))

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        latents = tokens * shape.kv_heads * self._rank(shape)
        return shape.layers * (latents + packed_nbytes(latents, 1) + tokens * (4 * shape.kv_heads + 2 * shape.width))

    def basis_nbytes(self, shape: Shape) -> int:
        return shape.layers * shape.width * self._rank(shape) * 2


@dataclass
class JarvisRepaired(Baseline):
    """The same idea done properly: keys and values, centred bases, packed codes, the Gaussian's best step.

    Per head the top `share` of the principal axes, the random rotation, one fp16 scale per head and token, `bits`-bit
    codes and one sign bit that halves the step (at the token's scale).
    """

    source: ClassVar[str] = "spectral-kv 1.0.0 (2026), repaired"
    in_attention: ClassVar[bool] = True

    seed: int = 42
    share: float = 0.5
    bits: int = 3
    _basis: dict[tuple[int, Side], tuple[torch.Tensor, torch.Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    @property
    def name(self) -> str:
        return f"jarviskv-repaired-r{self.share:g}-b{self.bits}"

    def _rank(self, shape: Shape) -> int:
        return max(1, round(self.share * shape.head_dim))

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        rotation = random_rotation(self._rank(shape), self.seed)
        for index, layer in enumerate(stats.layers):
            for side, x in zip(SIDES, (layer.keys, layer.values), strict=True):
                mean = x.mean(0)
                centred = (x - mean).double()
                axes = eigenbasis(torch.einsum("nhd,nhe->hde", centred, centred))[0]
                self._basis[index, side] = (mean, axes[..., : self._rank(shape)] @ rotation.to(axes.device))

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        mean, basis = (t.to(x.device) for t in self._basis[layer, side])
        latent = torch.einsum("thd,hdr->thr", x - mean, basis)
        scale = latent.pow(2).mean(-1).sqrt().clamp_min(1e-6).half()
        # A sign bit that halves the step is the last bit of a code with one bit more: store it as the plane it is.
        step = gaussian_step(self.bits + 1) * scale.float()[..., None]
        fine = midrise_encode(latent, step, 2**self.bits).to(torch.uint8)
        return Stored({"codes": (fine >> 1, self.bits), "signs": (fine & 1, 1)}, {"scale": scale})

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        codes, scale = stored.codes["codes"][0], stored.floats["scale"].float()[..., None]
        mean, basis = (t.to(codes.device) for t in self._basis[layer, side])
        fine = 2.0 * codes + stored.codes["signs"][0]
        latent = midrise_decode(fine, gaussian_step(self.bits + 1) * scale, 2**self.bits)
        return torch.einsum("thr,hdr->thd", latent, basis) + mean

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        latents = tokens * shape.kv_heads * self._rank(shape)
        one = packed_nbytes(latents, self.bits) + packed_nbytes(latents, 1) + 2 * tokens * shape.kv_heads
        return 2 * shape.layers * one

    def basis_nbytes(self, shape: Shape) -> int:
        return 2 * shape.layers * shape.width * (self._rank(shape) + 1) * 2

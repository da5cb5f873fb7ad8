"""KVTC: one PCA over layers and heads, formats by dynamic programming, DEFLATE over the real codes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from spectral.baselines.base import SIDES, Baseline, CalibrationStats, Shape, Side
from spectral.baselines.fp8 import LARGEST
from spectral.baselines.kvtc_groups import FORMATS, SIZES, Format, Group, plan_groups, starts_of
from spectral.baselines.quantizers import affine_decode, affine_encode
from spectral.baselines.store import Stored, packed_nbytes
from spectral.baselines.transforms import frame, principal_axes, rope, unrope

MAX_RANK = 2048
"""Principal components kept at most (for either side); also what bounds the dynamic programme."""

PLAN_TOKENS = 256
"""Calibration tokens on which the formats' errors are measured."""


def code_group(x: torch.Tensor, form: Format) -> Stored:
    """One group's components x [T, size] in a format."""
    if form.name == "none":
        return Stored()
    if form.name == "fp8":
        return Stored(floats={"x": x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)})
    codes, scale, shift = affine_encode(x, form.bits)
    return Stored({"codes": (codes, form.bits)}, {"scale": scale, "shift": shift})


def restore_group(stored: Stored, form: Format, tokens: int, size: int, device: torch.device) -> torch.Tensor:
    """The inverse: float32 [T, size]."""
    if form.name == "none":
        return torch.zeros(tokens, size, device=device)
    if form.name == "fp8":
        return stored.floats["x"].float()
    return affine_decode(stored.codes["codes"][0], stored.floats["scale"], stored.floats["shift"])


def format_errors(latent: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Squared error, summed over the tokens of latent [N, R], of every group that `plan_groups` may choose."""
    tokens, count = latent.shape
    out = {}
    for size in SIZES:
        for form in FORMATS:
            if size == 1:  # all components at once, each a group of its own
                x = latent.T.reshape(-1, 1)
                back = restore_group(code_group(x, form), form, len(x), 1, x.device)
                out[size, form.name] = (x - back).double().pow(2).view(count, tokens).sum(1)
                continue
            errors = []
            for start in starts_of(size, count):
                x = latent[:, start : start + size]
                back = restore_group(code_group(x, form), form, tokens, x.shape[1], x.device)
                errors.append(float((x - back).double().pow(2).sum()))
            out[size, form.name] = torch.tensor(errors, dtype=torch.float64)
    return out


@dataclass
class _Transform:
    """mean [P] and axes [P, R] of one side, P = layers * heads * head_dim, and how its components are stored."""

    mean: torch.Tensor
    axes: torch.Tensor
    groups: list[Group]


@dataclass
class Kvtc(Baseline):
    """`ratio` before entropy coding, 4 sinks and 128 recent tokens exact.

    Keys and values have a PCA each. Int formats keep a scale and a shift (fp16 each) per token and group; fp8 is a bare
    cast. `payload_nbytes` uses DEFLATE's gain on the last round trip, and counts packed codes before there was one;
    it is the count without the exact window, `nbytes` the one with it.
    """

    source: ClassVar[str] = "arXiv:2511.01815 (ICLR 2026)"
    across_layers: ClassVar[bool] = True

    sinks: int = 4
    recent: int = 128
    ratio: float = 16.0
    level: int = 6
    deflate_gain: float = field(init=False, default=1.0)
    _sides: dict[Side, _Transform] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"kvtc-{self.ratio:g}x"

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        self.deflate_gain = 1.0
        for side in SIDES:
            if f"kvtc {side}" not in stats.memo:
                stats.memo[f"kvtc {side}"] = self._transform(stats, shape, side)
            mean, axes, errors = stats.memo[f"kvtc {side}"]
            self._sides[side] = _Transform(mean, axes, plan_groups(errors, axes.shape[1], self._budget(shape)))

    @staticmethod
    def _transform(
        stats: CalibrationStats, shape: Shape, side: Side
    ) -> tuple[torch.Tensor, torch.Tensor, dict[tuple[int, str], torch.Tensor]]:
        """mean [P], axes [P, R] and the formats' errors: the same for every ratio."""
        x = torch.cat([frame(stats, layer, side).flatten(1) for layer in range(shape.layers)], 1)  # [N, P]
        mean = x.mean(0)
        axes = principal_axes(x - mean, MAX_RANK)
        pick = torch.linspace(0, len(x) - 1, min(PLAN_TOKENS, len(x))).round().long()
        return mean, axes, format_errors(((x - mean)[pick.to(x.device)] @ axes).cpu())

    def _budget(self, shape: Shape) -> int:
        """Bits per token and side."""
        return int(16 * shape.layers * shape.width / self.ratio)

    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        """x here is all layers' [T, L * H, d]; `layer` is ignored."""
        if side == "key":
            x = unrope(x, positions, *self._rope())
        transform = self._sides[side]
        latent = (x.flatten(1) - transform.mean.to(x.device)) @ transform.axes.to(x.device)
        out = Stored()
        for number, group in enumerate(transform.groups):
            part = code_group(latent[:, group.start : group.stop], group.format)
            out.codes |= {f"{number} {name}": entry for name, entry in part.codes.items()}
            out.floats |= {f"{number} {name}": entry for name, entry in part.floats.items()}
        return out

    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        transform = self._sides[side]
        device = positions.device
        latent = []
        for number, group in enumerate(transform.groups):
            prefix = f"{number} "
            part = Stored(
                {k.removeprefix(prefix): v for k, v in stored.codes.items() if k.startswith(prefix)},
                {k.removeprefix(prefix): v for k, v in stored.floats.items() if k.startswith(prefix)},
            )
            latent.append(restore_group(part, group.format, len(positions), group.stop - group.start, device))
        flat = torch.cat(latent, 1) @ transform.axes.T.to(device) + transform.mean.to(device)
        x = flat.view(len(flat), -1, self._fitted().head_dim)
        return rope(x, positions, *self._rope()) if side == "key" else x

    def roundtrip_all(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._check_all(keys, values, positions)
        self._held, raw = {}, 0
        out = []
        for number, x in enumerate((keys, values)):
            stored = self.encode(0, SIDES[number], x.transpose(0, 1).flatten(1, 2), positions)
            raw += stored.nbytes
            self._held[number] = deflated_nbytes(stored, self.level)
            back = self.decode(0, SIDES[number], stored, positions)
            out.append(back.unflatten(1, (shape.layers, shape.kv_heads)).transpose(0, 1).contiguous())
        self.deflate_gain = raw / max(1, self.measured_nbytes)
        return out[0], out[1]

    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        if not tokens:
            return 0
        if not self._sides:
            return 2 * packed_nbytes(tokens, self._budget(shape))
        raw = 0
        for transform in self._sides.values():
            for group in transform.groups:
                raw += packed_nbytes(tokens * (group.stop - group.start), group.format.bits)
                raw += tokens * group.format.overhead // 8
        return round(raw / self.deflate_gain)

    def basis_nbytes(self, shape: Shape) -> int:
        width = shape.layers * shape.width
        rank = [t.axes.shape[1] for t in self._sides.values()] or [min(MAX_RANK, width)] * 2
        return sum(2 * width * (r + 1) for r in rank)


def deflated_nbytes(stored: Stored, level: int) -> int:
    """Bytes of everything stored, packed and then DEFLATEd (zlib) as one stream."""
    stream = b"".join(part.cpu().numpy().tobytes() for part in stored.packed())
    return min(len(stream), len(zlib.compress(stream, level)))

"""Scalar quantizers that several methods share: affine groups, optimal uniform steps, Lloyd-Max, water-filling."""

from __future__ import annotations

import heapq
import math
from functools import cache

import torch


def fitting_group(size: int, group: int) -> int:
    """The largest divisor of `size` that is at most `group`: the group actually used where `group` does not divide."""
    return max(divisor for divisor in range(1, min(size, group) + 1) if size % divisor == 0)


def affine_encode(
    x: torch.Tensor, bits: int, *, clip: float = 1.0, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric quantization of groups along the last axis: x [..., g] -> codes [..., g], scale and zero [...].

    Code 0 is the group's minimum and code 2^bits - 1 its maximum (both shrunk by `clip`). Scale and zero point are
    rounded to `dtype` before the codes are taken, since that is what a decoder has.
    """
    low, high = x.amin(-1) * clip, x.amax(-1) * clip
    scale, zero = ((high - low) / (2**bits - 1)).to(dtype), low.to(dtype)
    step = torch.where(scale > 0, scale.float(), 1.0)[..., None]
    codes = ((x - zero.float()[..., None]) / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def affine_decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The inverse: float32 [..., g]."""
    return codes.float() * scale.float()[..., None] + zero.float()[..., None]


CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def best_clip(x: torch.Tensor, bits: int) -> float:
    """The `clip` among CLIPS with which `affine_encode` restores groups x [..., g] with the least squared error."""
    errors = [float((affine_decode(*affine_encode(x, bits, clip=clip)) - x).pow(2).sum()) for clip in CLIPS]
    return CLIPS[errors.index(min(errors))]


@cache
def gaussian_step(bits: int) -> float:
    """Step, in standard deviations, of the best uniform mid-rise quantizer of a Gaussian with 2^bits levels."""
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    half = 2 ** (bits - 1)
    steps = torch.linspace(2.0 / 2**bits, 9.0 / 2**bits + 0.4, 300, dtype=torch.float64)
    errors = [float((weight * (x - midrise_decode(midrise_encode(x, s, half), s, half)) ** 2).sum()) for s in steps]
    return float(steps[errors.index(min(errors))])


def midrise_encode(x: torch.Tensor, step: torch.Tensor, half: torch.Tensor | int) -> torch.Tensor:
    """Uniform mid-rise codes in [0, 2 half), as floating point; `step` and `half` broadcast."""
    low = -half if isinstance(half, int) else -half.to(x.dtype)
    return torch.clamp(torch.floor(x / step), min=torch.as_tensor(low, device=x.device), max=-low - 1) - low


def midrise_decode(codes: torch.Tensor, step: torch.Tensor, half: torch.Tensor | int) -> torch.Tensor:
    """The inverse: (code + 1/2 - half) * step."""
    return (codes + 0.5 - half) * step


@cache
def lloyd_max(bits: int, dim: int) -> torch.Tensor:
    """Lloyd-Max levels [2^bits], ascending, for one coordinate of a uniformly random unit vector in `dim` dimensions.

    Its density is proportional to (1 - x^2)^((dim - 3) / 2); levels are in units of the coordinate itself.
    """
    if dim < 4:
        raise ValueError(f"the coordinate's density needs at least 4 dimensions, got {dim}")
    reach = min(1.0, 8.0 / math.sqrt(dim))
    x = torch.linspace(-reach, reach, 16001, dtype=torch.float64)
    weight = (1 - x * x).clamp_min(0) ** ((dim - 3) / 2)
    zeroth = torch.cat([torch.zeros(1, dtype=torch.float64), weight.cumsum(0)])
    first = torch.cat([torch.zeros(1, dtype=torch.float64), (weight * x).cumsum(0)])
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64) / math.sqrt(dim) if bits else torch.zeros(1).double()
    for _ in range(400):
        cut = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), cut, torch.tensor([len(x)])])
        new = (first[edges[1:]] - first[edges[:-1]]) / (zeroth[edges[1:]] - zeroth[edges[:-1]]).clamp_min(1e-300)
        if torch.equal(new, levels):
            break
        levels = new
    return ((levels - levels.flip(0)) / 2).float()  # symmetric, as the density is


def water_fill(variance: torch.Tensor, total_bits: int, max_bits: int = 8) -> torch.Tensor:
    """Reverse water-filling in whole bits under D(b) = variance * 4^-b: int64 of the same shape.

    The optimum of that model: every bit goes to the channel whose error is largest. Channels without variance get none.
    """
    flat = variance.reshape(-1).double().tolist()
    if not all(math.isfinite(v) and v >= 0 for v in flat):
        raise ValueError("variances must be finite and non-negative")
    bits = [0] * len(flat)
    heap = [(-v, channel) for channel, v in enumerate(flat) if v > 0]
    heapq.heapify(heap)
    for _ in range(total_bits):
        if not heap:
            break
        error, channel = heapq.heappop(heap)
        bits[channel] += 1
        if bits[channel] < max_bits:
            heapq.heappush(heap, (error / 4, channel))
    return torch.tensor(bits, dtype=torch.int64).view(variance.shape)

"""Bit widths, quantizer tables and allocation (pure: no I/O, no clock, no logging). spectral.layout lays codes out in
a page.

A page holds P consecutive tokens of one unit (a group of KV heads, keys and values together) as P x R latent
coefficients: R latents, each transformed over the page's tokens by an orthonormal DCT, so that row f of a page is
frequency f. Rows are grouped into classes of neighbouring frequencies (`frequency_classes`); a class has one standard
deviation and one width per latent. Where all rows are one class there is no transform, and row f is token f: that is
how a profile for speed has it, and the number of classes says which (`row_classes`, `page_transform`). A coefficient of
width w is a code in [0, 2^w): the index of a level of the width's uniform table, times the class's standard deviation.
Tables are shared by everything in a profile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

WIDTHS = (0, 1, 2, 3, 4, 6, 8)
"""Widths a coefficient may have."""

FIELDS = (0, 1, 1, 2, 1, 2, 1)
"""Fields that a code of each width is stored in (spectral.layout.PLANES): what reading it costs, whatever its bits."""

CHANNEL_GROUP = 16
"""Widths are given to runs of this many latents, so that every run of codes fills whole bytes at every width."""


@cache
def gaussian_step(bits: int) -> tuple[float, float]:
    """Step (in standard deviations) and mean squared error (in variances) of the best uniform mid-rise quantizer
    of a unit Gaussian with 2^bits levels. Found by a grid search over steps on the density; 0 bits: (0.0, 1.0)."""
    if bits == 0:
        return 0.0, 1.0
    x = np.linspace(-8.0, 8.0, 16001)
    weight = np.exp(-x * x / 2)
    weight /= weight.sum()
    half = 2 ** (bits - 1)
    best = (math.inf, 0.0)
    for step in np.geomspace(2.0 / 2**bits, 8.0 / 2**bits + 0.6, 400):
        code = np.clip(np.floor(x / step), -half, half - 1)
        error = float((weight * (x - (code + 0.5) * step) ** 2).sum())
        best = min(best, (error, float(step)))
    return best[1], best[0]


def uniform_levels(width: int, step: float) -> np.ndarray:
    """The 2^width levels of a mid-rise quantizer, ascending, float64."""
    return (np.arange(2**width) + 0.5 - 2 ** (width - 1)) * step


@dataclass(frozen=True)
class Table:
    """A quantizer of unit-variance coefficients.

    Attributes:
        levels: float64 [2^width], ascending, symmetric around zero: what a code stands for.
        cuts: float64 [2^width - 1], ascending, symmetric: code c stands for coefficients between cuts c - 1 and c.
    """

    levels: np.ndarray
    cuts: np.ndarray

    @classmethod
    def nearest(cls, levels: np.ndarray) -> Table:
        """Every coefficient to its nearest level."""
        return cls(levels, (levels[1:] + levels[:-1]) / 2)

    @property
    def step(self) -> float:
        """Distance of neighbouring levels."""
        return float(self.levels[-1] - self.levels[0]) / (self.levels.size - 1)


def uniform_table(width: int, step: float) -> Table:
    """2^width levels `step` apart; every coefficient goes to the nearest."""
    return Table.nearest(uniform_levels(width, step))


def gaussian_tables() -> dict[int, Table]:
    """The best uniform tables for unit Gaussians: for a codec without fitted ones."""
    return {width: uniform_table(width, gaussian_step(width)[0]) for width in WIDTHS if width}


def fit_tables(sample: np.ndarray) -> dict[int, Table]:
    """The best uniform quantizer of every width for a sample of coefficients of unit variance.

    Uniform levels let a kernel use a code where it lies (spectral.kernels.lanes): a look-up of Lloyd's levels (Lloyd,
    "Least squares quantization in PCM", 1982) costs three times the instructions and wins 1 to 4 % of KL
    (docs/codec-research.md).

    Args:
        sample: [n] float; only magnitudes count, so tables are symmetric.

    Raises ValueError for fewer than 64 coefficients, or values that are not finite or all zero.
    """
    half = np.abs(np.asarray(sample, dtype=np.float64))
    if half.size < 64 or not np.isfinite(half).all() or not half.max() > 0:
        raise ValueError(f"tables need at least 64 finite coefficients that are not all zero, got {half.size}")
    return {width: uniform_table(width, _best_step(half, width)) for width in WIDTHS if width}


def _best_step(magnitudes: np.ndarray, width: int) -> float:
    """The step with the least squared error: a coarse search, then a fine one around its best."""
    steps = gaussian_step(width)[0] * np.geomspace(0.5, 4.0, 46)
    for _ in range(2):
        errors = [_uniform_error(magnitudes, width, float(step)) for step in steps]
        best = int(np.argmin(errors))
        low, high = steps[max(0, best - 1)], steps[min(steps.size - 1, best + 1)]
        found, steps = float(steps[best]), np.geomspace(low, high, 13)
    return found


def _uniform_error(magnitudes: np.ndarray, width: int, step: float) -> float:
    """Mean squared error of a mid-rise quantizer."""
    code = np.clip(np.floor(magnitudes / step), 0, 2 ** (width - 1) - 1)
    return float(((magnitudes - (code + 0.5) * step) ** 2).mean())


def frequency_classes(page_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Rows of a page that share deviations and widths: {0}, {1}, {2, 3}, {4..7}, ... up to the page's size.

    Measured on two models (docs/codec-research.md): sixteen classes are no better than these.
    """
    if page_tokens < 8 or page_tokens & (page_tokens - 1):
        raise ValueError(f"page_tokens must be a power of two and at least 8, got {page_tokens}")
    bounds = [0, *(2**i for i in range(page_tokens.bit_length()))]
    return tuple(tuple(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False))


def row_classes(page_tokens: int, count: int) -> tuple[tuple[int, ...], ...]:
    """The rows of each of `count` classes: one for all rows of a page that is not transformed, or those of
    frequencies. Raises ValueError for any other count."""
    classes = frequency_classes(page_tokens)
    if count == 1:
        return (tuple(range(page_tokens)),)
    if count != len(classes):
        raise ValueError(f"a page of {page_tokens} tokens has 1 or {len(classes)} classes, not {count}")
    return classes


def class_count(page_tokens: int, transform: bool) -> int:
    """Classes of a page that is transformed, or is not."""
    return len(frequency_classes(page_tokens)) if transform else 1


def page_transform(page_tokens: int, count: int) -> np.ndarray:
    """What a page's tokens become its rows by, with so many classes: the DCT, or nothing. float64 [P, P], orthonormal,
    y = M x."""
    return np.eye(page_tokens) if count == 1 else dct_matrix(page_tokens)


def dct_matrix(size: int) -> np.ndarray:
    """Orthonormal DCT-II, float64 [size, size], rows are frequencies: y = M x, x = M^T y."""
    k = np.arange(size)
    matrix = np.cos(np.pi * (k[None] + 0.5) * k[:, None] / size) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def allocate(errors: np.ndarray, sizes: np.ndarray, total_bits: float, *, field_bits: float = 0.0) -> np.ndarray:
    """The widths with the least total error under a budget of bits: one Lagrangian over all items.

    Reverse water-filling with measured, possibly non-convex error curves: width = argmin error + lambda * size * width,
    lambda by bisection, then the rest of the budget greedily (Shoham and Gersho, "Efficient bit allocation for an
    arbitrary set of quantizers", 1988).

    Args:
        errors: [len(WIDTHS), n] error of each item at each width.
        sizes: [n] how many codes an item stands for.
        total_bits: budget; sum(sizes * widths) stays at or below it.
        field_bits: what reading a field counts for beside its bits. Kernels spend the same time on a field of any size:
            with this above 0 there are fewer and larger ones, for more error.

    Returns:
        [n] uint8 widths.
    """
    cost = np.asarray(errors, dtype=np.float64)
    weight = np.asarray(sizes, dtype=np.float64)
    if cost.ndim != 2 or cost.shape[0] != len(WIDTHS) or cost.shape[1:] != weight.shape:
        raise ValueError(f"errors {cost.shape} and sizes {weight.shape} do not fit {len(WIDTHS)} widths")
    if not np.isfinite(cost).all() or (cost < 0).any() or (weight <= 0).any():
        raise ValueError("errors must be finite and non-negative, and sizes positive")
    widths = np.array(WIDTHS, dtype=np.float64)
    fields = np.array(FIELDS)
    bits = (widths + field_bits * fields)[:, None] * weight
    low, high = -80.0, 40.0
    for _ in range(90):
        middle = (low + high) / 2
        pick = (cost + math.exp(middle) * bits).argmin(0)
        low, high = (middle, high) if float((widths[pick] * weight).sum()) > total_bits else (low, middle)
    pick = (cost + math.exp(high) * bits).argmin(0)
    left = total_bits - float((widths[pick] * weight).sum())
    every = np.arange(weight.size)
    following = np.minimum(pick + 1, len(WIDTHS) - 1)
    gain = (cost[pick, every] - cost[following, every]) / np.maximum(weight * (widths[following] - widths[pick]), 1e-9)
    if field_bits:
        gain[fields[following] > fields[pick]] = 0.0
    for item in np.argsort(-gain, kind="stable"):
        need = float(weight[item] * (widths[following[item]] - widths[pick[item]]))
        if 0 < need <= left and gain[item] > 0:
            left -= need
            pick[item] = following[item]
    return widths[pick].astype(np.uint8)

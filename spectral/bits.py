"""Bit widths, quantizer tables, allocation and the layout of a page (pure: no I/O, no clock, no logging).

A page holds P consecutive tokens of one unit (a group of KV heads, keys and values together) as P x R latent
coefficients: R latents, each transformed over the page's tokens by an orthonormal DCT, so that row f of a page is
frequency f. Rows are grouped into classes of neighbouring frequencies (`frequency_classes`); a class has one standard
deviation and one width per latent. A coefficient of width w is a code in [0, 2^w): the index of a level of the width's
table, times the class's standard deviation. Tables are shared by everything in a profile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

WIDTHS = (0, 1, 2, 3, 4, 6, 8)
"""Widths a coefficient may have."""

CHANNEL_GROUP = 16
"""Widths are given to runs of this many latents, so that every run of codes fills whole bytes at every width."""

UNIFORM_FROM = 6
"""Tables from this width up are uniform (a 64-entry look-up would cost a kernel more than it gains in quality)."""

# How a width's code is stored: fields of 1, 2, 4 or 8 bits. 6 = four high bits and two low ones (levels are uniform, so
# the two fields' values add up); 3 = a magnitude of two bits and a sign (the table is symmetric, so they multiply).
FIELDS: dict[int, tuple[tuple[str, int], ...]] = {
    8: (("code", 8),),
    4: (("code", 4),),
    6: (("high", 4), ("low", 2)),
    2: (("code", 2),),
    3: (("magnitude", 2), ("sign", 1)),
    1: (("code", 1),),
}
STORAGE_ORDER = (8, 4, 6, 2, 3, 1)


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


def gaussian_tables() -> dict[int, np.ndarray]:
    """Uniform tables for unit Gaussians: what a profile without fitted tables uses."""
    return {width: uniform_levels(width, gaussian_step(width)[0]) for width in WIDTHS if width}


def fit_tables(sample: np.ndarray, *, iterations: int = 40) -> dict[int, np.ndarray]:
    """Quantizer tables for a sample of unit-variance coefficients, one per width, symmetric around zero.

    Lloyd's algorithm (Lloyd, "Least squares quantization in PCM", 1982) from the Gaussian's uniform levels for narrow
    widths, the best uniform step for `UNIFORM_FROM` and wider.

    Args:
        sample: [n] float; its mirror image is added, so that tables are symmetric.

    Returns:
        width -> float64 [2^width] levels, ascending.
    """
    half = np.sort(np.abs(np.asarray(sample, dtype=np.float64)))
    if half.size < 64 or not np.isfinite(half).all():
        raise ValueError(f"tables need at least 64 finite coefficients, got {half.size}")
    total = np.concatenate([[0.0], np.cumsum(half)])
    tables = {}
    for width in WIDTHS[1:]:
        positive = uniform_levels(width, gaussian_step(width)[0])[2 ** (width - 1) :]
        if width >= UNIFORM_FROM:
            steps = gaussian_step(width)[0] * np.geomspace(0.5, 4.0, 61)
            errors = [_uniform_error(half, width, float(step)) for step in steps]
            positive = uniform_levels(width, float(steps[int(np.argmin(errors))]))[2 ** (width - 1) :]
        else:
            for _ in range(iterations):
                cut = np.searchsorted(half, (positive[1:] + positive[:-1]) / 2)
                cut = np.concatenate([[0], cut, [half.size]])
                count = np.diff(cut)
                mean = np.diff(total[cut]) / np.maximum(count, 1)
                positive = np.sort(np.where(count > 0, mean, positive))
        tables[width] = np.concatenate([-positive[::-1], positive])
    return tables


def _uniform_error(magnitudes: np.ndarray, width: int, step: float) -> float:
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


def dct_matrix(size: int) -> np.ndarray:
    """Orthonormal DCT-II, float64 [size, size], rows are frequencies: y = M x, x = M^T y."""
    k = np.arange(size)
    matrix = np.cos(np.pi * (k[None] + 0.5) * k[:, None] / size) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def allocate(errors: np.ndarray, sizes: np.ndarray, total_bits: float) -> np.ndarray:
    """The widths with the least total error under a budget of bits: one Lagrangian over all items.

    Reverse water-filling with measured, possibly non-convex error curves: width = argmin error + lambda * size * width,
    lambda by bisection, then the rest of the budget greedily (Shoham and Gersho, "Efficient bit allocation for an
    arbitrary set of quantizers", 1988).

    Args:
        errors: [len(WIDTHS), n] error of each item at each width.
        sizes: [n] how many codes an item stands for.
        total_bits: budget; sum(sizes * widths) stays at or below it.

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
    bits = widths[:, None] * weight
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
    for item in np.argsort(-gain, kind="stable"):
        need = float(weight[item] * (widths[following[item]] - widths[pick[item]]))
        if 0 < need <= left and gain[item] > 0:
            left -= need
            pick[item] = following[item]
    return widths[pick].astype(np.uint8)


@dataclass(frozen=True)
class Segment:
    """Consecutive bytes of a page that hold one field of one width: `count` codes of `bits` bits from byte `start`."""

    width: int
    field: str
    bits: int
    count: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.bits // 8


@dataclass(frozen=True)
class PageLayout:
    """Where every coefficient of a unit's page lies.

    Attributes:
        page_tokens: P; channels: R.
        segments: fields in storage order. Within a field, codes run through the classes, through a class's rows, and
            through the class's latents of that width, ascending; the first code is in the lowest bits of its byte.
        places: width -> int64 [count]: coefficient f * R + r of each of its codes.
    """

    page_tokens: int
    channels: int
    segments: tuple[Segment, ...]
    places: dict[int, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return self.segments[-1].stop if self.segments else 0

    @property
    def bits(self) -> int:
        """Bits of one page's codes; pages have no padding, so this is 8 * nbytes."""
        return sum(width * place.size for width, place in self.places.items())


def page_layout(widths: np.ndarray, page_tokens: int) -> PageLayout:
    """Layout for widths [classes, R] (int). Raises ValueError on widths that do not exist or do not fill bytes."""
    table = np.asarray(widths)
    classes = frequency_classes(page_tokens)
    if table.ndim != 2 or table.shape[0] != len(classes):
        raise ValueError(f"widths {table.shape} must be [{len(classes)} classes, latents]")
    wrong = sorted({int(w) for w in np.unique(table)} - set(WIDTHS))
    if wrong:
        raise ValueError(f"widths {wrong} are not among {WIDTHS}")
    channels = table.shape[1]
    places: dict[int, np.ndarray] = {}
    segments: list[Segment] = []
    start = 0
    for width in STORAGE_ORDER:
        parts = []
        for rows, row_widths in zip(classes, table, strict=True):
            latents = np.flatnonzero(row_widths == width)
            parts += [row * channels + latents for row in rows]
        place = np.concatenate(parts).astype(np.int64)
        if not place.size:
            continue
        if place.size % 8:
            raise ValueError(f"{place.size} codes of width {width} do not fill whole bytes")
        places[width] = place
        for field, bits in FIELDS[width]:
            segments.append(Segment(width, field, bits, place.size, start))
            start = segments[-1].stop
    return PageLayout(page_tokens, channels, tuple(segments), places)


def field_values(width: int, field: str, levels: np.ndarray) -> np.ndarray:
    """What each value of a field contributes, float64 [2^bits of the field] (FIELDS: high + low, magnitude * sign)."""
    if field == "high":
        return levels[:: 2**2] - levels[0]
    if field == "low":
        return levels[: 2**2]
    if field == "magnitude":
        return levels[2 ** (width - 1) :]
    if field == "sign":
        return np.array([-1.0, 1.0])
    return levels


def split_code(width: int, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of a width -> the values of its fields (integers of the same shape)."""
    if width == 6:
        return {"high": codes >> 2, "low": codes & 3}
    if width == 3:
        sign = codes >> 2
        return {"magnitude": np.where(sign == 1, codes - 4, 3 - codes), "sign": sign}
    return {"code": codes}

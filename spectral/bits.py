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

    @classmethod
    def mirrored(cls, levels: np.ndarray, cuts: np.ndarray) -> Table:
        """From the positive halves."""
        return cls(np.concatenate([-levels[::-1], levels]), np.concatenate([-cuts[::-1], [0.0], cuts]))


def gaussian_tables() -> dict[int, Table]:
    """Uniform tables for unit Gaussians, not nested: for a codec without fitted ones."""
    return {width: Table.nearest(uniform_levels(width, gaussian_step(width)[0])) for width in WIDTHS if width}


def fit_tables(sample: np.ndarray, *, iterations: int = 40) -> dict[int, Table]:
    """Quantizer tables for a sample of unit-variance coefficients, one per width, symmetric around zero and nested.

    Nested: every threshold of 1, 2, 3 and 4 bits is one of every wider table up to 6 bits. So the code of a narrower
    width follows from the code of a wider one, and squeezing a page gives the page that encoding would have given
    (from 8 bits, which need a range of their own, nearly). Tables start from Lloyd's (Lloyd, "Least squares
    quantization in PCM", 1982); their thresholds then move on the grid of the uniform 6-bit table to where the relative
    errors of all widths are least, and levels are the means of their cells. This costs a few per cent of 4-bit error.

    Args:
        sample: [n] float; its mirror image is added, so that tables are symmetric.

    Raises ValueError for fewer than 64 coefficients, or values that are not finite or all zero.
    """
    half = np.sort(np.abs(np.asarray(sample, dtype=np.float64)))
    if half.size < 64 or not np.isfinite(half).all() or not half[-1] > 0:
        raise ValueError(f"tables need at least 64 finite coefficients that are not all zero, got {half.size}")
    cells = _Cells(half)
    lloyd = {width: cells.lloyd(width, iterations) for width in (2, 3, 4)}
    step = {width: cells.best_step(width) for width in (6, 8)}
    best: tuple[float, np.ndarray] | None = None
    for factor in np.linspace(0.88, 1.12, 25):
        cost, cuts = _nest(cells, lloyd, float(step[6] * factor), cells.uniform_error(6, step[6]))
        if best is None or cost < best[0]:
            best = cost, cuts
            step[0] = float(step[6] * factor)
    assert best is not None
    positive = {1: best[1][:0], 2: best[1][3:4], 3: best[1][1::2], 4: best[1]}
    tables = {width: Table.mirrored(cells.levels(cuts), cuts) for width, cuts in positive.items()}
    for width, found in ((6, step[0]), (8, step[8])):
        tables[width] = Table.nearest(uniform_levels(width, found))
    return tables


class _Cells:
    """Sums over cells of sorted magnitudes, for any positive thresholds between them."""

    def __init__(self, magnitudes: np.ndarray) -> None:
        self.x = magnitudes
        self.total = np.concatenate([[0.0], np.cumsum(magnitudes)])
        self.square = np.concatenate([[0.0], np.cumsum(magnitudes**2)])

    def _bounds(self, cuts: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.searchsorted(self.x, cuts), [self.x.size]])

    def levels(self, cuts: np.ndarray) -> np.ndarray:
        """The means of the cells between 0, the cuts and infinity; the middle of a cell without samples."""
        bounds = self._bounds(cuts)
        count = np.diff(bounds)
        edges = np.concatenate([[0.0], cuts, [2 * max([float(self.x[-1]), *cuts.tolist()])]])
        return np.where(count > 0, np.diff(self.total[bounds]) / np.maximum(count, 1), (edges[1:] + edges[:-1]) / 2)

    def error(self, cuts: np.ndarray) -> float:
        """Mean squared error with the means as levels."""
        bounds = self._bounds(cuts)
        count = np.maximum(np.diff(bounds), 1)
        return float((np.diff(self.square[bounds]) - np.diff(self.total[bounds]) ** 2 / count).sum() / self.x.size)

    def lloyd(self, width: int, iterations: int) -> np.ndarray:
        """Positive thresholds of the best quantizer of this width."""
        levels = uniform_levels(width, gaussian_step(width)[0])[2 ** (width - 1) :]
        for _ in range(iterations):
            levels = np.sort(self.levels((levels[1:] + levels[:-1]) / 2))
        return (levels[1:] + levels[:-1]) / 2

    def uniform_error(self, width: int, step: float) -> float:
        """Mean squared error of a mid-rise quantizer."""
        code = np.clip(np.floor(self.x / step), 0, 2 ** (width - 1) - 1)
        return float(((self.x - (code + 0.5) * step) ** 2).mean())

    def best_step(self, width: int) -> float:
        """The best step of a mid-rise quantizer, by grid search."""
        steps = gaussian_step(width)[0] * np.geomspace(0.5, 4.0, 61)
        return float(steps[int(np.argmin([self.uniform_error(width, float(step)) for step in steps]))])


def _nest(cells: _Cells, lloyd: dict[int, np.ndarray], step: float, six: float) -> tuple[float, np.ndarray]:
    """Thresholds of 4 bits on multiples of `step` whose second ones serve 3 bits and whose fourth serves 2: the least
    sum of errors relative to the best of each width (4 bits twice, 6 bits half), by coordinate descent."""
    best = {width: max(cells.error(cuts), 1e-12) for width, cuts in lloyd.items()}
    weight = 0.5 * cells.uniform_error(6, step) / max(six, 1e-12)

    def cost(grid: np.ndarray) -> float:
        if grid[0] < 1 or grid[-1] > 31 or (np.diff(grid) <= 0).any():
            return math.inf
        cuts = grid * step
        errors = cells.error(cuts), cells.error(cuts[1::2]), cells.error(cuts[3:4])
        return weight + 2 * errors[0] / best[4] + errors[1] / best[3] + errors[2] / best[2]

    wanted = lloyd[4].copy()
    wanted[1::2] = (wanted[1::2] + lloyd[3]) / 2
    grid = np.round(wanted / step).astype(np.int64)
    grid = np.maximum.accumulate(np.maximum(grid, 1) - np.arange(7)) + np.arange(7)
    grid -= np.maximum(0, grid - np.arange(25, 32))
    least, improved = cost(grid), True
    while improved:
        improved = False
        for at in range(7):
            for move in (-1, 1):
                moved = grid.copy()
                moved[at] += move
                found = cost(moved)
                if found < least - 1e-12:
                    grid, least, improved = moved, found, True
    return least, grid * step


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

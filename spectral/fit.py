"""From statistics to a profile: weighted bases, quantizer tables, and one allocation for every setting.

No model is read here: the same statistics give the same profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from spectral.basis import Unit, regularised, side_numbers, weighted_basis
from spectral.bits import (
    CHANNEL_GROUP,
    WIDTHS,
    Table,
    allocate,
    class_count,
    fit_tables,
    page_transform,
    row_classes,
)
from spectral.errors import SettingError
from spectral.layout import page_layout
from spectral.profile import CONTEXT, LadderRow, LayerProfile, Widths
from spectral.shapes import ModelShape
from spectral.statistics import LayerStatistics, Statistics
from spectral.windows import slot_nbytes

TABLE_SAMPLE = 2_000_000
"""Coefficients on which quantizer tables are fitted, at most."""

SPEED_FIELD_BITS = 0.5
"""What a field counts for beside its bits where quality is not preferred (spectral.bits.allocate)."""


@dataclass(frozen=True)
class Preference:
    """What a profile is made for.

    Attributes:
        sides: of its units (spectral.basis.Unit); field_bits: what a field counts for beside its bits; transform:
            whether a page's latents are transformed over its tokens.
    """

    sides: tuple[str, ...]
    field_bits: float
    transform: bool


PREFERENCES = {
    "quality": Preference(("both",), 0.0, True),
    "balanced": Preference(("key", "value"), SPEED_FIELD_BITS, True),
    "speed": Preference(("key", "value"), SPEED_FIELD_BITS, False),
}
"""Quality: keys and values of a unit share a basis, which takes fewest bytes for the same loss. Balanced: each has its
own, so that scores and sums read half of the codes, and codes are fewer and larger. Speed: tokens as they are besides,
so that a page has one class of rows, codes come in long runs of one width, and nothing has to be transformed back
(docs/codec-research.md has what each loses)."""

FINE_WINDOW_BELOW = 8.0
"""All-in ratios below this keep 10 bits of recent tokens, the rest 8: there the window's own error would rule."""


@dataclass
class Fitted:
    """Bases and tables, and the error of every run of `CHANNEL_GROUP` latents at every width.

    Attributes:
        layers: index -> LayerProfile; tables: quantizers by width; prefer: of PREFERENCES.
        errors: [len(WIDTHS), n] nats per token; sizes: [n] codes per token of an item;
        where: per item (layer, unit, class, run).
    """

    layers: dict[int, LayerProfile]
    tables: dict[int, Table]
    errors: np.ndarray
    sizes: np.ndarray
    where: list[tuple[int, int, int, int]]
    prefer: str = "quality"


def preferred(prefer: str) -> Preference:
    """Of PREFERENCES. Raises SettingError for what is none of them."""
    if prefer not in PREFERENCES:
        raise SettingError(f"prefer must be one of {', '.join(PREFERENCES)}, got {prefer!r}")
    return PREFERENCES[prefer]


def fit(statistics: Statistics, page_tokens: int, prefer: str = "quality") -> Fitted:
    """Bases, tables and error curves. Raises ValueError on statistics that are not finite."""
    wanted = preferred(prefer)
    sides, classes = wanted.sides, class_count(page_tokens, wanted.transform)
    layers: dict[int, LayerProfile] = {}
    pool: list[np.ndarray] = []
    latents: dict[tuple[int, int], np.ndarray] = {}
    count = len(sides) * sum(len(layer.units) for layer in statistics.layers.values())
    for index, layer in statistics.layers.items():
        units: list[Unit] = []
        for side, number in product(sides, range(len(layer.units))):
            unit, latent = _fit_unit(layer, number, side, statistics, page_tokens, classes)
            latents[index, len(units)] = latent
            units.append(unit)
            flat = latent[..., : latent.shape[-1] // 2].ravel()  # the leading half gets nearly all bits
            pool.append(flat[:: max(1, flat.size * count // TABLE_SAMPLE)])
        layers[index] = LayerProfile(units, layer.shape.key_dim, layer.shape.value_dim, layer.frequencies)
    tables = fit_tables(np.concatenate(pool))
    errors, sizes, where = [], [], []
    for (index, number), latent in latents.items():
        table, size = _error_curves(layers[index].units[number], latent, tables, page_tokens)
        errors.append(table.reshape(len(WIDTHS), -1))
        sizes.append(size.ravel())
        where += [(index, number, c, run) for c in range(table.shape[1]) for run in range(table.shape[2])]
    return Fitted(layers, tables, np.concatenate(errors, 1), np.concatenate(sizes), where, prefer)


def _fit_unit(
    layer: LayerStatistics, number: int, side: str, statistics: Statistics, page_tokens: int, classes: int
) -> tuple[Unit, np.ndarray]:
    """The basis of keys and values of a run of heads, or of one side alone, and its sample as latents of unit variance:
    float32 [pages, P, R]."""
    sums, heads = layer.units[number], layer.heads[number]
    parts = side_numbers(heads, side, layer.shape.key_dim, layer.shape.value_dim)
    start = side_numbers(heads, "key", layer.shape.key_dim, layer.shape.value_dim)[0] if side == "value" else 0
    own = slice(start, start + sum(parts))
    mean = (sums.total[own] / statistics.tokens).numpy()
    covariance = (sums.moment[own, own] / statistics.tokens).numpy() - np.outer(mean, mean)
    metric = 0.5 * (sums.fisher[own, own] / statistics.fisher_tokens).numpy()
    basis = weighted_basis(mean, covariance, regularised(metric, tuple(size for size in parts if size)))
    floor = max(float(basis.variance[0]) * 1e-12, 1e-30)
    scale = np.sqrt(np.maximum(basis.variance, floor))
    x = torch.cat(layer.sample[number])[..., own].float()
    latent = (x - torch.tensor(mean, dtype=torch.float32)) @ torch.tensor(basis.encode / scale, dtype=torch.float32)
    transform = torch.tensor(page_transform(page_tokens, classes), dtype=torch.float32)
    square = torch.matmul(transform, latent).square().mean(0, dtype=torch.float64).numpy()  # [P, R]
    deviation = np.stack([np.sqrt(square[list(rows)].mean(0)) for rows in row_classes(page_tokens, classes)])
    variance = np.maximum(basis.variance, floor)
    return Unit(heads, mean, basis.decode * scale, basis.encode / scale, variance, deviation, side), latent.numpy()


def _error_curves(
    unit: Unit, latent: np.ndarray, tables: dict[int, Table], page_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measured loss of a unit's runs at every width: [len(WIDTHS), classes, runs] nats per token, and codes per token
    [classes, runs]. Latents beyond the last whole run never get bits."""
    runs = unit.variance.size // CHANNEL_GROUP
    transform = torch.tensor(page_transform(page_tokens, len(unit.deviation)), dtype=torch.float32)
    y = torch.matmul(transform, torch.from_numpy(latent))
    classes = row_classes(page_tokens, len(unit.deviation))
    errors = np.zeros((len(WIDTHS), len(classes), runs))
    importance = unit.variance[: runs * CHANNEL_GROUP]
    for c, rows in enumerate(classes):
        x = y[:, list(rows), : runs * CHANNEL_GROUP]
        deviation = torch.tensor(np.maximum(unit.deviation[c, : runs * CHANNEL_GROUP], 1e-12), dtype=torch.float32)
        normal = (x / deviation).contiguous()
        for w, width in enumerate(WIDTHS):
            if width == 0:
                wrong = x
            else:
                levels = torch.tensor(tables[width].levels, dtype=torch.float32)
                code = torch.bucketize(normal, torch.tensor(tables[width].cuts, dtype=torch.float32))
                wrong = (normal - levels[code]) * deviation
            square = wrong.square().mean(0, dtype=torch.float64).sum(0).numpy() / page_tokens
            errors[w, c] = (importance * square).reshape(runs, CHANNEL_GROUP).sum(1)
    sizes = np.array([[CHANNEL_GROUP * len(rows) / page_tokens] * runs for rows in classes])
    return errors, sizes


def ladder(
    fitted: Fitted,
    shape: ModelShape,
    ratios: Sequence[float],
    *,
    sinks: int,
    recent: int,
    page_tokens: int,
    field_bits: float | None = None,
) -> tuple[list[LadderRow], dict[str, Widths]]:
    """One row and its widths for every all-in ratio at `CONTEXT` tokens of the full-attention layers.

    `field_bits`: what a field counts for beside its bits (spectral.bits.allocate); None: as the preference has it.
    Raises SettingError for a ratio that the exact window alone exceeds.
    """
    full = [layer for layer in shape.layers if layer.sliding is None]
    token_nbytes = sum(layer.token_nbytes() for layer in full)
    pages = (CONTEXT - sinks - recent) // page_tokens
    rows: list[LadderRow] = []
    bits: dict[str, Widths] = {}
    if field_bits is None:
        field_bits = preferred(fitted.prefer).field_bits
    for ratio in ratios:
        window_bits = 10 if ratio < FINE_WINDOW_BELOW else 8
        held = sum(slot_nbytes(layer, sinks, recent + page_tokens, window_bits) for layer in full)
        page_budget = (token_nbytes * CONTEXT / ratio - held) / pages
        if page_budget <= 0:
            raise SettingError(
                f"{ratio:g}x cannot be reached: the exact window alone takes more; use fewer recent tokens"
            )
        picked, widths, page_nbytes = _allocated(fitted, shape, page_budget, page_tokens, field_bits)
        sliding = sum(layer.sliding * layer.token_nbytes() for layer in shape.layers if layer.sliding is not None)
        row = LadderRow(
            name=f"{ratio:g}x",
            bits_per_element=page_nbytes * 8 / page_tokens / (token_nbytes / 2),
            rank=float((fitted.sizes * (picked > 0)).sum()),
            sinks=sinks,
            window=recent,
            window_bits=window_bits,
            page_tokens=page_tokens,
            page_nbytes=page_nbytes,
            window_nbytes=held + sliding,
            energy=_energy(fitted, picked),
        )
        if rows and row.page_nbytes >= rows[-1].page_nbytes:
            continue  # a model so small that two ratios come to the same codes gets one row
        rows.append(row)
        bits[row.name] = widths
    return rows, bits


def _allocated(
    fitted: Fitted, shape: ModelShape, page_budget: float, page_tokens: int, field_bits: float
) -> tuple[np.ndarray, Widths, int]:
    """Widths by item and by layer under a budget of bytes of a page, and the bytes that they take.

    Padding comes on top of the budget where quality is preferred: some thousandths, and profiles that are shipped stay
    what they are. Twice as many units pad more, up to 3 % at 16x, so with the other preferences it is taken off.
    """
    budget = page_budget
    for turn in range(12):
        picked = allocate(fitted.errors, fitted.sizes, budget * 8 / page_tokens, field_bits=field_bits)
        _fill_empty_units(fitted, picked)
        widths = _widths(fitted, shape, picked)
        nbytes = sum(page_layout(w, page_tokens).nbytes for layer in widths for w in layer or [])
        if fitted.prefer == "quality" or nbytes <= page_budget:
            break
        budget = max(budget - (nbytes - page_budget) * 2 ** (turn // 3), page_budget / 2)
    return picked, widths, nbytes


def _fill_empty_units(fitted: Fitted, picked: np.ndarray) -> None:
    """One bit for the run that gains most of a unit that would have none: kernels serve no layer with such a unit."""
    of = np.unique([where[:2] for where in fitted.where], axis=0, return_inverse=True)[1].ravel()
    gain = (fitted.errors[0] - fitted.errors[1]) / fitted.sizes
    for empty in np.flatnonzero(np.bincount(of, picked) == 0):
        own = np.flatnonzero(of == empty)
        picked[own[np.argmax(gain[own])]] = WIDTHS[1]


def default_by_energy(rows: Sequence[LadderRow], target_energy: float) -> str:
    """The coarsest setting that keeps `target_energy` of the weighted variance; the finest where none does."""
    keeping = [row.name for row in rows if row.energy >= target_energy]
    return keeping[-1] if keeping else rows[0].name


def _energy(fitted: Fitted, picked: np.ndarray) -> float:
    """Share of the weighted variance that is kept at these widths (by item, as in WIDTHS)."""
    lost = fitted.errors[np.searchsorted(WIDTHS, picked), np.arange(picked.size)].sum()
    return float(1 - lost / max(float(fitted.errors[0].sum()), 1e-300))


def _widths(fitted: Fitted, shape: ModelShape, picked: np.ndarray) -> Widths:
    out: Widths = [None] * len(shape.layers)
    for index, layer in fitted.layers.items():
        out[index] = [np.zeros(unit.deviation.shape, dtype=np.uint8) for unit in layer.units]
    for (index, number, c, run), width in zip(fitted.where, picked, strict=True):
        units = out[index]
        assert units is not None
        units[number][c, run * CHANNEL_GROUP : (run + 1) * CHANNEL_GROUP] = width
    return out

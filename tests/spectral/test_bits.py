from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.bits import (
    WIDTHS,
    Table,
    allocate,
    dct_matrix,
    fit_tables,
    frequency_classes,
    gaussian_step,
    gaussian_tables,
)


def gaussian_errors(variances: np.ndarray) -> np.ndarray:
    return np.array([[v * gaussian_step(w)[1] for v in variances] for w in WIDTHS])


def test_gaussian_steps_match_the_published_optimum() -> None:
    # Max (1960): steps 1.596, .9957, .586, .3352 and errors .3634, .1188, .03744, .01154 for 1 to 4 bits.
    for bits, step, error in ((1, 1.596, 0.3634), (2, 0.9957, 0.1188), (3, 0.586, 0.03744), (4, 0.3352, 0.01154)):
        got = gaussian_step(bits)
        assert got[0] == pytest.approx(step, rel=0.02)
        assert got[1] == pytest.approx(error, rel=0.005)


def quantize(table: Table, x: np.ndarray) -> np.ndarray:
    return table.levels[np.searchsorted(table.cuts, x)]


def test_fitted_tables_are_the_published_uniform_optimum_for_a_gaussian() -> None:
    sample = np.random.default_rng(0).normal(size=400_000)
    for width, table in fit_tables(sample).items():
        np.testing.assert_allclose(table.levels, -table.levels[::-1])
        np.testing.assert_allclose(table.cuts, -table.cuts[::-1], atol=1e-12)
        np.testing.assert_allclose(np.diff(table.levels), table.step)
        assert (table.levels[:-1] < table.cuts).all() and (table.cuts < table.levels[1:]).all()
        error = float(((sample - quantize(table, sample)) ** 2).mean())
        assert error == pytest.approx(gaussian_step(width)[1], rel=0.02 if width < 6 else 0.15)


def test_tables_adapt_to_heavy_tails() -> None:
    sample = np.random.default_rng(1).laplace(size=200_000) / np.sqrt(2)
    fitted, plain = fit_tables(sample), gaussian_tables()
    for width in WIDTHS[1:]:
        errors = [float(((sample - quantize(t[width], sample)) ** 2).mean()) for t in (fitted, plain)]
        assert errors[0] <= errors[1] + 1e-9
    for bad in (np.full(100, np.nan), np.zeros(100), np.ones(3)):
        with pytest.raises(ValueError, match="at least 64"):
            fit_tables(bad)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_allocation_keeps_its_budget_and_follows_variance(variances: list[float], total: int) -> None:
    widths = allocate(gaussian_errors(np.array(variances)), np.ones(len(variances)), total)
    assert widths.sum() <= total
    assert set(widths.tolist()) <= set(WIDTHS)
    order = np.argsort(variances, kind="stable")
    if total - widths.sum() >= max(WIDTHS):  # nothing was skipped for want of bits: more variance never gets fewer
        assert (np.diff(widths[order].astype(int)) >= 0).all()


def test_allocation_is_optimal_but_for_the_last_bits() -> None:
    """No choice of widths with four bits less is better: a Lagrangian is exact on the convex hull, and the widest step
    between two widths is two bits."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        errors = gaussian_errors(rng.gamma(0.5, size=3))
        total = int(rng.integers(6, 22))
        widths = allocate(errors, np.ones(3), total)
        got = sum(errors[WIDTHS.index(int(w)), i] for i, w in enumerate(widths))
        best = min(
            sum(errors[WIDTHS.index(w), i] for i, w in enumerate(c))
            for c in itertools.product(WIDTHS, repeat=3)
            if sum(c) <= total - 4
        )
        assert widths.sum() <= total
        assert got <= best + 1e-12


def test_allocation_weighs_sizes_and_refuses_bad_input() -> None:
    errors = np.repeat(gaussian_errors(np.array([1.0])), 2, 1)
    widths = allocate(errors, np.array([1.0, 4.0]), 4)
    assert widths[0] > widths[1]  # the same gain costs four times the bits in the second
    with pytest.raises(ValueError, match="finite"):
        allocate(np.full((len(WIDTHS), 1), np.nan), np.ones(1), 4)
    with pytest.raises(ValueError, match="do not fit"):
        allocate(np.ones((2, 1)), np.ones(1), 4)


def test_classes_cover_a_page_and_the_dct_is_orthonormal() -> None:
    assert frequency_classes(16) == ((0,), (1,), (2, 3), (4, 5, 6, 7), tuple(range(8, 16)))
    for size in (8, 16, 64):
        assert [row for rows in frequency_classes(size) for row in rows] == list(range(size))
        np.testing.assert_allclose(dct_matrix(size) @ dct_matrix(size).T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(dct_matrix(8)[0], 8**-0.5)
    with pytest.raises(ValueError, match="power of two"):
        frequency_classes(12)

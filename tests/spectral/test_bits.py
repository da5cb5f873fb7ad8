from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.bits import (
    FIELDS,
    UNIFORM_FROM,
    WIDTHS,
    allocate,
    dct_matrix,
    field_values,
    fit_tables,
    frequency_classes,
    gaussian_step,
    gaussian_tables,
    page_layout,
    split_code,
)


def gaussian_errors(variances: np.ndarray) -> np.ndarray:
    return np.array([[v * gaussian_step(w)[1] for v in variances] for w in WIDTHS])


def test_gaussian_steps_match_the_published_optimum() -> None:
    # Max (1960): steps 1.596, .9957, .586, .3352 and errors .3634, .1188, .03744, .01154 for 1 to 4 bits.
    for bits, step, error in ((1, 1.596, 0.3634), (2, 0.9957, 0.1188), (3, 0.586, 0.03744), (4, 0.3352, 0.01154)):
        got = gaussian_step(bits)
        assert got[0] == pytest.approx(step, rel=0.02)
        assert got[1] == pytest.approx(error, rel=0.005)


def test_fitted_tables_match_the_published_optimum_for_a_gaussian() -> None:
    # Max (1960), non-uniform: levels .9816 and 1.5104 of 2 bits; error .1175 (2 bits), .03454 (3), .009497 (4).
    sample = np.random.default_rng(0).normal(size=400_000)
    tables = fit_tables(sample)
    assert tables[2][2:] == pytest.approx([0.4528, 1.510], abs=0.02)
    for width, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        levels = tables[width]
        near = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, sample)]
        assert float(((sample - near) ** 2).mean()) == pytest.approx(error, rel=0.02)
    for width, levels in tables.items():
        np.testing.assert_allclose(levels, -levels[::-1])
        assert (np.diff(levels) > 0).all()
        if width >= UNIFORM_FROM:
            np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0])


def test_tables_adapt_to_heavy_tails() -> None:
    sample = np.random.default_rng(1).laplace(size=200_000) / np.sqrt(2)
    fitted, plain = fit_tables(sample), gaussian_tables()
    for width in WIDTHS[1:]:
        error = [
            float(((sample - t[np.searchsorted((t[1:] + t[:-1]) / 2, sample)]) ** 2).mean())
            for t in (fitted[width], plain[width])
        ]
        assert error[0] <= error[1] + 1e-9
    with pytest.raises(ValueError, match="finite"):
        fit_tables(np.full(100, np.nan))


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


@given(st.lists(st.lists(st.sampled_from(WIDTHS), min_size=3, max_size=3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_layout_places_every_code_once(runs: list[list[int]]) -> None:
    """4 classes of a page of 8 tokens, 3 runs of 16 latents: bytes add up, no byte and no coefficient is used twice."""
    widths = np.repeat(np.array(runs), 16, axis=1)
    layout = page_layout(widths, 8)
    rows = np.array([len(r) for r in frequency_classes(8)])
    assert layout.nbytes * 8 == layout.bits == int((widths.sum(1) * rows).sum())
    places = np.concatenate([*layout.places.values(), np.zeros(0, dtype=np.int64)])
    assert len(set(places.tolist())) == places.size == int(((widths > 0).sum(1) * rows).sum())
    ends = [0, *(s.stop for s in layout.segments)]
    assert [s.start for s in layout.segments] == ends[:-1]
    for width, place in layout.places.items():
        classes = np.repeat(np.arange(4), rows)
        assert all(widths[classes[p // 48], p % 48] == width for p in place)


def test_layouts_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="5"):
        page_layout(np.full((4, 16), 5), 8)
    with pytest.raises(ValueError, match="classes"):
        page_layout(np.full((3, 16), 2), 8)
    uneven = np.zeros((4, 16), dtype=int)
    uneven[0, :3] = 1
    with pytest.raises(ValueError, match="whole bytes"):
        page_layout(uneven, 8)


def test_fields_rebuild_every_level() -> None:
    tables = fit_tables(np.random.default_rng(2).laplace(size=5000))
    for width, levels in tables.items():
        codes = np.arange(2**width)
        values = {f: field_values(width, f, levels)[split_code(width, codes)[f]] for f, _ in FIELDS[width]}
        rebuilt = values.get("code")
        if width == 6:
            rebuilt = values["high"] + values["low"]
        elif width == 3:
            rebuilt = values["magnitude"] * values["sign"]
        assert rebuilt is not None
        np.testing.assert_allclose(rebuilt, levels, atol=1e-9)

"""Decoded keys and values are lengthened by the part of their energy that the codes lost, and by no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral import gains
from spectral.basis import Unit
from spectral.bits import WIDTHS, gaussian_tables, row_classes
from spectral.codec import LayerCodec
from spectral.frames import BlockFrame
from spectral.gains import decode_gains, side_energy
from tests.spectral.helpers import cycling_widths, random_unit

HEADS, DIM, PAGE = 2, 16, 16


def codec_of(widths: np.ndarray, seed: int = 3) -> LayerCodec:
    """With one class of widths, of pages that are not transformed."""
    frame = BlockFrame(None, block_tokens=0, page_tokens=PAGE, sinks=0)
    parts = [(random_unit((0, HEADS), DIM, seed, flat=len(widths) == 1), widths)]
    return LayerCodec(parts, gaussian_tables(), frame, key_dim=DIM, value_dim=DIM, page_tokens=PAGE)


def by_row(unit: Unit) -> np.ndarray:
    """Deviations [P, D] of a page's rows."""
    out = np.empty((PAGE, unit.variance.size))
    for rows, deviation in zip(row_classes(PAGE, len(unit.deviation)), unit.deviation, strict=True):
        out[list(rows)] = deviation
    return out


@pytest.mark.parametrize("flat", [False, True])
def test_fewer_bits_are_lengthened_more(flat: bool) -> None:
    unit = random_unit((0, HEADS), DIM, 3, flat=flat)
    energy = side_energy(unit, HEADS * DIM)
    found = [decode_gains(energy, unit, np.full(unit.deviation.shape, w), PAGE) for w in sorted(WIDTHS)[1:]]
    for side in range(2):
        run = [pair[side] for pair in found]
        assert run == sorted(run, reverse=True) and 1 < run[-1] < 1.001 and run[0] > 1.02
    assert all(key < value for key, value in found)
    assert decode_gains(energy, unit, np.zeros(unit.deviation.shape, int), PAGE) == (1.0, 1.0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("widths", [[2, 1], [4, 0], [3, 1, 0]])
def test_all_of_it_would_be_the_length_that_was_there(
    monkeypatch: pytest.MonkeyPatch, widths: list[int], flat: bool
) -> None:
    """Whole parts give decoded coefficients the energy of Gaussian ones with the unit's statistics."""
    monkeypatch.setattr(gains, "KEY_PART", 1.0)
    monkeypatch.setattr(gains, "VALUE_PART", 1.0)
    codec = codec_of(cycling_widths(widths, 2 * HEADS * DIM, PAGE, flat))
    unit = random_unit((0, HEADS), DIM, 3, flat=flat)
    rng = np.random.default_rng(1)
    coefficients = rng.normal(size=(400, PAGE, unit.variance.size)) * by_row(unit)
    latents = np.einsum("pf,nfr->npr", codec.units[0].dct.T.double().numpy(), coefficients)
    x = torch.tensor(latents @ unit.decode.T, dtype=torch.float32)
    sides = [s.unflatten(2, (HEADS, DIM)).transpose(1, 2) for s in (x + codec.units[0].mean).split(HEADS * DIM, 2)]
    index = torch.zeros(400, dtype=torch.long)
    back = codec.decode(codec.encode(*sides, index), index)
    means = codec.units[0].mean.split(HEADS * DIM)
    for side, restored, mean in zip(sides, back, means, strict=True):
        middle = mean.view(HEADS, 1, DIM)
        there, got = ((t - middle).square().sum() for t in (side, restored))
        assert float(got / there) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("flat", [False, True])
def test_what_is_plain_gives_the_same_codes_again(flat: bool) -> None:
    codec = codec_of(cycling_widths([4, 2, 1], 2 * HEADS * DIM, PAGE, flat))
    pages = torch.randint(0, 256, (20, codec.page_nbytes), dtype=torch.uint8)
    index = torch.arange(20)
    unit, again = codec.units[0], codec.encode(*codec.decode(pages, index, plain=True), index)
    assert torch.equal(unit.codes(again), unit.codes(pages))
    assert not torch.equal(unit.codes(codec.encode(*codec.decode(pages, index), index)), unit.codes(pages))
    keys, plain = codec.decode(pages, index)[0], codec.decode(pages, index, plain=True)[0]
    middle = codec.units[0].mean[: HEADS * DIM].view(HEADS, 1, DIM)
    torch.testing.assert_close(keys - middle, codec.units[0].gains[0] * (plain - middle), rtol=1e-4, atol=1e-5)

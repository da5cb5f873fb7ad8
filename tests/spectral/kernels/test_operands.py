"""Queries as operands: what the matrix holds, and attention where a head is turned in whole, in part or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral.codec import LayerCodec
from spectral.frames import BlockFrame
from spectral.kernels.cells import SHARED
from spectral.kernels.check import TOLERANCE, Case
from spectral.kernels.choices import block_pages
from spectral.kernels.decode import LayerKernels, frame_half
from spectral.kernels.operands import (
    STAGES,
    _contracted,
    lane_chunks,
    operand_basis,
    operands_fit,
    shares_of,
    tiles_of,
)
from spectral.kernels.synthetic import synthetic_codec
from spectral.kernels.tables import layer_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HEADS = [(16, 8), (64, 32), (80, 16), (96, 0), (96, 48), (128, 64), (256, 128), (256, 32)]
"""Numbers of a head, and half of those that are turned."""


@pytest.mark.parametrize(("dim", "half"), HEADS)
def test_every_number_of_a_head_is_contracted_once_beside_its_partner(dim: int, half: int) -> None:
    assert operands_fit(dim, half)
    number = _contracted(dim, half)
    assert number.shape == (4 * lane_chunks(dim, half), 4, 2, 2)
    there = np.sort(number[number < dim])
    assert there.tolist() == list(range(dim)) and (number[number >= dim] == dim).all()
    low, high = number[:, :, 0], number[:, :, 1]
    turning = low < 2 * half
    assert (high[turning] == low[turning] + half).all(), "what is turned together lies in one lane"
    assert tiles_of(dim, half) * lane_chunks(dim, half) <= 4, "registers"
    assert int(STAGES) * 4 * lane_chunks(dim, half) * 512 <= SHARED


@pytest.mark.parametrize(("dim", "half"), [(24, 12), (40, 20), (72, 32), (100, 0), (320, 160), (512, 256)])
def test_other_heads_are_left_to_the_kernels_of_transformed_pages(dim: int, half: int) -> None:
    assert not operands_fit(dim, half)


def turned_codec(dim: int, half: int, bits: float) -> LayerCodec:
    """A layer whose heads' first 2 half numbers are turned."""
    whole = synthetic_codec(1 if dim > 128 else 2, dim, bits, DEVICE, "speed")
    frequencies = 0.5 ** np.arange(half) if half else None
    frame = BlockFrame(frequencies, block_tokens=256, page_tokens=16, sinks=4, device=DEVICE)
    assert frame.turns == (half > 0)
    whole.frame = frame
    return whole


@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 16), (96, 0), (256, 128), (24, 12)])
def test_attention_where_a_head_is_turned_in_whole_in_part_or_not_at_all(dim: int, half: int) -> None:
    kernels = LayerKernels(turned_codec(dim, half, 1.0))
    assert kernels.flat == operands_fit(dim, half) and frame_half(kernels.codec) == half
    pages = block_pages(kernels.codec) + 1
    case = Case(kernels, 1, 116 + 16 * pages, 2, torch.float16)
    assert case.error() < TOLERANCE / 2
    if dim == 64:
        kernels.key_basis.neg_()
        assert case.error() > TOLERANCE, "they are what answers depend on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_answer(dtype: torch.dtype) -> None:
    kernels = LayerKernels(turned_codec(32, 16, 3.0))
    assert kernels.flat
    case = Case(kernels, 1, 116 + 20 * 16, 3, dtype)
    flat = case.run()
    kernels.read_tokens(False)
    assert not kernels.flat
    other = case.run()
    assert 0 < (flat - other).float().norm() / other.float().norm() < 4e-3


def test_the_matrix_is_the_basis_times_what_fields_stand_for() -> None:
    codec = synthetic_codec(2, 32, 3.0, DEVICE, "speed")
    tables = layer_tables(codec)
    unit = codec.units[codec.key_units[0]]
    assert unit.heads == (0, 2)
    found = operand_basis(unit.key_decode, [unit.heads], tables, 16).float().cpu()
    entry = torch.from_numpy(tables.entry[: int(tables.span[0, 1])])
    assert found.shape == (2, len(entry), 4 * lane_chunks(32, 16), 8, 4, 2, 2, 2)
    number = torch.from_numpy(_contracted(32, 16))
    keys = torch.nn.functional.pad(unit.key_decode.cpu(), (0, 32, 0, 1))  # a number that is none counts nothing
    for n, words in enumerate(entry):
        latent = int(words[0, 2]) // 32
        factor = words[:, :2].contiguous().view(torch.float16).float()
        for g, operand in np.ndindex(8, 2):
            quarter, k = g // 2, g % 2 + 2 * operand  # of a quarter's four latents: 0, 2, then 1, 3
            column = keys[:, :, latent + 4 * quarter + (0, 2, 1, 3)[k]] * factor[quarter, k]
            if words[0, 3] and k < 2:
                column = column - keys[:, :, latent + 4 * quarter + (1, 3)[k]] * factor[quarter, k + 2]
            expected = column[:, number]
            assert torch.allclose(found[:, n, :, g, :, operand], expected, rtol=2e-3, atol=1e-6)


def test_programs_share_entries_only_where_they_are_few() -> None:
    assert shares_of(8, 19) == 19 and shares_of(64, 19) == 4 and shares_of(1000, 19) == 1
    assert shares_of(64, 19, 64) == 4 and shares_of(64, 19, 256) == 2, "beside as many others half of them fill a GPU"

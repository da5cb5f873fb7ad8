from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.shapes import LayerShape
from spectral.windows import QuantizedWindow, make_window, scale_group, slot_nbytes

SHAPE = LayerShape(2, 24, 8)


@given(st.sampled_from([8, 10]), st.floats(1e-4, 1e3), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_numbers_come_back_within_half_a_step(bits: int, size: float, seed: int) -> None:
    window = make_window(SHAPE, 4, 16, torch.float32, torch.device("cpu"), bits)
    window.resize(3)
    tokens = torch.randn(9, 2, 32, generator=torch.Generator().manual_seed(seed)) * size
    place = torch.tensor([0, 3, 4, 5, 9, 10, 11, 18, 19])
    slot = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    window.write(slot, place, tokens)
    back = window.read(torch.tensor([0, 1, 2]))[slot, :, place]
    assert torch.equal(back[:2], tokens[:2])  # sinks are exact
    step = tokens.unflatten(-1, (-1, 8)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    wrong = (back - tokens).unflatten(-1, (-1, 8)).abs()[2:]
    assert (wrong <= 0.502 * step[2:] + 1e-6 + 3.1e-5).all()
    assert torch.equal(back[2:], window.as_kept(tokens)[2:])
    read = window.read_places(slot, place[:, None])[:, :, 0]
    assert torch.equal(read, back)


@pytest.mark.parametrize("bits", [8, 10, 16])
@pytest.mark.parametrize("shape", [SHAPE, LayerShape(3, 80, 80), LayerShape(1, 128, 64)])
def test_bytes_are_counted_as_allocated(shape: LayerShape, bits: int) -> None:
    window = make_window(shape, 4, 32, torch.bfloat16, torch.device("cpu"), bits)
    expected = slot_nbytes(shape, 4, 32, bits)
    assert window.slot_nbytes == expected
    window.resize(5)
    assert window.slot_nbytes == expected
    assert window.nbytes == 5 * expected == sum(t.numel() * t.element_size() for t in window.tensors())


def test_resizing_keeps_the_first_slots() -> None:
    window = QuantizedWindow(SHAPE, 1, 8, torch.float32, torch.device("cpu"), 10)
    window.resize(2)
    window.write(1, torch.arange(9), torch.randn(9, 2, 32))
    before = window.read(torch.tensor([1]))
    window.resize(4)
    assert torch.equal(window.read(torch.tensor([1])), before)
    window.resize(2)
    assert torch.equal(window.read(torch.tensor([1])), before)


def test_scales_and_bits() -> None:
    assert [scale_group(*dims) for dims in ((128, 128), (80, 80), (24, 8), (96, 64))] == [32, 20, 8, 32]
    with pytest.raises(ValueError, match="8 or 10"):
        make_window(SHAPE, 0, 8, torch.float32, torch.device("cpu"), 4)

"""Attention over the exact window by products of 16-bit numbers, against those of 32."""

from __future__ import annotations

import pytest
import torch

from spectral.kernels import recent_attention
from spectral.kernels.choices import DecodeChoices
from spectral.kernels.decode import StepTables
from spectral.shapes import LayerShape
from spectral.windows import WindowGroup, make_window

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("bits", "cap"), [(16, 0.0), (8, 0.0), (8, 20.0)])
@pytest.mark.parametrize("first", [False, True] if DEVICE.type == "cuda" else [False])  # what an interpreter has not
def test_numbers_of_16_bits_are_multiplied_as_exactly(
    bits: int, cap: float, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows, the third one the second one's next token in a chunk; weights of sinks would show a rounding."""
    rng = torch.Generator(DEVICE).manual_seed(bits)
    window = make_window(LayerShape(2, 32, 16), 4, 24, torch.float16, DEVICE, bits)
    WindowGroup([window]).resize(2)
    places = torch.arange(28, device=DEVICE)
    for slot in range(2):
        window.write(slot, places, torch.randn(28, 2, 48, generator=rng, device=DEVICE))
    step = StepTables(
        column(0, 0, 0)[:, None], column(0, 0, 0), column(0, 1, 1), column(21, 60, 60), column(4, 44, 44),
        column(0, 0, 1),
    )  # fmt: skip
    query, key, value = (
        torch.randn(3, heads, size, generator=rng, device=DEVICE).half() for heads, size in ((6, 32), (2, 32), (2, 16))
    )
    found = []
    for short in (True, False):
        monkeypatch.setattr(recent_attention, "_short", lambda query, window, kind=short: kind)
        top = torch.zeros(3, 6, 1, device=DEVICE)
        total, mixed = torch.zeros_like(top), torch.zeros(3, 6, 1, 16, device=DEVICE)
        recent_attention.read_window(
            DecodeChoices(), window, step, query, key, value, 0.3, cap, top, total, mixed, first=first
        )
        found.append((top, total, mixed / total[..., None]))
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours, wanted, rtol=2e-5, atol=2e-5)
    assert (found[0][1] > 1).all()


def test_which_numbers_are_multiplied_as_they_are() -> None:
    shape = LayerShape(1, 16, 16)
    kinds = {torch.float16: True, torch.bfloat16: DEVICE.type == "cuda", torch.float32: False}
    for kind, short in kinds.items():
        window = make_window(shape, 0, 8, kind, DEVICE)
        query = torch.zeros(1, 1, 16, dtype=kind, device=DEVICE)
        assert recent_attention._short(query, window) is short
        assert not recent_attention._short(query.double(), window)

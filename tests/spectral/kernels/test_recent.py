"""The window's kernels in Triton's interpreter (or on a GPU) against torch: the same bits."""

from __future__ import annotations

import pytest
import torch

from spectral.kernels.recent import read_recent, served, write_recent
from spectral.shapes import LayerShape
from spectral.windows import QuantizedWindow, WindowGroup, make_window

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def window_of(heads: int, dim: int, value_dim: int, bits: int, sinks: int, slots: int = 3) -> QuantizedWindow:
    window = make_window(LayerShape(heads, dim, value_dim), sinks, 24, torch.bfloat16, DEVICE, bits)
    WindowGroup([window]).resize(slots)
    assert isinstance(window, QuantizedWindow) and served(window)
    return window


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim", "sinks", "count"), [(2, 32, 32, 4, 11), (1, 40, 24, 0, 1), (3, 64, 64, 2, 8)]
)
def test_tokens_go_in_and_out_as_in_torch(
    heads: int, dim: int, value_dim: int, sinks: int, count: int, bits: int
) -> None:
    """Strided keys, numbers of very different size, zeros, ties; places in any order."""
    rng = torch.Generator(DEVICE).manual_seed(count)
    ours, theirs = (window_of(heads, dim, value_dim, bits, sinks) for _ in range(2))
    kept = torch.randn(sinks, heads, dim + value_dim, device=DEVICE, generator=rng)
    keys = torch.randn(count + 5, heads, dim, device=DEVICE, generator=rng).bfloat16().transpose(0, 1)
    values = torch.randn(heads, count + 5, value_dim, device=DEVICE, generator=rng).bfloat16()
    values[:, 2] = 0.0
    values[0, 0, :4] = 3e4
    source = torch.randperm(count + 5, device=DEVICE, generator=rng)[:count]
    place = sinks + torch.randperm(24, device=DEVICE, generator=rng)[:count]
    slot = torch.tensor([1], device=DEVICE)
    for window in (ours, theirs):
        if sinks:
            window.write(1, torch.arange(sinks, device=DEVICE), kept)
    write_recent(ours, slot, place, source, keys, values)
    tokens = torch.cat([x.index_select(1, source) for x in (keys, values)], -1).transpose(0, 1)
    theirs.write(1, place, tokens)
    for name, got, wanted in zip(ours.names, ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(got, wanted), name
    places = torch.cat([torch.arange(sinks, device=DEVICE), place])
    assert torch.equal(read_recent(ours, slot, places), theirs.read_places(slot, places[None])[0])
    assert read_recent(ours, slot, places[:0]).shape == (heads, 0, dim + value_dim)
    slots = torch.arange(len(places), device=DEVICE) % 3  # each of its own slot
    assert torch.equal(
        read_recent(ours, slots, places), theirs.read_places(slots, places[:, None])[:, :, 0].transpose(0, 1)
    )


def test_wrong_tensors_are_refused_by_name() -> None:
    window = window_of(1, 16, 16, 8, 0)
    slot, place = torch.tensor([0], device=DEVICE), torch.arange(2, device=DEVICE)
    key = torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="place must be contiguous int64"):
        read_recent(window, slot, place.int())
    with pytest.raises(ValueError, match="slot must be one"):
        read_recent(window, place, torch.arange(3, device=DEVICE))
    with pytest.raises(ValueError, match="source must be contiguous int64"):
        write_recent(window, slot, place, place[:1], key, key)
    with pytest.raises(ValueError, match=r"value must be floating point \[1, 2, 16\]"):
        write_recent(window, slot, place, place, key, key[..., :8])
    assert not served(make_window(LayerShape(1, 16, 16), 0, 8, torch.bfloat16, DEVICE))


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(("heads", "dim", "value_dim", "sinks"), [(2, 32, 32, 4), (1, 40, 24, 0), (3, 64, 32, 2)])
def test_a_steps_tokens_go_into_all_layers_as_in_torch(
    heads: int, dim: int, value_dim: int, sinks: int, bits: int
) -> None:
    """Rows in any order of slots, one of them twice (as spare rows do), in some layers of a group."""
    rng = torch.Generator(DEVICE).manual_seed(bits)
    groups = []
    for _ in range(2):
        shape = LayerShape(heads, dim, value_dim)
        windows = [make_window(shape, sinks, 24, torch.bfloat16, DEVICE, bits) for _ in range(4)]
        groups.append(WindowGroup(windows))
        groups[-1].resize(5)
    slot = torch.tensor([3, 0, 4, 3], device=DEVICE)
    place = torch.tensor([sinks + 23, sinks, sinks + 7, sinks + 23], device=DEVICE)
    tokens = torch.randn(3, 4, heads, dim + value_dim, device=DEVICE, generator=rng).bfloat16()
    tokens[:, 3] = tokens[:, 0]
    tokens[0, 1] = 0.0
    tokens[1, 2, :, :4] = 3e4
    groups[0].write(1, slot, place, tokens, recent=True, kernels=True)
    groups[1].write(1, slot, place, tokens, recent=True)
    for ours, theirs in zip(groups[0].windows, groups[1].windows, strict=True):
        for name, got, wanted in zip(ours.names, ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(got, wanted), name
    assert groups[0].windows[1].tensors()[1].any(), "something was written"
    assert not groups[0].windows[0].tensors()[1].any(), "layers before the first one stay as they were"


def test_a_steps_wrong_tensors_are_refused_by_name() -> None:
    group = WindowGroup([make_window(LayerShape(1, 16, 16), 0, 8, torch.bfloat16, DEVICE, 8)])
    group.resize(2)
    slot, place = torch.tensor([0], device=DEVICE), torch.tensor([1], device=DEVICE)
    tokens = torch.zeros(1, 1, 1, 32, device=DEVICE)
    for name, args in (("slot", (slot.int(), place)), ("place", (slot, place[None]))):
        with pytest.raises(ValueError, match=f"{name} must be contiguous int64"):
            group.write(0, *args, tokens, recent=True, kernels=True)
    with pytest.raises(ValueError, match=r"tokens must be floating point \[layers, 1, 1, 32\]"):
        group.write(0, slot, place, tokens[..., :16], recent=True, kernels=True)

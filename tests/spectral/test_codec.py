from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.basis import Unit
from spectral.bits import WIDTHS, fit_tables, frequency_classes, gaussian_step, gaussian_tables
from spectral.codec import ExactCodec, LayerCodec
from spectral.errors import SettingError
from spectral.frames import BlockFrame
from spectral.unit_codec import byte_fields, pack_fields
from tests.spectral.helpers import cycling_widths, random_codec, random_unit

ALL = [8, 6, 4, 3, 2, 1, 0]


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.integers(0, 99))
def test_packing_fields_loses_nothing(bits: int, count: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, size=(3, 8 * count)).astype(np.uint8))
    packed = pack_fields(values, bits)
    assert packed.shape == (3, count * bits)
    assert (byte_fields(bits)[packed.numpy()].reshape(3, -1) == values.numpy()).all()


@given(st.permutations(list(WIDTHS)), st.sampled_from([8, 16]), st.booleans(), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_levels_come_back_from_their_codes(widths: list[int], page: int, flat: bool, seed: int) -> None:
    """Coefficients that are levels already survive packing exactly, whatever the mix of widths."""
    unit = random_codec(2, 16, widths, page=page, flat=flat).units[0]
    tables, rng = gaussian_tables(), np.random.default_rng(seed)
    y = torch.zeros(3, page * unit.rank)
    for width in widths:
        place = np.flatnonzero(unit.layout.row_widths.ravel() == width)
        if not width or not place.size:
            continue
        y[:, place] = torch.tensor(rng.choice(tables[width].levels, size=(3, place.size)), dtype=torch.float32)
    packed = unit.quantize(y.view(3, page, unit.rank))
    assert packed.shape == (3, unit.layout.nbytes)
    torch.testing.assert_close(unit.levels(packed).flatten(1), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("units", "apart", "flat"),
    [(1, False, False), (2, False, False), (1, True, False), (2, True, False), (1, False, True), (2, True, True)],
)
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("widths", [ALL, [2, 1, 0, 0], [4], [0]])
def test_attention_on_codes_equals_attention_on_what_they_decode_to(
    widths: list[int], block: int, units: int, apart: bool, flat: bool
) -> None:
    heads, dim, page, groups, count = 2, 16, 16, 3, 5
    codec = random_codec(heads, dim, widths, page=page, block=block, units=units, apart=apart, flat=flat)
    keys, values = torch.randn(2 * count, heads, page, dim), torch.randn(2 * count, heads, page, dim)
    index = torch.arange(count).repeat(2)
    pages = codec.encode(keys, values, index)
    assert pages.dtype == torch.uint8
    assert pages.shape == (2 * count, codec.page_nbytes)
    dense = [
        x.view(2, count, heads, page, dim).transpose(1, 2).reshape(2, heads, -1, dim)
        for x in codec.decode(pages, index)
    ]
    query = torch.randn(2, heads, groups, dim)
    opened = codec.open(pages.view(2, count, -1))
    torch.testing.assert_close(opened.scores(query), query @ dense[0].transpose(2, 3), rtol=1e-4, atol=2e-3)
    weight = torch.rand(2, heads, groups, count * page)
    torch.testing.assert_close(opened.mix(weight), weight @ dense[1], rtol=1e-4, atol=2e-3)


def joined(key: Unit, value: Unit) -> Unit:
    """Keys and values of the same heads in one unit whose latents are those of the two: its basis has two blocks."""
    sizes = key.mean.size, value.mean.size
    decode, encode = (np.zeros((sum(sizes), sum(sizes))) for _ in range(2))
    for whole, name in ((decode, "decode"), (encode, "encode")):
        whole[: sizes[0], : sizes[0]], whole[sizes[0] :, sizes[0] :] = getattr(key, name), getattr(value, name)
    mean, variance, deviation = (
        np.concatenate([getattr(unit, name) for unit in (key, value)], -1) for name in ("mean", "variance", "deviation")
    )
    return Unit(key.heads, mean, decode, encode, variance, deviation)


def typical(unit: Unit, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of a unit, [*shape, D] float32, with the deviations that it expects."""
    latents = torch.randn(*shape, unit.variance.size) * float(unit.deviation.mean())
    return latents @ torch.from_numpy(unit.decode.T).float() + torch.from_numpy(unit.mean).float()


@pytest.mark.parametrize("mixed", [False, True])
def test_units_of_one_side_are_units_of_both_with_two_blocks(mixed: bool) -> None:
    """The same latents at the same widths: pages open, decode and squeeze to the same numbers, wherever a unit's bytes
    lie. `mixed`: units of keys and of values take turns; else all keys come first."""
    torch.manual_seed(0)
    heads, dim, page, count = 4, 16, 16, 6
    spans, classes = [(0, 2), (2, 4)], len(frequency_classes(page))
    rng = np.random.default_rng(4)
    both, sides = [], []
    for number, span in enumerate(spans):
        pair = [random_unit(span, dim, 7 * number + i, page, side) for i, side in enumerate(("key", "value"))]
        sides.append(pair)
        both.append(joined(*pair))

    def codecs(among: list[int]) -> list[LayerCodec]:
        """The two forms, with widths [classes, 32] for each side of each run of heads."""
        widths = [[rng.choice(among, size=(classes, 2)).repeat(16, axis=1) for _ in range(2)] for _ in spans]
        apart = [(unit, w) for pair, ws in zip(sides, widths, strict=True) for unit, w in zip(pair, ws, strict=True)]
        if not mixed:
            apart.sort(key=lambda part: part[0].side)
        whole = [(unit, np.concatenate(ws, 1)) for unit, ws in zip(both, widths, strict=True)]
        frame = BlockFrame(0.5 ** np.arange(dim // 2), block_tokens=32, page_tokens=page, sinks=4)
        return [
            LayerCodec(parts, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page)
            for parts in (whole, apart)
        ]

    fine, coarse = codecs([8, 6, 4]), codecs([3, 2, 1, 0])
    assert fine[1].key_units == ([0, 2] if mixed else [0, 1]) and fine[1].value_units == ([1, 3] if mixed else [2, 3])
    index, query, weight = torch.arange(count), torch.randn(1, heads, 3, dim), torch.rand(1, heads, 3, count * page)
    keys, values = (
        torch.cat([typical(pair[side], (count, page)).unflatten(2, (2, dim)) for pair in sides], 2).transpose(1, 2)
        for side in (0, 1)
    )
    keys = fine[0].frame.keys(keys, index, back=True)
    pages = [codec.encode(keys, values, index) for codec in fine]
    squeezed = [codec.squeeze(x, new) for codec, x, new in zip(fine, pages, coarse, strict=True)]
    for found, of in ((pages, fine), (squeezed, coarse)):
        assert [x.shape for x in found] == [(count, codec.page_nbytes) for codec in of]
        for plain in (False, True):
            decoded = [codec.decode(x, index, plain=plain) for codec, x in zip(of, found, strict=True)]
            for expected, got in zip(*decoded, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        opened = [codec.open(x[None]) for codec, x in zip(of, found, strict=True)]
        torch.testing.assert_close(opened[1].scores(query), opened[0].scores(query), rtol=1e-4, atol=2e-3)
        torch.testing.assert_close(opened[1].mix(weight), opened[0].mix(weight), rtol=1e-4, atol=2e-3)
    for original, got in zip((keys, values), fine[1].decode(pages[1], index), strict=True):
        assert (got - original).norm() < 0.2 * original.norm()  # and they are those that went in


@pytest.mark.parametrize("flat", [False, True])
def test_error_falls_by_the_quantizers_law(flat: bool) -> None:
    """A latent of b bits has the error of `gaussian_step(b)` for Gaussian latents, in every class of rows."""
    heads, dim, page = 2, 8, 16
    unit = random_unit((0, heads), dim, 3, flat=flat)
    unit = type(unit)(unit.heads, unit.mean, unit.decode, unit.encode, unit.variance, np.ones_like(unit.deviation))
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(512 * page, 2 * heads * dim))
    x = torch.tensor(unit.mean + latents @ unit.decode.T, dtype=torch.float32).view(512, page, -1)
    frame = BlockFrame(None, block_tokens=0, page_tokens=page, sinks=0)
    sides = [s.unflatten(2, (heads, dim)).transpose(1, 2) for s in x.split(heads * dim, 2)]
    for bits in (2, 4):
        widths = np.full(unit.deviation.shape, bits)
        codec = LayerCodec([(unit, widths)], gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page)
        index = torch.zeros(512, dtype=torch.long)
        back = codec.decode(codec.encode(sides[0], sides[1], index), index, plain=True)
        joined = torch.cat([s.transpose(1, 2).flatten(2) for s in back], 2).flatten(0, 1).double().numpy()
        error = ((joined - unit.mean) @ unit.encode - latents) ** 2
        assert error.mean(0) == pytest.approx(np.full(latents.shape[1], gaussian_step(bits)[1]), rel=0.15)


@pytest.mark.parametrize("flat", [False, True])
def test_squeezing_is_nearly_encoding_at_the_coarser_setting(flat: bool) -> None:
    """Codes map to codes: what a squeeze loses is little more than what encoding at the coarser setting loses."""
    heads, dim, page, count = 2, 16, 16, 64
    unit = random_unit((0, heads), dim, 5, flat=flat)
    frame = BlockFrame(0.5 ** np.arange(dim // 2), block_tokens=64, page_tokens=page, sinks=4)
    tables = fit_tables(np.random.default_rng(0).normal(size=20_000))

    def codec(widths: list[int]) -> LayerCodec:
        parts = [(unit, cycling_widths(widths, 2 * heads * dim, page, flat))]
        return LayerCodec(parts, tables, frame, key_dim=dim, value_dim=dim, page_tokens=page)

    y = torch.randn(count, page, 64, generator=torch.Generator().manual_seed(0))
    for fine, coarse in (([8], [4]), ([6], [3]), ([4], [2]), ([3], [2]), ([2], [1]), ([4], [0]), ([3], [3])):
        a, b = codec(fine), codec(coarse)
        packed = a.units[0].quantize(y)
        twice = b.units[0].levels(a.squeeze(packed, b)) if coarse != [0] else torch.zeros_like(y)
        direct = b.units[0].levels(b.units[0].quantize(y)) if coarse != [0] else torch.zeros_like(y)
        errors = [float((x - y).square().mean()) for x in (twice, direct)]
        assert errors[0] <= 1.25 * errors[1], (fine, coarse, errors)
        if fine == coarse:
            assert torch.equal(a.squeeze(packed, b), packed)


def test_exact_codec_returns_what_it_was_given() -> None:
    codec = ExactCodec(kv_heads=2, key_dim=8, value_dim=4, page_tokens=16, dtype=torch.float32)
    keys, values = torch.randn(3, 2, 16, 8), torch.randn(3, 2, 16, 4)
    index = torch.arange(3)
    pages = codec.encode(keys, values, index)
    assert pages.shape == (3, codec.page_nbytes)
    assert torch.equal(codec.decode(pages, index)[0], keys)
    assert torch.equal(codec.decode(pages, index)[1], values)


def test_codec_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(SettingError, match="power of two"):
        LayerCodec(
            [], {}, BlockFrame(None, block_tokens=0, page_tokens=8, sinks=0), key_dim=8, value_dim=8, page_tokens=12
        )
    units = [(random_unit((1, 2), 16, 0), np.zeros((5, 32), dtype=np.uint8))]
    with pytest.raises(SettingError, match="in order"):
        LayerCodec(
            units,
            gaussian_tables(),
            BlockFrame(None, block_tokens=0, page_tokens=16, sinks=0),
            key_dim=16,
            value_dim=16,
            page_tokens=16,
        )


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([((1, 2), "key"), ((0, 2), "value")], "keys do not cover"),
        ([((0, 2), "value")], "keys do not cover"),
        ([((0, 1), "key"), ((0, 2), "value")], "keys of 1 heads and values of 2"),
        ([((0, 2), "key"), ((0, 1), "value")], "keys of 2 heads and values of 1"),
        ([((1, 2), "key"), ((0, 1), "key"), ((0, 2), "value")], "keys do not cover"),
        ([((0, 2), "key"), ((0, 1), "value"), ((0, 1), "value")], "values do not cover"),
        ([((0, 2), "both"), ((0, 2), "value")], "values do not cover"),
        ([((0, 1), "both"), ((1, 2), "key")], "keys of 2 heads and values of 1"),
    ],
)
def test_units_that_do_not_cover_both_sides_are_refused(held: list[tuple[tuple[int, int], str]], message: str) -> None:
    units = [random_unit(heads, 16, number, 16, side) for number, (heads, side) in enumerate(held)]
    parts = [(unit, cycling_widths([4], unit.variance.size, 16)) for unit in units]
    frame = BlockFrame(None, block_tokens=0, page_tokens=16, sinks=0)
    with pytest.raises(SettingError, match=message):
        LayerCodec(parts, gaussian_tables(), frame, key_dim=16, value_dim=16, page_tokens=16)

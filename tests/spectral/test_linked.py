"""The smaller cold form: pages coded by what the layers below say about them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.archive import archive_pages
from spectral.bits import WIDTHS, gaussian_tables
from spectral.codec import Codebook
from spectral.errors import CacheError, SessionError
from spectral.link_fit import fit_links, load_links, save_links
from spectral.linked import BINS, Chain, LayerLinks, Links, predicted_bins, unpacked_codes
from tests.spectral.cold_helpers import any_pages, layer_codec

WIDE = np.array([[8, 6], [6, 4], [4, 3], [3, 2], [2, 1]])


def book_of(tables: list[np.ndarray | None], *, units: int = 1, apart: bool = False) -> Codebook:
    layers = [None if t is None else layer_codec(t, units=units, seed=i, apart=apart) for i, t in enumerate(tables)]
    return Codebook("test", "hash", 4, 16, 16, layers)


def coupled_pages(book: Codebook, count: int, seed: int = 0) -> list[torch.Tensor | None]:
    """Pages of layers that all see the same coefficients, each with some noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    out, common = [], {}
    for codec in book.layers:
        if codec is None:
            out.append(None)
            continue
        parts = []
        for number, unit in enumerate(codec.units):
            shape = (count, unit.page_tokens, unit.rank)
            base = common.setdefault((number, unit.rank), torch.randn(shape, generator=generator))
            parts.append(unit.quantize(0.9 * base + 0.4 * torch.randn(shape, generator=generator)))
        out.append(torch.cat(parts, 1))
    return out


def through(book: Codebook, links: Links, pages: list[torch.Tensor | None]) -> int:
    """Assert that pages come back; returns the archive's bytes."""
    writer, reader, total = Chain(book, links), Chain(book, links), 0
    for index, layer in enumerate(pages):
        if layer is not None:
            data = writer.archive(index, layer)
            total += len(data)
            assert torch.equal(reader.restore(index, data), layer)
    return total


@given(
    st.lists(st.lists(st.sampled_from(WIDTHS), min_size=10, max_size=10), min_size=2, max_size=4),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([1, 5]),
    st.sampled_from([0, 1, 3, 130]),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_any_pages_of_any_widths_come_back(
    widths: list[list[int]], units: int, apart: bool, classes: int, count: int, seed: int
) -> None:
    """Also pages that no encoder would have written, and predictors that predict nothing of them."""
    book = book_of([np.array(w).reshape(5, 2)[:classes] for w in widths], units=units, apart=apart)
    links = fit_links(book, coupled_pages(book, 20))
    pages = [any_pages(codec, count, seed + i) for i, codec in enumerate(book.layers)]
    assert through(book, links, pages) > 0


@pytest.mark.parametrize("widths", [WIDE, WIDE[1:2]])
def test_layers_that_say_the_same_are_stored_smaller(widths: np.ndarray) -> None:
    book = book_of([widths, None, widths, widths], units=2)
    links = fit_links(book, coupled_pages(book, 300))
    pages = coupled_pages(book, 200, seed=1)
    plain = sum(len(archive_pages(p, c)) for p, c in zip(pages, book.layers, strict=True) if p is not None)
    assert through(book, links, pages) < 0.9 * plain


def test_unpacked_codes_are_the_quantizers() -> None:
    codec = layer_codec(WIDE)
    unit = codec.units[0]
    packed = coupled_pages(book_of([WIDE]), 5)[0]
    level = unit.levels(packed).flatten(1)
    for width, place in unit.width_places.items():
        codes = unpacked_codes(unit, packed, width)
        assert codes.long().max() < 2**width
        again = torch.bucketize(level[:, place], torch.tensor(gaussian_tables()[width].cuts, dtype=torch.float32))
        assert torch.equal(codes.long(), again)


def test_predictions_are_exact_whatever_the_order_of_summation() -> None:
    """At the largest sums that links may have: float32 gives what int64 gives."""
    rng = torch.Generator().manual_seed(0)
    below = torch.full((4, 16, 700), 255, dtype=torch.int16)
    below[1:] = torch.randint(-255, 256, (3, 16, 700), generator=rng).to(torch.int16)
    weight = torch.randint(60, 94, (700, 32), generator=rng).to(torch.int8)
    gain = torch.rand((5, 32), generator=rng) * 1e-5
    Links("p", "s", [LayerLinks(weight, gain)], {})  # not refused: 700 * 93 * 255 is just below 2^24
    total = below.flatten(0, 1).long() @ weight.long()
    counts = torch.tensor([1, 1, 2, 4, 8])
    steps = (total.view(4, 16, 32).float() * gain.repeat_interleave(counts, 0)).round().clamp(-15, 15) + 15
    assert torch.equal(predicted_bins(LayerLinks(weight, gain), below).float(), steps)
    with pytest.raises(SessionError, match="not be exact"):
        Links("p", "s", [LayerLinks(torch.full((700, 32), 127, dtype=torch.int8), gain)], {})


def test_damaged_and_forged_blobs_are_refused() -> None:
    book = book_of([WIDE, WIDE])
    links = fit_links(book, coupled_pages(book, 50))
    pages = coupled_pages(book, 9, seed=1)
    writer = Chain(book, links)
    blobs = [writer.archive(i, p) for i, p in enumerate(pages)]
    for at in range(0, 8 * len(blobs[1]), 61):
        bad = bytearray(blobs[1])
        bad[at // 8] ^= 1 << (at % 8)
        reader = Chain(book, links)
        reader.restore(0, blobs[0])
        with pytest.raises(SessionError):
            reader.restore(1, bytes(bad))
        # With a right checksum: pages of the right shape or a SessionError.
        bad[-16:] = hashlib.blake2b(bad[:-16], digest_size=16).digest()
        with contextlib.suppress(SessionError):
            assert reader.restore(1, bytes(bad)).shape == pages[1].shape
    reader = Chain(book, links)
    reader.restore(0, archive_pages(pages[0][:5], book.layers[0]))
    with pytest.raises(SessionError, match="different numbers of pages"):
        reader.restore(1, blobs[1])
    other = dataclasses.replace(links, setting="test", layers=[None, dataclasses.replace(links.layers[1])])
    other.layers[1].gain = links.layers[1].gain * 0.5
    reader = Chain(book, other)
    reader.restore(0, blobs[0])
    with pytest.raises(SessionError, match="another page layout"):
        reader.restore(1, blobs[1])


def test_links_survive_their_file_and_nothing_else_does(tmp_path: Path) -> None:
    book = book_of([WIDE, None, WIDE])
    links = fit_links(book, coupled_pages(book, 50))
    path = save_links(links, tmp_path / "links.safetensors")
    back = load_links(path)
    assert back.digest == links.digest
    assert (back.profile_hash, back.setting) == ("hash", "test")
    assert [layer is None for layer in back.layers] == [True, True, False]
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack_from("<Q", data, 0)[0]
    bad = tmp_path / "bad"
    for at in [0, 9, start // 2, *range(start, len(data), 501)]:
        bad.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(SessionError):
            load_links(bad)
    bad.write_bytes(data[: len(data) // 2])
    with pytest.raises(SessionError):
        load_links(bad)


def test_links_are_for_one_setting_and_enough_text() -> None:
    book = book_of([WIDE, WIDE])
    links = fit_links(book, coupled_pages(book, 50))
    with pytest.raises(CacheError, match="fitted for setting 'test'"):
        Chain(dataclasses.replace(book, setting="other"), links)
    for other in (book_of([WIDE, WIDE], units=2), book_of([WIDE[:1], WIDE[:1]])):
        with pytest.raises(CacheError, match="do not fit"):
            Chain(other, links)
    with pytest.raises(CacheError, match="too few"):
        fit_links(book, coupled_pages(book, 1))
    with pytest.raises(SessionError, match="no permutations"):
        Links("p", "s", [], {2: torch.zeros((BINS, 4), dtype=torch.uint8)})

"""The cold form of pages: bit for bit back, and never wrong pages from damaged bytes."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.archive import (
    MAX_SHRINK,
    archive_pages,
    archive_tensor,
    page_streams,
    restore_pages,
    restore_tensor,
)
from spectral.bits import WIDTHS
from spectral.codec import ExactCodec, LayerCodec
from spectral.errors import SessionError
from tests.spectral.cold_helpers import any_pages, layer_codec

CLASSES = {8: 4, 16: 5}


@st.composite
def codecs(draw: st.DrawFn) -> LayerCodec:
    """Layers of one or two units with any widths; of pages that are transformed, and of others."""
    page = draw(st.sampled_from(sorted(CLASSES)))
    runs = 2
    count = runs * draw(st.sampled_from([1, CLASSES[page]]))
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=count, max_size=count))
    return layer_codec(np.array(widths).reshape(-1, runs), units=draw(st.integers(1, 2)), page=page)


def random_pages(codec: LayerCodec | ExactCodec, count: int, seed: int, spread: int = 255) -> torch.Tensor:
    if isinstance(codec, LayerCodec):
        return any_pages(codec, count, seed, spread)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, spread + 1, (count, codec.page_nbytes), generator=generator).to(torch.uint8)


def sealed(data: bytes) -> bytes:
    """A forger's blob: the checksum made right again."""
    return data[:-16] + hashlib.blake2b(data[:-16], digest_size=16).digest()


@given(codecs(), st.sampled_from([0, 1, 2, 7, 150]), st.integers(0, 99), st.sampled_from([0, 1, 15, 255]))
@settings(max_examples=60, deadline=None)
def test_pages_come_back_bit_for_bit(codec: LayerCodec, count: int, seed: int, spread: int) -> None:
    pages = random_pages(codec, count, seed, spread)
    back = restore_pages(archive_pages(pages, codec), codec)
    assert back.dtype == torch.uint8
    assert torch.equal(back, pages)


@given(codecs())
@settings(max_examples=40, deadline=None)
def test_streams_cover_every_byte_of_a_page_but_padding_once(codec: LayerCodec) -> None:
    covered = np.zeros(codec.page_nbytes, dtype=int)
    for stream in page_streams(codec):
        for part in stream:
            covered[part] += 1
    assert (covered <= 1).all()
    padding = any_pages(codec, 50, 0)[:, torch.from_numpy(covered == 0)]
    assert padding.shape[1] < 8 * len(codec.units) and not padding.any()


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_normal_coefficients_are_stored_in_little_more_than_their_entropy(width: int) -> None:
    """Three bits as well, though each of their planes alone is as good as random."""
    codec = layer_codec(np.full((5, 2), width))
    unit = codec.units[0]
    y = torch.randn((3000, 16, unit.rank), generator=torch.Generator().manual_seed(width))
    pages = unit.quantize(y)
    codes = unit.codes(pages).index_select(1, unit.width_places[width])
    share = codes.flatten().bincount(minlength=2**width).double() / codes.numel()
    entropy = float(-(share * share.clamp_min(1e-12).log2()).sum()) / width
    size = len(archive_pages(pages, codec)) / pages.numel()
    # Six bits in planes of four and two: what links the planes is lost.
    assert entropy - 0.001 < size < entropy + 0.01
    assert width == 2 or size < 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_pages_come_back_and_shrink(dtype: torch.dtype) -> None:
    codec = ExactCodec(kv_heads=2, key_dim=8, value_dim=8, page_tokens=16, dtype=dtype)
    pages = codec.encode(torch.randn(64, 2, 16, 8), torch.randn(64, 2, 16, 8), torch.arange(64))
    data = archive_pages(pages, codec)
    assert torch.equal(restore_pages(data, codec), pages)
    assert len(data) < 0.95 * pages.numel()  # a normal number's exponent holds less than its eight bits


@pytest.mark.parametrize("shape", [(0, 3), (1,), (2, 5, 32), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_tensors_come_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)
    data = archive_tensor(tensor)
    back = restore_tensor(data, torch.empty_like(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    with pytest.raises(SessionError):
        restore_tensor(data, torch.empty((*shape, 2), dtype=dtype))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_or_a_cut_is_an_error(data: st.DataObject) -> None:
    codec = layer_codec(np.array([[8, 4], [6, 3], [2, 2], [1, 0], [1, 0]]))
    blob = bytearray(archive_pages(random_pages(codec, 9, 0, 15), codec))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, 8 * len(blob) - 1))
        blob[at // 8] ^= 1 << (at % 8)
    else:
        blob = blob[: data.draw(st.integers(0, len(blob) - 1))]
    with pytest.raises(SessionError):
        restore_pages(bytes(blob), codec)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_forged_bytes_with_a_right_checksum_raise_nothing_else(data: st.DataObject) -> None:
    """Whoever writes the checksum can choose the pages, but only pages, or a SessionError, come out."""
    codec = layer_codec(np.array([[8, 4], [6, 3], [2, 2], [1, 0], [1, 0]]))
    blob = bytearray(archive_pages(random_pages(codec, 40, 0, 15), codec))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 17))] = data.draw(st.integers(0, 255))
    try:
        pages = restore_pages(sealed(bytes(blob)), codec)
    except SessionError:
        return
    assert pages.shape[1] == codec.page_nbytes


@pytest.mark.parametrize("count", [1000, 2**32, 2**40, 2**63])
def test_a_forged_count_allocates_little(count: int) -> None:
    codec = layer_codec(np.array([[8, 4], [6, 3], [2, 2], [1, 0], [1, 0]]))
    blob = bytearray(archive_pages(random_pages(codec, 40, 0, 15), codec))
    struct.pack_into("<Q", blob, 6, count)
    tracemalloc.start()
    with pytest.raises(SessionError):
        restore_pages(sealed(bytes(blob)), codec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * MAX_SHRINK * len(blob)


def test_another_layout_version_or_kind_is_refused_by_name() -> None:
    codec = layer_codec(np.array([[8, 4], [6, 3], [2, 2], [1, 0], [1, 0]]))
    blob = archive_pages(random_pages(codec, 3, 0), codec)
    for other in (np.array([[4, 8], [6, 3], [2, 2], [1, 0], [1, 0]]), np.zeros((5, 2), dtype=int)):
        with pytest.raises(SessionError, match="another page layout"):
            restore_pages(blob, layer_codec(other))
    newer = bytearray(blob)
    struct.pack_into("<H", newer, 4, 99)
    with pytest.raises(SessionError, match="version 99"):
        restore_pages(sealed(bytes(newer)), codec)
    with pytest.raises(SessionError, match="not an archive"):
        restore_pages(sealed(b"XXXX" + blob[4:]), codec)
    with pytest.raises(ValueError, match="pages must be"):
        archive_pages(torch.zeros((3, codec.page_nbytes + 1), dtype=torch.uint8), codec)

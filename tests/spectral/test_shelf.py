"""Tables of settings that were used come back bit for bit, and what nobody uses holds nothing on the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from spectral import shelf as shelves
from spectral.codec import Codebook, LayerCodec
from spectral.profile import SpectralProfile
from spectral.residency import storages_of
from spectral.resources import profile_path
from spectral.shelf import Shelf


@pytest.fixture(scope="module")
def profile() -> SpectralProfile:
    return SpectralProfile.load(profile_path("demo-7m"))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every storage is worth a copy, and only references count: nothing calls the garbage collector on a GPU either."""
    monkeypatch.setattr(shelves, "LEAST_BYTES", 1)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held(codecs: list[LayerCodec]) -> int:
    """Bytes of all storages that codecs reach."""
    return sum(storage.nbytes() for codec in codecs for storage in storages_of(codec, "cpu"))


def codecs_of(book: Codebook) -> list[LayerCodec]:
    return [codec for codec in book.layers if isinstance(codec, LayerCodec)]


def pages_of(book: Codebook) -> list[torch.Tensor]:
    """What every layer makes of the same keys and values, and what it reads from that."""
    out, page = [], torch.arange(3)
    for codec in codecs_of(book):
        rng = torch.Generator().manual_seed(4)
        sizes = [(3, codec.kv_heads, codec.page_tokens, dim) for dim in (codec.key_dim, codec.value_dim)]
        keys, values = (torch.randn(*size, generator=rng) for size in sizes)
        out.append(codec.encode(keys, values, page))
        out += codec.decode(out[-1], page)
    return out


def keep_all(shelf: Shelf, *settings: str) -> None:
    for setting in settings:
        list(shelf.keep(setting))


def test_a_setting_rests_with_its_last_user_and_comes_back_as_it_was(profile: SpectralProfile) -> None:
    shelf, book = Shelf("cpu"), profile.codebook("8x")
    shelf.adopt(book)
    expected, whole = pages_of(book), held(codecs_of(book))
    keep_all(shelf, "8x")
    codecs, another = codecs_of(book), [book]
    assert shelf.known() == ["8x"] and shelf.nbytes >= whole > 0
    del book
    assert held(codecs) == whole, "a setting in use must keep its tables"
    another.clear()
    assert held(codecs) == 0
    found = shelf.find("8x")
    assert found is not None and codecs_of(found) == codecs and held(codecs) == whole
    assert shelf.find("8x") is found, "two users share one setting's tables"
    assert all(torch.equal(a, b) for a, b in zip(pages_of(found), expected, strict=True))
    del found
    assert held(codecs) == 0


def test_what_was_not_copied_in_time_is_forgotten_at_once(profile: SpectralProfile) -> None:
    shelf, book = Shelf("cpu"), profile.codebook("8x")
    shelf.adopt(book)
    copying = shelf.keep("8x")
    next(copying)
    gone = [weakref.ref(codec) for codec in codecs_of(book)]
    del book
    assert not any(ref() for ref in gone) and shelf.find("8x") is None
    assert list(copying) == [] and shelf.known() == [] and shelf.nbytes == 0


def test_what_is_made_later_is_copied_when_the_setting_is_kept_again(profile: SpectralProfile) -> None:
    shelf, book = Shelf("cpu"), profile.codebook("8x")
    shelf.adopt(book)
    keep_all(shelf, "8x")
    before = held(codecs_of(book))
    expected = pages_of(book)  # the reference makes tables of its own when it is first asked
    assert held(codecs_of(book)) > before
    keep_all(shelf, "8x")
    codecs = codecs_of(book)
    del book
    assert held(codecs) == 0
    found = shelf.find("8x")
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(pages_of(found), expected, strict=True))


def test_host_memory_is_bounded_and_the_setting_used_longest_ago_goes(
    profile: SpectralProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelves, "PIECE", 1 << 12)
    books = {name: profile.codebook(name) for name in ("4x", "8x", "16x")}
    everything = Shelf("cpu")
    for name, book in books.items():
        everything.adopt(book)
        keep_all(everything, name)
    most = everything.nbytes - (1 << 12)
    shelf = Shelf("cpu", max_bytes=most)
    for book in books.values():
        shelf.adopt(book)
    keep_all(shelf, "4x", "8x")
    assert shelf.find("4x") is books["4x"] and shelf.known() == ["8x", "4x"]
    keep_all(shelf, "16x")
    assert shelf.known() == ["16x", "4x"] and 0 < shelf.nbytes <= most
    small = Shelf("cpu", max_bytes=1 << 13)
    small.adopt(books["4x"])
    keep_all(small, "4x")
    assert small.known() == [] and small.nbytes == 0


def test_a_failure_to_come_back_leaves_it_at_rest(profile: SpectralProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, book = Shelf("cpu"), profile.codebook("8x")
    shelf.adopt(book)
    expected = pages_of(book)
    keep_all(shelf, "8x")
    codecs = codecs_of(book)
    del book
    real, calls = shelves.bytes_of, []

    def short(storage: torch.UntypedStorage) -> torch.Tensor:
        calls.append(storage)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory for the fifth")
        return real(storage)

    with monkeypatch.context() as patch:
        patch.setattr(shelves, "bytes_of", short)
        with pytest.raises(torch.OutOfMemoryError):
            shelf.find("8x")
    calls.clear()
    assert held(codecs) == 0
    found = shelf.find("8x")
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(pages_of(found), expected, strict=True))


def test_whoever_moves_storages_has_them_for_himself(profile: SpectralProfile) -> None:
    shelf, books = Shelf("cpu"), {name: profile.codebook(name) for name in ("4x", "8x")}
    for name, book in books.items():
        shelf.adopt(book)
        keep_all(shelf, name)
    codecs = [codecs_of(books[name]) for name in ("4x", "8x")]
    del books["4x"], book
    shelf.clear()
    assert shelf.known() == [] and shelf.nbytes == 0 and shelf.find("4x") is None
    size = held(codecs[1])
    del books["8x"]
    assert held(codecs[1]) == size, "after `clear` nothing of a setting may be touched"


def test_settings_that_share_a_storage_are_let_alone(profile: SpectralProfile) -> None:
    shelf, first, second = Shelf("cpu"), profile.codebook("4x"), profile.codebook("8x")
    codecs_of(second)[0].units[0].mean = codecs_of(first)[0].units[0].mean
    for book in (first, second):
        shelf.adopt(book)
    keep_all(shelf, "4x", "8x")
    expected = pages_of(second)
    del first, book
    assert all(torch.equal(a, b) for a, b in zip(pages_of(second), expected, strict=True))

"""Pools that are made anew: packed, squeezed and grown, and what happens where the device has no memory for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral import pools as module
from spectral.pools import Pools, grow, remake, squeeze_fill
from spectral.profile import SpectralProfile
from spectral.resources import profile_path


def random_pools(pages: int, *sizes: int) -> Pools:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (pages, size), dtype=torch.uint8, generator=rng) if size else None for size in sizes]


def copy(_: int, pages: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(pages)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, *, largest: int) -> list[int]:
    """From now on no tensor of more bytes can be had; the list gets the sizes that were refused."""
    plain, refused = module.empty_pool, []

    def empty(capacity: int, nbytes: int, device: torch.device) -> torch.Tensor:
        if capacity * nbytes > largest:
            refused.append(capacity * nbytes)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(capacity, nbytes, device)

    monkeypatch.setattr(module, "empty_pool", empty)
    return refused


@pytest.mark.parametrize("kept", [None, [0, 1, 2, 150, 299], list(range(1, 300, 2))])
def test_pages_are_the_same_whether_there_is_memory_for_new_pools_or_not(
    kept: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = None if kept is None else torch.tensor(kept)
    before = random_pools(300, 24, 0, 40)
    plain = [None if pool is None else pool.clone() for pool in before]
    remake(plain, index, [24, 0, 40], copy)
    refused = short_of_memory(monkeypatch, largest=64 * 40)
    tight = [None if pool is None else pool.clone() for pool in before]
    remake(tight, index, [24, 0, 40], copy)
    for old, a, b in zip(before, plain, tight, strict=True):
        if old is not None:
            wanted = old if index is None else old[index]
            assert torch.equal(a, wanted) and torch.equal(b, wanted)  # type: ignore[arg-type]
    assert bool(refused) == (kept is None or len(kept) > 64)


def test_a_squeeze_without_memory_for_new_pools_rewrites_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    path = profile_path("demo-7m")
    assert path is not None
    profile = SpectralProfile.load(path)
    fine, coarse = profile.codebook("4x"), profile.codebook("12x")
    sizes = [codec.page_nbytes for codec in coarse.layers if codec is not None]
    before = random_pools(90, *(codec.page_nbytes for codec in fine.layers if codec is not None))
    kept = torch.arange(0, 90, 1)[5:]
    plain = [pool.clone() for pool in before if pool is not None]
    remake(plain, kept, sizes, squeeze_fill(fine.layers, coarse.layers))
    refused = short_of_memory(monkeypatch, largest=64 * max(sizes))
    tight = [pool.clone() for pool in before if pool is not None]
    remake(tight, kept, sizes, squeeze_fill(fine.layers, coarse.layers))
    assert refused
    for a, b in zip(plain, tight, strict=True):
        assert torch.equal(a, b) and a.shape[0] == 85
    assert any(int(pool.max()) > 0 for pool in plain)


def test_pages_that_would_grow_need_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = random_pools(100, 16)
    short_of_memory(monkeypatch, largest=64 * 16)
    with pytest.raises(torch.OutOfMemoryError, match="memory of their own"):
        remake(pools, None, [24], lambda _, pages, out: None)
    assert pools[0] is not None and pools[0].shape == (100, 16)


def test_pools_that_cannot_all_grow_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = random_pools(10, 8, 0, 8, 64)
    before = [None if pool is None else pool.clone() for pool in pools]
    short_of_memory(monkeypatch, largest=20 * 8)
    with pytest.raises(torch.OutOfMemoryError):
        grow(pools, 20)
    for old, new in zip(before, pools, strict=True):
        assert (old is None and new is None) or torch.equal(old, new)  # type: ignore[arg-type]
    monkeypatch.undo()
    grow(pools, 20)
    assert [pool.shape[0] for pool in pools if pool is not None] == [20, 20, 20]
    assert torch.equal(pools[3][:10], before[3])  # type: ignore[index, arg-type]


def test_a_codebook_takes_over_what_a_finer_one_holds() -> None:
    """What the profile itself gives; a setting with latents that the other lacks comes from the profile."""
    path = profile_path("demo-7m")
    assert path is not None
    profile = SpectralProfile.load(path)
    books: dict[str, Any] = {name: profile.codebook(name) for name in ("4x", "16x")}
    for name, other in (("16x", "4x"), ("4x", "16x")):
        found = profile.codebook(name, finer=books[other])
        for a, b in zip(found.layers, books[name].layers, strict=True):
            for x, y in zip(a.units, b.units, strict=True):  # type: ignore[union-attr]
                for part in ("project", "used", "deviation"):
                    assert torch.equal(getattr(x, part), getattr(y, part)), part
                for part in ("key_decode", "value_decode"):  # but for the rounding of the two settings' gains
                    torch.testing.assert_close(getattr(x, part), getattr(y, part), rtol=3e-7, atol=0, msg=part)
    small, large = (books[name].layers[0].units[0].rank for name in ("16x", "4x"))
    assert small < large

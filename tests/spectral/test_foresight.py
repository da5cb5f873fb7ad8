"""What a change of setting needs is made before it is asked for, and found again by content."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from spectral import foresight, unit_codec
from spectral.codec import LayerCodec
from spectral.foresight import Foresight, foresee
from spectral.from_tensors import profile_from_tensors
from spectral.kernels import quads, tables
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.decode import LayerKernels
from spectral.kernels.squeeze import SqueezeLayer
from spectral.profile import SpectralProfile
from spectral.remember import Memory, digest, nbytes_of
from spectral.resources import profile_path
from spectral.statistics import unit_heads


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """A memory of this test's own."""
    memory = Memory()
    for module in (foresight, unit_codec, quads, tables):
        monkeypatch.setattr(module, "memory", memory)
    return memory


@pytest.fixture(scope="module")
def profile() -> SpectralProfile:
    return SpectralProfile.load(profile_path("demo-7m"))


def two_layers(prefer: str) -> SpectralProfile:
    """Keys and values in two units each, two layers."""
    rng = torch.Generator().manual_seed(0)
    decay = 0.95 ** torch.arange(64)
    sides = [torch.randn(2, 1024, 64, generator=rng) * decay for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:  # units of one head
        patch.setattr("spectral.from_tensors.unit_heads", lambda shape: unit_heads(shape, 128))
        pairs = [(sides[0], sides[1]), (sides[2], sides[3])]
        return profile_from_tensors(pairs, ratios=(4, 6, 8), recent=16, prefer=prefer)


@pytest.fixture(scope="module")
def apart() -> SpectralProfile:
    return two_layers("balanced")


@pytest.fixture(scope="module")
def flat() -> SpectralProfile:
    return two_layers("speed")


def everything(profile: SpectralProfile, setting: str, finer: list[LayerCodec]) -> list[LayerCodec]:
    """All that a worker makes on a GPU for a setting."""
    layers = [codec for codec in profile.codebook(setting).layers if isinstance(codec, LayerCodec)]
    for number, codec in enumerate(layers):
        LayerKernels(codec)
        CodeLayer(codec)
        if finer:
            SqueezeLayer(finer[number], codec)
    return layers


@pytest.mark.parametrize("made_for", ["profile", "apart", "flat"])
def test_a_change_of_setting_makes_nothing_that_was_foreseen(
    fresh: Memory, made_for: str, request: pytest.FixtureRequest
) -> None:
    profile = request.getfixturevalue(made_for)
    now = everything(profile, "4x", [])
    assert len(now[0].units) == {"profile": 1, "apart": 4, "flat": 4}[made_for]
    rungs = list(dict.fromkeys(foresee(profile, "4x")))
    names = [row.name for row in profile.ladder]
    assert rungs == names[names.index("4x") + 1 :]
    made = fresh.misses
    for setting in rungs:
        everything(profile, setting, now)
    assert fresh.misses == made > 0


@pytest.mark.parametrize("made_for", ["profile", "apart", "flat"])
def test_what_is_found_is_what_would_be_made(
    fresh: Memory, made_for: str, request: pytest.FixtureRequest
) -> None:
    profile = request.getfixturevalue(made_for)
    list(foresee(profile, "4x"))
    found = profile.codebook("8x").layers[0]
    fresh.__init__()  # type: ignore[misc]
    made = profile.codebook("8x").layers[0]
    assert isinstance(found, LayerCodec) and isinstance(made, LayerCodec)
    keys, values = (torch.randn(3, made.kv_heads, made.page_tokens, size) for size in (made.key_dim, made.value_dim))
    page = torch.arange(3)
    pages = made.encode(keys, values, page)
    assert torch.equal(found.encode(keys, values, page), pages)
    assert all(torch.equal(a, b) for a, b in zip(found.decode(pages, page), made.decode(pages, page), strict=True))
    kernels = [LayerKernels(codec).tables for codec in (found, made)]
    assert all(torch.equal(kernels[0][name], kernels[1][name]) for name in kernels[0])


def test_a_new_setting_begins_anew_and_an_end_ends(fresh: Memory, profile: SpectralProfile) -> None:
    before = threading.active_count()
    foreseeing = Foresight(profile)
    foreseeing.begin("4x")
    foreseeing.begin("10x")
    until = time.monotonic() + 60
    while not fresh.misses and time.monotonic() < until:
        time.sleep(0.01)
    assert fresh.misses
    foreseeing.end()
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_least_recently_used_goes_first() -> None:
    memory = Memory(max_bytes=3000)
    calls: list[str] = []

    def make(name: str, size: int = 125) -> np.ndarray:
        calls.append(name)
        return np.zeros(size)

    for name in ("a", "b", "c", "a", "d"):  # 1,000 bytes each: the fourth, "d", leaves no room for "b"
        memory.get(name, lambda name=name: make(name))  # type: ignore[misc]
    assert memory.nbytes == 3000 and calls == ["a", "b", "c", "d"]
    memory.get("a", lambda: make("a"))
    memory.get("b", lambda: make("b"))
    assert calls == ["a", "b", "c", "d", "b"]
    memory.get("large", lambda: make("large", 1000))  # too large to be kept: nothing goes for it
    assert memory.nbytes == 3000 and memory.hits == 2


def test_content_is_told_apart() -> None:
    a = np.arange(6)
    assert digest(a) == digest(a.copy()) and len(digest(a)) == 16
    others = [digest(a.reshape(2, 3)), digest(a.astype(np.int32)), digest(a, a), digest(a + 1)]
    assert len({digest(a), *others}) == 5
    assert nbytes_of({"x": [a, (a,)]}) == 2 * a.nbytes


@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_what_is_in_use_is_kept_and_a_failure_there_is_told_and_ends_nothing(
    fresh: Memory, profile: SpectralProfile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    after_s: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(foresight, "KEEP_AFTER_S", after_s)
    kept: list[float] = []
    failed = threading.Event()

    def keep() -> Iterator[None]:
        kept.append(time.monotonic())
        yield
        kept.append(time.monotonic())
        failed.set()
        raise RuntimeError("no host memory")

    list(foresee(profile, "12x"))
    wanted = fresh.misses
    fresh.__init__()  # type: ignore[misc]
    foreseeing, began = Foresight(profile, keep), time.monotonic()
    foreseeing.begin("12x")
    assert failed.wait(60) and kept[0] >= began + after_s
    until, told = time.monotonic() + 60, "tables of setting 12x are not kept: no host memory"
    while (fresh.misses < wanted or told not in caplog.text) and time.monotonic() < until:  # told behind the failure
        time.sleep(0.01)
    foreseeing.end()
    assert fresh.misses == wanted > 0 and len(kept) == 2 and told in caplog.text

"""Profiles with bases of their own for keys and for values, of pages that are transformed and of others, from the cache
to a squeeze in a running engine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from spectral import SpectralCache
from spectral.codec import LayerCodec
from spectral.engine.engine import Engine
from spectral.engine.types import EngineLimits
from spectral.from_tensors import profile_from_tensors
from spectral.hf import LoadedModel, wrap_model
from spectral.link_profile import link_profile
from spectral.profile import CONTEXT, SpectralProfile
from tests.spectral.cache_helpers import generate, logits, model, profile, tokens
from tests.spectral.engine.engine_helpers import Letters, ask, request, squeeze_twice
from tests.spectral.test_profile import TEXT, loaded_model, small_profiler

FAMILIES = ["qwen3", "gemma3"]  # the second with sliding layers
CLASSES = {"balanced": 4, "speed": 1}  # of pages of 8 tokens
preferences = pytest.mark.parametrize("prefer", CLASSES)


def made_for(prefer: str, family: str) -> SpectralProfile:
    made = profile(family, prefer=prefer)
    assert made.apart and made.classes == CLASSES[prefer] and all(row.name in made.bits for row in made.ladder)
    return made


@preferences
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "spectral"])
def test_a_cache_answers_from_codes_of_either_side(family: str, attention: str, prefer: str) -> None:
    made, ids = model(family, attention), tokens(2, 67)  # one more token seals a page
    found = made_for(prefer, family)
    cache = SpectralCache(found, setting=found.ladder[1].name)
    logits(model(family, "eager"), ids, cache)
    for new in (ids[:, :1], ids[:, 1:14]):
        expected = logits(model(family, "eager"), new, copy.deepcopy(cache))
        assert torch.allclose(logits(made, new, copy.deepcopy(cache)), expected, atol=2e-4, rtol=1e-4)
    fine = found.ladder[0].name
    answers = [generate(made, ids, SpectralCache(found, setting=name)) for name in (fine, "exact")]
    assert answers[0].shape == (2, 24) and len(answers[0].unique()) > 8
    assert torch.equal(answers[1], generate(made, ids, DynamicCache(config=made.config)))


@preferences
@pytest.mark.parametrize("family", FAMILIES)
def test_what_codes_of_either_side_lose_falls_with_their_bytes(family: str, prefer: str) -> None:
    made, ids, found = model(family, "spectral"), tokens(2, 131), made_for(prefer, family)

    def answered(setting: str) -> torch.Tensor:
        cache = SpectralCache(found, setting=setting)
        logits(made, ids[:, :123], cache)
        return logits(made, ids[:, 123:], cache)

    exact = answered("exact")
    errors = [float((answered(row.name) - exact).norm() / exact.norm()) for row in found.ladder]
    assert errors == sorted(errors) and 0 < errors[0] < 0.05 < errors[-1] < 0.5, errors


def engine_of(prefer: str, family: str, setting: str) -> Engine:
    found = made_for(prefer, family)
    loaded = wrap_model(family, model(family, "eager"), Letters())
    loaded.eos_token_ids = set()
    book = None if setting == "exact" else found.codebook(setting)
    limits = EngineLimits(prefill_chunk=32, token_budget=64, max_concurrency=4)
    return Engine(loaded, codebook=book, setting=setting, profile=found, limits=limits, checked=True)


@preferences
@pytest.mark.parametrize("family", FAMILIES)
def test_a_running_engine_is_squeezed(family: str, prefer: str) -> None:
    names = [row.name for row in made_for(prefer, family).ladder]
    assert len(names) == 3
    engine = engine_of(prefer, family, names[0])
    prompts = [tokens(1, 90 + 20 * i, i)[0].tolist() for i in range(3)]
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"r{i}", prompt, 60))
    squeeze_twice(engine, names[1], names[2])
    alone = ask(engine_of(prefer, family, names[2]), request("x", prompts[0], 30))
    assert ask(engine, request("x", prompts[0], 30)) == alone


@preferences
def test_the_kernels_give_an_engines_answers(monkeypatch: pytest.MonkeyPatch, prefer: str) -> None:
    """At a fine setting, where no choice is as close as rounding to fp16 is. The model would say one token for ever."""
    family, sampling = "gemma3", {"frequency_penalty": 2.0}
    name = made_for(prefer, family).ladder[0].name
    found = []
    for choice in ("reference", "triton"):
        monkeypatch.setenv("SPECTRAL_ATTENTION", choice)
        engine = engine_of(prefer, family, name)
        found.append(ask(engine, request("x", tokens(1, 60, 3)[0].tolist(), 8, sampling=sampling))["x"])
        used = [vars(c) for c in engine.store.codebook.layers if isinstance(c, LayerCodec)]
        assert used and all(("_kernels" in held) == (choice == "triton") for held in used)
    assert found[0] == found[1] and len(set(found[0])) > 3


@pytest.fixture(scope="module")
def linked() -> LoadedModel:
    return loaded_model()


@preferences
def test_links_are_fitted_to_codes_of_either_side(linked: LoadedModel, tmp_path: Path, prefer: str) -> None:
    made = small_profiler(prefer=prefer).profile_from_loaded(linked, texts=[TEXT])
    found = SpectralProfile.load(made.save(tmp_path / "mine"))
    assert found.apart and found.classes == CLASSES[prefer]
    (report,) = link_profile(linked, found, ["6x"], texts=[TEXT], tokens=2048)
    assert report.small > report.fast > 1 and report.file is not None


@preferences
def test_every_unit_has_bits_and_a_ratio_is_kept_with_its_padding(prefer: str) -> None:
    """At any ratio: the kernels serve no layer with a unit without bits, and units by side pad twice. The values here
    hardly vary, so that all bits would go to keys."""
    rng = torch.Generator().manual_seed(0)
    sides = [torch.randn(4, 512, 32, generator=rng) * scale for scale in (torch.linspace(1, 0.1, 32), 1e-4)]
    looking = torch.randn(8, 512, 32, generator=rng)
    ratios = (4.0, 8.0, 16.0, 24.0)
    made = profile_from_tensors([sides, sides], queries=[looking, looking], ratios=ratios, prefer=prefer)
    assert [row.name for row in made.ladder] == [f"{ratio:g}x" for ratio in ratios]
    for row, ratio in zip(made.ladder, ratios, strict=True):
        assert all(widths.any() for layer in made.bits[row.name] for widths in layer or [])
        assert row.bytes_per_token(CONTEXT) <= made.token_nbytes / ratio * (1 + 1e-9)

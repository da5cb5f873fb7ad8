"""The small API: load, generate, chat, stream, unload."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectral import InferenceEngine
from spectral.calibrate import SpectralProfiler
from spectral.engine.build import build_engine, find_profile, saved_profile_path
from spectral.errors import ModelError, ProfileError, RequestError, SettingError
from spectral.hf import LoadedModel, load_model
from spectral.profile import SpectralProfile
from spectral.resources import profile_path

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHIPPED = profile_path("demo-7m")


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine("demo-7m", setting="exact") as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo-7m", device="cpu")


def test_chat_and_stream_agree(engine: InferenceEngine) -> None:
    text = engine.chat(QUESTION, max_tokens=40, temperature=0)
    assert "Paris" in text
    pieces = list(engine.stream(QUESTION, max_tokens=40, temperature=0))
    assert len(pieces) > 3 and "".join(pieces) == text


def test_generate_goes_on_with_a_text(engine: InferenceEngine) -> None:
    text = engine.generate("Once upon a time", max_tokens=12, temperature=0, ignore_eos=True)
    assert text and text == engine.generate("Once upon a time", max_tokens=12, temperature=0, ignore_eos=True)
    stopped = engine.generate("Once upon a time", max_tokens=12, temperature=0, ignore_eos=True, stop=text[5:9])
    assert stopped == text[: text.index(text[5:9])]


def test_streams_may_overlap_and_closing_one_frees_it(engine: InferenceEngine) -> None:
    whole = engine.chat(QUESTION, max_tokens=30, temperature=0)
    first = engine.stream(QUESTION, max_tokens=30, temperature=0)
    opening = next(first)
    assert engine.chat(QUESTION, max_tokens=30, temperature=0) == whole
    assert opening + "".join(first) == whole
    abandoned = engine.stream("Once", max_tokens=4000, temperature=0)
    next(abandoned)
    abandoned.close()
    engine.stream("Never read", max_tokens=4000)
    assert engine.chat(QUESTION, max_tokens=30, temperature=0) == whole
    assert engine.kv_bytes == 0


@pytest.mark.parametrize(
    ("sampling", "remedy"),
    [
        ({"temperature": -1.0}, "between 0 and 100"),
        ({"n": 2}, "call again"),
        ({"colour": "red"}, "there are max_tokens, temperature"),
        ({"max_tokens": 0}, "at least 1"),
        ({"stop": 5}, "a list of strings.*leave it out for none.*got 5"),
        ({"stop": None}, "a list of strings.*leave it out for none.*got None"),
        ({"logit_bias": None}, "a map from token ids.*leave it out for none"),
        ({"logit_bias": [5]}, "a map from token ids"),
        ({"session": "a" * 300}, "a name of 1 to 256 characters"),
        ({"session": ""}, "a name of 1 to 256 characters"),
    ],
)
def test_bad_parameters_are_named(engine: InferenceEngine, sampling: dict[str, object], remedy: str) -> None:
    name = next(iter(sampling))
    with pytest.raises(RequestError, match=f"{name}.*{remedy}") as caught:
        engine.chat(QUESTION, **sampling)  # type: ignore[arg-type]
    assert caught.value.param == name and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["", "a" * 257, None, 5])
def test_a_session_has_a_name(engine: InferenceEngine, tmp_path: Path, name: object) -> None:
    engine.chat(QUESTION, max_tokens=2, session="talk")
    file = engine.save_session("talk", tmp_path / "talk")
    for call in (engine.save_session, engine.resume_session):
        with pytest.raises(RequestError, match="session must be a name of 1 to 256 characters") as caught:
            call(name, file)  # type: ignore[operator]
        assert caught.value.param == "session"
    assert engine.resume_session("a" * 256, file) > 0


def test_bad_arguments_are_refused_before_loading() -> None:
    with pytest.raises(ModelError, match="quantize"):
        InferenceEngine("demo-7m", quantize="3bit")
    with pytest.raises(ModelError, match="bits"):
        InferenceEngine("demo-7m", bits=0)


def test_it_says_that_it_is_not_loaded() -> None:
    engine = InferenceEngine("demo-7m", setting="exact")
    with pytest.raises(ModelError, match="load"):
        engine.generate("x")
    engine.load()
    engine.unload()
    engine.unload()
    with pytest.raises(ModelError, match="load"):
        engine.generate("x")


@pytest.mark.skipif(SHIPPED is None, reason="the demo model's profile is not there")
def test_the_shipped_profile_is_used_and_bits_choose_the_setting() -> None:
    with InferenceEngine("demo-7m") as engine:
        assert engine.profile is not None and engine.active_setting == engine.profile.default
        assert "Paris" in engine.chat(QUESTION, max_tokens=40, temperature=0)
        profile = engine.profile
    finest = profile.ladder[0]
    with InferenceEngine("demo-7m", bits=finest.bits_per_element, profile=profile) as engine:
        assert engine.active_setting == finest.name
    with pytest.raises(SettingError, match="ladder"):
        InferenceEngine("demo-7m", setting="999x").load()


def test_without_a_profile_one_is_made_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def quick(_: SpectralProfiler, loaded: LoadedModel, **__: object) -> SpectralProfile:
        calls.append(1)
        small = SpectralProfiler(window=64, measure_tokens=64, measure_window=64, ratios=(4.0, 8.0))
        texts = [" ".join(f"number {i} is followed by {i + 1}." for i in range(400))]
        return real(small, loaded, texts=texts, tokens=512)

    real = SpectralProfiler.profile_from_loaded
    monkeypatch.setattr(SpectralProfiler, "profile_from_loaded", quick)
    monkeypatch.setattr("spectral.engine.build.profile_path", lambda _: None)
    monkeypatch.setenv("SPECTRAL_PROFILES", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="spectral"):
        with InferenceEngine("demo-7m") as engine:
            assert engine.profile is not None
            first = engine.profile.content_hash
    assert "calibrating" in caplog.text and len(list(tmp_path.glob("demo-7m-*.safetensors"))) == 1
    with InferenceEngine("demo-7m") as engine:
        assert engine.profile is not None and engine.profile.content_hash == first
    assert len(calls) == 1


def test_a_setting_without_a_profile_says_how_to_get_one(loaded: LoadedModel) -> None:
    with pytest.raises(ProfileError, match="spectral profile build"):
        build_engine(loaded, None, setting="8x")


def test_a_saved_profile_of_another_model_is_not_used(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("spectral.engine.build.profile_path", lambda _: None)
    monkeypatch.setenv("SPECTRAL_PROFILES", str(tmp_path))
    assert find_profile(loaded) is None
    small = SpectralProfiler(window=64, measure_tokens=64, measure_window=64, ratios=(8.0,))
    profile = small.profile_from_loaded(loaded, texts=["one two three four five " * 200], tokens=512)
    profile.save(saved_profile_path(loaded))
    assert find_profile(loaded) is not None
    profile.fingerprint = "0" * 64
    profile.save(saved_profile_path(loaded))
    assert find_profile(loaded) is None
    with pytest.raises(ProfileError, match="made for"):
        find_profile(loaded, saved_profile_path(loaded))


def test_a_models_language_part_is_found_in_a_nested_configuration() -> None:
    """Multimodal models keep their text configuration inside another one."""
    from transformers import Gemma3Config, Gemma3TextConfig

    from spectral.model_shapes import text_config

    text = Gemma3TextConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    nested = SimpleNamespace(config=Gemma3Config(text_config=text))
    assert text_config(nested).num_hidden_layers == 3
    assert text_config(SimpleNamespace(config=text)).num_hidden_layers == 3

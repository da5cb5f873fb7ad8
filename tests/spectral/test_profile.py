from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from spectral.bits import FIELDS, WIDTHS, row_classes
from spectral.calibrate import SpectralProfiler, token_windows
from spectral.errors import ModelError, ProfileError, SettingError
from spectral.evaluate import evaluate, score_settings
from spectral.fit import fit
from spectral.from_tensors import profile_from_tensors
from spectral.hf import LoadedModel
from spectral.pages import PageStore
from spectral.profile import LadderRow, SpectralProfile
from spectral.profile_file import digest
from spectral.sparkline import spectrum_lines
from spectral.statistics import Collector, Statistics, split_attention
from tests.spectral.helpers import NoTokenizer, random_model


class ByteTokenizer(NoTokenizer):
    """One token per character, for calibration on short texts."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


TEXT = "the quick brown fox jumps over the lazy dog while seventeen wizards count their silver; " * 40


def loaded_model(family: str = "qwen3", seed: int = 0) -> LoadedModel:
    loaded = random_model(family, seed)
    loaded.tokenizer = ByteTokenizer()
    return loaded


def small_profiler(**changes: object) -> SpectralProfiler:
    options = {
        "tokens": 2048,
        "window": 128,
        "measure_tokens": 256,
        "recent": 16,
        "page_tokens": 8,
        "fisher_tokens": 1024,
        "measure_window": 256,
        "block_tokens": 64,
        "ratios": (3.0, 6.0, 12.0),
        **changes,
    }
    return SpectralProfiler(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded_model()


@pytest.fixture(scope="module")
def profile(model: LoadedModel) -> SpectralProfile:
    return small_profiler().profile_from_loaded(model, texts=[TEXT])


@pytest.fixture(scope="module")
def apart(model: LoadedModel) -> SpectralProfile:
    """The same, with bases of their own for keys and for values."""
    return small_profiler(prefer="balanced").profile_from_loaded(model, texts=[TEXT])


@pytest.fixture(scope="module")
def flat(model: LoadedModel) -> SpectralProfile:
    """The same again, with pages that are not transformed."""
    return small_profiler(prefer="speed").profile_from_loaded(model, texts=[TEXT])


def test_ladder_is_measured_and_monotone(profile: SpectralProfile, model: LoadedModel) -> None:
    kl = [row.kl_mean for row in profile.ladder]
    assert kl == sorted(kl)
    assert 0 <= kl[0] < kl[-1]
    sizes = [row.bytes_per_token(400) for row in profile.ladder]
    assert sizes == sorted(sizes, reverse=True)
    for row in profile.ladder:
        store = PageStore(model.shape, profile.codebook(row.name))
        assert store.bytes_per_token(400) == pytest.approx(row.bytes_per_token(400))
    assert profile.resolve("auto") == profile.default
    with pytest.raises(SettingError, match="7x"):
        profile.resolve("7x")


def test_calibration_is_deterministic(model: LoadedModel, profile: SpectralProfile, tmp_path: Path) -> None:
    again = small_profiler().profile_from_loaded(model, texts=[TEXT])
    assert again.save(tmp_path / "a").read_bytes() == profile.save(tmp_path / "b").read_bytes()


def test_calibrated_bases_beat_uncalibrated_ones(model: LoadedModel, profile: SpectralProfile) -> None:
    """The same bits in a basis of the wrong model lose more."""
    other = small_profiler().profile_from_loaded(loaded_model(seed=9), texts=[TEXT])
    other.fingerprint = profile.fingerprint
    ids = ByteTokenizer()(TEXT)["input_ids"][:256]
    ours = score_settings(model, profile, [ids], [profile.ladder[1].name])[profile.ladder[1].name]
    wrong = score_settings(model, other, [ids], [other.ladder[1].name])[other.ladder[1].name]
    assert ours["kl_mean"] < 0.8 * wrong["kl_mean"]


def test_gemma_keeps_sliding_layers_exact() -> None:
    made = small_profiler().profile_from_loaded(loaded_model("gemma2"), texts=[TEXT])
    assert [layer is None for layer in made.layers] == [True, False, True]


def test_round_trip(profile: SpectralProfile, model: LoadedModel, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "p")
    loaded = SpectralProfile.load(tmp_path / "p")
    assert loaded.content_hash == profile.content_hash
    assert loaded.to_dict()["ladder"] == profile.to_dict()["ladder"]
    assert json.dumps(loaded.to_dict())
    assert profile.default in loaded.summary()
    loaded.check_model(model)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    x = torch.randn(2, 2, 8, 16)
    name = profile.default
    pages = [p.codebook(name).layers[0].encode(x, x, torch.arange(2)) for p in (SpectralProfile.load(path), loaded)]  # type: ignore[union-attr]
    assert torch.equal(*pages)


def test_another_models_profile_is_refused(profile: SpectralProfile) -> None:
    with pytest.raises(ProfileError, match=r"made for 'qwen3'.*model is 'llama'"):
        profile.check_model(loaded_model("llama"))
    with pytest.raises(ProfileError, match="fingerprint"):
        profile.check_model(_renormed())  # the same architecture, trained on


def _renormed() -> LoadedModel:
    from spectral.hf import wrap_model

    loaded = loaded_model()
    loaded.model.model.norm.weight.data.mul_(1.5)
    return wrap_model("qwen3", loaded.model, loaded.tokenizer)


def _rewrite(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change a profile's tensors or document, with a checksum that is right again: later checks are met."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    document = json.loads(json.loads(metadata["spectral"])["document"])
    change(tensors, document)
    text = json.dumps(document, sort_keys=True)
    sealed = json.dumps({"document": text, "sha256": digest(text, tensors)})
    save_file(tensors, path, metadata={"spectral": sealed})


def _nan(tensors, _):  # type: ignore[no-untyped-def]
    tensors["0.0.mean"][0] = np.nan


def _shape(tensors, _):  # type: ignore[no-untyped-def]
    tensors["1.0.decode"] = tensors["1.0.decode"][:-1]


def _skewed(tensors, _):  # type: ignore[no-untyped-def]
    tensors["1.0.decode"][:, 0] *= 2


def _singular(tensors, _):  # type: ignore[no-untyped-def]
    tensors["1.0.decode"][:, 0] = tensors["1.0.decode"][:, 1]


def _widths(tensors, _):  # type: ignore[no-untyped-def]
    tensors["setting.0.0.0"][0, :16] = 7


def _ragged(tensors, _):  # type: ignore[no-untyped-def]
    tensors["setting.0.0.0"][0, 0] = (tensors["setting.0.0.0"][0, 0] + 1) % 3


def _smaller(tensors, _):  # type: ignore[no-untyped-def]
    tensors["setting.0.0.0"][:] = 1


def _missing(tensors, _):  # type: ignore[no-untyped-def]
    del tensors["2.0.scale"]


def _table(tensors, _):  # type: ignore[no-untyped-def]
    tensors["table.2.step"][0] = -1


def _version(_, document):  # type: ignore[no-untyped-def]
    document["format_version"] = 99


def _upside_down(_, document):  # type: ignore[no-untyped-def]
    document["ladder"] = [dict(row, page_nbytes=i + 1) for i, row in enumerate(document["ladder"])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, "not finite"),
        (_shape, "1.0.decode"),
        (_skewed, "unit length"),
        (_singular, "singular"),
        (_widths, "widths"),
        (_ragged, "every run"),
        (_smaller, "pages of"),
        (_missing, "2.0.scale"),
        (_table, "must be positive"),
        (_version, "format 99"),
        (_upside_down, "finest to coarsest"),
    ],
)
def test_damaged_profiles_are_refused(profile: SpectralProfile, tmp_path: Path, change: object, message: str) -> None:
    path = profile.save(tmp_path / "p")
    _rewrite(path, change)
    with pytest.raises(ProfileError, match=message):
        SpectralProfile.load(path)


def test_any_flipped_bit_is_seen(profile: SpectralProfile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "p")
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [9, len(data) - 1, *rng.integers(8, len(data), 40).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        with pytest.raises(ProfileError):
            SpectralProfile.load(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04K\x01.", struct.pack("<Q", 10 << 30) + b"{}", struct.pack("<Q", 4) + b"{}", b"x" * 4096],
    ids=["empty", "pickle", "ten gigabytes of header", "cut header", "text"],
)
def test_files_that_are_no_profiles_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="safetensors"):
        SpectralProfile.load(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        SpectralProfile.load(tmp_path / "absent")


def test_evaluate_reads_through_the_cache(model: LoadedModel, profile: SpectralProfile) -> None:
    report = evaluate(model, profile, texts=[TEXT], context=200, max_windows=2)
    exact, *ours = report.rows
    assert exact["name"] == "exact"
    assert exact["kl_mean"] < 1e-3
    assert [row["kl_mean"] for row in ours] == sorted(row["kl_mean"] for row in ours)
    assert ours[-1]["ratio"] > 1.5
    assert set(ours[0]) >= {
        "name",
        "ours",
        "in_attention",
        "bytes_per_token",
        "ratio",
        "kl_mean",
        "kl_p99",
        "top1",
        "perplexity",
    }
    assert json.dumps(report.to_dict())
    assert "exact" in report.table()
    with pytest.raises(ModelError, match="context"):
        evaluate(model, profile, texts=[TEXT], context=100_000)
    with pytest.raises(ModelError, match="shorter"):
        evaluate(model, profile, texts=["short"], context=200)


def _read(model: LoadedModel, windows: list[list[int]], statistics: Statistics) -> None:
    collector = Collector(
        model, seed=0, sinks=4, recent=16, page_tokens=8, block_tokens=64, fisher_tokens=512, sample_tokens=256
    )
    while statistics.windows < len(windows):
        collector.read(statistics, windows)


def test_statistics_resume_where_they_stopped(model: LoadedModel) -> None:
    windows = token_windows(model, [TEXT], 128, 1024, seed=0)
    whole, first, second = (Statistics.of(model, turned=True) for _ in range(3))
    _read(model, windows, whole)
    _read(model, windows[:3], first)  # the share of windows with a backward pass depends on how many there are
    first = Statistics.of(model, turned=True)
    collector = Collector(
        model, seed=0, sinks=4, recent=16, page_tokens=8, block_tokens=64, fisher_tokens=512, sample_tokens=256
    )
    for _ in range(3):
        collector.read(first, windows)
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    _read(model, windows, second)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(second.tensors()[name], tensor, rtol=0, atol=0)


def test_an_interrupted_profile_goes_on(model: LoadedModel, profile: SpectralProfile, tmp_path: Path) -> None:
    import spectral.calibrate as calibrate

    class Stop(Exception):
        pass

    def stop(stage: str, fraction: float) -> None:
        if stage == "statistics" and fraction > 0.6:
            raise Stop

    saved, pause = tmp_path / "state", calibrate.SAVE_SECONDS
    calibrate.SAVE_SECONDS = 0.0
    try:
        with pytest.raises(Stop):
            small_profiler(checkpoint=saved, progress=stop).profile_from_loaded(model, texts=[TEXT])
        assert saved.is_file()
        seen: list[float] = []
        again = small_profiler(
            checkpoint=saved, progress=lambda s, f: seen.append(f) if s == "statistics" else None
        ).profile_from_loaded(model, texts=[TEXT])
    finally:
        calibrate.SAVE_SECONDS = pause
    assert min(seen) > 1 / 16, "it began again"
    assert not saved.exists()
    assert again.save(tmp_path / "a").read_bytes() == profile.save(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("of", ["profile", "flat"])
def test_one_forward_scores_what_the_store_shows_token_by_token(
    model: LoadedModel, of: str, request: pytest.FixtureRequest
) -> None:
    from spectral.oneshot import score_oneshot
    from spectral.scoring import ExactPass, score_store

    found: SpectralProfile = request.getfixturevalue(of)
    ids = ByteTokenizer()(TEXT)["input_ids"][:200]
    exact = ExactPass.run(model, ids)
    for row in found.ladder:
        book = found.codebook(row.name)
        stepped, nbytes = score_store(exact, book, chunk=1)
        once = score_oneshot(exact, book)
        assert nbytes == pytest.approx(row.bytes_per_token(200))
        # Sums in another order move a number across a rounding boundary once in a while.
        wrong = (once["kl"] - stepped["kl"]).abs()
        assert float(wrong.mean()) <= 0.03 * float(stepped["kl"].mean()) + 1e-6


def test_a_default_that_keeps_the_asked_energy(model: LoadedModel, profile: SpectralProfile) -> None:
    energies = [row.energy for row in profile.ladder]
    assert energies == sorted(energies, reverse=True)
    middle = (energies[1] + energies[2]) / 2
    assert small_profiler(target_energy=middle)._default(profile.ladder) == profile.ladder[1].name
    assert small_profiler(target_energy=0.999999)._default(profile.ladder) == profile.ladder[0].name
    with pytest.raises(ModelError, match="target_energy"):
        small_profiler(target_energy=1.5)


def test_head_statistics_and_maps(profile: SpectralProfile) -> None:
    mean, metric, covariance = profile.head_statistics(0, 1, "value")
    assert mean.shape == (16,) and metric.shape == covariance.shape == (16, 16)
    assert np.linalg.eigvalsh(metric).min() > 0 and np.linalg.eigvalsh(covariance).min() > -1e-9
    bits = profile.bits_map()[0]
    assert bits is not None and bits.shape[0] == 8
    used, held = sum(int(b.sum()) for b in profile.bits_map() if b is not None), 8 * profile.row("auto").page_nbytes
    assert 0.8 * held < used <= held  # pages of this small model are padded by up to a tenth
    for wrong in ((9, 0, "key"), (0, 5, "key"), (0, 0, "query")):
        with pytest.raises(ProfileError):
            profile.head_statistics(*wrong)


def read_fields(profile: SpectralProfile, row: LadderRow) -> float:
    """Fields of a token that scores and sums read, of all layers: a unit of both sides is read twice."""
    share = np.array([len(members) for members in row_classes(row.page_tokens, profile.classes)]) / row.page_tokens
    total = 0.0
    for layer, widths in zip(profile.layers, profile.bits[row.name], strict=True):
        assert layer is not None and widths is not None
        for unit, table in zip(layer.units, widths, strict=True):
            fields = np.array(FIELDS)[np.searchsorted(WIDTHS, table)]  # [classes, latents]
            total += (2 if unit.side == "both" else 1) * float(share @ fields.sum(1))
    return total


@pytest.mark.parametrize(("prefer", "classes"), [("balanced", 4), ("speed", 1)])
def test_what_is_not_for_quality_reads_fewer_fields_and_is_measured(
    apart: SpectralProfile, flat: SpectralProfile, profile: SpectralProfile, model: LoadedModel, prefer: str,
    classes: int,
) -> None:  # fmt: skip
    made = {"balanced": apart, "speed": flat}[prefer]
    assert [[unit.side for unit in layer.units] for layer in made.layers if layer] == [["key", "value"]] * 3
    assert made.apart and not profile.apart and (made.classes, profile.classes) == (classes, 4)
    assert made.provenance["prefer"] == prefer
    assert "prefer" not in profile.provenance, "so that its command makes the shipped profile byte for byte"
    kl = [row.kl_mean for row in made.ladder]
    assert kl == sorted(kl) and 0 < kl[0] < kl[-1]
    for row, other in zip(made.ladder, profile.ladder, strict=True):
        # Padding is taken off these; and a run without classes takes 16 bytes more for a bit.
        assert row.name == other.name and 0.75 * other.page_nbytes < row.page_nbytes <= other.page_nbytes
        assert 0 < read_fields(made, row) < 0.6 * read_fields(profile, other)
        assert row.energy < other.energy and None not in (row.kl_p99, row.top1, row.top5, row.perplexity)
        store = PageStore(model.shape, made.codebook(row.name))
        assert store.bytes_per_token(400) == pytest.approx(row.bytes_per_token(400))


@pytest.mark.parametrize("of", ["apart", "flat"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_what_is_known_of_a_head_does_not_depend_on_the_bases(
    of: str, profile: SpectralProfile, side: str, request: pytest.FixtureRequest
) -> None:
    """Mean and covariance are the text's; the metric is too, but for what regularises it."""
    for head in (0, 1):
        ours, others = (made.get_projection(1, head, side) for made in (request.getfixturevalue(of), profile))
        np.testing.assert_allclose(ours.mean, others.mean, rtol=1e-5, atol=1e-6)
        assert np.linalg.norm(ours.covariance - others.covariance) < 2e-3 * np.linalg.norm(others.covariance)
        assert np.linalg.norm(ours.metric - others.metric) < 0.05 * np.linalg.norm(others.metric)


def test_a_preference_that_there_is_not_is_refused() -> None:
    with pytest.raises(SettingError, match="prefer must be one of quality, balanced, speed, got 'fast'"):
        small_profiler(prefer="fast")
    with pytest.raises(SettingError, match="got 'fast'"):
        fit(Statistics({}, tokens=1, fisher_tokens=1), 8, "fast")
    sides = torch.randn(2, 64, 8)
    with pytest.raises(SettingError, match="got 'fast'"):
        profile_from_tensors([(sides, sides)], prefer="fast")


def test_a_profile_with_sides_apart_comes_back(
    apart: SpectralProfile, profile: SpectralProfile, tmp_path: Path
) -> None:
    loaded = SpectralProfile.load(apart.save(tmp_path / "p"))
    assert loaded.content_hash == apart.content_hash and loaded.apart
    facts = loaded.to_dict()
    assert facts == apart.to_dict() and json.dumps(facts)
    assert facts["layers"][0] == {"key_dim": 16, "value_dim": 16, "heads": [[0, 2], [0, 2]], "sides": ["key", "value"]}
    assert "sides" not in profile.to_dict()["layers"][0]  # what profiles said before there were any
    assert list(facts["spectrum"][0]) == ["keys of heads 0-1", "values of heads 0-1"]
    assert "keys and values apart" in loaded.summary() and "keys and values together" in profile.summary()
    assert len({line.index("|") for line in spectrum_lines(facts["spectrum"])}) == 1
    x, y = torch.randn(2, 2, 2, 8, 16)
    for row in apart.ladder:
        again = SpectralProfile.load(tmp_path / "p")
        codecs = [made.codebook(row.name).layers[0] for made in (loaded, again, apart)]
        pages = [codec.encode(x, y, torch.arange(2)) for codec in codecs]  # type: ignore[union-attr]
        assert torch.equal(*pages[:2]) and pages[0].any()
        assert (pages[0] == pages[2]).float().mean() > 0.99  # whose bases were float64: edges of codes move


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["key"], r"layers\[1\].sides: must say both, key or value for every unit"),
        (["key", "value", "value"], r"layers\[1\].sides: must say both, key or value for every unit"),
        (["key", "query"], r"layers\[1\].sides: must say both, key or value for every unit"),
        (["key", ["value"]], r"layers\[1\].sides: must say both, key or value for every unit"),
        (["key", None], r"layers\[1\].sides: must say both, key or value for every unit"),
        ("key value", r"layers\[1\].sides: must be a list"),
        ({"key": 0}, r"layers\[1\].sides: must be a list"),
        (None, r"layers\[1\].sides: must be a list"),
        ([], r"layers\[1\].sides"),
        (["key", "key"], "layer 1: the units' keys do not cover the KV heads in order"),
        (["key", "both"], "layer 1: the units' keys do not cover the KV heads in order"),
        (["both", "both"], "layer 1: the units' keys do not cover the KV heads in order"),
    ],
)
def test_forged_sides_are_refused(apart: SpectralProfile, tmp_path: Path, sides: object, message: str) -> None:
    path = apart.save(tmp_path / "p")
    _rewrite(path, lambda _, document: document["layers"][1].update(sides=sides))
    with pytest.raises(ProfileError, match=message):
        SpectralProfile.load(path)


def test_sides_that_are_left_out_or_added_are_refused(
    apart: SpectralProfile, profile: SpectralProfile, tmp_path: Path
) -> None:
    path = apart.save(tmp_path / "p")
    _rewrite(path, lambda _, document: document["layers"][0].pop("sides"))
    with pytest.raises(ProfileError, match="layer 0: the units' keys do not cover"):
        SpectralProfile.load(path)
    path = profile.save(tmp_path / "q")
    _rewrite(path, lambda _, document: document["layers"][0].update(sides=["value"]))
    with pytest.raises(ProfileError, match="layer 0: the units' keys do not cover"):
        SpectralProfile.load(path)
    path = apart.save(tmp_path / "r")
    _rewrite(path, lambda _, document: document["layers"][0].update(heads=[[0, 2], [0, 1]]))
    with pytest.raises(ProfileError, match="layer 0: the units hold keys of 2 heads and values of 1"):
        SpectralProfile.load(path)


def test_many_short_texts_make_windows(model: LoadedModel) -> None:
    windows = token_windows(model, ["abc" * 20] * 10, 100, 10_000, seed=0)
    assert [len(w) for w in windows] == [100] * 6
    assert len(token_windows(model, [TEXT], 100, 250, seed=0)) == 3


def test_too_little_text_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ModelError, match="at least 512 tokens"):
        small_profiler().profile_from_loaded(model, texts=["too short"])


def test_split_attention_is_causal_attention_plus_its_errors() -> None:
    from spectral.prefill import causal_attention

    query, key, value = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    zero = torch.zeros_like(key)
    exact = causal_attention(query, key, value, scaling=0.3)
    got = split_attention(query, (key, value), (zero, zero), 8, 2, 0.3, None)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    error = torch.zeros_like(key)
    error[:, :, 20] = 1.0  # within the window of every later query but the last two
    got = split_attention(query, (key, value), (zero, error), 8, 2, 0.3, None)
    moved = (got - exact).abs().amax((0, 1, 3)) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [28, 29]

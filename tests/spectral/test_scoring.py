"""Scoring through the page store is what a decoder would see, and `spectral eval` reports it whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spectral.calibrate import SpectralProfiler
from spectral.cli import app
from spectral.errors import ModelError, SettingError, SpectralError
from spectral.evaluate import EvalReport, evaluate, strict
from spectral.hf import LoadedModel
from spectral.oneshot import oneshot_blocks
from spectral.pages import PageStore
from spectral.profile import SpectralProfile
from spectral.scoring import ExactPass, score_store, store_blocks
from tests.spectral.helpers import NoTokenizer, random_codebook, random_model

runner = CliRunner()


class Characters(NoTokenizer):
    """One token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


TEXT = "the quick brown fox jumps over the lazy dog while seventeen wizards count their silver; " * 40


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    loaded = random_model("qwen3")
    loaded.tokenizer = Characters()
    return loaded


@pytest.fixture(scope="module")
def profile(model: LoadedModel) -> SpectralProfile:
    profiler = SpectralProfiler(
        tokens=1024,
        window=128,
        measure_tokens=128,
        measure_window=128,
        recent=16,
        page_tokens=8,
        block_tokens=64,
        ratios=(3.0, 8.0),
    )
    return profiler.profile_from_loaded(model, texts=[TEXT])


@pytest.mark.parametrize(("family", "bits"), [("qwen3", 8), ("qwen3", 16), ("gemma2", 10), ("phi3", 8)])
def test_token_by_token_the_store_shows_what_one_forward_does(family: str, bits: int) -> None:
    """For the sceptic: no prediction of ours sees more than sinks, sealed pages and recent tokens."""
    loaded = random_model(family)
    book = random_codebook(loaded.shape, [4, 2, 1], sinks=4, window=16, page=8, window_bits=bits)
    ids = torch.randint(3, 96, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    want = torch.cat([x for _, x in oneshot_blocks(loaded, book, ids)])
    got = torch.cat([x for _, x in store_blocks(loaded, PageStore(loaded.shape, book), ids, chunk=1)])
    if bits == 16:
        torch.testing.assert_close(got.log_softmax(-1), want.log_softmax(-1), rtol=2e-3, atol=2e-3)
    else:  # sums in another order can move a number across a rounding boundary of the window, once in a while
        wrong = (got.log_softmax(-1) - want.log_softmax(-1)).abs()
        assert float(wrong.median()) < 2e-3 and float(wrong.mean()) < 5e-3
    exact = ExactPass.run(loaded, ids)
    assert float((want.log_softmax(-1) - exact.log_probs(0, 90))[60:].abs().max()) > 0.05, "codes are read at all"


def test_chunks_widen_the_window_and_nothing_else(model: LoadedModel, profile: SpectralProfile) -> None:
    exact = ExactPass.run(model, Characters()(TEXT)["input_ids"][:200])
    book = profile.codebook(profile.ladder[-1].name)
    kl = {chunk: float(score_store(exact, book, chunk=chunk)[0]["kl"].mean()) for chunk in (1, 16, 200)}
    assert kl[1] > kl[16] > kl[200] and kl[200] < 1e-3, "in one chunk nothing is read from pages"


@pytest.fixture(scope="module")
def report(model: LoadedModel, profile: SpectralProfile) -> EvalReport:
    return evaluate(
        model, profile, texts=[TEXT], context=400, max_windows=2, recall=True,
        baselines=["hadamard-int4", "kvtc-8x", "window-only"], calibration_texts=[TEXT], calibration_tokens=800,
    )  # fmt: skip


def test_a_report_says_everything(report: EvalReport, model: LoadedModel, profile: SpectralProfile) -> None:
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["exact", *(r.name for r in profile.ladder), "hadamard-int4", "kvtc-8x", "window-only"]
    wanted = {
        *("name", "ours", "in_attention", "bytes_per_token", "bytes_per_token_at", "ratio", "ratio_without_window"),
        *("basis_nbytes", "kl_mean", "kl_p99", "top1", "top5_overlap", "perplexity", "exact_perplexity", "recall"),
        *("recall_by_distance", "kl_by_position", "scored_tokens", "source"),
    }
    for name, row in rows.items():
        assert wanted <= set(row), name
        assert set(row["bytes_per_token_at"]) == {"2048", "8192", "32768"} and row["scored_tokens"] == 600
        assert row["ratio"] == pytest.approx(model.shape.token_nbytes() / row["bytes_per_token"])
        assert row["exact_perplexity"] == pytest.approx(rows["exact"]["exact_perplexity"])
    assert [rows[n]["ours"] for n in ("exact", profile.ladder[0].name, "kvtc-8x")] == [False, True, False]
    assert not rows["kvtc-8x"]["in_attention"] and rows["hadamard-int4"]["in_attention"]
    assert rows["kvtc-8x"]["ratio_without_window"] > rows["kvtc-8x"]["ratio"]
    assert rows["window-only"]["kl_mean"] > rows["hadamard-int4"]["kl_mean"] > rows["exact"]["kl_mean"]
    assert rows["exact"]["kl_mean"] < 1e-3 and rows["window-only"]["ratio_without_window"] is None
    assert found["calibration"] == {"text": "given text", "tokens": 800, "sample_tokens": 800}
    assert found["recall"]["sequences"] == 2 and found["windows"] == 2 and found["chunk"] == 0
    assert re.fullmatch("[0-9a-f]{64}", found["tokens_sha256"])
    assert found["dtype"] == "float32"
    assert {"versions", "commit", "hardware", "command", "seed", "texts", "scored_tokens"} <= set(found)
    assert found["hardware"]["threads"] >= 1 and found["hardware"]["cpu"]
    assert "kvtc-8x" in report.table() and "recalls nothing" in report.table()


def test_the_same_seed_gives_the_same_rows(report: EvalReport, model: LoadedModel, profile: SpectralProfile) -> None:
    partial: list[EvalReport] = []
    again = evaluate(
        model, profile, texts=[TEXT], context=400, max_windows=2, settings=["exact"], baselines="kvtc-8x, window-only",
        recall=True, calibration_texts=[TEXT], calibration_tokens=800, after_window=partial.append,
    )  # fmt: skip
    old = {row["name"]: row for row in report.rows}
    assert [row["name"] for row in again.rows] == ["exact", "kvtc-8x", "window-only"]
    for row in again.rows:
        assert row == old[row["name"]]
    first, whole = partial
    assert [part.windows for part in partial] == [1, 2] and first.tokens_sha256 != whole.tokens_sha256
    assert whole.tokens_sha256 == again.tokens_sha256 and first.scored_tokens * 2 == again.scored_tokens
    assert [row["kl_mean"] for row in whole.rows] == [row["kl_mean"] for row in again.rows]
    assert whole.recall is None and again.recall is not None, "recall is asked after the windows"


def test_what_is_not_finite_is_null() -> None:
    assert strict({"a": [float("nan"), 1.0], 2: (float("inf"), "x")}) == {"a": [None, 1.0], "2": [None, "x"]}


def test_bad_requests_are_refused_before_anything_runs(model: LoadedModel, profile: SpectralProfile) -> None:
    with pytest.raises(SpectralError, match="did you mean kvtc"):
        evaluate(model, profile, texts=[TEXT], context=200, baselines="kvtc8x")
    with pytest.raises(SettingError, match="9x"):
        evaluate(model, profile, texts=[TEXT], context=200, settings=["9x"])
    with pytest.raises(ModelError, match="chunk"):
        evaluate(model, profile, texts=[TEXT], context=200, chunk=-1)
    with pytest.raises(ModelError, match="in memory already: dtype 'bfloat16'"):
        evaluate(model, profile, texts=[TEXT], context=200, dtype="bfloat16")
    with pytest.raises(ModelError, match="shorter than one window"):
        evaluate(model, profile, texts=[TEXT], context=200, baselines="kvtc-8x", calibration_texts=["short"])
    with pytest.raises(ModelError, match="turboquant-2.25bit cannot be fitted to llama"):
        other = random_model("llama")  # heads of 8 channels
        other.tokenizer = Characters()
        small = SpectralProfiler(tokens=1024, window=128, recent=16, page_tokens=8, ratios=(4.0,))
        evaluate(
            other, small.profile_from_loaded(other, texts=[TEXT]), texts=[TEXT], context=200, settings=["exact"],
            baselines="turboquant-2.25bit", calibration_texts=[TEXT],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration-text", "{text}"], "--baselines"),
        (["--html", "{folder}/absent/x.html"], "--html"),
        (["--plots", "{text}"], "--plots"),
        (["--baselines", "nothing"], "no comparison 'nothing'"),
        (["--baselines", " "], "no comparison was named"),
    ],
)
def test_options_are_honoured_or_refused(tmp_path: Path, options: list[str], words: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    filled = [option.format(text=text, folder=tmp_path) for option in options]
    result = runner.invoke(app, ["eval", "demo", "--text", str(text), *filled])
    assert isinstance(result.exception, SpectralError) and words in str(result.exception)


def test_the_command_prints_strict_json_and_writes_what_it_was_asked_for(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    result = runner.invoke(
        app,
        ["eval", "demo", "--text", str(text), "--calibration-text", str(text), "--context", "128", "--windows", "1",
         "--settings", "8x", "--baselines", "hadamard-int3", "--json", "--plots", str(tmp_path / "plots"),
         "--html", str(tmp_path / "r.html")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert [row["name"] for row in found["rows"]] == ["8x", "hadamard-int3"]
    assert found["windows"] == 1 and found["recall"] is None and found["rows"][0]["recall"] is None
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {f"{n}.{s}" for n in ("rate-distortion", "error-by-position", "spectrum") for s in ("png", "svg")} <= names
    assert "hadamard-int3" in (tmp_path / "r.html").read_text()

"""Plots, report and sparklines from plain data."""

from __future__ import annotations

import copy
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from spectral import plots, provenance
from spectral.cli import app
from spectral.errors import SpectralError
from spectral.plots import bit_map, figures_of, method_family, rate_distortion, save_figures, svg_of
from spectral.report import html_report
from spectral.sparkline import channels_for, sparkline, spectrum_lines
from tests.spectral.helpers import FAMILIES


def row(name: str, ratio: float, kl: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "ours": name.endswith("x"), "in_attention": not name.startswith("kvtc"), "ratio": ratio,
        "ratio_without_window": None, "bytes_per_token": 1000 / ratio, "basis_nbytes": 1 << 20, "kl_mean": kl,
        "bytes_per_token_at": {"2048": 1000 / ratio, "8192": 900 / ratio}, "kl_p99": kl * 9, "top1": 0.9,
        "top5_overlap": 0.8, "perplexity": 12.5, "exact_perplexity": 12.0, "recall": 0.5,
        "recall_by_distance": [{"from": 0, "to": 256, "facts": 4, "recall": 0.5}],
        "kl_by_position": [{"from": 0, "to": 64, "kl_mean": kl}, {"from": 64, "to": 128, "kl_mean": kl * 2}], **changes,
    }  # fmt: skip


REPORT: dict[str, Any] = {
    "model": "<b>evil</b> & co", "context": 128, "windows": 1, "scored_tokens": 96, "seed": 1, "chunk": 16,
    "texts": "1 windows of given text", "token_nbytes": 1000, "basis_nbytes": 7, "calibration": None,
    "recall": {"sequences": 1}, "versions": {"torch": "2"}, "commit": None, "command": "spectral eval \"x\" <y>",
    "hardware": {"cpu": "a CPU", "threads": 1, "gpu": None},
    "rows": [row("exact", 0.97, 0.0), row("8x", 7.0, 0.01), row("16x", 13.0, 0.05), row("kvtc-8x-like", 6.0, 0.002),
             row("oscar-int2", 5.0, 0.02), row("oscar-int3", 4.0, 0.01), row("broken", 9.0, 0.1, kl_p99=None)],
}  # fmt: skip
SPECTRUM = [
    {"key": [0.7, 0.2, 0.1], "value": [0.5, 0.3, 0.2]},
    None,
    {"key": [0.9, 0.1, 0.0], "value": [0.4, 0.3, 0.3]},
]
BITS = [np.array([[4, 2, 0], [2, 0, 0]]), None, np.array([[8, 1, 0], [1, 0, 0]])]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return figures_of(REPORT, SPECTRUM, BITS, setting="8x")


def test_every_plot_is_written_as_png_and_svg(figures: dict[str, Any], tmp_path: Path) -> None:
    paths = save_figures(figures, tmp_path / "new" / "folder")
    assert {path.stem for path in paths} == {"rate-distortion", "error-by-position", "spectrum", "bits"}
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<svg") and len(data) > 2000
    assert "bits" not in figures_of(REPORT, SPECTRUM, None) and "spectrum" not in figures_of(REPORT, [None], None)


def test_curves_hold_the_rows_figures(figures: dict[str, Any]) -> None:
    lines = {line.get_label(): line for line in figures["rate-distortion"].axes[0].get_lines()}
    assert set(lines) == {"Spectral", "kvtc-like", "oscar", "broken"}
    assert lines["Spectral"].get_xydata().tolist() == [[7.0, 0.01], [13.0, 0.05]]
    assert lines["oscar"].get_xydata().tolist() == [[4.0, 0.01], [5.0, 0.02]]
    assert lines["kvtc-like"].get_linestyle() == "--" and lines["oscar"].get_linestyle() == "-"
    near = {line.get_label(): line.get_xydata().tolist() for line in figures["error-by-position"].axes[0].get_lines()}
    assert near["8x"] == [[32.0, 0.01], [96.0, 0.02]]
    assert [image.get_images()[0].get_array().tolist() for image in figures["bits"].axes[:2]] == [
        BITS[0].tolist(), BITS[2].tolist(),  # type: ignore[union-attr]
    ]  # fmt: skip
    assert len(figures["spectrum"].axes) == 2 and len(figures["spectrum"].axes[0].get_lines()) == 2
    names = ("kivi-2bit", "turboquant-qjl-3bit", "svdq-2.25bit-v4", "kvquant-nuq3", "oscar-int2-tuned")
    assert [method_family(name) for name in names] == [
        "kivi", "turboquant-qjl", "svdq", "kvquant", "oscar-tuned",
    ]  # fmt: skip


def test_nothing_to_draw_is_no_error() -> None:
    assert rate_distortion([]).axes and bit_map([None]).axes


def test_equal_data_give_equal_files() -> None:
    first, second = (svg_of(rate_distortion(REPORT["rows"])) for _ in range(2))
    assert first == second


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    with pytest.raises(SpectralError, match=r"spectral-serve\[plots\]"):
        rate_distortion([])
    for option, value in (("--plots", tmp_path), ("--html", tmp_path / "r.html")):
        result = CliRunner().invoke(app, ["eval", "demo", option, str(value)])
        assert isinstance(result.exception, SpectralError) and option in str(result.exception)
    assert plots.SIZE


class Outline(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_is_escaped(figures: dict[str, Any]) -> None:
    page = html_report(REPORT, figures)
    outline = Outline()
    outline.feed(page)
    names = [tag for tag, _ in outline.tags]
    assert not {"script", "link", "iframe", "img", "b"} & set(names), "no script, nothing fetched, no injected tag"
    assert "<b>evil</b> & co" in outline.text and 'spectral eval "x" <y>' in outline.text
    for _, attributes in outline.tags:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\(\s*['\"]?(?!#)", page) and "@import" not in page
    identifiers = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)), "several SVGs share one page"
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page))
    assert used and used <= set(identifiers)
    assert names.count("svg") == 4 and names.count("table") == 3
    assert "prefers-color-scheme: dark" in page and ("html", {"lang": "en"}) in outline.tags


def test_tables_can_be_read_aloud(figures: dict[str, Any]) -> None:
    outline = Outline()
    outline.feed(html_report(REPORT, figures))
    names = [tag for tag, _ in outline.tags]
    assert names.count("caption") == 3
    scopes = [attributes.get("scope") for tag, attributes in outline.tags if tag == "th"]
    assert None not in scopes and scopes.count("row") == 3 * len(REPORT["rows"])
    labels = [attributes.get("aria-label") for tag, attributes in outline.tags if tag == "svg"]
    assert all(labels) and len(labels) == 4


def test_sparklines() -> None:
    line = sparkline([1.0, 0.1, 0.01, 0.001, 0.00001, 0.0])
    assert line == "█▆▄▂  " and sparkline([]) == "" and sparkline([0.0, 0.0]) == "  "
    assert len(sparkline([1.0] * 500, width=40)) == 40
    assert channels_for([0.9, 0.06, 0.04]) == 2 and channels_for([]) == 0
    lines = spectrum_lines(SPECTRUM)
    assert len(lines) == 5 and "stays exact" in lines[2] and "95 % in 3 of 3 channels" in lines[0]


def test_profile_show_draws_the_spectrum(root: Path) -> None:
    result = CliRunner().invoke(app, ["profile", "show", str(root / "profiles" / "demo-7m.safetensors")])
    assert result.exit_code == 0 and "layer   5" in result.stdout and "█" in result.stdout


def test_provenance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = provenance.provenance()
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", facts["commit"])
    assert facts["versions"]["torch"] and facts["hardware"]["threads"] >= 1 and facts["hardware"]["gpu"] is None
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "spectral" / "provenance.py"))
    assert provenance.git_commit() is None
    monkeypatch.setattr(
        "sys.argv", ["/somewhere/bench/recall.py", "lab", "--text", "/data/a text.txt", "--json", "out/x.json"]
    )
    assert provenance.provenance()["command"] == "recall.py lab --text a text.txt --json out/x.json"


def test_a_configurations_hash_is_the_models_and_not_its_folders() -> None:
    config = copy.deepcopy(FAMILIES["qwen3"])
    known = provenance.config_sha256(config)
    config._name_or_path, config.transformers_version = "/somewhere/else", "9.0"
    assert provenance.config_sha256(config) == known
    config.rms_norm_eps = 0.5
    assert provenance.config_sha256(config) != known

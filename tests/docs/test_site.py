"""The documentation site: it builds without a warning, has what it promises, and asks no other host for anything."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import docs_pages, docs_pictures, fit_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (it is in the extras docs and dev)")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_pages_from_the_code_are_there(site: Path) -> None:
    assert "from_pretrained" not in text_of(site, "library")
    for name in ("InferenceEngine", "SpectralProfile", "SpectralCache", "SpectralKVCompressor", "profile_from_tensors"):
        assert f">{name}<" in re.sub(r"<span[^>]*>|</span>", "", text_of(site, "library")) or name in text_of(
            site, "library"
        )
    assert "spectral keys create" in text_of(site, "cli") and "--max-concurrency" in text_of(site, "cli")
    assert "POST /v1/chat/completions" in text_of(site, "http-reference")
    assert "kv_quality" in text_of(site, "http-reference")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=\"?(https?://[^\s\">]+)")
    for path in site.rglob("*.html"):
        found = loads.findall(path.read_text(encoding="utf-8"))
        assert found == [], (path, found)


def test_links_inside_the_site_resolve(site: Path) -> None:
    for path in site.rglob("index.html"):
        for target in re.findall(r'href="?([^"\s>]+)', path.read_text(encoding="utf-8")):
            plain = target.split("#")[0].split("?")[0]
            if plain and not re.match(r"[a-z]+:", plain) and not plain.startswith("/"):
                assert (path.parent / plain).exists(), (path.relative_to(site), target)


def test_the_command_line_page_has_every_command() -> None:
    import typer

    from spectral.cli import app

    page = docs_pages.command_line()
    for path, _ in docs_pages.commands(typer.main.get_command(app), ("spectral",)):
        assert f"## `{' '.join(path)}`" in page


def test_the_http_page_has_every_path() -> None:
    page, document = docs_pages.http_reference(), docs_pages.openapi()
    assert all(f" {path}`" in page for path in document["paths"]) and len(document["paths"]) > 30


@pytest.mark.parametrize("name", docs_pictures.PICTURES)
def test_pictures_are_as_they_are_made(name: str) -> None:
    kept = (docs_pictures.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == str(docs_pictures.PICTURES[name]()), "run python tools/docs_pictures.py"


def test_the_table_of_cards_is_as_it_is_computed() -> None:
    page = (ROOT / "docs" / "fits.md").read_text(encoding="utf-8")
    shapes = json.loads(fit_table.SHAPES.read_text(encoding="utf-8"))
    some = {name: shapes[name] for name in ("Llama 3.1 8B", "Gemma 3 12B")}
    for model, weights, cells in fit_table.rows(some, cards=(12,)):
        row = next(line for line in page.splitlines() if line.startswith(f"| {model} | {weights} |"))
        assert row.split(" | ")[3] == cells[0], "run python tools/fit_table.py"


def test_the_table_says_what_the_command_says(tmp_path: Path) -> None:
    shapes = json.loads(fit_table.SHAPES.read_text(encoding="utf-8"))
    fit_table.make_folder(tmp_path / "model", shapes["Llama 3.1 8B"])
    config = tmp_path / "config.yaml"
    limits = "{max_concurrency: 1}"
    config.write_text(f"models: [{{name: a, path: {tmp_path / 'model'}, quantization: nf4, limits: {limits}}}]\n")
    cell = next(
        cells[0] for _, weights, cells in fit_table.rows({"x": shapes["Llama 3.1 8B"]}, (12,)) if weights == "nf4"
    )
    most = int(re.findall(r"\d+", cell)[1]) * 1024  # the exact cache, for which no profile is needed

    def fits(context: int) -> bool:
        command = [sys.executable, "-m", "server.plan_command", "--config", str(config), "--gpu", "12GiB", "--json"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command += ["--host", "64GiB", "--context", str(context)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return bool(json.loads(done.stdout)["fits"])

    assert fits(most) and not fits(most + 1024)

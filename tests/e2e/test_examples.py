"""Everything in examples/ runs, as it is written, against the real server."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import ROOT, Server

pytestmark = pytest.mark.e2e
EXAMPLES = ROOT / "examples"
PROGRAMS = {
    "openai_client.py": ("openai", ["in form:  city=", "tool:     temperature city=", "then:", "setting:", "KL"]),
    "langchain_client.py": ("langchain_openai", ["ChatOpenAI, in form: city=", "ChatOllama, streamed:", "3 answers"]),
    "httpx_client.py": ("httpx", ["tokens, cache", "given up after: data:"]),
}


def run(command: list[str], folder: Path, server: Server | None = None) -> str:
    """What a program prints; the test fails if it fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    env |= {"SPECTRAL_URL": server.url} if server is not None else {}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tried_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {*PROGRAMS, "curl.sh", "library.ipynb", "three-models.yaml", "README.md"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(server: Server, tmp_path: Path, name: str) -> None:
    package, wanted = PROGRAMS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (it is in the extra dev)")
    printed = run([sys.executable, str(EXAMPLES / name)], tmp_path, server)
    assert "Paris" in printed
    assert [part for part in wanted if part not in printed] == [], printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Server, tmp_path: Path) -> None:
    printed = run(["bash", str(EXAMPLES / "curl.sh")], tmp_path, server)
    parts = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in printed.split("== ") if part}
    assert "Paris" in json.loads(parts["a chat"])["choices"][0]["message"]["content"]
    assert parts["the same, streamed"].rstrip().endswith("data: [DONE]")
    assert "Paris" in json.loads(parts["as Ollama's clients ask"])["response"]
    assert json.loads(parts["tokens"])["count"] > 3
    assert "devices" in parts[next(name for name in parts if "memory" in name)]


def test_notebook(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (it is in the extra dev)")
    book = nbformat.read(EXAMPLES / "library.ipynb", as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells), "keep the outputs out of it"
    printed = run([sys.executable, "-c", "\n".join(cell.source for cell in cells)], tmp_path)
    assert "Paris" in printed and "times" in printed


def test_configuration() -> None:
    from server.config import Settings

    data = yaml.safe_load((EXAMPLES / "three-models.yaml").read_text(encoding="utf-8"))
    assert len(Settings(**data).models) == 3

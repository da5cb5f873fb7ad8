"""The README's curl line and Python blocks, run as they are written (only the address is another)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Server

pytestmark = pytest.mark.e2e

README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def block(kind: str, containing: str) -> str:
    """The only block of this kind that contains the text."""
    found = [text for text in re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1, f"{len(found)} {kind} blocks contain {containing!r}"
    return str(found[0])


def run_python(code: str, folder: Path, seconds: float) -> str:
    """What a block prints; the test fails if it ends with an error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_line(server: Server) -> None:
    line = block("bash", "curl")
    assert ADDRESS in line
    result = subprocess.run(
        ["bash", "-ec", line.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in json.loads(result.stdout)["choices"][0]["message"]["content"]


def test_openai_block(server: Server, tmp_path: Path) -> None:
    code = block("python", "from openai import")
    assert ADDRESS in code
    assert "Paris" in run_python(code.replace(ADDRESS, server.url), tmp_path, 60)


def test_library_block(tmp_path: Path) -> None:
    assert "Paris" in run_python(block("python", "InferenceEngine("), tmp_path, 120)


def test_cache_block(tmp_path: Path) -> None:
    printed = run_python(block("python", "SpectralCache("), tmp_path, 120)
    assert "Paris" in printed and "bytes" in printed


def test_profiler_block(tmp_path: Path) -> None:
    code = block("python", "SpectralProfiler(")
    # Given text, and few tokens, instead of text by the model: the block is to be run, not to make a good profile.
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md")))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = "seed=0, window=256, measure_tokens=512, measure_window=256"
    short = code.replace("SpectralProfiler(seed=0)", f"SpectralProfiler({options})")
    arguments = 'texts=[open("text.txt", encoding="utf-8").read()], tokens=2048'
    short = short.replace("tokens=16_384", arguments)
    assert "window=256" in short and "tokens=2048" in short
    printed = run_python(short, tmp_path, 240)
    assert (tmp_path / "demo-7m.safetensors").is_file()
    assert "KL" in printed, printed

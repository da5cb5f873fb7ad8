"""The documents' Python blocks and curl lines, run as they are written (only the address is another)."""

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
ADDRESS = "http://127.0.0.1:8000"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(kind: str) -> list[object]:
    """All blocks of this kind, named by page and number."""
    found = []
    for path in PAGES:
        texts = re.findall(rf"```{kind}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        found += [pytest.param(text, id=f"{path.stem}-{number}") for number, text in enumerate(texts)]
    return found


CURLS = [
    pytest.param(line, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, line in enumerate(
        line
        for text in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("curl ")
    )
]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block(server: Server, tmp_path: Path, code: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    program = code.replace(ADDRESS, server.url)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURLS)
def test_curl_line(server: Server, line: str) -> None:
    assert ADDRESS in line
    command = line.replace(ADDRESS, server.url).replace("curl ", "curl --fail-with-body -sS ", 1)
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 4 and len(CURLS) >= 3

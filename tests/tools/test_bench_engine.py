"""bench/engine.py: its GPU rows run, tiny, on the CPU; what it cannot measure here it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "engine.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


@pytest.mark.alone
def test_every_row_of_a_gpu_runs_and_is_kept_as_soon_as_it_is_there(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    done = run("--check", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["row"] for row in rows] == [
        "step1x1k", "step1x1k-speed", "step8x32k", "step8x32k-speed", "eager", "prefill", "prefill-speed", "prefix",
        "held", "batch", "memory",
    ]  # fmt: skip
    assert all(row.get("prefer") == ("speed" if row["row"].endswith("-speed") else None) for row in rows)
    assert all(row["figure"] > 0 and row["against"] > 0 for row in rows), rows
    by_name = {row["row"]: row for row in rows}
    assert by_name["prefix"]["ratio"] < 1 < by_name["held"]["ratio"]
    assert not by_name["batch"]["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU refuses")
def test_rows_that_cannot_be_measured_are_refused() -> None:
    done = run("--rows", "gpu-prefill")
    assert done.returncode == 2 and "--rows" in done.stderr


def test_the_tiny_shape_keeps_its_layers() -> None:
    done = run("--check", "--layers", "2")
    assert done.returncode == 2 and "--layers" in done.stderr


def test_rows_that_are_not_measured_again_stay_and_say_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    old = [{"row": "streams", "ratio": 2.0}, {"row": "held", "ratio": 7.0}]
    file.write_text(json.dumps({"rows": old, "seed": 1, "commit": "before"}))
    done = run("--rows", "held", "--budget-mib", "32", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(file.read_text())
    held, streams = written["rows"]
    assert held["row"] == "held" and held["ratio"] != 7.0 and "from" not in held
    assert streams == {"from": {"seed": 1, "commit": "before"}, **old[0]}
    assert written["commit"] != "before"

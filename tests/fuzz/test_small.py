"""A few inputs of every target, each run in CI; `make fuzz` runs as many as one likes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.targets import registry

COUNTS = {"profile": 400, "profile_bytes": 600, "config": 100, "sessions": 250, "templates": 20, "headers": 400}
COUNTS |= {"tool_calls": 500, "grammars": 60}
MANY = 2000


@pytest.mark.parametrize("name", registry.SHARES)
def test_nothing_is_found(name: str) -> None:
    target = registry.load(name)
    count = COUNTS.get(name, MANY)
    with contextlib.closing(target):
        report = harness.run_here(target, seed=1, first=0, count=count)
    assert report["findings"] == []
    assert report["inputs"] == count and len(report["outcomes"]) >= 2  # some are accepted, some refused
    assert report["memory_growth"] < target.memory


def test_a_run_by_the_command(tmp_path: Path) -> None:
    written = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.fuzz", "--target", "json_bytes,frames", "--inputs", "200", "--seed", "5"]
    done = subprocess.run([*command, "--json", "--output", str(written)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(written.read_text()) and report["inputs"] == 200
    assert {target["target"] for target in report["targets"]} == {"json_bytes", "frames"}
    assert report["provenance"]["versions"]["python"]
    wrong = subprocess.run([*command[:4], "nothing"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "unknown targets: nothing" in wrong.stderr


class _Bad:
    """Fails, hangs where signals are heard, hangs where they are not, and dies."""

    name, seconds, memory = "bad", 0.2, 64 << 20

    def make(self, random: object) -> int:
        return 0

    def check(self, item: int) -> str:
        raise RuntimeError("found")

    def close(self) -> None:
        return None


def test_the_harness_reports_what_is_raised() -> None:
    report = harness.run_here(_Bad(), 0, 3, 2)
    assert report["outcomes"] == {"finding": 2}
    assert [(f["input"], f["kind"], f["message"]) for f in report["findings"]] == [
        (3, "RuntimeError", "found"),
        (4, "RuntimeError", "found"),
    ]


def test_the_harness_outlives_hangs_and_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GRACE_S", 0.5)
    report = harness.run("self_test", 0.3, seed=0, first=0, count=6, part=6, until=math.inf)
    kinds = [(found["input"], found["kind"]) for found in report.findings]
    assert kinds == [(1, "AssertionError"), (2, "TooSlow"), (3, "Hang"), (4, "Died(-9)"), (5, "MemoryError")]
    assert report.inputs == 6 and report.outcomes["accepted"] == 1


def test_inputs_are_the_same_again() -> None:
    for name in ("profile_bytes", "frames", "ollama"):
        with contextlib.closing(registry.load(name)) as target:
            one, two = (str(target.make(harness.randomness(name, 3, 7))) for _ in range(2))
            assert one == two and one != str(target.make(harness.randomness(name, 3, 8)))


def test_guided_fuzzing_runs_where_atheris_is() -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (extra fuzz)")
    command = [sys.executable, "-m", "tests.fuzz.guided", "--target", "keys", "--inputs", "900", "--seconds", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "DONE" in done.stderr, done.stderr[-2000:]

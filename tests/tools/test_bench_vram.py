"""What bench/vram.py and bench/engine.py keep when their time is up."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.keeping import Cut, Limit, write_json
from bench.vram import attempt, times_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_limit_cuts_what_runs_and_lets_nothing_begin() -> None:
    limit = Limit(0.2)
    assert not limit.passed and 0 < (limit.left or 0) <= 0.2
    began = time.monotonic()
    with pytest.raises(Cut), limit.enforced():
        time.sleep(30)
    assert time.monotonic() - began < 5 and limit.passed
    with pytest.raises(Cut), limit.enforced():
        raise AssertionError("something began after the limit")
    with Limit(None).enforced():
        assert Limit(None).left is None and not Limit(None).passed


def test_no_alarm_comes_after_what_ended_in_time() -> None:
    limit = Limit(0.1)
    with limit.enforced():
        pass
    time.sleep(0.2)  # an alarm would raise here
    assert limit.passed


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(file, {"rows": [object()]})
    assert json.loads(file.read_text()) == {"rows": [1]} and list(tmp_path.iterdir()) == [file]


def test_a_part_that_is_cut_off_keeps_its_rows_and_cleans_up() -> None:
    ended: list[str] = []

    async def part(row: dict[str, Any]) -> None:
        row["rows"] = [7]
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("streams")

    async def run() -> dict[str, Any]:
        row: dict[str, Any] = {}
        await attempt(part(row), "part", SimpleNamespace(), row, Limit(0.2))  # type: ignore[arg-type]
        return row

    row = asyncio.run(run())
    assert row["rows"] == [7] and 0.2 <= row["cut_after_s"] < 10 and ended == ["streams"]


def test_a_part_that_fails_says_why() -> None:
    async def part() -> None:
        raise RuntimeError("no memory")

    async def run() -> dict[str, Any]:
        row: dict[str, Any] = {"rows": []}
        steward = SimpleNamespace(last=None)
        scheduler = SimpleNamespace(memory=SimpleNamespace(steward=steward))
        scene: Any = SimpleNamespace(vram=lambda: {"foreign": 1.0}, scheduler=scheduler)
        await attempt(part(), "part", scene, row, Limit(None))
        return row

    assert asyncio.run(run()) == {
        "rows": [], "error": "RuntimeError: no memory", "vram": {"foreign": 1.0}, "plan": None,
    }  # fmt: skip


def test_times_are_compared_with_those_of_nothing_beside() -> None:
    found = times_of({"alone": [0.1] * 99 + [0.2], "beside_a_load": [0.3], "beside_a_wake": []})
    assert found["alone"]["p99_ms"] == pytest.approx(100) and found["beside_a_load"]["p99_ratio"] == pytest.approx(3)
    assert "beside_a_wake" not in found and times_of({"alone": []}) == {}


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / name), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_a_run_whose_time_is_up_says_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "vram.json"
    done = bench("vram.py", "--parts", "squeeze,wake", "--limit", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(file.read_text())
    assert written["not_begun"] == ["load", "squeeze", "wake"] and written["limit_s"] == 1


def test_the_engine_bench_keeps_the_rows_before_the_cut(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"rows": [{"row": "memory", "ratio": 2.0}], "commit": "before"}))
    done = bench("engine.py", "--rows", "gpu-held,gpu-memory", "--limit", "0.01", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(file.read_text())
    assert written["cut"]["rows"] == ["held", "memory"]
    assert written["rows"] == [{"from": {"commit": "before"}, "row": "memory", "ratio": 2.0}]

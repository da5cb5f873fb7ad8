"""`spectral plan` as a program, GET /admin/plan and /admin/vram, and the map of `spectral top`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.plan_command import main
from spectral.cli import app
from spectral.commands.top import MARKS, bar, parts_of
from tests.server.conftest import Running, serving, settings

CONFIG = """
models:
  - {name: small, path: demo}
  - {name: other, path: demo, setting: 4x, min_context: 4096}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_configuration_is_planned_for_gpus_that_are_not_here(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = ask(capsys, "--config", config, "--gpu", "12GiB", "--gpu", "4GiB,2GiB")
    assert status == 0 and found["fits"] and found["unmet"] == []
    assert set(found["budgets"]) == {"cpu", "cuda:0", "cuda:1", "cuda:2"}
    assert found["budgets"]["cuda:0"] == 12 * 2**30 - 512 * 2**20
    models = found["models"]
    assert models["small"]["setting"] == "8x" and models["other"]["setting"] == "4x"
    assert [row["setting"] for row in models["other"]["ladder"]] == ["4x"]
    assert models["small"]["weights_bytes"] > 10_000_000 and models["small"]["devices"][0].startswith("cuda")


def test_more_models_and_longer_contexts_are_asked_for(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ask(capsys, "--config", config, "--gpu", "3GiB")[1]["models"]["small"]
    status, found = ask(capsys, "--config", config, "--gpu", "3GiB", "--with", "demo-7m", "--context", "150000")
    assert set(found["models"]) == {"small", "other", "demo-7m"}
    assert status == 1 and found["unmet"] and not found["fits"]
    assert found["models"]["small"]["ladder"][0]["floor_bytes"] > few["ladder"][0]["floor_bytes"]
    reasons = [found["models"][name]["reason"] for name in found["unmet"]]
    assert all("needs at least" in reason for reason in reasons)
    status, found = ask(capsys, "--config", config, "--with", "nobody/nothing")
    assert (status, found["unknown"]) == (2, ["nobody/nothing"])  # nobody knows whether that fits


def test_wrong_questions_are_refused_with_the_field(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", config, "--gpu", "big"]) == 2
    assert main(["--config", config, "--gpu", "12"]) == 2, "twelve bytes are no GPU"
    assert "size" in capsys.readouterr().err
    assert main(["--config", config + ".nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["--config", config, "--with", "../../!"]) == 2
    assert "--with" in capsys.readouterr().err


def test_the_command_explains_in_words(config: str, root: Path) -> None:
    command = [sys.executable, "-m", "spectral.cli", "plan", "-c", config, "--gpu", "8GiB", "--explain"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Everything fits" in done.stdout and "hot on cuda:0 at 8x" in done.stdout and "given away" in done.stdout


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(settings({"name": "demo"}, {"name": "later", "load": "on_demand"})) as server:
        server.until_state("demo", "hot")
        yield server


def test_the_plan_in_force_and_a_dry_run(running: Running) -> None:
    running.until(lambda: running.client.get("/admin/plan").json()["plan"] is not None)
    force = running.client.get("/admin/plan").json()
    assert force["dry_run"] is False and force["plan"]["models"]["demo"]["residency"] == "hot"
    trial = running.client.get("/admin/plan?dry_run=1&with=later&context=1000").json()
    assert trial["dry_run"] and trial["plan"]["models"]["later"]["residency"] == "hot"
    assert running.ready()["later"]["state"] == "cold", "a dry run changes nothing"
    for query, words in (("with=later", "dry_run"), ("dry_run=1&with=%20bad", "with"), ("dry_run=1&context=0", "")):
        refused = running.client.get(f"/admin/plan?{query}")
        assert refused.status_code in (400, 422) and words in refused.text


def test_top_shows_the_map_once_and_as_json(running: Running) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["top", "--once", "--url", running.url])
    assert shown.exit_code == 0, shown.output
    assert "cpu" in shown.output and "demo" in shown.output and "budget" in shown.output and "# weights" in shown.output
    found = json.loads(runner.invoke(app, ["top", "--json", "--url", running.url]).output)
    assert found["devices"][0]["device"] == "cpu" and found["leases"]["demo"] > 0 and "demo" in found["models"]


def test_bars_are_in_proportion_and_as_wide_as_asked() -> None:
    device = {
        "segments": [{"kind": "weights", "bytes": 50}, {"kind": "kv", "bytes": 1}, {"kind": "new kind", "bytes": 9}],
        "foreign_bytes": 0,
        "free_bytes": 40,
    }
    parts = parts_of(device)
    assert parts == [("weights", 50), ("kv", 1), ("other", 9), ("free", 40)]
    cells = dict(bar(parts, 60))
    assert sum(cells.values()) == 60 and cells["weights"] == 30 and cells["kv"] >= 1 and set(cells) <= set(MARKS)
    assert bar([], 10) == []

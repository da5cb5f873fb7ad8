"""PROMISES.md names tests that exist, and figures that its results hold."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "PROMISES.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[f"{file}::{test}" for file, test in NAMED])
def test_every_test_that_is_named_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert test in found if test else any(name.startswith("test_") for name in found) or "TestCase" in ast.dump(tree)


def test_every_promise_has_a_test() -> None:
    rows = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if len(row) == 5 and row[1].strip() not in ("Promise", "Run")]
    assert len(promises) > 20
    for row in promises:
        assert "`tests/" in row[2], row[1]


def test_runs_on_record_kept_their_promises_and_say_how_they_were_made() -> None:
    for path in re.findall(r"\((bench/results/(?:chaos|soak)\w*\.json)\)", TEXT):
        report: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
        assert report["promises"] and all(report["promises"].values()), path
        assert report["command"].startswith("python -m tools.faults.") and report["versions"] and "seed" in report
        assert f"{report['requests']:,}" in TEXT, f"the table shows the requests of {path}"

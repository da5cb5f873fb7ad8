"""How `make test` puts its parts together: every test is in one of them, and no part's failure is lost."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tools import run_tests

PARTS = ("compute", "wait", "alone")


def part_of(arguments: tuple[str, ...]) -> str:
    if "alone" in arguments:
        return "alone"
    return "wait" if "not alone" in arguments else "compute"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0, 0), 0), ((0, 0, 5), 0), ((1, 0, 0), 1), ((0, 2, 0), 2), ((0, 0, 3), 3), ((1, 0, 5), 1), ((1, 2, 3), 2)],
)
def test_all_parts_run_and_a_failure_of_any_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], statuses: tuple[int, int, int], expected: int
) -> None:
    """Also behind a part that failed. (5 is pytest's status where nothing was chosen.)"""
    status = dict(zip(PARTS, statuses, strict=True))

    def command(*arguments: str) -> list[str]:
        part = part_of(arguments)
        return [sys.executable, "-c", f"import sys; print('this is {part}', flush=True); sys.exit({status[part]})"]

    monkeypatch.setattr(run_tests, "command", command)
    assert run_tests.run(2) == expected
    said = capfd.readouterr().out
    assert [said.count(f"this is {part}") for part in PARTS] == [1, 1, 1]
    assert said.count("FAILED") == sum(number not in (0, 5) for number in statuses)
    assert said.index("this is wait") < said.index("this is compute") < said.index("this is alone")


def test_no_test_is_left_out_or_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[str, ...]] = {}

    def command(*arguments: str) -> list[str]:
        asked[part_of(arguments)] = arguments
        return [sys.executable, "-c", ""]

    monkeypatch.setattr(run_tests, "command", command)
    assert run_tests.run(3) == 0
    folders = [path for path in run_tests.COMPUTING if (run_tests.ROOT / path).is_dir()]
    assert folders == run_tests.COMPUTING and set(folders) <= set(asked["compute"])
    assert {f"--ignore={path}" for path in folders} <= set(asked["wait"])
    for part, mark in (("wait", "not alone"), ("alone", "alone")):
        assert asked[part][asked[part].index("-m") + 1] == mark
    assert "-m" not in asked["compute"], "a mark would leave tests out that no other part runs"
    marked = {path for path in (run_tests.ROOT / "tests").rglob("*.py") if uses(path, "alone")}
    assert marked and {str(path.relative_to(run_tests.ROOT)) for path in marked} == set(asked["alone"][2:])
    assert not [path for folder in folders for path in marked if run_tests.ROOT / folder in path.parents]


def uses(path: Path, mark: str) -> bool:
    """Whether a file names this mark, however it came by it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.Attribute) and node.attr == mark for node in ast.walk(tree))


def test_what_runs_in_the_background_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = run_tests.subprocess.Popen

    def kept(*arguments: object, **named: object) -> object:
        started.append(popen(*arguments, **named))  # type: ignore[call-overload]
        return started[-1]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_tests, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(run_tests.subprocess, "Popen", kept)
    monkeypatch.setattr(run_tests.subprocess, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["run_tests.py"])
    assert run_tests.main() == 130
    assert len(started) == 1 and started[0].poll() is not None

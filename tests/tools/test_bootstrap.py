"""The script that makes the environment, with everything that would touch the machine replaced by fakes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bootstrap  # noqa: E402


class Machine:
    """Records what bootstrap would have done, and makes chosen commands fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nvidia: bool = False, pick: str | None = "2.13.0+cpu") -> None:
        self.commands: list[str] = []
        self.failing: tuple[str, ...] = ()
        self.torch: str | None = None
        monkeypatch.setattr(bootstrap, "has_nvidia", lambda: nvidia)
        monkeypatch.setattr(bootstrap, "pip_pick", lambda python: pick)
        monkeypatch.setattr(bootstrap, "installed_torch", lambda python: self.torch)
        monkeypatch.setattr(bootstrap, "create_venv", self.create)
        monkeypatch.setattr(bootstrap, "run", self.run)

    def create(self, venv: Path) -> None:
        self.commands.append("create")
        python = bootstrap.venv_python(venv)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    def run(self, command: list[str]) -> bool:
        text = " ".join(command[1:])
        self.commands.append(text)
        return not any(word in text for word in self.failing)

    def order(self, *words: str) -> list[str]:
        """The first of `words` found in each command, in the order in which the commands ran."""
        found = [next((word for word in words if word in command), None) for command in self.commands]
        return [word for word in found if word is not None]


def test_torch_comes_before_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch)
    bootstrap.bootstrap(tmp_path / "env", {"dev"})
    assert machine.order("create", "torch", "--editable") == ["create", "torch", "--editable"]
    assert machine.commands[-1].endswith(".[dev]")
    assert json.loads((tmp_path / "env" / "spectral-stamp.json").read_text(encoding="utf-8"))["extras"] == ["dev"]


def test_second_call_does_nothing_and_a_new_extra_keeps_the_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch)
    bootstrap.bootstrap(tmp_path / "env", {"dev"})
    machine.commands.clear()
    machine.torch = "2.13.0+cpu"
    bootstrap.bootstrap(tmp_path / "env", set())
    bootstrap.bootstrap(tmp_path / "env", {"dev"})
    assert machine.commands == []
    bootstrap.bootstrap(tmp_path / "env", {"ray"})
    assert [command.split()[-1] for command in machine.commands] == [".[dev,ray]"]


def test_failed_install_leaves_no_stamp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch)
    machine.failing = ("--editable",)
    with pytest.raises(bootstrap.BootstrapError, match="installing the project failed"):
        bootstrap.bootstrap(tmp_path / "env", set())
    assert not (tmp_path / "env" / "spectral-stamp.json").exists()


def test_a_fresh_environment_gets_the_newest_pip_first_and_does_without_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch)
    machine.failing = ("--upgrade pip",)
    bootstrap.bootstrap(tmp_path / "env", set())
    assert machine.order("create", "--upgrade pip", "torch", "--editable") == [
        "create", "--upgrade pip", "torch", "--editable",
    ]  # fmt: skip
    assert "pip could not be upgraded" in capsys.readouterr().err
    machine.commands.clear()
    bootstrap.bootstrap(tmp_path / "env", {"dev"})
    assert machine.order("--upgrade pip", "--editable") == ["--editable"], "once for an environment"


def test_unreachable_cpu_index_falls_back_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch, pick="2.13.0")
    machine.failing = ("--torch-backend",)
    bootstrap.install_torch(tmp_path / "python", nvidia=False)
    assert machine.order("--torch-backend=cpu", "install --quiet --no-compile torch")[-2:] == [
        "--torch-backend=cpu",
        "install --quiet --no-compile torch",
    ]
    assert "2.7 GB" in capsys.readouterr().err


def test_gpu_machine_gets_the_gpu_build_and_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    machine = Machine(monkeypatch, nvidia=True)
    bootstrap.bootstrap(tmp_path / "env", set())
    assert machine.order("--torch-backend=auto", "--editable") == ["--torch-backend=auto", "--editable"]
    assert machine.commands[-1].endswith(".[gpu]")


def test_no_way_to_torch_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch)
    machine.failing = ("torch",)
    with pytest.raises(bootstrap.BootstrapError, match="torch could not be installed"):
        bootstrap.bootstrap(tmp_path / "env", set())


@pytest.mark.parametrize(
    ("stdout", "expected"),
    [
        (json.dumps({"install": [{"metadata": {"version": "2.13.0+cpu"}}]}), "2.13.0+cpu"),
        (json.dumps({"install": []}), None),
        ("ERROR: no matching distribution", None),
    ],
)
def test_pip_pick_reads_the_report(monkeypatch: pytest.MonkeyPatch, stdout: str, expected: str | None) -> None:
    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "--dry-run" in command
        return subprocess.CompletedProcess(command, 0, stdout=stdout, stderr="")

    monkeypatch.setattr(subprocess, "run", answer)
    assert bootstrap.pip_pick(Path("python")) == expected


def test_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert bootstrap.main() == 2
    said = capsys.readouterr().err
    assert "3.10 or newer; this is 3.9" in said and "PYTHON=" in said


@pytest.mark.parametrize("name", ["bootstrap.py", "torch_choice.py"])
def test_old_python_can_parse_the_scripts(name: str) -> None:
    # Otherwise an old Python shows a SyntaxError instead of the message above.
    tree = ast.parse((TOOLS / name).read_text(encoding="utf-8"), feature_version=(3, 7))
    assert tree.body


def test_python_without_ensurepip_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(bootstrap.BootstrapError, match=r"no ensurepip module.*apt install python3\.\d+-venv"):
        bootstrap.create_venv(tmp_path / "env")
    assert not (tmp_path / "env").exists()


def test_unreadable_stamp_counts_as_none(tmp_path: Path) -> None:
    stamp = tmp_path / "stamp.json"
    assert bootstrap.read_stamp(stamp) is None
    for text in ("", "[1]", "{"):
        stamp.write_text(text, encoding="utf-8")
        assert bootstrap.read_stamp(stamp) is None

"""Every shell line in the documents works: make targets exist, `spectral` lines parse with their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from spectral.cli import app

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```(?:bash|sh|shell)\n(.*?)```", re.DOTALL)


def shell_lines() -> list[str]:
    """Commands of all shell blocks, with continued lines joined and comments removed."""
    lines = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [shlex.join(shlex.split(line, comments=True)) if "curl" not in line else line for line in lines]


LINES = shell_lines()


def program(line: str) -> str:
    """The program that a line starts, without its folder."""
    return shlex.split(line)[0].rsplit("/", 1)[-1]


def test_every_line_starts_a_program_that_is_checked_here() -> None:
    known = {"make", "spectral", "curl", "docker", "git", "pip", "python3", "cd", "ray"}
    assert {program(line) for line in LINES} <= known
    assert {"make", "spectral", "curl"} <= {program(line) for line in LINES}


@pytest.mark.parametrize("line", [line for line in LINES if program(line) == "make"])
def test_make_target_exists(line: str) -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [word for word in shlex.split(line)[1:] if "=" not in word]
    assert named and set(named) <= set(targets)


@pytest.mark.parametrize("line", [line for line in LINES if program(line) == "spectral"])
def test_spectral_line_parses(line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    context = None
    while hasattr(command, "commands"):  # a group: go down to the command that the line names
        name = words.pop(0)
        command = command.commands[name]
    context = command.make_context(line, words)
    assert context.params is not None

"""`spectral backup`, `spectral restore`: the server's state (profiles, settings, audit trail, events) in one file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

CONFIG = typer.Option(None, "--config", "-c", help="Configuration that names the state (default: the shipped one).")
FOLDER = typer.Option(None, "--state-dir", help="The state's folder, instead of the configured one.")
JSON = typer.Option(False, "--json", help="Print JSON.")


def backup(
    file: Path = typer.Argument(help="Where to write the backup, a tar file."),
    config: Path | None = CONFIG,
    state_dir: Path | None = FOLDER,
    as_json: bool = JSON,
) -> None:
    """Copy the server's state into one file; the server may be running."""
    _become(["backup", str(file)], config, state_dir, as_json)


def restore(
    file: Path = typer.Argument(help="A file made by `spectral backup`."),
    config: Path | None = CONFIG,
    state_dir: Path | None = FOLDER,
    replace: bool = typer.Option(False, "--replace", help="Move a state that is there aside."),
    as_json: bool = JSON,
) -> None:
    """Put a backup's state in place; the server that uses the folder must be stopped."""
    _become(["restore", str(file), *(["--replace"] if replace else [])], config, state_dir, as_json)


def _become(words: list[str], config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """The library does not import the server: it only knows how to start it."""
    command = [sys.executable, "-m", "server.backup", *words]
    for name, value in (("--config", config), ("--state-dir", state_dir)):
        command += [] if value is None else [name, str(value)]
    command += ["--json"] if as_json else []
    sys.stdout.flush()
    os.execv(sys.executable, command)

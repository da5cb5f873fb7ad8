"""`spectral serve`: becomes the server process, so that signals reach it directly."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path

import typer

from spectral.commands.backup import backup, restore

__all__ = ["backup", "check", "restore", "serve"]  # the commands that become processes of the server


class Cluster(str, Enum):
    """What several machines are joined by."""

    ray = "ray"


class LogLevel(str, Enum):
    """How much the server logs."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    config: Path | None = typer.Option(None, "--config", "-c", help="Configuration (default: the shipped one)."),
    host: str | None = typer.Option(None, "--host", help="Address to bind (default: as configured)."),
    port: int | None = typer.Option(None, "--port", min=0, max=65535, help="Port to bind (default: as configured)."),
    log_level: LogLevel | None = typer.Option(None, "--log-level", help="How much to log (default: as configured)."),
    cluster: Cluster | None = typer.Option(None, "--cluster", help="Serve from all machines of a Ray cluster."),
) -> None:
    """Start the inference server."""
    level = None if log_level is None else log_level.value
    options = {"--config": config, "--host": host, "--port": port, "--log-level": level}
    _become_server([], options | {"--cluster": None if cluster is None else cluster.value})


def check(
    config: Path | None = typer.Option(None, "--config", "-c", help="Configuration (default: the shipped one)."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check a configuration without starting anything; exit status 1 where it is not valid."""
    _become_server(["check", *(["--json"] if as_json else [])], {"--config": config})


def _become_server(words: list[str], options: dict[str, object]) -> None:
    """The library does not import the server: it only knows how to start it."""
    command = [sys.executable, "-m", "server", *words]
    for name, value in options.items():
        if value is not None:
            command += [name, str(value)]
    sys.stdout.flush()
    os.execv(sys.executable, command)

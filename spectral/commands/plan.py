"""`spectral plan`: what the scheduler would do with a configuration, without loading anything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer


def plan(
    config: Path | None = typer.Option(None, "--config", "-c", help="Configuration (default: the shipped one)."),
    model: str | None = typer.Option(None, "--with", help="Plan for this model as well: a folder or a hub name."),
    quantization: str = typer.Option("none", "--quantization", help="Of the model of --with: none, nf4 or int8."),
    context: int | None = typer.Option(None, "--context", min=1, help="Tokens of cache that every model must have."),
    gpu: list[str] = typer.Option([], "--gpu", help='Plan for GPUs of these sizes ("12GiB"), not this machine\'s.'),
    host: str = typer.Option("32GiB", "--host", help="Host memory beside --gpu."),
    explain: bool = typer.Option(False, "--explain", help="Say why each model is where it is."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Does it fit, where, and at what KL? Exit status 1: something does not fit; 2: that cannot be known."""
    # The library does not import the server: it only knows how to start it.
    command = [sys.executable, "-m", "server.plan_command", "--quantization", quantization, "--host", host]
    for name, value in (("--config", config), ("--with", model), ("--context", context)):
        command += [] if value is None else [name, str(value)]
    for size in gpu:
        command += ["--gpu", size]
    command += ["--explain"] if explain else []
    command += ["--json"] if as_json else []
    sys.stdout.flush()
    os.execv(sys.executable, command)

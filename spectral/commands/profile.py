"""`spectral profile`: make a spectral profile for a model, and look at one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from spectral.commands.texts import read_texts

app = typer.Typer(help="Make and inspect spectral profiles.", no_args_is_help=True)


def report_progress(stage: str, fraction: float) -> None:
    """Progress on stderr: one line that is overwritten on a terminal, else one line per finished stage."""
    if sys.stderr.isatty():
        print(f"\r\033[K  {stage} {fraction:.0%}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)
    elif fraction >= 1:
        print(f"  {stage}: done", file=sys.stderr, flush=True)


@app.command("build")
def build(
    model: str = typer.Argument(..., help="Folder, hub name, or `demo`."),
    output: Path = typer.Option(..., "--output", "-o", help="File to write (.safetensors)."),
    text: list[Path] | None = typer.Option(
        None, "--text", help="Calibration text, UTF-8; may be repeated (default: text by the model itself)."
    ),
    tokens: int = typer.Option(49152, "--tokens", min=1024, help="Calibration tokens."),
    seed: int = typer.Option(0, "--seed", min=0, help="Same seed, same kind of machine: the same profile."),
    as_json: bool = typer.Option(False, "--json", help="Print the finished profile's facts as JSON."),
) -> None:
    """Calibrate a model and write its profile with a measured ladder of settings."""
    from spectral import SpectralProfiler
    from spectral.errors import SpectralError

    texts = read_texts(text)
    if not output.parent.is_dir():
        raise SpectralError(f"--output: the folder {output.parent} does not exist; create it first.")
    profiler = SpectralProfiler(seed=seed, progress=report_progress)
    profile = profiler.profile_from_model(model, texts=texts, tokens=tokens)
    profile.save(output)
    typer.echo(json.dumps(profile.to_dict(), indent=2) if as_json else f"{profile.summary()}\nwritten to {output}")


@app.command("show")
def show(
    file: Path = typer.Argument(..., help="A profile (.safetensors)."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show what a profile holds: the model it fits, its ladder of settings, and each layer's spectrum."""
    from spectral import SpectralProfile
    from spectral.sparkline import DECADES, spectrum_lines

    profile = SpectralProfile.load(file)
    if as_json:
        typer.echo(json.dumps(profile.to_dict(), indent=2))
        return
    typer.echo(profile.summary())
    typer.echo(f"\nVariance by latent channel, largest first (log scale, {DECADES:g} decades):")
    typer.echo("\n".join(spectrum_lines(profile.to_dict()["spectrum"])))

"""`spectral profile`: make a spectral profile for a model, and look at one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import typer

from spectral.commands.plain import App
from spectral.commands.texts import read_texts

app = App(help="Make and inspect spectral profiles.", no_args_is_help=True)


class Progress:
    """Progress on stderr: a bar with the time left, overwritten on a terminal; else a line per finished stage."""

    def __init__(self) -> None:
        self.stage, self.began, self.first = "", 0.0, 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began, self.first = stage, now, fraction  # a resumed stage does not begin at nothing
        spent = now - self.began
        if not sys.stderr.isatty():
            if fraction >= 1:
                print(f"  {stage}: done in {clock(spent)}", file=sys.stderr, flush=True)
            return
        done = fraction - self.first
        left = clock(spent * (1 - fraction) / done) if done > 0 and fraction < 1 else ""
        bar = "#" * round(24 * fraction)
        text = f"\r\033[K  {stage:<24} [{bar:<24}] {fraction:4.0%}  {clock(spent)}" + (f", {left} left" if left else "")
        print(text, end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)


class JsonProgress:
    """Progress on stderr for programs: one JSON object per line, at most one for each hundredth of a stage."""

    def __init__(self) -> None:
        self.last: tuple[str, int] = "", -1

    def __call__(self, stage: str, fraction: float) -> None:
        now = stage, int(100 * fraction)
        if now != self.last:
            self.last = now
            print(json.dumps({"stage": stage, "fraction": round(fraction, 4)}), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


QUANTIZE = typer.Option(None, "--quantize", help="Load the weights as 4bit (nf4) or 8bit (int8); needs the gpu extra.")
DEVICE = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N.")


@app.command("build")
def build(
    model: str = typer.Argument(..., help="Folder, hub name, or `demo`."),
    output: Path = typer.Option(..., "--output", "-o", help="File to write (.safetensors)."),
    text: list[Path] | None = typer.Option(
        None, "--text", help="Calibration text, UTF-8; may be repeated (default: text by the model itself)."
    ),
    tokens: int = typer.Option(65_536, "--tokens", min=1024, help="Calibration tokens."),
    prefer: str = typer.Option(
        "quality",
        "--prefer",
        help="quality: least loss for the bytes; balanced: GPUs read half of the codes, for up to 1.7 times the KL; "
        "speed: tokens without the page's transform besides, read fastest, for up to 2.7 times.",
    ),
    quantize: str | None = QUANTIZE,
    device: str = DEVICE,
    seed: int = typer.Option(0, "--seed", min=0, help="Same seed, same kind of machine: the same profile."),
    as_json: bool = typer.Option(False, "--json", help="Print the finished profile's facts as JSON."),
    progress: str = typer.Option("text", "--progress", help="How progress is told on stderr: text or json (lines)."),
) -> None:
    """Calibrate a model and write its profile with a measured ladder of settings.

    An interrupted run leaves OUTPUT.partial beside the output; the same command goes on from there.
    """
    from spectral import SpectralProfiler
    from spectral.errors import SpectralError
    from spectral.fit import PREFERENCES

    if progress not in ("text", "json"):
        raise SpectralError(f"--progress: {progress!r} is neither text nor json.")
    if prefer not in PREFERENCES:
        raise SpectralError(f"--prefer: {prefer!r} is none of {', '.join(PREFERENCES)}.")
    texts = read_texts(text)
    if not output.parent.is_dir():
        raise SpectralError(f"--output: the folder {output.parent} does not exist; create it first.")
    partial = output.with_name(output.name + ".partial")
    profiler = SpectralProfiler(
        seed=seed, prefer=prefer, progress=JsonProgress() if progress == "json" else Progress(), checkpoint=partial
    )
    profile = profiler.profile_from_model(model, quantize=quantize, device=device, texts=texts, tokens=tokens)
    profile.save(output)
    typer.echo(json.dumps(profile.to_dict(), indent=2) if as_json else f"{profile.summary()}\nwritten to {output}")


@app.command("show")
def show(
    file: Path = typer.Argument(..., help="A profile (.safetensors), or a model that one is shipped for (`demo`)."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show what a profile holds: the model it fits, its ladder of settings, and each layer's spectrum."""
    from spectral import SpectralProfile
    from spectral.resources import profile_path
    from spectral.sparkline import DECADES, spectrum_lines

    shipped = None if file.exists() else profile_path(file)
    profile = SpectralProfile.load(file if shipped is None else shipped)
    if as_json:
        typer.echo(json.dumps(profile.to_dict(), indent=2))
        return
    typer.echo(profile.summary())
    typer.echo(f"\nVariance by latent channel, largest first (log scale, {DECADES:g} decades):")
    typer.echo("\n".join(spectrum_lines(profile.to_dict()["spectrum"])))

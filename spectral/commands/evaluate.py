"""`spectral eval`: what a setting of the cache costs in quality and saves in bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spectral.commands.texts import read_texts

if TYPE_CHECKING:
    from spectral.evaluate import EvalReport
    from spectral.profile import SpectralProfile


RECALL_FROM = 512
"""Tokens of context from which facts are asked for unless the command line says otherwise."""


def split_settings(settings: str | None) -> list[str] | None:
    """ "8x, 4x" -> ["8x", "4x"]; None or nothing -> None, which means all."""
    names = [name.strip() for name in (settings or "").split(",") if name.strip()]
    return names or None


def evaluate_command(
    model: str = typer.Argument(..., help="Folder, hub name, or `demo`."),
    profile: Path | None = typer.Option(None, "--profile", help="Profile (default: the shipped one)."),
    text: list[Path] | None = typer.Option(None, "--text", help="Text to score, UTF-8; may be repeated."),
    context: int = typer.Option(1024, "--context", min=64, help="Tokens per scored window."),
    windows: int = typer.Option(4, "--windows", min=1, help="Windows at most."),
    settings: str | None = typer.Option(None, "--settings", help="Settings, with commas between (default: all)."),
    baselines: str | None = typer.Option(
        None, "--baselines", help="Published methods to compare with: `all`, or names with commas between."
    ),
    calibration_text: list[Path] | None = typer.Option(
        None, "--calibration-text", help="What comparisons are calibrated on (default: text by the model itself)."
    ),
    recall: bool | None = typer.Option(
        None, "--recall/--no-recall", help="Ask for facts hidden in the text (default: from 512 tokens of context on)."
    ),
    chunk: int = typer.Option(
        0,
        "--chunk",
        min=0,
        help="Tokens fed through the page store at once; 0: every query sees what it would see in decoding.",
    ),
    dtype: str = typer.Option(
        "auto", "--dtype", help="auto (float32 on CPUs, else the model's own), float32, bfloat16 or float16."
    ),
    seed: int = typer.Option(1, "--seed", min=0, help="Of windows, hidden facts and text by the model itself."),
    plots: Path | None = typer.Option(None, "--plots", help="Folder for PNG and SVG plots (extra `plots`)."),
    html: Path | None = typer.Option(None, "--html", help="Self-contained report to write (extra `plots`)."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Score a model through the compressed cache: bytes per token, KL, top-1, perplexity and recall against exact."""
    from spectral.commands.profile import Progress
    from spectral.errors import ProfileError, SpectralError
    from spectral.resources import profile_path

    if calibration_text and baselines is None:
        raise SpectralError("--calibration-text is for comparisons: name some with --baselines")
    texts = read_texts(text)
    calibration = read_texts(calibration_text, "--calibration-text")
    found = profile or profile_path(model)
    if found is None:
        raise ProfileError(
            f"no profile is shipped for {model!r}; make one with `spectral profile build {model} --output FILE` "
            "and name it with --profile."
        )
    _check_outputs(plots, html)
    from spectral.evaluate import evaluate
    from spectral.profile import SpectralProfile

    opened = SpectralProfile.load(found)
    report = evaluate(
        model,
        opened,
        texts=texts,
        context=context,
        settings=split_settings(settings),
        max_windows=windows,
        baselines=baselines,
        calibration_texts=calibration,
        recall=context >= RECALL_FROM if recall is None else recall,
        seed=seed,
        chunk=chunk,
        dtype=dtype,
        progress=Progress(),
    )
    _write(report, opened, plots, html)
    typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False) if as_json else report.table())


def _check_outputs(plots: Path | None, html: Path | None) -> None:
    """Refuse what cannot be written before minutes are spent on measuring."""
    from spectral.errors import SpectralError

    if html is not None and not html.parent.is_dir():
        raise SpectralError(f"--html: the folder {html.parent} does not exist; create it first.")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise SpectralError(f"--plots: {plots} is a file; name a folder.")
    if plots is not None or html is not None:
        from spectral.plots import require_matplotlib

        require_matplotlib("--plots" if plots is not None else "--html")


def _write(report: EvalReport, profile: SpectralProfile, plots: Path | None, html: Path | None) -> None:
    """Plots and report, where asked for."""
    if plots is None and html is None:
        return
    from spectral.plots import figures_of, save_figures
    from spectral.report import html_report

    name = next((row["name"] for row in report.rows if row["ours"]), profile.default)
    bits = profile.bits_map(name) if hasattr(profile, "bits_map") else None
    figures = figures_of(report.to_dict(), report.spectrum, bits, setting=name)
    if plots is not None:
        save_figures(figures, plots)
    if html is not None:
        html.write_text(html_report(report.to_dict(), figures), encoding="utf-8")

"""`spectral bench serve`: a load on any OpenAI-compatible server, replayed from a trace or drawn at a rate."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from spectral.commands import client as http
from spectral.commands.plain import App
from spectral.errors import SpectralError

if TYPE_CHECKING:
    from spectral.commands.bench_client import Load, Measured
    from spectral.commands.bench_load import Planned

app = App(help="Measure a running server.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a running server."""


@app.command("serve")
def serve(
    url: str | None = typer.Option(None, "--url", help=f"Server (default: SPECTRAL_URL or {http.DEFAULT_URL})."),
    model: str | None = typer.Option(None, "--model", help="Model (default: the server's first)."),
    api_key: str | None = typer.Option(None, "--api-key", help="Key (default: SPECTRAL_API_KEY)."),
    trace: Path | None = typer.Option(
        None, "--trace", help="CSV with TIMESTAMP, ContextTokens and GeneratedTokens to replay."
    ),
    speed: float = typer.Option(1.0, "--speed", min=1e-6, help="Replay a trace this many times as fast."),
    max_context: int | None = typer.Option(
        None, "--max-context", min=2, help="Shorten a trace's prompts so that prompt and answer fit (tokens)."
    ),
    rate: float | None = typer.Option(None, "--rate", min=1e-6, help="Requests a second, Poisson arrivals."),
    concurrency: int | None = typer.Option(None, "--concurrency", min=1, help="Keep so many requests going instead."),
    requests: int | None = typer.Option(None, "--requests", min=1, help="Requests (default: 100, or the whole trace)."),
    prompt_tokens: int = typer.Option(256, "--prompt-tokens", min=1, help="About so many tokens of prompt."),
    output_tokens: int = typer.Option(64, "--output-tokens", min=1, help="Most tokens of an answer."),
    shared_prefix: int = typer.Option(0, "--shared-prefix", min=0, help="Tokens that all prompts begin with alike."),
    completions: bool = typer.Option(False, "--completions", help="Use /v1/completions instead of chat."),
    usage: bool = typer.Option(True, "--usage/--no-usage", help="Ask for token counts in streams."),
    slo_ttft: float | None = typer.Option(None, "--slo-ttft", min=0, help="Objective: seconds to the first token."),
    slo_tpot: float | None = typer.Option(None, "--slo-tpot", min=0, help="Objective: seconds per output token."),
    timeout: float = typer.Option(600.0, "--timeout", min=0.1, help="Seconds without an event until a request fails."),
    seed: int = typer.Option(0, "--seed", help="Of arrivals and prompts."),
    plot_folder: Path | None = typer.Option(None, "--plots", help="Folder for load.png and load.svg (extra `plots`)."),
    save: Path | None = typer.Option(None, "--save", help="File for the figures and every request's, as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
) -> None:
    """Put a load on an OpenAI-compatible server: times to and between tokens, throughput, goodput at an objective.

    Ctrl-C ends it early and shows what was measured. Exit status 1: no request was answered to its end.
    """
    from spectral.commands import bench_load, bench_report
    from spectral.commands.bench_client import Load, Target

    check_options(trace, rate, concurrency)
    check_numbers(
        {"--speed": speed, "--rate": rate, "--slo-ttft": slo_ttft, "--slo-tpot": slo_tpot, "--timeout": timeout},
        {"--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens, "--shared-prefix": shared_prefix},
    )
    target = Target(*check_server(url, model, api_key), not completions, usage, timeout)
    if trace is not None:
        planned = bench_load.read_trace(trace, requests=requests, speed=speed, max_context=max_context)
    else:
        planned = bench_load.at_rate(rate, requests or 100, prompt_tokens, output_tokens, seed)
    check_outputs(save, plot_folder, trace)
    load = Load(target, concurrency, shared=shared_prefix, seed=seed)
    stopped = run_load(load, planned)
    options = {
        "url": target.url, "model": load.target.model, "endpoint": target.path, "seed": seed,
        "shared_prefix": shared_prefix, "rate": rate, "concurrency": concurrency,
        "trace": trace.name if trace else None, "speed": speed,
    }  # fmt: skip
    course = {"planned": len(planned), "stopped": stopped, "unfinished": load.begun - len(load.measured)}
    figures = {"options": options, **course, **bench_report.report(load.measured, slo_ttft, slo_tpot)}
    give(figures, load.measured, as_json, save, plot_folder)
    if stopped or not figures["completed"]:
        raise typer.Exit(130 if stopped else 1)


def check_options(trace: Path | None, rate: float | None, concurrency: int | None) -> None:
    """Refuse what contradicts itself."""
    if trace is not None and rate is not None:
        raise typer.BadParameter("a trace has its own times; use --speed instead", param_hint="--rate")
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("choose one of --rate and --concurrency", param_hint="--concurrency")


def check_numbers(numbers: dict[str, float | None], tokens: dict[str, int]) -> None:
    """Refuse what passes for a number and measures nothing: nan, inf, and prompts that no memory holds."""
    from spectral.commands.bench_load import MOST_TOKENS

    for option, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"must be a finite number, got {number}", param_hint=option)
    for option, count in tokens.items():
        if count > MOST_TOKENS:
            raise typer.BadParameter(f"must be at most {MOST_TOKENS} tokens", param_hint=option)


def check_server(url: str | None, model: str | None, api_key: str | None) -> tuple[str, str | None, str | None]:
    """Address, model and key, of the options or the environment. Raises ServerError or BadParameter for those that no
    request can carry."""
    key, named = (api_key, "--api-key") if api_key else (os.environ.get("SPECTRAL_API_KEY"), "SPECTRAL_API_KEY")
    if model is not None and model != model.encode(errors="replace").decode():
        raise typer.BadParameter("must be text in UTF-8", param_hint="--model")
    return http.check_address(http.resolve_url(url)), model or None, http.check_key(key, named) if key else None


def check_outputs(save: Path | None, plot_folder: Path | None, trace: Path | None) -> None:
    """Refuse what cannot be written, before time is spent on a load. Makes the folder of the plots; raises
    SpectralError."""
    if plot_folder is not None:
        from spectral.commands.bench_report import PLOTS
        from spectral.plots import require_matplotlib

        require_matplotlib("--plots")
        try:
            plot_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_be_written("--plots", plot_folder, error) from error
        for name in PLOTS:
            check_writable("--plots", plot_folder / name)
    if save is not None:
        check_writable("--save", save)
        if trace is not None and save.exists() and save.samefile(trace):
            raise SpectralError(f"--save: {save} is the trace, which would be lost; name another file")


def check_writable(option: str, path: Path) -> None:
    """Open a file as if to write it, and leave it as it was. Raises SpectralError."""
    try:
        new = not path.exists()
        if new or not stat.S_ISFIFO(path.stat().st_mode):  # a pipe would wait here for its reader
            path.open("ab").close()
        if new:
            path.resolve().unlink()  # of a link that led nowhere, what it leads to
    except OSError as error:
        raise cannot_be_written(option, path, error) from error


def cannot_be_written(option: str, path: Path, error: OSError) -> SpectralError:
    """The error for a place that takes no output."""
    return SpectralError(
        f"{option}: {path} cannot be written ({error.strerror or error}); name a place that exists and can be written"
    )


def run_load(load: Load, planned: list[Planned]) -> bool:
    """Run it; True if Ctrl-C ended it, with something measured or under way. Raises ServerError."""
    import asyncio

    try:
        asyncio.run(load.run(planned))
    except KeyboardInterrupt:
        if not load.begun:
            raise
        return True
    return False


def give(
    figures: dict[str, Any], measured: list[Measured], as_json: bool, save: Path | None, plot_folder: Path | None
) -> None:
    """Write and print what was measured. Neither a file that cannot be written nor a closed standard output costs the
    other; raises SpectralError for files at the end."""
    from spectral.commands import bench_report

    faults: list[SpectralError] = []
    if save is not None:
        try:
            save.write_text(json.dumps({**figures, "each": bench_report.each(measured)}, indent=2) + "\n", "utf-8")
        except OSError as error:
            faults.append(cannot_be_written("--save", save, error))
    text = json.dumps(figures, indent=2) if as_json else "\n".join(bench_report.lines(figures))
    encoding = sys.stdout.encoding or "utf-8"  # a server's message may have letters that this terminal has not
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))
    if plot_folder is not None:
        try:
            bench_report.plots(measured, plot_folder)
        except OSError as error:
            faults.append(cannot_be_written("--plots", plot_folder, error))
    if faults:
        raise SpectralError("; ".join(map(str, faults)))

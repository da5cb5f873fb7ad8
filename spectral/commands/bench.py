"""`spectral bench serve`: a load on any OpenAI-compatible server, replayed from a trace or drawn at a rate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer

from spectral.commands import client as http
from spectral.commands.plain import App

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
    timeout: float = typer.Option(600.0, "--timeout", min=0.1, help="Seconds without a byte until a request fails."),
    seed: int = typer.Option(0, "--seed", help="Of arrivals and prompts."),
    plot_folder: Path | None = typer.Option(None, "--plots", help="Folder for load.png and load.svg (extra `plots`)."),
    save: Path | None = typer.Option(None, "--save", help="File for the figures and every request's, as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
) -> None:
    """Put a load on an OpenAI-compatible server: times to and between tokens, throughput, goodput at an objective."""
    import asyncio

    from spectral.commands import bench_load, bench_report
    from spectral.commands.bench_client import Load, Target

    if plot_folder is not None:
        from spectral.plots import require_matplotlib

        require_matplotlib("--plots")
    check_options(trace, rate, concurrency)
    if trace is not None:
        planned = bench_load.read_trace(trace, requests=requests, speed=speed, max_context=max_context)
    else:
        planned = bench_load.at_rate(rate, requests or 100, prompt_tokens, output_tokens, seed)
    key = api_key or os.environ.get("SPECTRAL_API_KEY")
    model = model or first_model(url, key)
    target = Target(http.resolve_url(url), model, key, not completions, usage, timeout)
    measured = asyncio.run(Load(target, concurrency, shared=shared_prefix, seed=seed).run(planned))
    options = {
        "url": target.url, "model": model, "endpoint": target.path, "seed": seed, "shared_prefix": shared_prefix,
        "rate": rate, "concurrency": concurrency, "trace": trace.name if trace else None, "speed": speed,
    }  # fmt: skip
    figures = {"options": options, **bench_report.report(measured, slo_ttft, slo_tpot)}
    if save is not None:
        text = json.dumps({**figures, "each": bench_report.each(measured)}, indent=2)
        save.write_text(text + "\n", encoding="utf-8")
    if plot_folder is not None:
        bench_report.plots(measured, plot_folder)
    typer.echo(json.dumps(figures, indent=2) if as_json else "\n".join(bench_report.lines(figures)))
    if not figures["completed"]:
        raise typer.Exit(1)


def check_options(trace: Path | None, rate: float | None, concurrency: int | None) -> None:
    """Refuse what contradicts itself."""
    if trace is not None and rate is not None:
        raise typer.BadParameter("a trace has its own times; use --speed instead", param_hint="--rate")
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("choose one of --rate and --concurrency", param_hint="--concurrency")


def first_model(url: str | None, key: str | None) -> str:
    """The first model that the server lists. Raises ServerError."""
    with http.open_client(url) as client:
        if key:
            client.headers["Authorization"] = f"Bearer {key}"
        return http.first_model(client)

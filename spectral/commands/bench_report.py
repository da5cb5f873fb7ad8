"""Figures of a load test, from what was measured; and their plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral.commands.bench_client import Measured
from spectral.commands.bench_load import percentile

SHOWN = (50, 75, 90, 95, 99)
ALL = (*range(1, 100), 99.9, 100)

PLOTS = ("load.png", "load.svg")
MOST_ERRORS = 10
"""Kinds of errors that are shown to people; servers may put a number of their own into every message."""

METRICS = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "gap_s": "gap between pieces",
    "latency_s": "whole answer",
}


def series(done: Sequence[Measured]) -> dict[str, list[float]]:
    """The samples behind each metric, seconds."""
    gaps = [b - a for m in done for a, b in zip(m.chunks, m.chunks[1:], strict=False)]
    return {
        "ttft_s": [m.ttft for m in done],
        "tpot_s": [tpot for m in done if (tpot := m.tpot) is not None],
        "gap_s": gaps,
        "latency_s": [m.ended - m.sent for m in done],
    }


def summary(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, least and all percentiles; None without samples."""
    if not values:
        return None
    levels = {f"{share:g}": percentile(values, share) for share in ALL}
    return {"count": len(values), "mean": sum(values) / len(values), "min": min(values), "percentiles": levels}


def report(measured: Sequence[Measured], slo_ttft: float | None, slo_tpot: float | None) -> dict[str, Any]:
    """JSON-ready figures. Goodput: requests that meet both objectives, a second and as a share of all sent."""
    done = [m for m in measured if not m.error]
    begin = min((m.sent for m in measured), default=0.0)
    seconds = max((m.ended for m in measured), default=0.0) - begin
    prompt, output = sum(m.prompt_tokens for m in done), sum(m.output_tokens for m in done)

    def good(m: Measured) -> bool:
        tpot = m.tpot
        return (slo_ttft is None or m.ttft <= slo_ttft) and (slo_tpot is None or tpot is None or tpot <= slo_tpot)

    met = sum(good(m) for m in done)
    rate = 1 / seconds if seconds > 0 else 0.0
    return {
        "requests": len(measured),
        "completed": len(done),
        "failed": len(measured) - len(done),
        "errors": dict(Counter(m.error for m in measured if m.error)),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_second": len(done) * rate,
        "output_tokens_per_second": output * rate,
        "tokens_per_second": (prompt + output) * rate,
        "slo": {"ttft_s": slo_ttft, "tpot_s": slo_tpot},
        "goodput": {"requests_per_second": met * rate, "share": met / len(measured) if measured else 0.0},
        **{name: summary(values) for name, values in series(done).items()},
    }


def each(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Every request, JSON-ready."""
    return [
        {
            "at": m.planned.at,
            "sent": m.sent,
            "ended": m.ended,
            "error": m.error,
            "ttft_s": m.ttft if m.chunks else None,
            "tpot_s": m.tpot if m.chunks else None,
            "prompt_tokens": m.prompt_tokens,
            "output_tokens": m.output_tokens,
        }
        for m in measured
    ]


def lines(figures: dict[str, Any]) -> list[str]:
    """The report for people. `figures`: those of `report`, with `planned`, `stopped` and `unfinished` requests."""
    out = []
    if figures["stopped"]:
        out.append(
            f"stopped early: of {figures['planned']} requests {figures['requests']} had ended, and "
            f"{figures['unfinished']} that were going are left out of what follows"
        )
    out.append(
        f"{figures['completed']} of {figures['requests']} requests in {figures['seconds']:.1f} s: "
        f"{figures['requests_per_second']:.2f} requests/s, {figures['output_tokens_per_second']:.1f} output tokens/s, "
        f"{figures['tokens_per_second']:.1f} tokens/s in all"
    )
    slo = {name: value for name, value in figures["slo"].items() if value is not None}
    if slo:
        asked = ", ".join(f"{name.removesuffix('_s')} <= {value:g} s" for name, value in slo.items())
        goodput = figures["goodput"]
        met = f"{goodput['requests_per_second']:.2f} requests/s, {goodput['share']:.1%} of all"
        out.append(f"goodput at {asked}: {met}")
    if figures["completed"]:
        heads = ("mean", *(f"p{p}" for p in SHOWN), "max")
        out.append(f"{'milliseconds':24}" + "".join(f"{name:>10}" for name in heads))
    for name, title in METRICS.items():
        if figures[name] is not None:
            levels = figures[name]["percentiles"]
            row = [figures[name]["mean"], *(levels[str(p)] for p in SHOWN), levels["100"]]
            out.append(f"{title:24}" + "".join(f"{1000 * value:10.1f}" for value in row))
    errors = Counter(figures["errors"]).most_common()
    out += [f"{count} x {error}" for error, count in errors[:MOST_ERRORS]]
    if rest := sum(count for _, count in errors[MOST_ERRORS:]):
        out.append(f"{rest} x other errors (--json has them all)")
    return out


def plots(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Write load.png and load.svg: how the metrics are distributed, and the answers over time. Raises SpectralError
    without matplotlib, OSError."""
    from spectral.plots import require_matplotlib

    require_matplotlib("--plots")
    from matplotlib.figure import Figure

    done = [m for m in measured if not m.error]
    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    axes = figure.subplots(2, 2).flat
    samples = series(done)
    for axis, name in zip(axes, ("ttft_s", "tpot_s", "latency_s"), strict=False):
        values = sorted(1000 * value for value in samples[name])
        axis.plot(values, [(i + 1) / len(values) for i in range(len(values))])
        axis.set(title=METRICS[name], xlabel="milliseconds", ylabel="share of requests", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axis = figure.axes[3]
    axis.plot([m.sent for m in done], [1000 * m.ttft for m in done], ".", label="answered")
    failed = [m for m in measured if m.error]
    axis.plot([m.sent for m in failed], [0.0] * len(failed), "x", label="failed")
    axis.set(title="over time", xlabel="sent, seconds", ylabel="time to first token, ms")
    axis.legend()
    folder.mkdir(parents=True, exist_ok=True)
    out = [folder / name for name in PLOTS]
    for path in out:
        figure.savefig(path)
    return out

"""Plots of an evaluation: plain data in, matplotlib figures out.

matplotlib is the extra `plots` and is imported when a plot is made. Nothing here knows how profiles or reports are
kept: rows are dictionaries as in `spectral eval --json`, spectra are lists of shares, bit maps are 2-D arrays.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral.errors import SpectralError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Spectrum = Sequence["dict[str, Sequence[float]] | None"]
"""Per layer, None (sliding) or name -> variance shares, largest first."""

SIZE = (7.0, 4.2)
MOST_SERIES = 8
"""Rows drawn in the plot by distance; more would hide each other."""


def require_matplotlib(asked_by: str = "a plot") -> None:
    """Raise SpectralError that names the extra unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SpectralError(
            f"{asked_by} needs matplotlib: install the extra with `pip install 'spectral-serve[plots]'`, or do without"
        )


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.3)
    return figure, axes


def method_family(name: str) -> str:
    """ "oscar-int2" -> "oscar": rows of one method at several settings form one curve."""
    return re.sub(r"-(?:int|r|b|v|q)?\d[\w.]*", "", name)


def rate_distortion(rows: Sequence[dict[str, Any]]) -> Figure:
    """KL against the all-in ratio at the scored context: ours, and a curve per comparison (dashed: rebuilt first)."""
    figure, axes = _axes("Quality against compression", "all-in ratio against bf16", "mean KL, nats per token")
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["name"] != "exact" and (row["kl_mean"] or 0) > 0 and row["ratio"]:
            families.setdefault("ours" if row["ours"] else method_family(row["name"]), []).append(row)
    for number, (family, members) in enumerate(sorted(families.items(), key=lambda item: item[0] != "ours")):
        members = sorted(members, key=lambda row: row["ratio"])
        ours = family == "ours"
        axes.plot(
            [row["ratio"] for row in members],
            [row["kl_mean"] for row in members],
            marker="o" if ours else "sv^D<>pPX*"[number % 10],
            markersize=6 if ours else 4,
            linewidth=2.5 if ours else 1,
            linestyle="-" if ours or members[0]["in_attention"] else "--",
            color="#c2410c" if ours else None,
            zorder=5 if ours else 2,
            label="Spectral" if ours else family,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64) if families]
    axes.set_xticks(ticks, [f"{t}x" for t in ticks])
    if families:
        axes.legend(fontsize=7, ncols=2)
    return figure


def error_by_distance(rows: Sequence[dict[str, Any]]) -> Figure:
    """Mean KL by position in the context: of our rows, or of the first rows when none is ours."""
    figure, axes = _axes("Error by position", "position in the context, tokens", "mean KL, nats per token")
    wanted = [row for row in rows if row.get("kl_by_position") and row["name"] != "exact"]
    for row in sorted(wanted, key=lambda row: not row["ours"])[:MOST_SERIES]:
        middle = [(part["from"] + part["to"]) / 2 for part in row["kl_by_position"]]
        axes.plot(middle, [part["kl_mean"] for part in row["kl_by_position"]], marker=".", label=row["name"])
    if wanted:
        axes.set_yscale("log")
        axes.legend(fontsize=7)
    return figure


def spectrum_plot(spectrum: Spectrum) -> Figure:
    """Each layer's variance shares against the channel's rank, one panel per name (keys, values or both at once)."""
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = sorted({name for layer in spectrum if layer for name in layer})
    figure = Figure(figsize=(SIZE[0], SIZE[1]), layout="constrained")
    for number, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), number + 1)
        for index, layer in enumerate(spectrum):
            if layer and name in layer:
                shares = np.maximum(np.asarray(layer[name], dtype=np.float64), 1e-12)
                colour = colormaps["viridis"](index / max(1, len(spectrum) - 1))
                axes.plot(np.arange(1, len(shares) + 1), shares, color=colour, linewidth=1, label=f"layer {index}")
        axes.set_yscale("log")
        axes.set_title(f"Spectrum: {name}")
        axes.set_xlabel("channel, largest first")
        axes.grid(True, alpha=0.3)
        if number == 0:
            axes.set_ylabel("share of the layer's variance")
            axes.legend(fontsize=6, ncols=2)
    return figure


def bit_map(layers: Sequence[np.ndarray | None], setting: str = "") -> Figure:
    """Bits of every latent channel: one panel per layer, [frequencies, channels] int arrays (None: stays exact)."""
    require_matplotlib()
    from matplotlib.figure import Figure

    shown = [(index, np.atleast_2d(np.asarray(bits))) for index, bits in enumerate(layers) if bits is not None]
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.7 * max(1, len(shown))), layout="constrained")
    grid: list[Any] = list(figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0])
    top = max((int(bits.max()) for _, bits in shown), default=8)
    for axes, (index, bits) in zip(grid, shown, strict=False):
        image = axes.imshow(bits, aspect="auto", interpolation="nearest", vmin=0, vmax=max(1, top), cmap="magma")
        axes.set_ylabel(f"{index}", rotation=0, labelpad=10)
        axes.set_yticks([])
        axes.tick_params(axis="x", labelbottom=axes is grid[-1])
    if shown:
        grid[-1].set_xlabel("latent channel")
        figure.colorbar(image, ax=grid, label="bits")
    figure.suptitle(f"Bits per channel and layer{f', setting {setting}' if setting else ''}")
    return figure


def figures_of(
    report: dict[str, Any], spectrum: Spectrum, bits: Sequence[np.ndarray | None] | None, *, setting: str = ""
) -> dict[str, Figure]:
    """Every plot of a report (`EvalReport.to_dict`) by its file's name; no bit map where `bits` is None."""
    figures = {
        "rate-distortion": rate_distortion(report["rows"]),
        "error-by-position": error_by_distance(report["rows"]),
    }
    if any(layer for layer in spectrum):
        figures["spectrum"] = spectrum_plot(spectrum)
    if bits is not None:
        figures["bits"] = bit_map(bits, setting)
    return figures


def save_figures(figures: dict[str, Figure], folder: str | Path) -> list[Path]:
    """Write every figure as PNG and SVG into a folder, which is made when absent. Returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            if suffix == "svg":
                path.write_text(svg_of(figure), encoding="utf-8")
            else:
                figure.savefig(path, dpi=150)
            written.append(path)
    return written


def svg_of(figure: Figure) -> str:
    """A figure as one <svg> element: text stays text, no date and no random ids, so equal data give equal files."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spectral"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

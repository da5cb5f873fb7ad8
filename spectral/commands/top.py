"""`spectral top`: a live map of the memory of a running server's devices."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import typer

from spectral.commands import client as http
from spectral.commands.chat import human_bytes

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 60
MARKS = {"weights": "#", "kv": "=", "workspace": "+", "context": "c", "other": "~", "foreign": "x", "free": "."}
COLOURS = {
    "weights": "blue",
    "kv": "green",
    "workspace": "cyan",
    "context": "magenta",
    "other": "yellow",
    "foreign": "red",
    "free": "bright_black",
}


def parts_of(device: dict[str, Any]) -> list[tuple[str, int]]:
    """Bytes by kind of one device of GET /admin/vram, in the order of the map; zeros left out."""
    sizes = dict.fromkeys(MARKS, 0)
    for segment in device.get("segments", []):
        kind = segment["kind"] if segment["kind"] in sizes else "other"
        sizes[kind] += int(segment["bytes"])
    sizes["foreign"] = int(device.get("foreign_bytes", 0))
    sizes["free"] = int(device.get("free_bytes", 0))
    return [(kind, size) for kind, size in sizes.items() if size > 0]


def bar(parts: list[tuple[str, int]], width: int = WIDTH) -> list[tuple[str, int]]:
    """Cells by kind that add up to the width; whatever is there has at least one while there is room."""
    total = sum(size for _, size in parts) or 1
    cells = [(kind, max(1, round(size * width / total))) for kind, size in parts]
    while cells and (extra := sum(count for _, count in cells) - width) != 0:
        at = max(range(len(cells)), key=lambda i: cells[i][1])
        kind, count = cells[at]
        if count - extra < 1:
            break
        cells[at] = (kind, count - extra)
    return cells


def render(vram: dict[str, Any], ready: dict[str, Any]) -> Group:
    """The map, and a line for every model."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[Any] = []
    for device in vram.get("devices", []):
        parts = parts_of(device)
        head = f"{device['device']}  {device.get('name', '')}  {human_bytes(float(device['total_bytes']))}"
        if device.get("budget_bytes") is not None:
            head += f", budget {human_bytes(float(device['budget_bytes']))}"
        lines.append(Text(head + ("  (cannot be read now)" if device.get("stale") else ""), style="bold"))
        row = Text("  ")
        for kind, count in bar(parts):
            row.append(MARKS[kind] * count, style=COLOURS[kind])
        lines.append(row)
        lines.append(Text("  " + "  ".join(f"{MARKS[kind]} {kind} {human_bytes(float(size))}" for kind, size in parts)))
    table = Table(box=None, pad_edge=False)
    for column in ("model", "state", "setting", "KL", "weights", "cache", "lease", "run + wait"):
        table.add_column(column, no_wrap=True)
    for name, model in (ready.get("models") or {}).items():
        table.add_row(*model_row(name, model, vram.get("leases", {}).get(name)))
    lines += [Text(""), table]
    lines += [Text(f"note: {note}", style="yellow") for note in vram.get("notes", [])]
    return Group(*lines)


def model_row(name: str, model: dict[str, Any], lease: int | None) -> list[str]:
    """One model's cells; what the server does not know yet stays empty."""
    setting = model.get("setting") or {}
    size = lambda value: "" if value is None else human_bytes(float(value))  # noqa: E731
    work = f"{model['running']} + {model.get('queued', 0)}" if "running" in model else ""
    kl = setting.get("kl_mean")
    return [
        name,
        str(model.get("state", "")),
        str(setting.get("setting") or ""),
        "" if kl is None else f"{kl:.4f}",
        size(model.get("weights_bytes")),
        size(model.get("kv_bytes_used")),
        size(lease),
        work,
    ]


def top(
    url: str | None = typer.Option(None, "--url", help=f"Server (default: SPECTRAL_URL or {http.DEFAULT_URL})."),
    every: float = typer.Option(1.0, "--every", min=0.1, help="Seconds between readings."),
    once: bool = typer.Option(False, "--once", help="Print the map once."),
    as_json: bool = typer.Option(False, "--json", help="Print one reading as JSON."),
) -> None:
    """Show who holds which memory on every device, live. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    with http.open_client(url) as client:

        def read() -> tuple[dict[str, Any], dict[str, Any]]:
            return http.get_json(client, "/admin/vram"), http.get_json(client, "/ready", allowed=(200, 503))

        vram, ready = read()
        if as_json:
            typer.echo(json.dumps({**vram, "models": ready.get("models")}, indent=2))
            return
        console = Console()
        if once or not console.is_terminal:
            console.print(render(vram, ready))
            return
        with Live(render(vram, ready), console=console, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(every)
                live.update(render(*read()), refresh=True)

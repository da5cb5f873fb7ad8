"""One self-contained HTML page of an evaluation: inline SVG, no script, nothing fetched, light and dark."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1c1917; --paper: #fafaf9; --line: #d6d3d1; --ours: #ffedd5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e5e4; --paper: #1c1917; --line: #44403c; --ours: #431407; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 70rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th[scope=row], th:first-child { text-align: left; }
tr.ours { background: var(--ours); }
figure { margin: 2rem 0; background: #fff; border: 1px solid var(--line); border-radius: .4rem; padding: .5rem; }
figure svg { width: 100%; height: auto; }
figcaption { color: #444; padding: .3rem .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""

CAPTIONS = {
    "rate-distortion": "Mean KL against the all-in ratio; dashed lines rebuild the cache before attention.",
    "error-by-position": "Mean KL by position in the context.",
    "spectrum": "Each layer's variance by latent channel.",
    "bits": "Bits of every latent channel, layer by layer.",
}

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("Bytes/token", "bytes_per_token", "{:.1f}"),
    ("Ratio", "ratio", "{:.2f}x"),
    ("Without window", "ratio_without_window", "{:.2f}x"),
    ("KL mean", "kl_mean", "{:.5f}"),
    ("KL p99", "kl_p99", "{:.4f}"),
    ("Top-1", "top1", "{:.2%}"),
    ("Top-5 overlap", "top5_overlap", "{:.2%}"),
    ("Perplexity", "perplexity", "{:.4f}"),
    ("Recall", "recall", "{:.1%}"),
)


def _cell(value: Any, form: str) -> str:
    return "<td>–</td>" if value is None else f"<td>{escape(form.format(value))}</td>"


def _table(caption: str, heads: list[str], rows: list[tuple[str, str, list[str]]]) -> str:
    """A table with a caption and scoped headers; rows are (name, class, cells as HTML)."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr{f" class={kind!r}" if kind else ""}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>\n'
        for name, kind, cells in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _figures_table(rows: list[dict[str, Any]], context: int) -> str:
    out = []
    for row in rows:
        cells = [_cell(row.get(key), form) for _, key, form in COLUMNS]
        cells.append(_cell(row["basis_nbytes"] / 2**20, "{:.2f} MiB"))
        cells.append(f"<td>{'yes' if row['in_attention'] else 'no'}</td>")
        out.append((row["name"], "ours" if row["ours"] else "", cells))
    heads = ["Contender", *(head for head, _, _ in COLUMNS), "Bases", "In attention"]
    return _table(f"Quality and bytes at {context} tokens of context, against the exact cache", heads, out)


def _bytes_table(rows: list[dict[str, Any]], token_nbytes: int) -> str:
    contexts = list(rows[0]["bytes_per_token_at"]) if rows else []
    out = [
        (
            row["name"],
            "ours" if row["ours"] else "",
            [
                _cell(row["bytes_per_token_at"][c], f"{{:.1f}} ({token_nbytes / row['bytes_per_token_at'][c]:.2f}x)")
                for c in contexts
            ],
        )
        for row in rows
    ]
    return _table("All-in bytes per token (ratio) by context", ["Contender", *(f"{c} tokens" for c in contexts)], out)


def _recall_table(rows: list[dict[str, Any]]) -> str:
    buckets = sorted({(part["from"], part["to"]) for row in rows for part in row["recall_by_distance"]})
    out = []
    for row in rows:
        found = {(part["from"], part["to"]): part["recall"] for part in row["recall_by_distance"]}
        out.append((row["name"], "ours" if row["ours"] else "", [_cell(found.get(b), "{:.0%}") for b in buckets]))
    heads = ["Contender", *(f"{low}–{high}" for low, high in buckets)]
    return _table("Recall by distance in tokens", heads, out)


def _facts(report: dict[str, Any]) -> str:
    hardware = report.get("hardware", {})
    pairs = {
        "Model": report["model"],
        "Text": report["texts"],
        "Scored": f"{report['scored_tokens']} tokens, seed {report['seed']}, {report['chunk']} tokens fed at once",
        "Comparisons calibrated on": ", ".join(f"{k}: {v}" for k, v in (report["calibration"] or {}).items()),
        "Recall": ", ".join(f"{k}: {v}" for k, v in (report["recall"] or {}).items()),
        "Versions": ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()),
        "Commit": report.get("commit") or "",
        "Hardware": ", ".join(f"{k}: {v}" for k, v in hardware.items() if v is not None),
        "Command": report.get("command", ""),
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs.items() if v)
    return f"<dl>{items}</dl>"


def _inline(name: str, figure: Figure) -> str:
    """A figure as inline SVG with ids of its own (several SVGs share one page) and a text for screen readers."""
    from spectral.plots import svg_of

    svg = svg_of(figure)
    for identifier in set(re.findall(r'id="([^"]+)"', svg)):
        fresh = f"{name}-{identifier}"
        svg = svg.replace(f'id="{identifier}"', f'id="{fresh}"')
        svg = svg.replace(f'"#{identifier}"', f'"#{fresh}"').replace(f"url(#{identifier})", f"url(#{fresh})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    caption = escape(CAPTIONS.get(name, name))
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def html_report(report: dict[str, Any], figures: dict[str, Figure]) -> str:
    """The page. `report` is `EvalReport.to_dict()`; figures by name, as `spectral.plots.figures_of` makes them."""
    rows = report["rows"]
    title = f"Spectral: {report['model']} at {report['context']} tokens"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(report),
        _figures_table(rows, report["context"]),
        _bytes_table(rows, report["token_nbytes"]),
    ]
    if any(row.get("recall_by_distance") for row in rows):
        parts.append(_recall_table(rows))
    parts += [_inline(name, figure) for name, figure in figures.items()]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )

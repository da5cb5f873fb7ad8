"""Writes dashboards/grafana/*.json: `python tools/dashboards.py`. The dashboards are data; they are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "dashboards" / "grafana"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24


def target(expr: str, legend: str) -> dict[str, Any]:
    """One query."""
    return {"datasource": SOURCE, "expr": expr, "legendFormat": legend, "refId": ""}


def panel(
    title: str,
    queries: list[tuple[str, str]],
    *,
    unit: str = "short",
    kind: str = "timeseries",
    width: int = 12,
    stacked: bool = False,
    text: str = "",
    limits: list[tuple[float, str]] | None = None,
) -> dict[str, Any]:
    """A panel; `limits` are (value, colour) from which the colour applies."""
    targets = [{**target(expr, legend), "refId": chr(65 + i)} for i, (expr, legend) in enumerate(queries)]
    steps = [
        {"color": "green", "value": None},
        *({"color": colour, "value": value} for value, colour in limits or []),
    ]
    custom: dict[str, Any] = {"fillOpacity": 60 if stacked else 10, "lineWidth": 1, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    defaults: dict[str, Any] = {"unit": unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if kind == "timeseries":
        defaults["custom"] = custom
    options: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"showLegend": True}}
    if kind in ("stat", "bargauge"):
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "textMode": "auto"}
    fields = {"defaults": defaults, "overrides": []}
    head = {"title": title, "type": kind, "description": text, "datasource": SOURCE, "width": width}
    return {**head, "targets": targets, "fieldConfig": fields, "options": options}


def dashboard(uid: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    """Panels laid out in rows of the grid; the event log's entries are annotations."""
    x = y = 0
    placed = []
    for number, item in enumerate(panels, start=1):
        item = dict(item)
        width = item.pop("width")
        if x + width > WIDTH:
            x, y = 0, y + 8
        placed.append({"id": number, "gridPos": {"h": 8, "w": width, "x": x, "y": y}, **item})
        x += width
    kinds = "squeeze|relax|evict|sleep|wake|setting|profile|worker_lost"
    moves = {
        "name": "Moves",
        "enable": True,
        "iconColor": "orange",
        "datasource": SOURCE,
        "expr": f'sum by (kind, model) (increase(spectral_events_total{{kind=~"{kinds}", model=~"$model"}}[1m])) > 0',
        "titleFormat": "{{kind}} {{model}}",
        "step": "60s",
    }
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "model",
            "type": "query",
            "label": "Model",
            "datasource": SOURCE,
            "query": {"query": "label_values(spectral_model_state, model)", "refId": "model"},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
        },
    ]
    return {
        "uid": uid,
        "title": title,
        "tags": ["spectral"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "editable": True,
        "annotations": {"list": [moves]},
        "templating": {"list": variables},
        "panels": placed,
    }


def quantile(q: float, metric: str) -> str:
    """A quantile of a histogram, per model."""
    rate = f'rate({metric}_bucket{{model=~"$model"}}[$__rate_interval])'
    return f"histogram_quantile({q}, sum by (model, le) ({rate}))"


OF_MODEL = '{model=~"$model"}'
RATE = "[$__rate_interval]"

# Where the bytes are and what quality they buy.
MEMORY = [
    panel(
        "Memory map",
        [
            (
                'sum by (device, kind, model) (spectral_device_memory_bytes{kind!="free"})',
                "{{device}} {{kind}} {{model}}",
            ),
            ('sum by (device) (spectral_device_memory_bytes{kind="free"})', "{{device}} free"),
        ],
        unit="bytes",
        stacked=True,
        width=16,
        text="Everything that a device holds; together it is the device.",
    ),
    panel(
        "Free",
        [
            (
                '1 - spectral_device_memory_bytes{kind="free"} / on (device) group_left '
                "spectral_device_memory_total_bytes",
                "{{device}}",
            )
        ],
        unit="percentunit",
        kind="bargauge",
        width=8,
        limits=[(0.9, "orange"), (0.97, "red")],
        text="Part of each device in use.",
    ),
    panel(
        "Cache in use",
        [
            (f"spectral_kv_used_bytes{OF_MODEL}", "{{model}} used"),
            (f"spectral_kv_allocated_bytes{OF_MODEL}", "{{model}} allocated"),
        ],
        unit="bytes",
    ),
    panel(
        "Nodes",
        [("spectral_cluster_nodes", "{{state}}")],
        text="Of a cluster, as each gateway sees them; its devices are named node/device.",
    ),
    panel(
        "Requests sent again after the loss of a replica",
        [(f"rate(spectral_requests_sent_again_total{OF_MODEL}{RATE})", "{{model}}")],
    ),
    panel("Tokens in the cache", [(f"spectral_kv_tokens{OF_MODEL}", "{{model}}")]),
    panel(
        "Prompts found in the cache",
        [
            (
                f"rate(spectral_prefix_reused_tokens_total{OF_MODEL}{RATE})"
                f" / rate(spectral_prefix_asked_tokens_total{OF_MODEL}{RATE})",
                "{{model}}",
            )
        ],
        unit="percentunit",
    ),
    panel(
        "Kept and parked",
        [
            (f"spectral_prefix_bytes{OF_MODEL}", "{{model}} prefixes"),
            (f"spectral_parked_bytes{OF_MODEL}", "{{model}} parked in host memory"),
        ],
        unit="bytes",
    ),
    panel(
        "Cache, times smaller than uncompressed",
        [
            (
                f"spectral_setting_exact_bytes_per_token{OF_MODEL} / spectral_setting_bytes_per_token{OF_MODEL}",
                "{{model}}",
            ),
        ],
        unit="none",
        width=8,
    ),
    panel(
        "Measured KL of the setting",
        [(f"spectral_setting_kl_nats{OF_MODEL}", "{{model}}")],
        unit="none",
        width=8,
        text="Nats per token against the exact cache, as the profile's ladder says.",
    ),
    panel(
        "Bits per element and rank",
        [
            (f"8 * spectral_setting_bytes_per_element{OF_MODEL}", "{{model}} bits"),
            (f"spectral_setting_rank{OF_MODEL}", "{{model}} rank"),
        ],
        width=8,
    ),
    panel(
        "Settings in use",
        [(f"spectral_setting_info{OF_MODEL}", "{{model}} {{setting}} {{profile}}")],
        kind="stat",
        width=12,
    ),
    panel(
        "Moves",
        [
            (
                'sum by (kind) (increase(spectral_events_total{kind!="state", model=~"$model"}[$__rate_interval]))',
                "{{kind}}",
            )
        ],
        width=12,
    ),
]

# Latency, queue, tokens and errors.
TRAFFIC = [
    panel(
        "Models by state",
        [('sum by (state) (spectral_model_state{model=~"$model"})', "{{state}}")],
        kind="stat",
        width=8,
    ),
    panel(
        "Requests",
        [(f"sum by (model, status) (rate(spectral_requests_total{OF_MODEL}{RATE}))", "{{model}} {{status}}")],
        unit="reqps",
        width=8,
    ),
    panel(
        "Errors",
        [(f"sum by (model, code) (rate(spectral_request_errors_total{OF_MODEL}{RATE}))", "{{model}} {{code}}")],
        unit="reqps",
        width=8,
    ),
    panel(
        "Time to first token",
        [
            (quantile(0.5, "spectral_time_to_first_token_seconds"), "{{model}} median"),
            (quantile(0.99, "spectral_time_to_first_token_seconds"), "{{model}} p99"),
        ],
        unit="s",
    ),
    panel(
        "Between tokens",
        [
            (quantile(0.5, "spectral_inter_token_latency_seconds"), "{{model}} median"),
            (quantile(0.99, "spectral_inter_token_latency_seconds"), "{{model}} p99"),
        ],
        unit="s",
    ),
    panel(
        "Tokens",
        [
            (f"sum by (model) (rate(spectral_generated_tokens_total{OF_MODEL}{RATE}))", "{{model}} generated"),
            (f"sum by (model) (rate(spectral_prompt_tokens_total{OF_MODEL}{RATE}))", "{{model}} prompts"),
        ],
    ),
    panel(
        "Queue",
        [
            (f"spectral_running_sequences{OF_MODEL}", "{{model}} running"),
            (f"spectral_queued_requests{OF_MODEL}", "{{model}} queued"),
            (f"spectral_waiting_requests{OF_MODEL}", "{{model}} waiting for a load"),
        ],
    ),
    panel(
        "Whole answers",
        [
            (quantile(0.5, "spectral_answer_duration_seconds"), "{{model}} median"),
            (quantile(0.99, "spectral_answer_duration_seconds"), "{{model}} p99"),
        ],
        unit="s",
        width=8,
    ),
    panel("Loads", [(quantile(0.9, "spectral_model_load_duration_seconds"), "{{model}} p90")], unit="s", width=8),
    panel(
        "Loads and restarts",
        [
            (
                f"sum by (model, outcome) (increase(spectral_model_loads_total{OF_MODEL}[1h]))",
                "{{model}} {{outcome}}",
            ),
            (f"sum by (model) (increase(spectral_worker_restarts_total{OF_MODEL}[1h]))", "{{model}} restarts"),
        ],
        width=8,
    ),
    panel("Ends of answers", [(f"sum by (reason) (rate(spectral_answers_total{OF_MODEL}{RATE}))", "{{reason}}")]),
    panel(
        "Gateway",
        [
            ("rate(process_cpu_seconds_total" + RATE + ")", "processor"),
            ("process_resident_memory_bytes / 1e9", "memory (GB)"),
        ],
    ),
]


def files() -> dict[str, str]:
    """Each file's name and content."""
    made = {
        "memory.json": dashboard("spectral-memory", "Spectral: memory and quality", MEMORY),
        "traffic.json": dashboard("spectral-traffic", "Spectral: traffic", TRAFFIC),
    }
    return {name: json.dumps(content, indent=1) + "\n" for name, content in made.items()}


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()

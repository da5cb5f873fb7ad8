"""What a bench of the server says of its run beside the figures, and where the result goes. Does not import torch."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from spectral.provenance import cpu_name, git_commit


def run_facts() -> dict[str, Any]:
    """The command, commit and machine of this run."""
    return {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def deliver(result: dict[str, Any], path: Path | None) -> None:
    """Print a result, and write it where it is wanted."""
    text = json.dumps(result, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")


def time_per_byte(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows of bench/kernels.py that hold as many tokens in all: nanoseconds a kilobyte of codes and window against
    the tokens of a row, and the longest time over the shortest (asked: within 20 % from 4,096 to 262,144)."""
    kinds: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        kind = row["setting"], row["prefer"], row["rows"] * row["context"]
        kinds.setdefault(kind, {})[row["context"]] = 1e6 * row["us"] / row["codes_and_window_bytes"]
    return [
        {
            "setting": setting,
            "prefer": prefer,
            "tokens": tokens,
            "ns_per_kb": {str(context): round(times[context], 4) for context in sorted(times)},
            "spread": max(times.values()) / min(times.values()),
        }
        for (setting, prefer, tokens), times in kinds.items()
        if len(times) > 1
    ]

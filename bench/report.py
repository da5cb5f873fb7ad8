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

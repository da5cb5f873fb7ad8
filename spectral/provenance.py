"""Where a measured figure comes from: versions, commit, hardware, threads and the command that was run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from spectral import __version__


def provenance(device: str = "cpu") -> dict[str, Any]:
    """JSON-ready facts about this process: `versions`, `commit` (None outside a checkout), `hardware`, `command`."""
    import torch
    import transformers

    hardware: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": device, "gpu": None}
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return {
        "versions": {
            "spectral": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": git_commit(),
        "hardware": hardware,
        "command": command_line(),
    }


def command_line() -> str:
    """How this process was started; absolute paths by their last name: folders of one machine tell nobody else
    anything."""
    return " ".join([Path(sys.argv[0]).name, *(x if x[:1] != "/" else Path(x).name for x in sys.argv[1:])])


def config_sha256(config: Any) -> str:
    """Hash of a transformers configuration, the same wherever the model lies and whichever version read it."""
    facts = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        facts.pop(name, None)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cpu_name() -> str:
    """The processor's name and how many logical CPUs this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} logical CPUs"


def git_commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files have changed; None in an installed package or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

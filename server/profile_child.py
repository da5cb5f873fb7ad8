"""A process of its own for work on profiles: `python -m server.profile_child check FILE` or `... build ARGUMENTS`.

check: read and validate a file within limits of memory and time, and print its facts as one line of JSON.
build: `spectral profile build ARGUMENTS`; it ends when its standard input is closed, so that it never outlives the
server, not even one that was killed.

Exit statuses: 0; 2 with the reason on stderr where the profile or the model is refused; others: the process failed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from typing import Any

SPECTRUM_POINTS = 128
"""Points that are kept of a unit's spectrum: enough for a plot, and bounded for any model."""


def check(path: str, memory: int, seconds: int) -> int:
    """Validate a file with at most `memory` bytes of address space and `seconds` of processor time."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from spectral.errors import ProfileError
    from spectral.profile import SpectralProfile

    try:
        facts = SpectralProfile.load(path).to_dict()
    except ProfileError as error:
        print(str(error).replace(f"profile {path}", "the file").replace(path, "the file"), file=sys.stderr)
        return 2
    except MemoryError:
        print(f"the file needs more than {memory} bytes of memory to be read", file=sys.stderr)
        return 2
    facts["spectrum"] = [None if layer is None else _thinned(layer) for layer in facts["spectrum"]]
    facts["layers"] = [None if layer is None else layer for layer in facts["layers"]]
    sys.stdout.write(json.dumps(facts, allow_nan=False))
    return 0


def _thinned(layer: dict[str, list[float]]) -> dict[str, Any]:
    """Each unit's shares at evenly spaced latents, and how many there are."""
    out: dict[str, Any] = {}
    for name, shares in layer.items():
        step = max(1, -(-len(shares) // SPECTRUM_POINTS))
        out[name] = {"latents": len(shares), "step": step, "shares": shares[::step]}
    return out


def build(arguments: list[str]) -> None:
    """Run the command; never returns."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(10)  # whoever is answered now goes first
    from spectral.cli import main

    sys.argv = ["spectral", "profile", "build", *arguments]
    main()


def _end_with_parent() -> None:
    while os.read(0, 4096):
        continue
    os._exit(1)


def run(argv: list[str]) -> int:
    """Entry point."""
    command, *rest = argv
    if command == "check":
        path, memory, seconds = rest
        return check(path, int(memory), int(seconds))
    build(rest)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

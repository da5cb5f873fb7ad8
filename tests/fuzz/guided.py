"""`python -m tests.fuzz.guided --target NAME --seconds S`: coverage-guided fuzzing with atheris (extra `fuzz`).

Bytes that reach new branches of the server's and the library's parsers are kept and changed further. Ends with status 1
and the input where something is raised that no target expects; 2 where atheris is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

TARGETS = ("json_bytes", "frames", "profile_bytes", "config", "keys")


SEEDS = 300


def reader(name: str) -> tuple[Callable[[bytes], str], list[bytes]]:
    """What reads bytes for a target, and bytes to begin with."""
    from tests.fuzz.harness import randomness
    from tests.fuzz.targets import registry

    target = registry.load(name)
    made = [target.make(randomness(name, 0, number)) for number in range(SEEDS)]
    if name == "json_bytes":
        from tests.fuzz.targets.bodies import OLLAMA, OPENAI

        kinds = list(dict.fromkeys(schema for schema, _ in OPENAI + OLLAMA))
        seeds = [bytes([kinds.index(schema)]) + data for schema, data in made]
        return (lambda data: target.check((kinds[data[0] % len(kinds)], data[1:])) if data else "empty"), seeds
    if name == "frames":
        seeds = [bytes([to_parent]) + frame for to_parent, frame, _ in made]
        return (lambda data: target.check((bool(data[0] % 2), data[1:], 1 << 20)) if data else "empty"), seeds
    return target.check, made


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description="Coverage-guided fuzzing.")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--inputs", type=int, default=-1, help="at most so many")
    parser.add_argument("--corpus", help="folder of inputs to begin with and to add to; else one that is removed")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install 'spectral-serve[fuzz]'", file=sys.stderr)
        return 2
    if options.corpus is None:  # libFuzzer ends its process, so another one has to clean up
        with tempfile.TemporaryDirectory(prefix="spectral-corpus-") as folder:
            given = list(sys.argv[1:] if argv is None else argv)
            return subprocess.call([sys.executable, "-m", "tests.fuzz.guided", *given, "--corpus", folder])
    import atheris

    with atheris.instrument_imports(include=["server", "spectral", "yaml", "json"]):
        read, seeds = reader(options.target)
    limits = [f"-runs={options.inputs}", f"-max_total_time={options.seconds}", "-timeout=10", "-rss_limit_mb=3072"]
    for number, seed in enumerate(seeds):
        (Path(options.corpus) / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *limits, options.corpus], read)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

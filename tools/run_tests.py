"""All tests, in three parts that each have what they need of the machine: what `make test` runs.

    python tools/run_tests.py [--jobs 2]

What only computes runs in the background, at a low priority, and takes what the others leave. Beside it run those
that start servers and wait for them. What holds something to seconds (the mark `alone`) comes last, by itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPUTING = ["tests/docs", "tests/spectral"]
NOTHING_CHOSEN = 5
"""pytest's exit status where no test was chosen."""


def command(*arguments: str) -> list[str]:
    """pytest with these arguments."""
    return [sys.executable, "-m", "pytest", *arguments]


def modestly() -> None:
    """In the child: whoever else wants a core has it first."""
    with suppress(OSError):
        os.nice(10)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child that is no longer wanted; its own workers end with it."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def told(name: str, status: int, began: float) -> int:
    """Say how a part ended; 0 where it was well."""
    status = 0 if status == NOTHING_CHOSEN else status
    print(f"-- {name}: {'ok' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - began:.0f} s", flush=True)
    return status


def files_with(mark: str) -> list[str]:
    """The files outside COMPUTING that have a test with this mark; reading the others takes longer than many a test."""
    files = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if f"mark.{mark}" in path.read_text("utf-8"))
    names = (path.relative_to(ROOT).as_posix() for path in files)
    return [name for name in names if not name.startswith(tuple(f"{folder}/" for folder in COMPUTING))]


def run(jobs: int) -> int:
    """Run everything; the first status that is not 0, else 0."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Tests of one file that serves share its servers, so they stay together, and the longest files come first as they
    # are named; those that compute are handed from a busy process to an idle one.
    background = command("-n", str(jobs), "--dist", "worksteal", *COMPUTING)
    others = [f"--ignore={path}" for path in COMPUTING]
    waiting = command("-n", str(jobs), "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not alone", *others)
    print("== tests that compute run in the background and are shown when they have ended", flush=True)
    with tempfile.TemporaryFile() as output:
        computing = subprocess.Popen(
            background, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=modestly if hasattr(os, "nice") else None,
        )  # fmt: skip
        try:
            first = told("tests that wait", subprocess.run(waiting, cwd=ROOT, env=environment).returncode, began)
            second = computing.wait()
        finally:
            stop(computing)
        output.seek(0)
        sys.stdout.write(output.read().decode(errors="replace"))
        second = told("tests that compute", second, began)
    third = subprocess.run(command("-m", "alone", *files_with("alone")), cwd=ROOT, env=environment).returncode
    third = told("tests that have the machine to themselves", third, began)
    return first or second or third


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run all tests.")
    parser.add_argument("--jobs", type=int, default=2, help="processes of each part that has several")
    try:
        return run(parser.parse_args().jobs)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""Runs a target's inputs in a process of its own, bounded in time and memory, and reports what broke.

Input i of a seed is always the same, so a finding is repeated with `--first i --inputs 1`. The process writes the
number of the input at hand into a mapped file: whoever watches sees what it was working on when it died or hung, kills
it, counts that as a finding, and goes on behind it.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Protocol

GRACE_S = 5.0
"""Beyond a target's own limit: for inputs that hang where Python's signals are not heard."""

MOST_FINDINGS = 50
_STATE = struct.Struct("<qd")


class Target(Protocol):
    """One reader of foreign input.

    seconds, memory: what one input may take (wall clock, bytes of address space beyond the start).
    make: an input from randomness; check: "accepted" or "refused" (or another word to count), anything raised is a
    finding.
    """

    name: str
    seconds: float
    memory: int

    def make(self, random: Random) -> Any:
        """An input."""

    def check(self, item: Any) -> str:
        """What became of it."""

    def close(self) -> None:
        """Leave nothing behind."""


@dataclass
class Report:
    """What a run of one target found. Times in seconds, memory in bytes."""

    target: str
    seed: int
    inputs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest_input: int = -1
    memory_growth: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: dict[str, Any]) -> None:
        """Take in what a process reported."""
        self.inputs += part["inputs"]
        self.outcomes = dict(Counter(self.outcomes) + Counter(part["outcomes"]))
        if part["slowest_s"] > self.slowest_s:
            self.slowest_s, self.slowest_input = part["slowest_s"], part["slowest_input"]
        self.memory_growth = max(self.memory_growth, part["memory_growth"])
        self.findings += part["findings"]


class TooSlow(BaseException):
    """An input took longer than its target allows. No target may catch it, so it is no Exception."""


def randomness(name: str, seed: int, number: int) -> Random:
    """The randomness of one input."""
    return Random(f"{name}/{seed}/{number}")


def describe(error: BaseException) -> dict[str, str]:
    """A finding: what was raised and where."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return {"kind": type(error).__name__, "message": str(error)[:300], "where": where}


def run_here(target: Target, seed: int, first: int, count: int, state: mmap.mmap | None = None) -> dict[str, Any]:
    """Run inputs first .. first + count - 1 in this process, and stop after too many findings."""

    def too_slow(_: int, __: FrameType | None) -> None:
        raise TooSlow(f"over {target.seconds:g} s")

    outcomes: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    slowest, slowest_input, done = 0.0, -1, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handled = signal.signal(signal.SIGALRM, too_slow)
    for number in range(first, first + count):
        try:
            item = target.make(randomness(target.name, seed, number))
        except RecursionError:  # nested more deeply than it could be made: no input
            outcomes["not made"] += 1
            done += 1
            continue
        began = time.monotonic()
        if state is not None:
            state[: _STATE.size] = _STATE.pack(number, began)
        try:
            signal.setitimer(signal.ITIMER_REAL, target.seconds)
            try:
                outcome = target.check(item)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (Exception, TooSlow) as error:
            outcome = "finding"
            findings.append({"input": number, **describe(error)})
        took = time.monotonic() - began
        if took > slowest:
            slowest, slowest_input = took, number
        outcomes[outcome] += 1
        done += 1
        if len(findings) >= MOST_FINDINGS:
            break
    signal.signal(signal.SIGALRM, handled)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    facts = {"slowest_s": round(slowest, 6), "slowest_input": slowest_input, "memory_growth": growth}
    return {"inputs": done, "outcomes": dict(outcomes), "findings": findings, **facts}


def child(name: str, seed: int, first: int, count: int, state_file: str) -> None:
    """A process's work: one part of a run; prints its report as JSON."""
    from tests.fuzz.targets.registry import load

    target = load(name)
    target.check(target.make(randomness(name, seed, first)))  # imports and caches belong to the start
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + target.memory, size + target.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(state_file, "r+b") as file, mmap.mmap(file.fileno(), _STATE.size) as state:
        report = run_here(target, seed, first, count, state)
    target.close()
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


def run(name: str, limit_s: float, *, seed: int, first: int, count: int, part: int, until: float) -> Report:
    """Run a target's inputs, `part` to a process, until they are done or the clock (monotonic) says `until`."""
    report, began, number = Report(name, seed), time.monotonic(), first
    while number < first + count and time.monotonic() < until and len(report.findings) < MOST_FINDINGS:
        number += _one_process(name, limit_s, seed, number, min(part, first + count - number), report)
    report.seconds = round(time.monotonic() - began, 3)
    return report


def _one_process(name: str, limit_s: float, seed: int, first: int, count: int, report: Report) -> int:
    """Run one process; how many inputs are behind it."""
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryFile() as said:
        file.write(_STATE.pack(-1, 0.0))
        file.flush()
        command = [sys.executable, "-m", "tests.fuzz", "--child", name, str(seed), str(first), str(count), file.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, start_new_session=True) as process:
            stuck = _watch(process, Path(file.name), limit_s)
            out = process.stdout.read() if process.stdout is not None else b""
        at = _STATE.unpack(Path(file.name).read_bytes()[: _STATE.size])[0]
        if process.returncode == 0 and out:
            part = json.loads(out)
            report.add(part)
            return int(part["inputs"])
        said.seek(0)
        last = said.read()[-600:].decode("utf-8", "replace")
        if at < 0:
            raise RuntimeError(f"the target {name} does not start (status {process.returncode}): {last}")
        if at > first:  # what it had done before was lost with it
            _one_process(name, limit_s, seed, first, at - first, report)
        kind = "Hang" if stuck else f"Died({process.returncode})"
        report.findings.append({"input": at, "kind": kind, "message": last, "where": ""})
        report.inputs += 1
        return int(at - first + 1)


def _watch(process: subprocess.Popen[bytes], state: Path, limit_s: float) -> bool:
    """Wait for the end of a process; True where it had to be killed because one input took too long."""
    while True:
        try:
            process.wait(0.25)
        except subprocess.TimeoutExpired:
            number, began = _STATE.unpack(state.read_bytes()[: _STATE.size])
            if number < 0 or time.monotonic() - began < limit_s + GRACE_S:
                continue
            process.kill()
            process.wait()
            return True
        return False


def as_json(reports: list[Report]) -> dict[str, Any]:
    """What a run wrote down."""
    return {"inputs": sum(r.inputs for r in reports), "targets": [asdict(r) for r in reports]}

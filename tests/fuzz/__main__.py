"""`python -m tests.fuzz [--target NAME,...] [--inputs N] [--seconds S] [--seed N] [--json] [--output FILE]`.

Exit status: 0 where nothing was found, 1 with findings (each names the input; `--target T --seed S --first I --inputs
1` repeats it), 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import harness
from tests.fuzz.targets import registry


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--child"]:
        name, seed, first, count, state = given[1:]
        harness.child(name, int(seed), int(first), int(count), state)
    options = _parser().parse_args(given)
    names = list(registry.SHARES) if options.target == "all" else options.target.split(",")
    unknown = sorted(set(names) - set(registry.SHARES))
    if unknown:
        print(f"unknown targets: {', '.join(unknown)}; there are {', '.join(registry.SHARES)}", file=sys.stderr)
        return 2
    whole = sum(registry.SHARES[name] for name in names)
    reports = []
    for name in names:
        share = registry.SHARES[name] / whole
        count = max(1, round(options.inputs * share))
        until = time.monotonic() + (options.seconds * share if options.seconds else 1e9)
        limit = registry.load(name).seconds
        part = {"seed": options.seed, "first": options.first, "count": count, "part": options.part, "until": until}
        report = harness.run(name, limit, **part)
        reports.append(report)
        if not options.json:
            _tell(report)
    document = {**_provenance(), **harness.as_json(reports)}
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(document, indent=1))
    return 1 if any(report.findings for report in reports) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz whatever reads foreign input.")
    parser.add_argument("--target", default="all", help=f"all, or names: {', '.join(registry.SHARES)}")
    parser.add_argument("--inputs", type=int, default=100_000, help="in all; each target gets its share")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after about so long (0: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat a finding")
    parser.add_argument("--part", type=int, default=20_000, help="inputs to one process")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--output", help="write the report to this file as well")
    return parser


def _tell(report: harness.Report) -> None:
    words = ", ".join(f"{name} {count}" for name, count in sorted(report.outcomes.items()))
    print(
        f"{report.target:>14}: {report.inputs} inputs in {report.seconds:.1f} s ({words}); slowest "
        f"{report.slowest_s:.3f} s, memory +{report.memory_growth / 2**20:.0f} MiB, {len(report.findings)} findings",
        flush=True,
    )
    for found in report.findings:
        print(f"    input {found['input']}: {found['kind']}: {found['message']}\n        {found['where']}")


def _provenance() -> dict[str, object]:
    from spectral.provenance import provenance

    return {"benchmark": "fuzz", "provenance": provenance()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

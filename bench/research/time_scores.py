"""The score kernel's ways beside each other: time of the kernel and of the whole function, error against float64.

    python bench/research/time_scores.py [--ways old,joint,wide] [--settings 8x,16x] [--cases 32x32768,8x32768]

A way is a value of SPECTRAL_SCORES. Kernel times are means over five calls, by PyTorch's profiler; the function's are
medians of graph replays (bench/kernels.py, whose layer this is). Microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from kernels import BITS, microseconds, synthetic_codec  # noqa: E402

from spectral.kernels.check import Case  # noqa: E402
from spectral.kernels.decode import LayerKernels  # noqa: E402


def kernel_times(case: Case) -> dict[str, float]:
    """Microseconds of every kernel of a call, those of more than one."""
    calls = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            case.run()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / calls for event in profiler.key_averages()}
    return {name[:40]: round(us, 1) for name, us in found.items() if us > 1}


def measured(case: Case, once: bool) -> Iterator[tuple[str, Any]]:
    begin = time.monotonic()
    case.run()
    torch.cuda.synchronize()
    yield "first_s", round(time.monotonic() - begin, 1)
    if not once:
        yield "us", round(microseconds(case.run), 1)
        yield "error", case.error()
        yield "kernels", kernel_times(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="old,joint,unheld,wide,wide-unheld")
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--cases", default="32x32768,8x32768", help="rows x context")
    parser.add_argument("--once", action="store_true", help="compile only: several processes with a way each, at once")
    args = parser.parse_args()
    for setting in args.settings.split(","):
        kernels = LayerKernels(synthetic_codec(8, 128, BITS[setting], "cuda"))
        for case in args.cases.split(","):
            rows, context = (int(x) for x in case.split("x"))
            held = Case(kernels, rows, context, 4, torch.bfloat16)
            for way in args.ways.split(","):
                os.environ["SPECTRAL_SCORES"] = way
                found: dict[str, Any] = {"setting": setting, "case": case, "way": way}
                try:
                    found.update(measured(held, args.once))
                except Exception as error:  # a way that does not compile must not hide the others
                    found["failed"] = repr(error)[:500]
                print(json.dumps(found), flush=True)
            del held


if __name__ == "__main__":
    main()

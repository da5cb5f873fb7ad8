"""The score kernel's ways beside each other: time of the kernel and of the whole function, error against float64.

    python bench/research/time_scores.py [--ways old,joint] [--settings 8x,16x] [--cases 32x32768,8x32768]

A way is a value of SPECTRAL_SCORES. Kernel times are means over five calls, by PyTorch's profiler; the function's are
medians of graph replays (bench/kernels.py, whose layer this is). Microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

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
    return {name[:40]: round(us, 1) for name, us in found.items() if us > 1 and "kernel" in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="old,joint")
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--cases", default="32x32768,8x32768", help="rows x context")
    args = parser.parse_args()
    for setting in args.settings.split(","):
        kernels = LayerKernels(synthetic_codec(8, 128, BITS[setting], "cuda"))
        for case in args.cases.split(","):
            rows, context = (int(x) for x in case.split("x"))
            held = Case(kernels, rows, context, 4, torch.bfloat16)
            for way in args.ways.split(","):
                os.environ["SPECTRAL_SCORES"] = way
                begin = time.monotonic()
                try:
                    held.run()
                    torch.cuda.synchronize()
                    compiled = time.monotonic() - begin
                    found = {"us": round(microseconds(held.run), 1), "error": held.error(), "first_s": compiled}
                    found["kernels"] = kernel_times(held)
                except Exception as error:  # a way that does not compile must not hide the others
                    found = {"error": repr(error)[:500]}
                print(json.dumps({"setting": setting, "case": case, "way": way, **found}), flush=True)
            del held


if __name__ == "__main__":
    main()

"""Decode attention on codes launch by launch: time of every kernel beside that of the whole function.

    python bench/research/launch_times.py [--settings 8x,16x] [--prefer quality] [--cases 32x32768,8x32768]

The layer of bench/kernels.py. Kernels' times are means over five calls, by PyTorch's profiler; the function's is the
median of graph replays; microseconds. The error is against float64 on the same codes.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
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
    return {name[:40]: round(us, 1) for name, us in found.items() if us > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--prefer", default="quality", help="what the settings' profile is made for")
    parser.add_argument("--cases", default="32x32768,8x32768", help="rows x context")
    args = parser.parse_args()
    for prefer, setting in product(args.prefer.split(","), args.settings.split(",")):
        kernels = LayerKernels(synthetic_codec(8, 128, BITS[setting], "cuda", prefer))
        for name in args.cases.split(","):
            rows, context = (int(x) for x in name.split("x"))
            case = Case(kernels, rows, context, 4, torch.bfloat16)
            spent = round(microseconds(case.run), 1)
            found = {"prefer": prefer, "setting": setting, "case": name, "us": spent, "error": case.error()}
            print(json.dumps(found | {"kernels": kernel_times(case)}), flush=True)


if __name__ == "__main__":
    main()

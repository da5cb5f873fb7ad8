"""Decode attention on codes launch by launch: time of every kernel beside that of the whole function.

    python bench/research/launch_times.py [--settings 8x,16x] [--prefer quality] [--cases 32x32768,8x32768] [--graph]

The layer of bench/kernels.py. Kernels' times are means over five calls, by PyTorch's profiler; the function's is the
median of graph replays; microseconds. The error is against float64 on the same codes. With --graph the kernels are
those of a replay, in their order: when each begins, after the first one, and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import median

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


def replayed_times(case: Case) -> list[tuple[str, float, float]]:
    """Name, begin and time of every kernel of a graph replay: medians of nine."""
    case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run()
    graph.replay()
    torch.cuda.synchronize()
    rounds: list[list[tuple[str, float, float]]] = []
    for _ in range(9):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            torch.cuda.synchronize()
        events = sorted((e.time_range.start, e.name, e.time_range.elapsed_us()) for e in profiler.events())
        kernels = [(start, name, us) for start, name, us in events if "kernel" in name or "nvjet" in name]
        rounds.append([(name[:40], start - kernels[0][0], us) for start, name, us in kernels])
    usual = [found for found in rounds if [x[0] for x in found] == [x[0] for x in rounds[-1]]]
    return [
        (column[0][0], round(median(x[1] for x in column), 1), round(median(x[2] for x in column), 1))
        for column in zip(*usual, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--prefer", default="quality", help="what the settings' profile is made for")
    parser.add_argument("--cases", default="32x32768,8x32768", help="rows x context")
    parser.add_argument("--graph", action="store_true", help="kernels of a graph replay, in their order")
    args = parser.parse_args()
    times = replayed_times if args.graph else kernel_times
    for prefer, setting in product(args.prefer.split(","), args.settings.split(",")):
        kernels = LayerKernels(synthetic_codec(8, 128, BITS[setting], "cuda", prefer))
        for name in args.cases.split(","):
            rows, context = (int(x) for x in name.split("x"))
            case = Case(kernels, rows, context, 4, torch.bfloat16)
            spent = round(microseconds(case.run), 1)
            found = {"prefer": prefer, "setting": setting, "case": name, "us": spent, "error": case.error()}
            print(json.dumps(found | {"kernels": times(case)}), flush=True)


if __name__ == "__main__":
    main()

"""A captured decode step kernel by kernel: how often each runs in a layer, for how long, and the gap before it.

    python bench/research/step_times.py [--layers 12] [--cases 1x1024,8x32768] [--prefer quality] [--in-order]

Qwen3-8B's shape with random weights and the synthetic 8x setting of bench/engine.py, with fewer layers; microseconds,
by PyTorch's profiler over one replay. `ms` is the mean of ten replays without it. With --in-order the kernels of a
layer in the middle are listed as they ran: when each begins, after the first one, and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

import torch  # noqa: E402

from bench import engine_scene  # noqa: E402


def replayed(graph: Any) -> list[tuple[float, float, str]]:
    """Begin, end and name of every kernel of one replay."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted((e.time_range.start, e.time_range.end, e.name[:60]) for e in events)


def kernels(spans: list[tuple[float, float, str]], layers: int) -> list[dict[str, Any]]:
    """By name, the longest in all first."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    last = spans[0][0]
    for begin, end, name in spans:
        own = found[name]
        own[0], own[1], own[2] = own[0] + 1, own[1] + end - begin, own[2] + max(0.0, begin - last)
        last = max(last, end)
    rows = [
        {"kernel": name, "in_a_layer": n / layers, "us": us / n, "gap_us": gap / n}
        for name, (n, us, gap) in found.items()
    ]
    return sorted(rows, key=lambda row: -row["in_a_layer"] * row["us"])


def in_order(spans: list[tuple[float, float, str]], layers: int) -> list[dict[str, Any]]:
    """A layer's kernels, from the one that turns its queries to the next layer's."""
    first = [at for at, (_, _, name) in enumerate(spans) if "rotary" in name]
    if len(first) != layers:
        raise SystemExit(f"the step turns queries {len(first)} times, in {layers} layers")
    begin, end = first[layers // 2 : layers // 2 + 2]
    return [
        {"kernel": name, "begin_us": round(start - spans[begin][0], 1), "us": round(stop - start, 1)}
        for start, stop, name in spans[begin:end]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cases", default="1x1024,8x32768", help="rows x context")
    parser.add_argument("--prefer", default="quality", help="what the setting is made for")
    parser.add_argument("--in-order", action="store_true", help="the kernels of one layer, one after another")
    options = parser.parse_args()
    scene = engine_scene.make_scene(False, 0, options.layers)
    scene.prefer = options.prefer
    for case in options.cases.split(","):
        rows, context = map(int, case.split("x"))
        engine = scene.engine()
        engine_scene.hold(engine, rows, context - 300, 400)
        for _ in range(40):
            engine_scene.step(engine)
        kept = engine.runner.graphs.replayer.graphs
        graph = [graph for (what, _), graph in kept.items() if what == "decode step"][-1]
        print(json.dumps({"case": case, "ms": engine_scene.replay_ms(graph)}))
        spans = replayed(graph)
        for row in (in_order if options.in_order else kernels)(spans, options.layers):
            print(json.dumps(row), flush=True)
        del engine, graph, kept
        scene.free()


if __name__ == "__main__":
    main()

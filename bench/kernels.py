"""Decode attention on codes beside bf16 attention on a GPU: time, bytes read, and error against float64.

    python bench/kernels.py [--settings 8x,16x] [--prefer quality,balanced,speed]
        [--cases 8x32768,32x32768,1x131072,32x4096,256x4096,4x262144] [--layers 4]
        [--json FILE] [--plot FILE]

Layers of 32 query and 8 KV heads of 128 (--shape changes it), with a synthetic spectrum and the bits that a setting
of that name spends. SDPA is the faster of flash and cuDNN on the same sizes; the FP8 floor is half the bf16 bytes at
the device's copy bandwidth; all in one run. Times are medians of CUDA-graph replays, in microseconds: a graph has
--layers layers one after another, as a step has, each with tables and a cache of its own, and a time is a layer's share
(the launch of a graph alone takes some 5 us). Of cases that hold as many tokens in all, time per byte is told against
the length of a row.
Without a GPU `--check` alone runs, on a small layer in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import time_per_byte
from spectral.fit import PREFERENCES
from spectral.kernels.check import Case
from spectral.kernels.choices import DecodeChoices, block_pages, known
from spectral.kernels.decode import LayerKernels
from spectral.kernels.synthetic import BITS, PAGE, RECENT, SINKS, synthetic_codec
from spectral.kernels.timing import microseconds
from spectral.provenance import provenance

CASES = "8x32768,32x32768,1x131072,32x4096,256x4096,4x262144"


def a_layer(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of a call, where a graph has all of them."""
    return microseconds(lambda: [call() for call in calls]) / len(calls)


def sdpa(rows: int, context: int, kv_heads: int, group: int, dim: int, layers: int) -> float:
    """The faster of flash and cuDNN attention of one token over bf16 caches."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dim, device="cuda", dtype=torch.bfloat16)

    attend, calls = torch.nn.functional.scaled_dot_product_attention, []
    for _ in range(layers):
        k, v = (made(rows, kv_heads, context) for _ in range(2))
        calls.append(partial(attend, made(rows, kv_heads * group, 1), k, v, enable_gqa=True))
    best = math.inf
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            best = min(best, a_layer(calls))
    return best


def copy_bandwidth() -> float:
    """Bytes read and written by a device copy, in bytes per microsecond: the faster of a memory copy and a kernel."""
    a = torch.zeros(1 << 27, dtype=torch.int64, device="cuda")
    b = torch.empty_like(a)
    spent = min(microseconds(lambda: b.copy_(a)), microseconds(lambda: torch.bitwise_not(a, out=b)))
    return 2 * a.nbytes / spent


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cases at all settings."""
    query_heads, kv_heads, dim = (int(x) for x in args.shape.split("x"))
    group, bandwidth = query_heads // kv_heads, copy_bandwidth()
    kinds = [*product(args.prefer.split(","), args.settings.split(","))]
    layers = {
        (prefer, setting): [
            LayerKernels(synthetic_codec(kv_heads, dim, BITS[setting], "cuda", prefer)) for _ in range(args.layers)
        ]
        for prefer, setting in kinds
    }
    rows_out = []
    for case in args.cases.split(","):
        rows, context = (int(x) for x in case.split("x"))
        exact = sdpa(rows, context, kv_heads, group, dim, args.layers)
        for prefer, setting in kinds:
            layer = layers[prefer, setting][0]
            all_held = [Case(one, rows, context, group, torch.bfloat16) for one in layers[prefer, setting]]
            held, spent = all_held[0], a_layer([one.run for one in all_held])
            rows_out.append(
                {
                    "rows": rows,
                    "context": context,
                    "setting": setting,
                    "prefer": prefer,
                    "codes_and_window_bytes": held.nbytes,
                    "bf16_bytes": held.bf16_nbytes,
                    "us": spent,
                    "sdpa_bf16_us": exact,
                    "fp8_floor_us": held.bf16_nbytes / 2 / bandwidth,
                    "bf16_floor_us": held.bf16_nbytes / bandwidth,
                    "speedup_over_sdpa": exact / spent,
                    "relative_error": held.error(),
                    "choices": known(DecodeChoices, layer.key_basis.device, layer.shape(group)).origin,
                }
            )
            print(json.dumps(rows_out[-1]), flush=True)
            del held, all_held
    return {"copy_bytes_per_us": bandwidth, "rows": rows_out, "time_per_byte": time_per_byte(rows_out)}


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against bytes for every setting, with bf16 attention and the copy bandwidth as the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="bytes read", ylabel="microseconds a layer and step")
    rows = result["rows"]
    for kind in dict.fromkeys((row["setting"], row["prefer"]) for row in rows):
        found = sorted((r["codes_and_window_bytes"], r["us"]) for r in rows if (r["setting"], r["prefer"]) == kind)
        axes.plot(*zip(*found, strict=True), "o-", label=f"codes and window, {kind[0]}, for {kind[1]}")
    found = sorted({(r["bf16_bytes"], r["sdpa_bf16_us"]) for r in rows})
    axes.plot(*zip(*found, strict=True), "s-", label="bf16, the faster SDPA")
    ends = [min(r["codes_and_window_bytes"] for r in rows), max(r["bf16_bytes"] for r in rows)]
    axes.plot(ends, [x / result["copy_bytes_per_us"] for x in ends], "k--", label="copy bandwidth")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="8x,16x")
    kinds = ",".join(PREFERENCES)
    parser.add_argument("--prefer", default=kinds, help="what profiles of these settings are made for")
    parser.add_argument("--cases", default=CASES, help="rows x context")
    parser.add_argument("--shape", default="32x8x128", help="query heads x KV heads x head dimension")
    parser.add_argument("--layers", type=int, default=4, help="of a graph, each with a cache of its own")
    parser.add_argument("--check", action="store_true", help="only the error of a small layer; runs without a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG or PNG: time against bytes")
    args = parser.parse_args()
    if args.check:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        codec = synthetic_codec(2, 16, 2.5, device)
        case = Case(LayerKernels(codec), 1, SINKS + RECENT + 40 * PAGE, 2, torch.float32)
        result: dict[str, Any] = {"pages_in_a_block": block_pages(codec), "relative_error": case.error()}
    elif torch.cuda.is_available():
        result = measure(args)
    else:
        parser.error("an NVIDIA GPU is needed (--check runs without one)")
    argv = vars(args) | {"json": str(args.json), "plot": str(args.plot)}
    document = {"argv": argv, "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"), **result}
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    if args.plot and "rows" in result:
        plot(result, args.plot)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

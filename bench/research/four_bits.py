"""What products of a few rows take with weights of four bits: by bitsandbytes, and by our own kernel.

    python bench/research/four_bits.py [--rows 1,2,4,8] [--nested] [--kind nf4] [--shapes q,k] [--tiles] [--json FILE]

Layers of Qwen3-8B's shape with random weights that bitsandbytes has quantized, as many copies of each as the
second-level cache does not hold, one after another in a graph: microseconds of a product, the least of three times ten
replays. "floor": its packed bytes and factors at the bandwidth of a copy. "gate": gate and up with what lies between
them. Single rows begin before the product before them has ended, as in a model; "launched late" are those that do not.
Errors are the largest difference to the product in fp32 with bitsandbytes' own opened weights, relative to its largest
number. "qkv": three layers in one launch of ours, three of bitsandbytes. `--tiles` also tries what a program of
spectral.kernels.nibbles has in hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

from bench.engine_scene import copy_bandwidth, replay_ms  # noqa: E402
from spectral import few_rows, lean_nibbles  # noqa: E402
from spectral.lean_four_bits import nibbles_of  # noqa: E402
from spectral.provenance import provenance  # noqa: E402

SHAPES = {
    "q": [(4096, 4096)], "k": [(1024, 4096)], "up": [(12288, 4096)], "down": [(4096, 12288)],
    "qkv": [(4096, 4096), (1024, 4096), (1024, 4096)], "gate": [(12288, 4096), (12288, 4096)],
}
HELD_BYTES = 192 << 20
"""Of copies: several times what a GPU's second-level cache holds."""
NAMES = ("TILES", "WARPS", "REGISTERS")
TILES = [(1, 8, 80), (1, 8, 128), (1, 4, 80), (1, 4, 128), (1, 4, 168), (2, 8, 128), (2, 4, 128), (2, 4, 168)]
DTYPE = torch.bfloat16


def layer(outputs: int, size: int, kind: str, nested: bool) -> Any:
    """bitsandbytes' layer with random weights."""
    made = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=DTYPE, quant_type=kind)
    made.in_features, made.out_features = size, outputs
    weight = torch.randn(outputs, size, device="cuda", dtype=DTYPE) / size**0.5
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested
    ).to("cuda")
    return made


def microseconds(products: list[Callable[[], torch.Tensor]]) -> float:
    """Of one of these, as a graph."""
    graph = torch.cuda.CUDAGraph()
    with few_rows.captured():
        products[0]()
        with torch.cuda.graph(graph):
            for product in products:
                product()
    return min(replay_ms(graph) for _ in range(3)) * 1e3 / len(products)


class Shape:
    """Copies of a layer, or of those that have one product, and their products."""

    def __init__(self, name: str, kind: str, nested: bool) -> None:
        self.name, self.gated = name, name == "gate"
        self.copies = max(2, -(-HELD_BYTES // (sum(n * k for n, k in SHAPES[name]) // 2)))
        self.layers = [[layer(n, k, kind, nested) for n, k in SHAPES[name]] for _ in range(self.copies)]
        self.nibbles = [tuple(nibbles_of(one, DTYPE) for one in layers) for layers in self.layers]
        self.nbytes = sum(x.nbytes for one in self.nibbles[0] for x in one if isinstance(x, torch.Tensor))
        self.x = torch.randn(8, SHAPES[name][0][1], device="cuda", dtype=DTYPE)

    def own(self, rows: int, copy: int) -> torch.Tensor:
        return lean_nibbles.product(self.x[:rows], self.nibbles[copy], gate="silu" if self.gated else "")

    def _joined(self, found: list[torch.Tensor]) -> torch.Tensor:
        return F.silu(found[0]) * found[1] if self.gated else torch.cat(found, -1)

    def theirs(self, rows: int, copy: int) -> torch.Tensor:
        found = [one(self.x[:rows]) for one in self.layers[copy]]
        return self._joined(found) if self.gated else found[0]

    def wanted(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bitsandbytes' answer, and that in fp32 with its opened weights."""
        opened = [bitsandbytes.functional.dequantize_4bit(one.weight.data, one.weight.quant_state).float()
                  for one in self.layers[0]]  # fmt: skip
        exact = self._joined([self.x[:rows].float() @ weight.T for weight in opened])
        return self._joined([one(self.x[:rows]) for one in self.layers[0]]), exact

    def measure(self, rows: int, product: Callable[[int, int], torch.Tensor]) -> dict[str, Any]:
        theirs, exact = self.wanted(rows)
        with few_rows.captured():
            found = theirs if product == self.theirs else product(rows, 0)
        error = (found.float() - exact).abs().max() / exact.abs().max()
        us = microseconds([lambda copy=copy: product(rows, copy) for copy in range(self.copies)])
        return {"us": round(us, 2), "error": round(float(error), 5), "tb_per_s": round(self.nbytes / us / 1e6, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--kind", default="nf4", choices=("nf4", "fp4"))
    parser.add_argument("--nested", action="store_true", help="factors as bytes (double quantization)")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth(SimpleNamespace(device=torch.device("cuda"), wait=torch.cuda.synchronize))
    print(f"copies at {bandwidth / 1e12:.2f} TB/s; microseconds, errors", flush=True)
    print("shape  rows  floor    own  launched late  bitsandbytes    errors of both", flush=True)
    found: list[dict[str, Any]] = []
    launches = few_rows.early_launches
    with torch.inference_mode():
        for name in options.shapes.split(","):
            shape = Shape(name, options.kind, options.nested)
            floor = shape.nbytes / bandwidth * 1e6
            for rows in map(int, options.rows.split(",")):
                row: dict[str, Any] = {"shape": name, "rows": rows, "floor_us": round(floor, 2)}
                row["own"] = shape.measure(rows, shape.own)
                if rows == 1:
                    launches.stopped = True
                    row["late"] = shape.measure(rows, shape.own)
                    launches.stopped = False
                row["bitsandbytes"] = shape.measure(rows, shape.theirs)
                late = row.get("late", row["own"])
                print(f"{name:5} {rows:5} {floor:6.2f} {row['own']['us']:6.2f} {late['us']:14.2f} "
                      f"{row['bitsandbytes']['us']:13.2f}    {row['own']['error']} {row['bitsandbytes']['error']}",
                      flush=True)  # fmt: skip
                found.append(row)
                for values in TILES if options.tiles else ():
                    tile = dict(zip(NAMES, values, strict=True))
                    if (shape.gated and tile["TILES"] < 2) or (name == "qkv" and tile["TILES"] > 1):
                        continue
                    usual, lean_nibbles._tile = lean_nibbles._tile, lambda *_, tile=tile: tile
                    found.append({"shape": name, "rows": rows, "tile": tile, "own": shape.measure(rows, shape.own)})
                    lean_nibbles._tile = usual
                    print(f"    {json.dumps(tile)} {found[-1]['own']['us']}", flush=True)
            del shape
            torch.cuda.empty_cache()
    result = {**provenance("cuda"), "bitsandbytes": bitsandbytes.__version__, "kind": options.kind,
              "nested": options.nested, "copies_bytes_per_s": bandwidth, "products": found}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

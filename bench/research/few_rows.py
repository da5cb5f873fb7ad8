"""What a model's forward without attention takes for a few rows: by a library's products, and by our own kernels.

    python bench/research/few_rows.py [--layers 8] [--rows 1,2,8] [--tiles] [--json FILE]

Qwen3-8B's shape with random weights and fewer layers, as bench/engine.py has it, as a graph; milliseconds, the least of
two times ten replays. "early": kernels begin before the one before them has ended, which serves single rows. `--tiles`
also tries what a program of spectral.lean_products.row_kernel has in hand: lines, numbers of each, warps, for
products up to 8,192 numbers long and for longer ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

from bench import engine_scene  # noqa: E402
from spectral import few_rows, lean_products  # noqa: E402
from spectral.provenance import provenance  # noqa: E402

TILES = [
    ((2, 2048, 4), (4, 512, 4)), ((2, 2048, 4), (4, 1024, 8)), ((2, 2048, 4), (2, 2048, 4)), ((2, 2048, 4), (8, 512, 4)),
    ((4, 2048, 8), (4, 512, 4)), ((2, 4096, 8), (4, 512, 4)), ((2, 1024, 4), (4, 512, 4)), ((4, 1024, 4), (4, 512, 4)),
]  # fmt: skip
NAMES = ("TALL", "WIDE", "num_warps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", default="1,2,8")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scene = engine_scene.make_scene(False, 0, options.layers)
    found: list[dict[str, Any]] = []

    def measure(rows: int, **what: Any) -> None:
        ms = min(engine_scene.dense(scene, rows) for _ in range(2))
        found.append({**what, "rows": rows, "ms": round(ms, 4)})
        print(json.dumps(found[-1]), flush=True)

    for rows in map(int, options.rows.split(",")):
        measure(rows, products="own, early" if rows == 1 else "own")
    few_rows.early_launches.stop("it is to be measured without")
    for rows in map(int, options.rows.split(",")):
        measure(rows, products="own")
    if options.tiles:
        for short, long in TILES:
            tiles = [dict(zip(NAMES, tile, strict=True)) for tile in (short, long)]
            lean_products._row_tile = lambda size, tiles=tiles: tiles[size > 8192]  # type: ignore[assignment]
            measure(1, products="own", tiles=[short, long])
    few_rows.distrust("it is to be measured without")
    for rows in map(int, options.rows.split(",")):
        measure(rows, products="library")
    floor = engine_scene.read_nbytes(scene) / scene.bandwidth * 1e3
    result = {**provenance("cuda"), "layers": options.layers, "copy_of_the_weights_ms": floor, "rows": found}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What requests leave in a process, by kind of memory: heap, mappings, pinned memory, the device.

    python bench/research/memory_growth.py [--layers 36] [--requests 300] [--rounds 3]

The row `memory` of bench/engine.py in rounds: requests of 2 to 199 random tokens, a tenth cancelled. Every round prints
by how many MiB each kind grew; the first has what is compiled once. Kernels that Triton compiles after it are named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

import psutil  # noqa: E402
import torch  # noqa: E402

from bench import engine_scene  # noqa: E402
from bench.engine_scene import Scene, counts, finish, random_request  # noqa: E402
from spectral.engine.engine import Engine  # noqa: E402

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Heap(ctypes.Structure):
    """What mallinfo2 of the C library answers."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def mappings() -> Counter[str]:
    """Resident bytes by name; those without one by their size."""
    found: Counter[str] = Counter()
    name = ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if head := re.match(r"^([0-9a-f]+)-([0-9a-f]+) ", line):
            parts, size = line.split(maxsplit=5), int(head[2], 16) - int(head[1], 16)
            name = parts[5] if len(parts) > 5 else "unnamed, above 1 MiB" if size > 1 << 20 else "unnamed"
        elif line.startswith("Rss:"):
            found[name] += int(line.split()[1]) << 10
    return found


def held(scene: Scene) -> Counter[str]:
    """Bytes of every kind now."""
    scene.free()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Heap
    heap = libc.mallinfo2()
    found = Counter({"process": psutil.Process().memory_info().rss, "heap": heap.uordblks, "heap, free": heap.fordblks})
    if scene.device.type == "cuda":
        found["device"] = torch.cuda.memory_reserved(scene.device)
    return found + mappings()


def requests(scene: Scene, engine: Engine, first: int, count: int) -> None:
    """Serve them."""
    rng = torch.Generator().manual_seed(1 + first)  # other lengths every round: what is kept for one of them shows
    for number in range(first, first + count):
        random_request(engine, scene, number, rng)
    finish(engine)
    engine.trim(prefixes=True)


def named(*_: Any, **what: Any) -> None:
    """Triton's listener: a kernel was compiled."""
    print("compiled", getattr(what.get("src"), "name", "?"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--requests", type=int, default=300, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    small = not torch.cuda.is_available()
    scene = engine_scene.make_scene(small, 0, None if small else options.layers)
    engine = scene.engine(max_concurrency=32, prefix_bytes=64 << 20)
    for number in range(options.rounds):
        before = held(scene)
        requests(scene, engine, number * options.requests, options.requests)
        after = held(scene)
        grown = {name: round((after[name] - before[name]) / 2**20, 1) for name in {*before, *after}}
        grown = {name: size for name, size in grown.items() if abs(size) >= 1 or name in ("process", "device")}
        print(json.dumps({"round": number, "requests": options.requests, "grown_mib": grown, **counts(engine)}), flush=True)
        if scene.device.type == "cuda" and not number:
            import triton

            triton.knobs.compilation.listener = named


if __name__ == "__main__":
    main()

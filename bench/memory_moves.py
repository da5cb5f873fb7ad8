"""How fast memory moves on a GPU, and whether NVML sees it: sleep, wake-up, squeeze, and a foreign process.

    python bench/memory_moves.py --gib 8 --json bench/results/memory_moves.json

Weights are random, in the shapes of an 8-billion-parameter model (bf16 matrices of 4,096 x 4,096 and 4,096 x 12,288).
Needs one NVIDIA GPU; reads NVML through nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from server.scheduler.ledger import Holding, Ledger
from server.scheduler.nvml import Devices
from spectral.pages import PageStore
from spectral.profile import SpectralProfile
from spectral.residency import Sleeper, reserved_nbytes
from spectral.resources import profile_path
from spectral.shapes import LayerShape, ModelShape

GIB = 2**30
FOREIGN = """
import sys, time, torch
held = torch.empty(int(sys.argv[1]) * 2**30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.readline()
"""


def used(devices: Devices) -> int:
    """Bytes in use on the first GPU, as NVML has it."""
    return devices.read_gpus()[0].used


def model_of(gib: float) -> torch.nn.Module:
    """Linear layers that add up to so many GiB of bf16."""
    layers: list[torch.nn.Module] = []
    total = 0
    while total < gib * GIB:
        wide = len(layers) % 3 == 2
        layer = torch.nn.Linear(4096, 12288 if wide else 4096, bias=False, device="cuda", dtype=torch.bfloat16)
        layers.append(layer)
        total += layer.weight.nbytes
    return torch.nn.ModuleList(layers)


def copy_rate(size: int) -> float:
    """Bytes per second from pinned host memory to the device, best of three."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began))
    return best


def sleep_and_wake(devices: Devices, gib: float) -> dict[str, Any]:
    """A model's way to host memory and back, twice."""
    rate = copy_rate(2 * GIB)
    torch.cuda.empty_cache()
    model = model_of(gib)
    check = [float(layer.weight.detach().float().sum()) for layer in list(model)[:3]]  # type: ignore[union-attr,operator]
    torch.cuda.empty_cache()
    sleeper, out = Sleeper(model), []
    for _ in range(3):
        before, began = used(devices), time.perf_counter()
        size = sleeper.sleep()
        slept = time.perf_counter() - began
        freed, began = before - used(devices), time.perf_counter()
        sleeper.wake()
        woke = time.perf_counter() - began
        out.append({"sleep_s": round(slept, 3), "wake_s": round(woke, 3), "wake_gb_s": round(size / woke / 1e9, 1)})
        out[-1] |= {"nvml_freed_part": round(freed / size, 4), "wake_part_of_copy_rate": round(size / woke / rate, 3)}
    same = check == [float(layer.weight.detach().float().sum()) for layer in list(model)[:3]]  # type: ignore[union-attr,operator]
    return {
        "gib": round(size / GIB, 2),
        "host_to_device_gb_s": round(rate / 1e9, 1),
        "rounds": out,
        "same_weights": same,
    }


def squeeze(devices: Devices, gib: float) -> dict[str, Any]:
    """A cache of the embedded model's shape, filled to `gib`, from its finest to a coarser setting."""
    path = profile_path("demo-7m")
    assert path is not None
    profile = SpectralProfile.load(path)
    shape = ModelShape(tuple(LayerShape(2, 64, 64) for _ in profile.layers), 4, 256)
    names = [row.name for row in profile.ladder]
    out = []
    for coarse in names[1:]:
        store = PageStore(shape, profile.codebook(names[0], device="cuda"), device="cuda")
        pages = int(gib * GIB / store._page_nbytes)
        store.admit(pages * store.codebook.page_tokens, pages)
        store.trim()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, book = used(devices), profile.codebook(coarse, device="cuda")
        began = time.perf_counter()
        freed = store.squeeze(book)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - began
        out.append({"from": names[0], "to": coarse, "freed_gib": round(freed / GIB, 3)})
        out[-1] |= {"nvml_freed_gib": round((before - used(devices)) / GIB, 3)}
        out[-1] |= {
            "ms_per_gib_held": round(seconds * 1e3 / gib, 1),
            "ms_per_gib_freed": round(seconds * 1e3 / (freed / GIB), 1),
        }
        del store
        torch.cuda.empty_cache()
    return {"gib": gib, "steps": out}


def foreign(devices: Devices, gib: int) -> dict[str, Any]:
    """Another process takes memory and ends: how soon the ledger knows, and by how much it errs."""
    ledger = Ledger(reserves={"*": 0})
    ledger.observe(devices.read_gpus())
    base = ledger.accounts["cuda:0"].foreign
    held = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")
    mine = Holding(weights=held.nbytes, workspace=reserved_nbytes(held.device) - held.nbytes)
    ledger.hold("me", "cuda:0", mine)
    ledger.observe(devices.read_gpus())
    start = ledger.accounts["cuda:0"].foreign
    with subprocess.Popen(
        [sys.executable, "-c", FOREIGN, str(gib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        began = time.perf_counter()
        ledger.observe(devices.read_gpus())
        took = ledger.accounts["cuda:0"].foreign - start
        seen = time.perf_counter() - began
        other.stdin.write("\n")
        other.stdin.flush()
    ended = time.perf_counter()
    while ledger.accounts["cuda:0"].foreign - start > GIB // 4 and time.perf_counter() - ended < 10:
        ledger.observe(devices.read_gpus())
        time.sleep(0.05)
    row = ledger.snapshot()[0]
    kinds = sum(part["bytes"] for part in row["segments"]) + row["foreign_bytes"]
    return {
        "asked_gib": gib,
        "seen_gib": round(took / GIB, 3),
        "read_ms": round(seen * 1e3, 2),
        "given_back_seen_after_s": round(time.perf_counter() - ended, 3),
        "ledger_error": round(abs(kinds - devices.read_gpus()[0].used) / max(1, devices.read_gpus()[0].used), 5),
        "foreign_before_gib": round(base / GIB, 3),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="weights of the model that sleeps")
    parser.add_argument("--cache", type=float, default=4.0, help="GiB of cache to squeeze")
    parser.add_argument("--foreign", type=int, default=10, help="GiB that the other process takes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    devices = Devices()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {"commit": commit, "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    result |= {"python": platform.python_version(), "notes": devices.knowledge(devices.read_gpus())}
    parts = (
        ("foreign", foreign, options.foreign),
        ("sleep", sleep_and_wake, options.gib),
        ("squeeze", squeeze, options.cache),
    )
    for name, measure, size in parts:
        result[name] = measure(devices, size)
        print(name, json.dumps(result[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

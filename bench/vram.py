"""The scheduler on one GPU, with real workers: foreign memory, squeezes, sleep, loads beside a model in use.

    python bench/vram.py --json bench/results/vram_h200.json [--parts squeeze,foreign,wake,ttft] [--check]

Three models with random weights in the shapes of Qwen3 8B, 4B and 1.7B (bench/vram_models.py makes them) share a GPU
under `max_vram: 38GiB`; the scheduler runs in this process, without HTTP, its workers are real, and this process has no
CUDA context. The ledger is compared with readings of NVML of this script's own, ten times a second.

load     all three from disk at once, then each setting of each model used once: kernels are compiled there
squeeze  eight streams of long contexts; the cache's setting is made coarser twice: milliseconds per GiB that NVML shows
foreign  eight streams on each model; another process takes 10 GiB and gives them back
wake     keep_alive 0 puts a model to sleep, the next request wakes it: bytes per second against a copy in the same run
ttft     time to the first token of a resident model, alone and while another loads from disk or wakes

Beside torch, transformers, accelerate, triton, psutil, nvidia-ml-py, prometheus-client and scipy it needs msgspec,
zstandard, pydantic and pydantic-settings (annotated-types, pydantic-core, typing-inspection, python-dotenv) and fastapi
(starlette, annotated-doc, anyio, idna). `--check` runs the same with tiny shapes on the CPU, whose memory is a device
like any other: a model there does not sleep, so `wake` only says so. `--models FOLDER` keeps models and compiled
kernels for the next run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.vram_clients import Clients, answer, percentile
from bench.vram_scene import GIB, Foreign, Scene, Sizes, watching

CHECK = Sizes(
    ("tiny-a", "tiny-b", "tiny-c"), "cpu", budget=2.0, foreign=0.25, prompt=300, answer=40, long=1500, hold_s=4.0,
    probes=30, threads=1,
)  # fmt: skip
FULL = Sizes(("8b", "4b", "1.7b"), "cuda:0")
HOST_COPY = """
import time, torch
size, best = 2 << 30, 0.0
host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
device = torch.empty(size, dtype=torch.uint8, device="cuda")
for _ in range(4):
    torch.cuda.synchronize()
    began = time.perf_counter()
    device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    best = max(best, size / (time.perf_counter() - began))
print(best)
"""


async def load(scene: Scene) -> dict[str, Any]:
    """Three loads at once; then every coarser setting of every model, once."""
    began = time.monotonic()
    waits = await asyncio.gather(*(answer(scene, name, 16, 2) for name in scene.sizes.models))
    loaded, vram, used = time.monotonic() - began, scene.vram(), []
    for name in scene.sizes.models:
        slot, began = scene.scheduler.slots[name], time.monotonic()
        names = [figure.name for figure in slot.ready.ladder]
        for setting in names[names.index(slot.ready.setting) + 1 :]:
            await scene.set_setting(slot, setting)
            await answer(scene, name, 400, 12)
        await scene.set_setting(slot, "4x")
        used.append(time.monotonic() - began)
    return {"seconds": loaded, "until_first_token_s": waits, "settings_used_once_s": used, "vram": vram}


async def squeeze(scene: Scene) -> dict[str, Any]:
    """Coarser by command, twice, while streams run: what the worker says, and what NVML shows at once."""
    out = []
    for name in (scene.sizes.models[0], scene.sizes.models[-1]):
        slot = scene.scheduler.slots[name]
        clients = Clients(scene, [name], prompt=scene.sizes.long, answer=10**6)
        await clients.started()
        await asyncio.sleep(1.0)
        for setting in ("8x", "16x"):
            before, held = scene.used(), slot.stats.kv_bytes_allocated
            was, began = slot.ready.setting, time.perf_counter()
            print_ = await scene.set_setting(slot, setting)
            took = time.perf_counter() - began
            shown = before - scene.used()
            row = {"model": name, "from": was, "to": setting, "held_gib": held / GIB, "command_s": took}
            row |= {"worker_s": print_.seconds, "freed_gib": print_.freed_bytes / GIB, "nvml_gib": shown / GIB}
            row["ms_per_gib"] = took * 1e3 / (shown / GIB) if shown > 0 else None
            out.append(row | {"longest_pause_s": await clients.longest_pause(3.0)})
            print(f"  {out[-1]}", flush=True)
        out[-1]["streams_broken"] = await clients.cancel()
        await scene.set_setting(slot, "4x")
    good = [row["ms_per_gib"] for row in out if row["ms_per_gib"] is not None]
    return {"rows": out, "ms_per_gib_max": max(good, default=None), "to_reach": "<= 300 ms per GiB"}


async def foreign(scene: Scene) -> dict[str, Any]:
    """Another process takes memory while eight streams run on each model, and gives it back."""
    size = scene.sizes.foreign
    clients = Clients(scene, list(scene.sizes.models), prompt=scene.sizes.prompt, answer=scene.sizes.answer)
    await clients.started()
    await asyncio.sleep(scene.sizes.hold_s / 2)
    before, overrun, began = len(scene.events.found), scene.overrun(), time.monotonic()
    await scene.foreign.take(int(size * GIB) - scene.foreign.context)
    noticed, fitted = None, None
    while time.monotonic() - began < scene.sizes.hold_s:
        await asyncio.sleep(0.02)
        found = [e for e in scene.events.found[before:] if e["kind"] == "foreign"]
        noticed = noticed or (time.monotonic() - began if found else None)
        fits = scene.used() <= scene.budget
        fitted = None if not fits else fitted or time.monotonic() - began
    held = scene.vram()
    await scene.foreign.give()
    await asyncio.sleep(scene.sizes.hold_s)
    totals = await clients.finished()
    moves = [e for e in scene.events.found[before:] if e["kind"] not in ("state", "lease")]
    return {
        "gib": size, "context_gib": scene.foreign.context / GIB, "noticed_after_s": noticed,
        "within_the_budget_after_s": fitted, "over_the_budget_before_gib": overrun / GIB,
        "while_held": held, "afterwards": scene.vram(), **totals, "events": moves,
    }  # fmt: skip


async def wake(scene: Scene) -> dict[str, Any]:
    """Sleep by keep_alive 0, and back by the next request."""
    if scene.device == "cpu":
        return {"left_out": "a model on the CPU does not sleep"}
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", HOST_COPY], capture_output=True, text=True)
    rate, rows = float(done.stdout), []
    for name in scene.sizes.models[:2]:
        slot = scene.scheduler.slots[name]
        for _ in range(3):
            before = scene.used()
            await answer(scene, name, 16, 2, keep_alive=0.0)
            slept = await scene.state(slot, "asleep", 60.0)
            freed, moved = before - scene.used(), scene.asleep_bytes(slot)
            first = await answer(scene, name, 16, 2, keep_alive=-1.0)
            took = scene.wake_seconds(slot)
            row = {"model": name, "gib": moved / GIB, "weights_gib": slot.ready.weights_bytes / GIB}
            row |= {"asleep_after_s": slept, "nvml_freed_gib": freed / GIB}
            row |= {"wake_s": took, "gb_s": moved / took / 1e9, "first_token_s": first}
            rows.append(row | {"part_of_copy_rate": row["gb_s"] * 1e9 / rate})
            print(f"  {rows[-1]}", flush=True)
    worst = min(row["part_of_copy_rate"] for row in rows)
    return {"copy_gb_s": rate / 1e9, "rows": rows, "part_of_copy_rate_min": worst, "to_reach": ">= 0.8"}


async def ttft(scene: Scene) -> dict[str, Any]:
    """A resident model's time to first token, one request after another, with nothing else and beside a load."""
    name, other = scene.sizes.models[-1], scene.sizes.models[1]
    slot, least = scene.scheduler.slots[other], scene.sizes.probes

    async def probe(until: asyncio.Task[Any] | None) -> list[float]:
        found: list[float] = []
        while not until.done() if until is not None else len(found) < least:
            found.append(await answer(scene, name, 32, 2))
        return found

    times: dict[str, list[float]] = {"alone": [], "beside_a_load": [], "beside_a_wake": []}
    loads = []
    await probe(None)
    for _ in range(2):
        times["alone"] += await probe(None)
        await scene.scheduler.unload(slot, 0.0, "the bench wants it cold")
        began = time.monotonic()
        load = asyncio.create_task(answer(scene, other, 16, 2, keep_alive=0.0))
        times["beside_a_load"] += await probe(load)
        loads.append(round(time.monotonic() - began, 2))
        if scene.device != "cpu":
            await scene.state(slot, "asleep", 60.0)
            times["beside_a_wake"] += await probe(asyncio.create_task(answer(scene, other, 16, 2, keep_alive=-1.0)))
    out: dict[str, Any] = {"model": name, "other": other, "loads_s": loads, "to_reach": "p99 within 1.2x"}
    for what, found in times.items():
        if found:
            p50, p99 = (percentile(found, part) * 1e3 for part in (0.5, 0.99))
            out[what] = {"count": len(found), "p50_ms": p50, "p99_ms": p99, "max_ms": max(found) * 1e3}
    for what in ("beside_a_load", "beside_a_wake"):
        if what in out:
            out[what]["p99_ratio"] = out[what]["p99_ms"] / out["alone"]["p99_ms"]
    return out


PARTS = {"squeeze": squeeze, "foreign": foreign, "wake": wake, "ttft": ttft}


async def study(sizes: Sizes, folder: Path, parts: list[str]) -> dict[str, Any]:
    """Load the models, then every part; each has its own figures of the ledger. One that fails says why."""
    out: dict[str, Any] = {}
    other = await Foreign.start(sizes.device)
    scene = Scene(sizes, folder, other)
    try:
        for name in ["load", *parts]:
            began = time.monotonic()
            async with watching(scene) as found:
                try:
                    out[name] = await {"load": load, **PARTS}[name](scene)
                except Exception as error:
                    logging.getLogger("bench").exception("part %s failed", name)
                    out[name] = {"error": f"{type(error).__name__}: {error}", "vram": scene.vram()}
                    last = scene.scheduler.memory.steward.last
                    out[name]["plan"] = last and last.as_dict()
            out[name] |= {"ledger": found, "took_s": time.monotonic() - began}
            shown = {k: v for k, v in out[name].items() if k not in ("rows", "events", "ledger")}
            shown["ledger"] = {k: v for k, v in found.items() if k != "series"}
            print(name, json.dumps(rounded(shown)), flush=True)
    finally:
        out["out_of_memory"] = scene.lines.found
        out["restarts"] = {name: slot.restarts for name, slot in scene.scheduler.slots.items()}
        out["events"] = [event for event in scene.events.found if event["kind"] != "state"]
        await scene.close()
    return out


def rounded(value: Any) -> Any:
    """Numbers with four significant decimals, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order")
    parser.add_argument("--check", action="store_true", help="tiny shapes on the CPU: does it run?")
    parser.add_argument("--models", type=Path, help="a folder that keeps the models for the next run")
    parser.add_argument("--verbose", action="store_true", help="the workers' log too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    parts = [part for part in options.parts.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    sizes = CHECK if options.check else FULL
    folder = options.models or Path(tempfile.mkdtemp())
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    began = time.monotonic()
    missing = [name for name in sizes.models if not (folder / name / "profile.safetensors").exists()]
    if missing:
        script = Path(__file__).with_name("vram_models.py")
        subprocess.run([sys.executable, str(script), str(folder), sizes.device, *missing], check=True)
    out: dict[str, Any] = {"models_made_s": time.monotonic() - began, "sizes": vars(sizes)}
    out |= asyncio.run(study(sizes, folder, parts))
    from spectral.provenance import provenance

    out = rounded(out | provenance(sizes.device) | {"seed": 6})
    if options.models is None:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

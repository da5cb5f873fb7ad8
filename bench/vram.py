"""The scheduler on one GPU, with real workers: foreign memory, squeezes, sleep, loads beside a model in use.

    python bench/vram.py --json bench/results/vram_h200.json [--parts squeeze,foreign,wake,ttft] [--limit 540]

Three models with random weights in the shapes of Qwen3 8B, 4B and 1.7B (bench/vram_models.py makes them) share a GPU
under `max_vram: 38GiB`; the scheduler runs in this process, without HTTP, its workers are real, and this process has no
CUDA context. The ledger is compared with readings of NVML of this script's own, ten times a second.

The file is written whenever a row is there; a run that its --limit or somebody else ends keeps what it measured.

load     all three from disk at once, then each setting of each model used once; kernels are compiled before,
         by processes beside those that make the models (bench/vram_compile.py)
squeeze  eight streams of long contexts; the cache's setting is made coarser twice: milliseconds per GiB that NVML
         shows, beside two hot models and with these asleep, when the cache is several times as large
foreign  eight streams on each model; another process takes 10 GiB and gives them back
wake     keep_alive 0 puts a model to sleep, the next request wakes it: bytes per second against a copy in the same run
ttft     time to the first token of a resident model, alone and while another loads from disk, falls asleep or wakes

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
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.keeping import Limit, write_json
from bench.vram_clients import answer, percentile, running
from bench.vram_scene import GIB, Foreign, Scene, Sizes, watching
from spectral.provenance import command_line

Part = dict[str, Any]
CHECK = Sizes(
    ("tiny-a", "tiny-b", "tiny-c"), "cpu", budget=2.0, foreign=0.25, prompt=300, answer=40, long=1500, longest=1500,
    hold_s=4.0, probes=30, threads=1, together=1,
)  # fmt: skip
FULL = Sizes(("8b", "4b", "1.7b"), "cuda:0")
COMPILE_S = 150.0
"""Seconds that compiling ahead may take at most: it saves the workers time, and whatever lacks they compile."""

SQUEEZED = ("8x", "16x")
"""Settings that a cache is squeezed to, one after the other."""
KEPT_S = 3.0
"""Seconds after which a worker has copied a setting's tables to host memory."""

PROVENANCE = "import json, sys; from spectral.provenance import provenance; print(json.dumps(provenance(sys.argv[1])))"


async def load(scene: Scene, out: Part) -> None:
    """Three loads at once; then every coarser setting of every model, once, those of the part that squeezes last."""
    began = time.monotonic()
    out["until_first_token_s"] = await asyncio.gather(*(answer(scene, name, 16, 2) for name in scene.sizes.models))
    out |= {"seconds": time.monotonic() - began, "vram": scene.vram()}

    async def used(name: str) -> float:
        slot, began = scene.scheduler.slots[name], time.monotonic()
        names = [figure.name for figure in slot.ready.ladder]
        coarser = names[names.index(slot.ready.setting) + 1 :]
        for setting in [*(name for name in coarser if name not in SQUEEZED), *SQUEEZED, "4x"]:
            await scene.set_setting(slot, setting)
            await answer(scene, name, 400, 12)
            if setting in (*SQUEEZED, "4x"):  # the part that squeezes finds their tables in host memory
                await asyncio.sleep(KEPT_S)
        return time.monotonic() - began

    out["settings_used_once_s"] = await asyncio.gather(*map(used, scene.sizes.models))
    out["vram_after_all_settings"] = scene.vram()


async def squeeze(scene: Scene, out: Part) -> None:
    """Coarser by command, twice, while streams run: what the worker says, and what NVML shows at once. First beside two
    other hot models, then, alone, with the contexts that the memory of all allows."""
    sizes, rows = scene.sizes, []
    out |= {"rows": rows, "to_reach": "<= 300 ms per GiB"}
    for name in (sizes.models[0], sizes.models[-1]):
        await squeezed(scene, name, sizes.long, out, rows)
    if scene.device != "cpu":  # models on a CPU do not sleep
        for name in sizes.models[1:]:
            await answer(scene, name, 16, 2, keep_alive=0.0)
            await scene.state(scene.scheduler.slots[name], "asleep", 60.0)
        await squeezed(scene, sizes.models[0], sizes.longest, out, rows)
        for name in sizes.models[1:]:
            await answer(scene, name, 16, 2, keep_alive=-1.0)


async def squeezed(scene: Scene, name: str, prompt: int, out: Part, rows: list[Part]) -> None:
    """Eight streams of one model, whose cache is squeezed to 8x and to 16x; a row of each. Of `command_s`, all that the
    scheduler waits for, the worker says what tables_s, waited_s (for the end of a step) and worker_s took; the rest is
    elsewhere_s. Of worker_s encoded_s went to codes and given_back_s to returning memory."""
    slot = scene.scheduler.slots[name]
    async with running(scene, [name], prompt=prompt, answer=10**6) as clients:
        await clients.started()
        for setting in SQUEEZED:
            steady_after = await scene.steady(slot)
            was, held, reserved = slot.ready.setting, slot.stats.kv_bytes_allocated, slot.stats.reserved_bytes
            before, began = scene.used(), time.perf_counter()
            print_ = await scene.set_setting(slot, setting)
            took = time.perf_counter() - began
            shown = before - scene.used()
            row = {"model": name, "from": was, "to": setting, "held_gib": held / GIB, "steady_after_s": steady_after}
            row |= {"command_s": took, "worker_s": print_.seconds}
            row |= {part: getattr(print_, part) for part in ("tables_s", "waited_s", "encoded_s", "given_back_s")}
            row["elsewhere_s"] = took - print_.tables_s - print_.waited_s - print_.seconds
            row |= {"freed_gib": print_.freed_bytes / GIB, "nvml_gib": shown / GIB}
            row["reserve_freed_gib"] = (reserved - print_.reserved_bytes) / GIB
            row["ms_per_gib"] = took * 1e3 / (shown / GIB) if shown > 0 else None
            rows.append(row | {"longest_pause_s": await clients.longest_pause(3.0)})
            good = [row["ms_per_gib"] for row in rows if row["ms_per_gib"] is not None]
            out["ms_per_gib_max"] = max(good, default=None)
            out["command_s_max"] = max(row["command_s"] for row in rows)
            scene.tell(rows[-1])
        rows[-1]["streams_broken"] = await clients.cancel()
    await scene.set_setting(slot, "4x")


async def foreign(scene: Scene, out: Part) -> None:
    """Another process takes memory while eight streams run on each model, and gives it back."""
    sizes = scene.sizes
    async with running(scene, list(sizes.models), prompt=sizes.prompt, answer=sizes.answer) as clients:
        await clients.started()
        await asyncio.sleep(sizes.hold_s / 2)
        before, overrun, size = len(scene.events.found), scene.overrun(), int(sizes.foreign * GIB)
        out |= {"gib": sizes.foreign, "context_gib": scene.foreign.context / GIB}
        out |= {"over_the_budget_before_gib": overrun / GIB, "noticed_after_s": None, "within_the_budget_after_s": None}
        try:
            shown = asyncio.create_task(scene.shown(size // 2))
            await scene.foreign.take(size - scene.foreign.context)
            done, _ = await asyncio.wait({shown}, timeout=1.0)  # a CPU's memory comes and goes with other programs'
            began, fitted = shown.result() if done else time.monotonic(), None
            shown.cancel()
            while time.monotonic() - began < sizes.hold_s:
                await asyncio.sleep(0.02)
                told = scene.noticed(before)
                noticed = None if told is None else max(0.0, told - scene.events.since(began))
                fits = scene.used() <= scene.budget
                fitted = None if not fits else fitted or time.monotonic() - began
                out |= {"noticed_after_s": noticed, "within_the_budget_after_s": fitted}
            out["while_held"] = scene.vram()
        finally:
            await scene.foreign.give()
        scene.tell({name: out[name] for name in ("noticed_after_s", "within_the_budget_after_s")})
        await asyncio.sleep(sizes.hold_s)
        out |= await clients.finished()
    out["afterwards"] = scene.vram()
    out["events"] = [e for e in scene.events.found[before:] if e["kind"] != "state"]


async def wake(scene: Scene, out: Part) -> None:
    """Sleep by keep_alive 0, and back by the next request."""
    if scene.device == "cpu":
        out["left_out"] = "a model on the CPU does not sleep"
        return
    rate = scene.foreign.copy_bytes_s
    rows = out["rows"] = []
    out |= {"copy_gb_s": rate / 1e9, "to_reach": ">= 0.8"}
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
            out["part_of_copy_rate_min"] = min(row["part_of_copy_rate"] for row in rows)
            scene.tell(rows[-1])


async def ttft(scene: Scene, out: Part) -> None:
    """A resident model's time to first token, one request after another, with nothing else and beside a load."""
    name, other = scene.sizes.models[-1], scene.sizes.models[1]
    slot, least = scene.scheduler.slots[other], scene.sizes.probes
    times: dict[str, list[float]] = {"alone": [], "beside_a_load": [], "beside_a_sleep": [], "beside_a_wake": []}
    loads: list[float] = []
    out |= {"model": name, "other": other, "loads_s": loads, "to_reach": "p99 within 1.2x"}

    async def probe(what: str, until: asyncio.Task[Any] | None = None) -> None:
        """Requests until something has ended, or as many as are wanted."""
        began, found = time.monotonic(), []
        while not until.done() if until is not None else len(found) < least:
            found.append((time.monotonic() - began, await answer(scene, name, 32, 2)))
        times[what] += [took for _, took in found]
        out.update(times_of(times))
        if until is not None and found:  # when the slowest came: a load is several things after one another
            slow = sorted(found, key=lambda pair: -pair[1])[: max(3, len(found) // 50)]
            out.setdefault("slowest_at_s", {}).setdefault(what, []).append(sorted(slow))
        scene.tell({what: out[what]} if what in out else {})

    for _ in range(least // 5):
        await answer(scene, name, 32, 2)
    for _ in range(2):
        await probe("alone")
        await scene.scheduler.unload(slot, 0.0, "the bench wants it cold")
        began = time.monotonic()
        await probe("beside_a_load", asyncio.create_task(answer(scene, other, 16, 2, keep_alive=0.0)))
        loads.append(round(time.monotonic() - began, 2))
        if scene.device != "cpu":
            await probe("beside_a_sleep", asyncio.create_task(scene.state(slot, "asleep", 60.0)))
            await probe("beside_a_wake", asyncio.create_task(answer(scene, other, 16, 2, keep_alive=-1.0)))


def times_of(times: dict[str, list[float]]) -> Part:
    """Percentiles of every kind that has any; p99 against that of requests with nothing beside them."""
    out: Part = {}
    for what, found in times.items():
        if found:
            p50, p99 = (percentile(found, part) * 1e3 for part in (0.5, 0.99))
            out[what] = {"count": len(found), "p50_ms": p50, "p99_ms": p99, "max_ms": max(found) * 1e3}
            out[what]["p99_ratio"] = p99 / out["alone"]["p99_ms"]
    return out


PARTS: dict[str, Callable[[Scene, Part], Awaitable[None]]] = {
    "squeeze": squeeze, "foreign": foreign, "wake": wake, "ttft": ttft,
}  # fmt: skip


async def study(sizes: Sizes, folder: Path, parts: list[str], limit: Limit, keep: Callable[[Part], None]) -> None:
    """Load the models, then every part; each has its own figures of the ledger. One that fails says why, one that the
    limit cuts off keeps what it has; `keep` gets everything so far, again and again."""
    out: Part = {}
    other = await Foreign.start(sizes.device)
    scene = Scene(sizes, folder, other, lambda: keep(out))
    try:
        for name in ["load", *parts]:
            if limit.passed:
                out["not_begun"] = [*out.get("not_begun", []), name]
                continue
            began, row = time.monotonic(), {}
            out[name] = row
            async with watching(scene) as found:
                await attempt({"load": load, **PARTS}[name](scene, row), name, scene, row, limit)
            row |= {"ledger": found, "took_s": time.monotonic() - began}
            shown = {k: v for k, v in row.items() if k not in ("rows", "events", "ledger")}
            shown["ledger"] = {k: v for k, v in found.items() if k != "series"}
            print(f"{limit.used:.0f} s: {name}", json.dumps(rounded(shown)), flush=True)
            keep(out)
    finally:
        out["out_of_memory"] = scene.lines.found
        out["restarts"] = {name: slot.restarts for name, slot in scene.scheduler.slots.items()}
        out["events"] = [event for event in scene.events.found if event["kind"] != "state"]
        keep(out)
        await scene.close()


async def attempt(part: Awaitable[None], name: str, scene: Scene, row: Part, limit: Limit) -> None:
    """Run a part to its end or to the limit; what went wrong is in its figures."""
    task = asyncio.ensure_future(part)
    await asyncio.wait({task}, timeout=limit.left)
    if not task.done():
        row["cut_after_s"] = limit.used
        task.cancel()
        await asyncio.wait({task}, timeout=10.0)
        return
    error = task.exception()
    if error is not None:
        logging.getLogger("bench").error("part %s failed", name, exc_info=error)
        row |= {"error": f"{type(error).__name__}: {error}", "vram": scene.vram()}
        last = scene.scheduler.memory.steward.last
        row["plan"] = last and last.as_dict()


def prepare(sizes: Sizes, folder: Path, limit: Limit, out: Part) -> None:
    """Make models that are missing and compile what their shapes need, side by side. Into `out`: the seconds that each
    took, and where the figures come from: asking that makes a context on a GPU, which this process is not to have."""
    missing = [name for name in sizes.models if not (folder / name / "profile.safetensors").exists()]
    makers = {f"make {name}": ["bench.vram_models", folder, sizes.device, name] for name in missing}
    compilers = {f"compile for {name}": ["bench.vram_compile", sizes.device, name] for name in sizes.models}
    # Modules, not scripts: in a script's path transformers would take bench/kernels.py for the package of that name.
    root = str(Path(__file__).resolve().parent.parent)
    environment = {"OMP_NUM_THREADS": str(sizes.threads), **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(arguments: list[Any], most: float | None = None, **more: Any) -> tuple[float, str]:
        began, bounds = time.monotonic(), [seconds for seconds in (most, limit.left) if seconds is not None]
        command = [sys.executable, *map(str, arguments)]
        timeout = min(bounds, default=None)
        done = subprocess.run(command, check=True, env=environment, timeout=timeout, text=True, **more)
        return time.monotonic() - began, done.stdout or ""

    took = out["prepared_s"] = {}
    with ThreadPoolExecutor(sizes.together) as pool:
        facts = pool.submit(run, ["-c", PROVENANCE, sizes.device], stdout=subprocess.PIPE)
        waits = {what: pool.submit(run, ["-m", *more]) for what, more in makers.items()}
        others = {what: pool.submit(run, ["-m", *more], COMPILE_S) for what, more in compilers.items()}
        out |= {name: value for name, value in json.loads(facts.result()[1]).items() if name != "command"}
        for what, wait in waits.items():
            took[what] = wait.result()[0]
        for what, wait in others.items():
            try:
                took[what] = wait.result()[0]
            except subprocess.SubprocessError as error:
                took[what] = f"{type(error).__name__}: the workers compile what lacks"


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
    parser.add_argument("--limit", type=float, help="seconds: the part that runs then is cut off, and none is begun")
    options = parser.parse_args()
    limit = Limit(options.limit)
    parts = [part for part in options.parts.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    sizes = CHECK if options.check else FULL
    folder = options.models or Path(tempfile.mkdtemp())
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    document: Part = {"seed": 6, "command": command_line(), "limit_s": options.limit, "sizes": vars(sizes)}

    def keep(out: Part) -> None:
        write_json(options.json, rounded(document | out))

    try:
        prepare(sizes, folder, limit, document)
        document["until_prepared_s"] = limit.used
        print(f"{limit.used:.0f} s: prepared", json.dumps(rounded(document["prepared_s"])), flush=True)
        asyncio.run(study(sizes, folder, parts, limit, keep))
    except subprocess.TimeoutExpired:
        keep({"not_begun": ["load", *parts]})
    finally:
        if options.models is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

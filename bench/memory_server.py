"""Real workers under a small budget on one GPU: models take turns, another process takes memory, nobody is cut off.

    python bench/memory_server.py --json bench/results/memory_server.json

Two models of a 1.7-billion-parameter shape with random weights (and the embedded model's tokenizer) and the embedded
model, under a `max_vram` that holds one of the two. The gateway's scheduler runs in this process, without HTTP; this
process makes no CUDA context. Needs one NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from server.config import Settings
from server.metrics import Metrics
from server.scheduler.loop import Scheduler
from server.scheduler.stream import RequestStream
from server.worker import messages as m

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo-7m"
MAKE = """
import sys, json, torch
from transformers import AutoModelForCausalLM, Qwen3Config
torch.manual_seed(int(sys.argv[2]))
config = Qwen3Config(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                     num_key_value_heads=8, head_dim=128, vocab_size=8192, tie_word_embeddings=True,
                     max_position_embeddings=8192, bos_token_id=0, eos_token_id=2, pad_token_id=0)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[1])
"""
FOREIGN = """
import sys, torch
held = torch.empty(int(float(sys.argv[1]) * 2**30), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.readline()
"""


class Events:
    """What the scheduler told, with times."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def add(self, kind: str, reason: str, **detail: Any) -> None:
        """Keep an event."""
        self.found.append({"at": round(time.monotonic(), 3), "kind": kind, "reason": reason, **detail})


async def ask(scheduler: Scheduler, name: str, tokens: int) -> tuple[float, RequestStream, Any]:
    """Seconds to the first token of a request; its stream and slot."""
    slot, began = scheduler.slots[name], time.monotonic()
    worker = await scheduler.ensure(slot)
    sampling = m.Sampling(max_tokens=tokens, temperature=0.0)
    message = m.Submit(uuid.uuid4().hex, "completion", sampling, prompt="Once upon a time there was a little dog")
    stream = scheduler.submit(slot, worker, message, 120.0)
    while not isinstance(item := await stream.get(), m.Delta):
        if item is None or isinstance(item, (m.Failed, m.Rejected)):
            raise RuntimeError(f"{name}: {item}")
    return time.monotonic() - began, stream, slot


async def whole(scheduler: Scheduler, name: str, tokens: int) -> float:
    """A whole answer; seconds to its first token."""
    seconds, stream, slot = await ask(scheduler, name, tokens)
    while not isinstance(item := await stream.get(), m.Finished):
        if item is None or isinstance(item, m.Failed):
            raise RuntimeError(f"{name}: {item}")
    scheduler.release(slot, stream, cancel=False)
    return seconds


async def watch(scheduler: Scheduler, base: int, errors: list[float]) -> None:
    """By how much of what is in use the ledger misjudges foreign memory, again and again while nobody moves."""
    while True:
        await asyncio.sleep(0.25)
        account = scheduler.memory.ledger.accounts["cuda:0"]
        if all(ward.moving is None for ward in scheduler.memory.steward.wards.values()):
            errors.append(abs(account.foreign - base) / max(1, account.reading.used))


async def study(models: dict[str, Path], budget: float, foreign_gib: float) -> dict[str, Any]:
    """All phases."""
    state = tempfile.mkdtemp()
    given = [{"name": name, "path": str(path), "load": "on_demand", "device": "cuda"} for name, path in models.items()]
    memory = {"max_vram": f"{budget}GiB", "reserve": 0}
    settings = Settings(models=given, memory=memory, server={"state_dir": state, "load_wait_seconds": 40})  # type: ignore[arg-type]
    events = Events()
    scheduler = Scheduler(settings, Metrics(), events=events)  # type: ignore[arg-type]
    scheduler.start()
    out: dict[str, Any] = {}
    try:
        base = scheduler.memory.ledger.accounts["cuda:0"].foreign
        out["loads_s"] = {name: round(await whole(scheduler, name, 8), 2) for name in ("demo", "a", "b")}
        out["states"] = {name: slot.state for name, slot in scheduler.slots.items()}
        errors: list[float] = []
        watcher = asyncio.create_task(watch(scheduler, base, errors))
        out["turns_s"] = [round(await whole(scheduler, name, 8), 3) for name in ("a", "b", "a", "b")]
        alone = sorted([await whole(scheduler, "demo", 4) for _ in range(40)])
        turn = asyncio.create_task(whole(scheduler, "a", 8))
        beside = []
        while not turn.done() or len(beside) < 40:
            beside.append(await whole(scheduler, "demo", 4))
        out["resident_ttft_ms"] = {
            "alone_median": round(statistics.median(alone) * 1e3, 1),
            "alone_p99": round(alone[-1] * 1e3, 1),
            "beside_a_wake_median": round(statistics.median(beside) * 1e3, 1),
            "beside_p99": round(sorted(beside)[-1] * 1e3, 1),
        }
        watcher.cancel()
        out["ledger_error_max"] = round(max(errors, default=0.0), 4)
        out["foreign"] = await foreign(scheduler, events, foreign_gib)
        out["events"] = [
            {k: e[k] for k in ("kind", "reason", "model", "seconds") if k in e}
            for e in events.found
            if e["kind"] not in ("state",)
        ]
        out["vram"] = scheduler.memory.vram()["devices"][-1]
    except Exception:
        print(
            json.dumps({"plan": scheduler.memory.steward.last and scheduler.memory.steward.last.as_dict()}), flush=True
        )
        print(json.dumps(scheduler.memory.vram()), [e["reason"] for e in events.found], flush=True)
        raise
    finally:
        await scheduler.stop()
        shutil.rmtree(state, ignore_errors=True)
    return out


async def foreign(scheduler: Scheduler, events: Events, gib: float) -> dict[str, Any]:
    """Another process takes memory while streams run, and gives it back."""
    streams = [await ask(scheduler, "demo", 4000) for _ in range(4)]
    before = len(events.found)
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FOREIGN, str(gib), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdin is not None
    await other.stdout.readline()
    began = time.monotonic()
    noticed = None
    while noticed is None and time.monotonic() - began < 5:
        await asyncio.sleep(0.02)
        found = [e for e in events.found[before:] if e["kind"] == "foreign"]
        noticed = time.monotonic() - began if found else None
    await asyncio.sleep(2)
    other.stdin.write(b"\n")
    await other.stdin.drain()
    await other.wait()
    await asyncio.sleep(1)
    broken = 0
    for _, stream, slot in streams:
        while not isinstance(item := await stream.get(), (m.Finished, m.Failed, type(None))):
            continue
        broken += not isinstance(item, m.Finished)
        scheduler.release(slot, stream, cancel=False)
    return {"gib": gib, "noticed_after_s": noticed, "streams": len(streams), "streams_broken": broken}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=8.0, help="max_vram in GiB")
    parser.add_argument("--foreign", type=float, default=1.0, help="GiB that the other process takes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    models = {"demo": DEMO}
    for number, name in enumerate("ab"):
        subprocess.run([sys.executable, "-c", MAKE, str(folder / name), str(number)], check=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / file, folder / name / file)
        models[name] = folder / name
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "commit": commit,
        "budget_gib": options.budget,
        **asyncio.run(study(models, options.budget, options.foreign)),
    }
    print(json.dumps(result, indent=1))
    shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Trace study and planner figures of the VRAM scheduler. Needs no GPU; everything is in virtual time and reproducible.

    python bench/scheduler.py --trace ../shared/data/traces/azure_llm_2023_conv.csv --json bench/results/scheduler.json

The trace's requests are spread over six models by a Zipf law (exponent 1, seed below) on GPUs of 12, 12 and 16 GB less
0.5 GB reserve each, with 48 GB of host memory for models that sleep. `--planner` measures the planner alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.trace_simulator import Kind, Request, Rule, Simulator, SpectralRule, kind
from bench.whole_model_rules import LeastCost, LeastKeepAlive
from server import heap
from server.scheduler.planner import plan
from server.scheduler.steward import Wishes
from spectral.commands.bench_load import read_trace as load_trace
from spectral.errors import SpectralError

SEED = 6
ZIPF = 1.0
GPUS = {"cuda:0": 12, "cuda:1": 12, "cuda:2": 16}
RESERVE_GB, HOST_GB = 0.5, 48
# The embedded model's measured ladder (profiles/demo-7m.safetensors): ratio at 4,096 tokens and mean KL. The first row,
# exact, is what the other rules have.
LADDER = [
    ("exact", 1.0, 0.0),
    ("3.5x", 3.5, 0.000072),
    ("4x", 4.0, 0.000134),
    ("5x", 5.0, 0.000316),
    ("6x", 6.0, 0.000665),
    ("8x", 8.0, 0.001652),
    ("10x", 10.0, 0.003119),
]
# Weights as people run them on such cards (4-bit, or 8-bit for small ones) and bf16 KV bytes per token of the shapes.
MODELS = [
    ("qwen3-8b-nf4", 5.7, 147_456),
    ("llama3.1-8b-nf4", 5.6, 131_072),
    ("mistral-7b-nf4", 4.3, 131_072),
    ("gemma3-4b-int8", 4.3, 139_264),
    ("qwen3-4b-nf4", 2.8, 147_456),
    ("phi4-mini-int8", 4.1, 131_072),
]


def study(trace: Path) -> dict[str, Any]:
    """The same requests under every rule."""
    rows = read_trace(trace)
    kinds = [kind(name, gib, token_bytes, LADDER[1:]) for name, gib, token_bytes in MODELS]
    exact = [kind(name, gib, token_bytes, LADDER[:1]) for name, gib, token_bytes in MODELS]
    devices = {name: int((size - RESERVE_GB) * 1e9) for name, size in GPUS.items()} | {"cpu": int(HOST_GB * 1e9)}
    rules: dict[str, tuple[list[Kind], Rule]] = {
        "spectral": (kinds, SpectralRule(kinds, Wishes(min_context=8192, max_concurrency=4))),
        "least_keep_alive": (exact, LeastKeepAlive(sleep=False)),
        "least_keep_alive_with_sleep": (exact, LeastKeepAlive(sleep=True)),
        "least_cost": (exact, LeastCost(sleep=False)),
        "least_cost_with_sleep": (exact, LeastCost(sleep=True)),
    }
    out = {}
    for name, (models, rule) in rules.items():
        requests = [Request(*row) for row in rows]
        sim = Simulator(models, devices, requests, rule)
        began = time.perf_counter()
        sim.run(tick_s=1.0 if name == "spectral" else 0.0)
        out[name] = figures(sim, requests) | {"seconds_of_cpu": round(time.perf_counter() - began, 1)}
        if isinstance(rule, SpectralRule):
            out[name] |= {"squeezes": rule.squeezes, "first_events": [f"{t:.1f} s: {e}" for t, e in rule.log[:12]]}
        print(f"{name}: {json.dumps({k: v for k, v in out[name].items() if k != 'first_events'})}")
    return out


def read_trace(trace: Path) -> list[tuple[float, str, int, int]]:
    """(seconds, model, prompt tokens, answer tokens), spread over the models by the Zipf law."""
    rng = random.Random(SEED)
    names = [name for name, _, _ in MODELS]
    weights = [1 / rank**ZIPF for rank in range(1, len(names) + 1)]
    rows = sorted((row.at, row.prompt_tokens, row.output_tokens) for row in load_trace(trace))
    return [(at, rng.choices(names, weights)[0], prompt, answer) for at, prompt, answer in rows]


def figures(sim: Simulator, requests: list[Request]) -> dict[str, Any]:
    """Starts, wake-ups, times to first token (s), KL (nats), and moments in which memory would have run out."""
    waits = sorted((r.first if r.first is not None else float("inf")) - r.at for r in requests)
    machines = sim.machines.values()
    return {
        "requests": len(requests),
        "answered": sum(r.first is not None for r in requests),
        "cold_starts": sum(m.starts for m in machines),
        "wake_ups": sum(m.wakes for m in machines),
        "ttft_p50_s": round(waits[len(waits) // 2], 3),
        "ttft_p99_s": round(waits[int(len(waits) * 0.99)], 3),
        "ttft_max_s": round(waits[-1], 3),
        "kl_mean": round(sum(r.kl for r in requests) / len(requests), 6),
        "out_of_memory": sim.overruns,
        "settings": dict(Counter(m.setting for m in machines if m.state == "hot")),
    }


def planner_figures() -> dict[str, Any]:
    """Times, and the gap to exhaustive search over many small cases."""
    from server.scheduler.options import PIN_S, UNMET_S
    from tests.server.scheduler.cases import least_cost, problem

    plan(*problem(0, 50, 8, 5))  # imports SciPy
    heap.keep()  # as the server does
    out: dict[str, Any] = {}
    for models, gpus in ((6, 3), (20, 4), (50, 8)):
        wall, cpu = [], []
        for seed in range(20):
            case = problem(seed, models, gpus, 5)
            plan(*case)
            began = time.perf_counter(), time.process_time()
            plan(*case)
            wall.append(round((time.perf_counter() - began[0]) * 1e3, 1))
            cpu.append(round((time.process_time() - began[1]) * 1e3, 1))
        figures_ = {"median": sorted(wall)[10], "max": max(wall), "cpu_median": sorted(cpu)[10], "cpu_max": max(cpu)}
        out[f"{models}_models_{gpus}_gpus_ms"] = figures_
    gaps = []
    for seed in range(3000):
        models_, devices = problem(seed, 1 + seed % 4, 1 + seed % 2, 1 + seed % 3, wishes=seed % 3 == 0)
        best = least_cost(models_, devices)
        found = plan(models_, devices, hysteresis=0)
        measured = best % UNMET_S if best < PIN_S else best % PIN_S
        gaps.append((found.cost - best) / max(measured, 1e-9))
    out["small_cases"] = {"cases": len(gaps), "above_1_percent": sum(g > 0.01 for g in gaps), "largest_gap": max(gaps)}
    print(json.dumps(out))
    return out


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--planner", action="store_true", help="also measure the planner")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "commit": commit,
        "seed": SEED,
        "zipf": ZIPF,
        "gpus_gb": GPUS,
        "reserve_gb": RESERVE_GB,
        "host_gb": HOST_GB,
    }
    about |= {"models": MODELS, "ladder": LADDER, "python": platform.python_version(), "machine": platform.machine()}
    result: dict[str, Any] = {"about": about}
    if options.trace:
        result["trace"] = options.trace.name
        try:
            result["study"] = study(options.trace)
        except SpectralError as error:
            parser.error(f"--trace: {error}")
    if options.planner:
        result["planner"] = planner_figures()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

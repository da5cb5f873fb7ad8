"""Compiles the kernels that a model of bench/vram.py will ask for, before its worker does, into TRITON_CACHE_DIR.

    python -m bench.vram_compile DEVICE NAME

Two layers of the named shape are enough: kernels depend on heads, widths and rows, not on how many layers there are.
Streams of short and of long contexts come and go, one to eight at once, at the profile's default and at coarser ones.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.vram_models import DEFAULT, DEMO, SEED, SHAPES, configuration, synthetic_profile
from server.worker.child_load import CHUNK_TOKENS
from spectral.engine.build import build_engine
from spectral.engine.engine import Engine
from spectral.engine.types import EngineLimits, Failed, GenerateRequest, SamplingParams

STREAMS = 8
LENGTHS = {"cpu": (24,), "cuda": (16, 1500, 8000)}


def streams(engine: Engine, length: int, settings: tuple[str, ...]) -> None:
    """Eight of them, which end one after another; the cache's setting changes while all run."""
    for number in range(STREAMS):
        prompt = torch.randint(10, 8000, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        params = SamplingParams(max_tokens=40 + 8 * number, temperature=0.0, ignore_eos=True)
        engine.submit(GenerateRequest(f"{length}-{number}", prompt, params))
    steps, wanted = 0, list(settings)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
        steps += len(engine.scheduler.running) == STREAMS
        if wanted and steps >= 10:
            engine.set_setting(wanted.pop(0))
            steps = 0


def main() -> None:
    """Entry point."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spectral.hf import wrap_model

    device, name = sys.argv[1:]
    began, sizes = time.perf_counter(), SHAPES[name] | {"num_hidden_layers": 2}
    torch.manual_seed(SEED)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(name, sizes), dtype=dtype).eval()
    loaded = wrap_model(name, model.requires_grad_(False), AutoTokenizer.from_pretrained(DEMO))
    profile = synthetic_profile(name, sizes, loaded)
    kind = torch.device(device).type
    chunk, step = CHUNK_TOKENS["cpu" if kind == "cpu" else "gpu"]
    limits = EngineLimits(max_concurrency=STREAMS, prefill_chunk=chunk, token_budget=step)
    engine = build_engine(loaded, profile, setting=DEFAULT, limits=limits).engine
    engine.warm_up()
    warm = time.perf_counter() - began
    for length in LENGTHS[kind]:
        streams(engine, length, ("8x", "16x"))
        engine.set_setting(DEFAULT)
    print(f"{name}: compiled in {time.perf_counter() - began:.1f} s, {warm:.1f} s of them until warm", flush=True)


if __name__ == "__main__":
    main()

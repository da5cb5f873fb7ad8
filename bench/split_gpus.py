"""A model spread over two GPUs answers as on one: greedy tokens, while its cache is parked, trimmed and squeezed.

    python bench/split_gpus.py [--model demo-7m] [--dtype float32] [--tokens 200] [--json FILE]

The layers are spread by accelerate under limits that no single GPU of the two could hold the model in; each layer's
pages lie on its layer's GPU. float32, and on one GPU too without what a split model does not have (captured steps,
several operations in one launch), so that equal arithmetic gives equal tokens. `--check` runs it on the CPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from spectral import hf
from spectral.engine.build import build_engine, find_profile
from spectral.engine.types import Delta, EngineLimits, Failed, GenerateRequest, SamplingParams
from spectral.hf import LoadedModel, load_model
from spectral.provenance import provenance

SETTINGS = ("exact", "8x")


def limits_of(nbytes: int) -> dict[str, int]:
    """Bytes of two GPUs between which a model of so many is divided about evenly."""
    return {"cuda:0": nbytes // 2, "cuda:1": 7 * nbytes // 10}


def answers(loaded: LoadedModel, setting: str, count: int, squeeze: str) -> dict[str, Any]:
    """Tokens of four prompts side by side; at a third of the way one is parked, at two thirds the cache is squeezed."""
    limits = EngineLimits(max_concurrency=4, prefill_chunk=64, token_budget=128)
    engine = build_engine(loaded, find_profile(loaded), setting=setting, limits=limits).engine
    size = engine.vocab_size
    for number, length in enumerate((7, 150, 301, 420)):
        rng = torch.Generator().manual_seed(number)
        prompt = torch.randint(10, size, (length,), generator=rng).tolist()
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        engine.submit(GenerateRequest(f"r{number}", prompt, params))
    found: dict[str, list[int]] = {f"r{number}": [] for number in range(4)}
    began, steps = time.perf_counter(), 0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                found[event.request_id] += event.token_ids
        steps += 1
        if steps == count // 3:
            engine.park("r1")
        if steps == count // 2:
            engine.trim()
        if steps == 2 * count // 3 and setting != "exact":
            engine.set_setting(squeeze)
        engine.check()
    places = sorted({str(pool.device) for pool in engine.store.pools if pool is not None})
    return {"tokens": found, "pages_on": places, "seconds": round(time.perf_counter() - began, 2)}


def differences(found: dict[str, list[int]], wanted: dict[str, list[int]]) -> dict[str, int]:
    """Requests whose tokens differ, and from which one on."""
    pairs = {name: list(zip(found[name], wanted[name], strict=True)) for name in wanted}
    apart = {name: [i for i, (a, b) in enumerate(both) if a != b] for name, both in pairs.items()}
    return {name: places[0] for name, places in apart.items() if places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-7m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--squeeze", default="16x")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--check", action="store_true", help="the same on the CPU alone: does it run?")
    options = parser.parse_args()
    if not options.check and torch.cuda.device_count() < 2:
        parser.error("this needs two GPUs; --check runs it on the CPU")
    os.environ["SPECTRAL_DECODE"], hf.lean = "eager", lambda model: []
    one = load_model(options.model, dtype=options.dtype, device="cpu" if options.check else "cuda:0")
    size = one.weights_nbytes
    single = {setting: answers(one, setting, options.tokens, options.squeeze) for setting in SETTINGS}
    del one
    limits = {"cpu": 4 * size} if options.check else limits_of(size)
    two = load_model(options.model, dtype=options.dtype, max_memory=limits)
    if not options.check and not two.split:
        raise SystemExit(f"the model was not split: {two.model.hf_device_map}")
    rows = []
    for setting in SETTINGS:
        found = answers(two, setting, options.tokens, options.squeeze)
        rows.append(
            {
                "setting": setting, "equal": found["tokens"] == single[setting]["tokens"],
                "first_differences": differences(found["tokens"], single[setting]["tokens"]),
                "pages_on": found["pages_on"], "seconds": found["seconds"],
                "seconds_on_one": single[setting]["seconds"],
            }  # fmt: skip
        )
        print(rows[-1], flush=True)
    document = {
        "rows": rows, "layers_on": [str(device) for device in two.layer_devices], "limits": limits,
        **provenance("cpu" if options.check else "cuda:0"),
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if not all(row["equal"] for row in rows):
        raise SystemExit("tokens differ")


if __name__ == "__main__":
    main()

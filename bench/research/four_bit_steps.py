"""Decode steps of a model with weights of four bits: with our products of a few rows, and with bitsandbytes' own.

    python bench/research/four_bit_steps.py [--layers 4] [--rows 1,4,8] [--context 1024] [--json FILE] [--check]

Qwen3-8B's shape with fewer layers and random weights, written to a temporary folder and loaded as nf4 by transformers;
the synthetic 8x setting of bench/engine.py for speed. Milliseconds of a whole engine step, mean and median, and of its
graph by itself. `same`: whether both chose the same tokens. `--check` runs a tiny model without quantization on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config  # noqa: E402

from bench.engine_scene import CHECK, FULL, Letters, Scene, decode_times, hold, replayed  # noqa: E402
from spectral import few_rows  # noqa: E402
from spectral.hf import NAME, wrap_model  # noqa: E402
from spectral.lean_four_bits import WEIGHTS  # noqa: E402
from spectral.provenance import provenance  # noqa: E402


def make(options: argparse.Namespace) -> Scene:
    """The model, quantized."""
    sizes, device = (CHECK, "cpu") if options.check else (FULL, "cuda:0")
    shape = {**sizes.shape, "num_hidden_layers": options.layers}
    dtype = torch.float32 if options.check else torch.bfloat16
    torch.manual_seed(1)
    with torch.device(device), tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(**shape, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        how: dict[str, Any] = {"attn_implementation": NAME, "dtype": dtype, "device_map": {"": device}}
        if not options.check:
            how["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    loaded = wrap_model("qwen3-8b-shape", model.requires_grad_(False), Letters())
    loaded.eos_token_ids = set()
    return Scene(loaded, torch.device(device), replace(sizes, shape=shape), prefer="speed")


def measure(scene: Scene, rows: int, context: int) -> dict[str, Any]:
    torch.manual_seed(2)
    engine = scene.engine()
    hold(engine, rows, context, 400)
    mean, median = decode_times(engine, 40, 60)
    tokens = [sequence.tokens[context:] for sequence in engine.scheduler.running]
    return {"mean_ms": 1e3 * mean, "median_ms": 1e3 * median, "graph_ms": replayed(scene, engine), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", default="1,4,8")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scene, found = make(options), []
    numbers = [int(rows) for rows in options.rows.split(",")]
    own = [measure(scene, rows, options.context) for rows in numbers]
    trusted = WEIGHTS not in few_rows._distrusted
    few_rows.distrust("this is measured without them", WEIGHTS)
    for rows, ours in zip(numbers, own, strict=True):
        gc.collect()
        theirs = measure(scene, rows, options.context)
        same = ours.pop("tokens") == theirs.pop("tokens")
        row = {"rows": rows, "context": options.context, "own": ours, "bitsandbytes": theirs, "same": same}
        found.append(row)
        print(f"{rows} x {options.context}: {ours['median_ms']:.2f} ms (graph {ours['graph_ms']:.2f}), bitsandbytes "
              f"{theirs['median_ms']:.2f} ({theirs['graph_ms']:.2f}); same tokens: {same}", flush=True)  # fmt: skip
    document = {
        "argv": {**vars(options), "json": str(options.json)}, "provenance": provenance(scene.device.type),
        "trusted": trusted, "steps": found,
    }  # fmt: skip
    print(json.dumps({"trusted": trusted}))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

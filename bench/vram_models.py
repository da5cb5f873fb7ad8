"""Models for bench/vram.py: Qwen3 shapes with random weights, the embedded model's tokenizer, and a synthetic profile.

    python -m bench.vram_models FOLDER DEVICE NAME [NAME ...]

Each becomes FOLDER/NAME with a profile in FOLDER/NAME/profile.safetensors. Bases have the synthetic spectrum of
bench/kernels.py, every layer its own importance, so every layer has other widths; the ladder's sizes follow from them.
Random weights have no quality to measure: the ladder's KL figures are those of the embedded model's rows of the same
names, because the planner needs an order. Sizes and times do not depend on them.
"""

from __future__ import annotations

import shutil
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from spectral.basis import Unit
from spectral.bits import CHANNEL_GROUP, WIDTHS, frequency_classes, gaussian_step, gaussian_tables
from spectral.calibrate import LADDER
from spectral.fit import Fitted, ladder
from spectral.kernels.synthetic import BLOCK, PAGE, RECENT, SINKS, synthetic_unit
from spectral.profile import LayerProfile, SpectralProfile
from spectral.resources import profile_path

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo-7m"
SEED = 6
DEFAULT = "4x"
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
TINY = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}


def shape(hidden: int, intermediate: int, layers: int, **more: int) -> dict[str, int]:
    """What a configuration is asked for."""
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, **more}


SHAPES: dict[str, dict[str, int]] = {
    "8b": shape(4096, 12288, 36, num_attention_heads=32, **SHARED),
    "4b": shape(2560, 9728, 36, num_attention_heads=32, **SHARED),
    "1.7b": shape(2048, 6144, 28, num_attention_heads=16, **SHARED),
    "tiny-a": shape(96, 128, 3, **TINY),
    "tiny-b": shape(64, 96, 3, **TINY),
    "tiny-c": shape(64, 96, 2, **TINY),
}


class Letters:
    """A tokenizer that needs no file, for what only wants a model's identity."""

    eos_token_id = None
    chat_template = None


@lru_cache(maxsize=8)
def unit(heads: tuple[int, int], dim: int, seed: int) -> Unit:
    """A synthetic unit; its decomposition takes seconds, so all layers share it."""
    return synthetic_unit(heads, dim, 4.0, seed)[0]


def errors_of(part: Unit, importance: float) -> tuple[np.ndarray, np.ndarray]:
    """A unit's loss at every width [len(WIDTHS), classes, runs], and codes per token [classes, runs]."""
    counts = np.array([len(rows) for rows in frequency_classes(PAGE)])
    runs = part.variance.size // CHANNEL_GROUP
    energy = part.variance * part.deviation**2 * counts[:, None] / PAGE
    energy = importance * energy.reshape(len(counts), runs, CHANNEL_GROUP).sum(2)
    lost = np.stack([energy if width == 0 else energy * gaussian_step(width)[1] for width in WIDTHS])
    return lost, np.repeat(CHANNEL_GROUP * counts[:, None] / PAGE, runs, axis=1)


def fitted(sizes: dict[str, int]) -> Fitted:
    """What calibration would have found: the same bases in every layer, each layer with an importance of its own."""
    rng = np.random.default_rng(SEED)
    dim, heads = sizes["head_dim"], sizes["num_key_value_heads"]
    run = max(1, min(heads, 1024 // (2 * dim)))
    units = [unit((a, min(a + run, heads)), dim, a // run) for a in range(0, heads, run)]
    frequencies = 1e6 ** (-np.arange(0, dim, 2) / dim)
    layers, errors, counts, where = {}, [], [], []
    for index in range(sizes["num_hidden_layers"]):
        layers[index] = LayerProfile(units, dim, dim, frequencies)
        for number, part in enumerate(units):
            lost, size = errors_of(part, float(np.exp(rng.normal(0, 0.7))))
            errors.append(lost.reshape(len(WIDTHS), -1))
            counts.append(size.ravel())
            where += [(index, number, c, r) for c in range(size.shape[0]) for r in range(size.shape[1])]
    return Fitted(layers, gaussian_tables(), np.concatenate(errors, 1), np.concatenate(counts), where)


def synthetic_profile(name: str, sizes: dict[str, int], loaded: Any) -> SpectralProfile:
    """The profile of a random model, `loaded` as spectral.hf wraps it."""
    facts = fitted(sizes)
    rows, bits = ladder(facts, loaded.shape, LADDER, sinks=SINKS, recent=RECENT, page_tokens=PAGE)
    path = profile_path("demo-7m")
    assert path is not None
    known = {row.name: row.kl_mean for row in SpectralProfile.load(path).ladder}
    for row in rows:
        row.kl_mean = known[row.name]
    return SpectralProfile(
        model=name, fingerprint=loaded.fingerprint, token_nbytes=loaded.shape.token_nbytes(),
        layers=[facts.layers[index] for index in range(len(facts.layers))], tables=facts.tables, bits=bits, ladder=rows,
        default=DEFAULT, block_tokens=BLOCK, sliding=[None] * len(facts.layers),
        provenance={"corpus": "synthetic", "kl": "of demo-7m's rows of the same names", "seed": SEED},
    )  # fmt: skip


def configuration(name: str, sizes: dict[str, int]) -> Any:
    """A Qwen3 of these sizes; the smaller shapes have one embedding for input and output."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=8192, tie_word_embeddings=name != "8b", bos_token_id=0, eos_token_id=2, pad_token_id=0, **sizes
    )


def make(folder: Path, name: str, device: str) -> None:
    """Write one model and its profile."""
    from transformers import AutoModelForCausalLM

    from spectral.hf import wrap_model

    began, sizes = time.perf_counter(), SHAPES[name]
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(name, sizes), dtype=torch.bfloat16)
    target = folder / name
    model.save_pretrained(target, max_shard_size="4GB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / file, target / file)
    synthetic_profile(name, sizes, wrap_model(name, model, Letters())).save(target / "profile.safetensors")
    print(f"{name}: made in {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    """Entry point."""
    folder, device, *names = sys.argv[1:]
    for name in names:
        make(Path(folder), name, device)


if __name__ == "__main__":
    main()

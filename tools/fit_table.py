"""docs/fits.md: which models of well-known shapes fit which cards, and with how much context, as `spectral plan` says.

    python tools/fit_table.py            writes docs/fits.md from tools/fit_shapes.json
    python tools/fit_table.py --shapes   measures the shapes anew (transformers, on the meta device: nothing is loaded)

For each model a folder is made with what the planner reads of a real one: a config.json and the header of a
safetensors file. The numbers are then those of `spectral plan --gpu SIZE --with FOLDER --context N`, for the largest N.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = ROOT / "tools" / "fit_shapes.json"
FRAME = ROOT / "tools" / "fit_page.md"
"""The page around the table."""
CARDS = (8, 12, 16, 24, 40)
WEIGHTS = ("none", "int8", "nf4")
STEP = 1024
EIGHTH = 8.0
SINKS, WINDOW, WINDOW_BYTES = 4, 127, 8.5 / 16
"""What an exact window takes: sinks in bf16, recent tokens as 8 bits and scales, against bf16."""


def configs() -> dict[str, Any]:
    """Configurations of well-known models, as their publishers have them."""
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
    )

    def qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> Any:
        return Qwen3Config(
            vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
            tie_word_embeddings=tied,
        )  # fmt: skip

    def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool = False) -> Any:
        return LlamaConfig(
            vocab_size=128_256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=131_072,
            tie_word_embeddings=tied,
        )  # fmt: skip

    return {
        "Qwen3 0.6B": qwen3(1024, 3072, 28, 16, tied=True),
        "Qwen3 1.7B": qwen3(2048, 6144, 28, 16, tied=True),
        "Llama 3.2 3B": llama(3072, 8192, 28, 24, 8, tied=True),
        "Phi-3 mini 4k": Phi3Config(),
        "Qwen3 4B": qwen3(2560, 9728, 36, 32, tied=True),
        "Mistral 7B v0.3": MistralConfig(vocab_size=32_768, sliding_window=None, max_position_embeddings=32_768),
        "Qwen2.5 7B": Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32_768,
        ),
        "Llama 3.1 8B": llama(4096, 14_336, 32, 32, 8),
        "Qwen3 8B": qwen3(4096, 12_288, 36, 32),
        "Gemma 2 9B": Gemma2Config(
            hidden_size=3584, intermediate_size=14_336, num_hidden_layers=42, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256,
        ),
        "Gemma 3 12B": Gemma3TextConfig(
            vocab_size=262_208, hidden_size=3840, intermediate_size=15_360, num_hidden_layers=48,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256, sliding_window=1024,
            max_position_embeddings=131_072,
        ),
        "Qwen3 14B": qwen3(5120, 17_408, 40, 40),
        "Qwen3 32B": qwen3(5120, 25_600, 64, 64),
        "Llama 3.1 70B": llama(8192, 28_672, 80, 64, 8),
    }  # fmt: skip


def measure() -> dict[str, Any]:
    """For each model: what the planner reads of its config, and numbers in linear layers and elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM

    found = {}
    for name, config in configs().items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linear = other = 0
        for tensor_name, tensor in model.named_parameters():
            outside = any(part in tensor_name for part in ("embed", "lm_head"))
            if tensor.ndim == 2 and not outside:
                linear += tensor.numel()
            else:
                other += tensor.numel()
        fields = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "layer_types")
        kept = {field: getattr(config, field, None) for field in (*fields, "head_dim", "max_position_embeddings")}
        found[name] = {"linear": linear, "other": other, "config": {k: v for k, v in kept.items() if v is not None}}
    return found


def make_folder(folder: Path, shape: dict[str, Any]) -> None:
    """What the planner reads of a model: its configuration, and a header without its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape["config"]), encoding="utf-8")
    tensors = {
        "layers.weight": {"dtype": "BF16", "shape": [shape["linear"], 1]},
        "embed.weight": {"dtype": "BF16", "shape": [shape["other"]]},
    }
    write_header(folder / "model.safetensors", tensors)


def make_profile(path: Path, token_nbytes: int) -> None:
    """The header of a profile with one setting, an eighth of bf16: two bits a number."""
    window = token_nbytes * (SINKS + WINDOW * WINDOW_BYTES)
    row = {"name": "8x", "kl_mean": 0.0, "page_nbytes": token_nbytes / EIGHTH * 16, "page_tokens": 16}
    document = json.dumps({"default": "8x", "ladder": [{**row, "window_nbytes": round(window)}]})
    write_header(path, {"__metadata__": {"spectral": json.dumps({"document": document})}})


def write_header(path: Path, header: dict[str, Any]) -> None:
    """A safetensors file that is only a header."""
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)


def tokens(folder: Path, profile: Path | None, quantization: str, card: int, most: int) -> int:
    """The most tokens of cache that one sequence may have on a card; 0 where the model does not fit."""
    from server.config import LimitSettings, ModelSettings, Settings
    from server.plan_command import _readings
    from server.scheduler.dry_run import dry_run

    model = ModelSettings(
        name="model", path=str(folder), quantization=quantization, setting="auto" if profile else "exact",
        profile=str(profile) if profile else None, limits=LimitSettings(max_concurrency=1), device="cuda",
    )  # fmt: skip
    settings, readings = Settings(models=[model]), _readings([f"{card}GiB"], "64GiB")

    def fits(count: int) -> bool:
        return not dry_run(settings, readings, context=count * STEP).plan.unmet

    low, high = 0, max(1, most // STEP)
    if not fits(1):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * STEP


def rows(shapes: dict[str, Any], cards: tuple[int, ...] = CARDS) -> Iterator[tuple[str, str, list[str]]]:
    """(model, weights, a cell for each card): tokens at 8x and, behind it, in the exact cache."""
    from server.scheduler.facts import shape_of

    with tempfile.TemporaryDirectory() as name:
        for place, (model, shape) in enumerate(shapes.items()):
            folder, profile = Path(name, str(place)), Path(name, f"{place}.safetensors")
            make_folder(folder, shape)
            token_nbytes, longest = shape_of(folder)
            make_profile(profile, token_nbytes)
            for weights in WEIGHTS:
                found = []
                for card in cards:
                    coded = tokens(folder, profile, weights, card, longest)
                    exact = tokens(folder, None, weights, card, longest) if coded else 0
                    found.append(f"{shown(coded, longest)} ({shown(exact, longest)})" if coded else "–")
                yield model, {"none": "bf16"}.get(weights, weights), found


def shown(count: int, longest: int) -> str:
    """Tokens in thousands, bold where it is the model's whole context."""
    if not count:
        return "–"
    text = f"{count // STEP}k"
    return f"**{text}**" if count // STEP >= longest // STEP else text


def page() -> str:
    """The whole page."""
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))
    lines = ["| model | weights | " + " | ".join(f"{card} GB" for card in CARDS) + " |"]
    lines.append("|---|---|" + "---|" * len(CARDS))
    lines += [f"| {model} | {weights} | " + " | ".join(cells) + " |" for model, weights, cells in rows(shapes)]
    return FRAME.read_text(encoding="utf-8").replace("TABLE", "\n".join(lines))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", action="store_true", help="measure the shapes anew")
    if parser.parse_args().shapes:
        SHAPES.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "fits.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

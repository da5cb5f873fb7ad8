"""Small random models, codecs and stores for the library's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from spectral.basis import Unit, side_numbers, weighted_basis
from spectral.bits import class_count, gaussian_tables
from spectral.codec import Codebook, LayerCodec
from spectral.frames import BlockFrame
from spectral.hf import LoadedModel, wrap_model
from spectral.pages import ModelShape

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=24),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=24, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=24, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**SMALL),
}


class NoTokenizer:
    """Stands where a test uses token ids only."""

    eos_token_id = 2
    chat_template = None


def made(config: PreTrainedConfig, seed: int = 0) -> Any:
    """transformers' float32 model with random weights, as it has it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(4.0)  # random initialisations attend almost uniformly; make attention matter
    return model


def random_model(family: str, seed: int = 0) -> LoadedModel:
    """A tiny float32 model with random weights."""
    return wrap_model(family, made(FAMILIES[family], seed), NoTokenizer())


def random_unit(
    heads: tuple[int, int], dim: int, seed: int, page: int = 16, side: str = "both", flat: bool = False
) -> Unit:
    """A unit of random, decaying statistics, latents of unit variance; `flat`: of pages that are not transformed."""
    rng = np.random.default_rng(seed)
    size = sum(side_numbers(heads, side, dim, dim))
    mixing = rng.normal(size=(size, size)) * (0.95 ** np.arange(size))
    skew = rng.normal(size=(size, size))
    basis = weighted_basis(rng.normal(size=size), mixing @ mixing.T, skew @ skew.T / size + 0.1 * np.eye(size))
    scale = np.sqrt(np.maximum(basis.variance, 1e-9))
    deviation = rng.uniform(0.5, 1.5, size=(class_count(page, not flat), size))
    return Unit(heads, basis.mean, basis.decode * scale, basis.encode / scale, basis.variance, deviation, side)


def cycling_widths(widths: list[int], channels: int, page: int, flat: bool = False) -> np.ndarray:
    """[classes, channels]: runs of 16 latents cycle through the widths, shifted by one in every class."""
    runs = channels // 16
    return np.stack(
        [
            np.repeat([widths[(run + c) % len(widths)] for run in range(runs)], 16).tolist() + [0] * (channels % 16)
            for c in range(class_count(page, not flat))
        ]
    ).astype(np.uint8)


def random_codec(
    heads: int,
    dim: int,
    widths: list[int],
    *,
    page: int = 16,
    seed: int = 0,
    units: int = 1,
    block: int = 0,
    sinks: int = 4,
    device: str = "cpu",
    apart: bool = False,
    flat: bool = False,
) -> LayerCodec:
    """A layer codec whose latents cycle through the given widths; `units` of equal size, or that many for keys and for
    values (`apart`); `block` tokens of a frame; `flat`: pages are not transformed."""
    run = heads // units
    parts = []
    for side in ("key", "value") if apart else ("both",):
        for number in range(units):
            unit = random_unit((number * run, (number + 1) * run), dim, seed + len(parts), page, side, flat)
            parts.append((unit, cycling_widths(widths, unit.variance.size, page, flat)))
    frequencies = 0.5 ** np.arange(dim // 2)
    frame = BlockFrame(frequencies, block_tokens=block, page_tokens=page, sinks=sinks, device=device)
    return LayerCodec(
        parts, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page, device=device
    )


def random_codebook(
    shape: ModelShape,
    widths: list[int],
    *,
    sinks: int = 4,
    window: int = 16,
    page: int = 8,
    block: int = 32,
    window_bits: int = 16,
    units: int = 1,
    device: str = "cpu",
    apart: bool = False,
    flat: bool = False,
) -> Codebook:
    """A setting with random bases for every full layer of a model; `units`, `apart`, `flat`: see `random_codec`."""
    layers = [
        None
        if layer.sliding
        else random_codec(
            layer.kv_heads,
            layer.key_dim,
            widths,
            page=page,
            seed=i,
            units=units,
            block=block,
            sinks=sinks,
            device=device,
            apart=apart,
            flat=flat,
        )
        for i, layer in enumerate(shape.layers)
    ]
    return Codebook("test", "hash", sinks, window, page, layers, window_bits=window_bits)

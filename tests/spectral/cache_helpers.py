"""Tiny unmodified models, and profiles of them, for the tests of SpectralCache."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedConfig, Qwen3MoeConfig
from transformers import logging as transformers_logging

from spectral.from_tensors import profile_from_tensors
from spectral.hf import fingerprint
from spectral.model_shapes import model_shape
from spectral.profile import SpectralProfile
from tests.spectral.helpers import FAMILIES, SMALL

transformers_logging.set_verbosity_error()

ARGUMENT = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What transformers calls the cache: `cache` since 5.24, where the old name is a warning."""

CACHE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3")

SMALL2 = {**SMALL, "hidden_size": 64, "num_hidden_layers": 2}


def _config(family: str) -> PreTrainedConfig:
    if family == "qwen3-moe":
        extra = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return Qwen3MoeConfig(**SMALL2, **extra)
    if family == "mistral":
        return type(FAMILIES["mistral-sliding"])(**SMALL2, sliding_window=None)
    config = FAMILIES[family]
    fields = {**SMALL2, "head_dim": 16} if hasattr(config, "head_dim") and family != "phi3" else dict(SMALL2)
    if family.startswith("gemma"):
        fields |= {"sliding_window": 24, "query_pre_attn_scalar": 16}
        fields |= {"layer_types": ["sliding_attention", "full_attention"]}
    if family == "mistral-sliding":
        fields |= {"sliding_window": 24}
    return type(config)(**fields)


@cache
def model(family: str, attention: str, seed: int = 0) -> Any:
    """A random model of a family, float32, with the given attention; the same weights whatever the attention."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(_config(family), attn_implementation=attention).float().eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) / 10)  # what tells models apart
        else:
            parameter.data.mul_(4.0)  # random initialisations attend almost uniformly; make attention matter
    made.generation_config.eos_token_id = None
    return made.requires_grad_(False)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def profile(family: str, seed: int = 0, prefer: str = "quality") -> SpectralProfile:
    """The profile of a random model, from its own keys and values of 480 random tokens."""
    made = model(family, "eager", seed)
    shape = model_shape(made)
    past = DynamicCache()
    made(input_ids=tokens(1, 480, 7), use_cache=True, **{ARGUMENT: past})
    return profile_from_tensors(
        [None if s.sliding else (x.keys[0], x.values[0]) for s, x in zip(shape.layers, past.layers, strict=True)],
        sliding=[s.sliding for s in shape.layers],
        ratios=(2.0, 4.5, 8.0),
        prefer=prefer,
        recent=16,
        page_tokens=8,
        model=family,
        fingerprint=fingerprint(made),
    )


def generate(made: Any, ids: torch.Tensor, past: Any, **options: Any) -> torch.Tensor:
    """Greedy continuation of 24 tokens, unless the options say otherwise: the new tokens only.

    Without repetitions: random models say one token for ever, and every cache agrees on that.
    """
    greedy = {"do_sample": False, "max_new_tokens": 24, "no_repeat_ngram_size": 2}
    out = made.generate(ids, **{ARGUMENT: past, **greedy, **options})
    return out[:, ids.shape[1] :]


@torch.no_grad()
def logits(made: Any, ids: torch.Tensor, past: Any, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """One forward with a cache: [B, n, vocabulary]."""
    if mask is not None:
        places = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options |= {"attention_mask": mask, "position_ids": places}
    return made(input_ids=ids, use_cache=True, **{ARGUMENT: past}, **options).logits


def reachable_nbytes(root: Any) -> int:
    """Bytes of all tensor storages that can be reached from an object."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            todo += list(thing)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            todo += list(vars(thing).values())
    return sum(storages.values())

"""Random models of many families of transformers, unmodified: greedy tokens are those of `generate`."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.spectral.engine.engine_helpers import both_ways
from tests.spectral.helpers import SMALL, made

SIZES = {
    **SMALL, "num_hidden_layers": 4, "hidden_size": 64, "head_dim": 16, "sliding_window": 24,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 96, "rotary_dim": 8, "ffn_dim": 96,
    "word_embed_proj_dim": 64, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 0,
}  # fmt: skip
"""Each configuration takes those that it has."""

NAMES = [
    "afmoe", "apertus", "arcee", "biogpt", "bitnet", "cohere", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone",
    "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma3n_text", "glm", "glm4", "glm4_moe", "gpt_bigcode",
    "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax",
    "internlm3", "jais2", "jetmoe", "minimax_m2", "ministral", "ministral3", "nanochat", "nemotron", "olmo",
    "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "vaultgemma",
]  # fmt: skip
"""Beside those that other tests have (Llama, Mistral, Mixtral, Qwen2 and 3, Gemma 2 to 4, Phi-3 and its experts,
Cohere 2, Starcoder 2, GPT-2, GPT-NeoX)."""


def small_config(name: str) -> Any:
    """The family's configuration with its own defaults but for sizes."""
    kind = CONFIG_MAPPING[name]
    default = kind().to_dict()
    other_names = getattr(kind, "attribute_map", {})
    sizes = {key: value for key, value in SIZES.items() if key in default and key not in other_names}
    if isinstance(default.get("layer_types"), list):
        sizes["layer_types"] = default["layer_types"][: SIZES["num_hidden_layers"]]
    return kind(**sizes)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_generate(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"the transformers that is installed has no {name}")
    wanted, found, _ = both_ways(made(small_config(name)), 40, 16)
    assert found == wanted

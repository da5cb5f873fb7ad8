"""A model that would answer otherwise through Spectral's attention than by itself is refused, and layers are what they
are seen to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    Cohere2Config,
    DiffLlamaConfig,
    FalconH1Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from spectral.cache import SpectralCache
from spectral.errors import ModelError
from spectral.hf import NAME, wrap_model
from spectral.hf_reading import projections
from spectral.model_shapes import model_shape
from spectral.own_answer import check_own_answer
from spectral.shapes import LayerShape
from tests.spectral.cache_helpers import ARGUMENT
from tests.spectral.engine.engine_helpers import both_ways
from tests.spectral.helpers import FAMILIES, SMALL, NoTokenizer, made, random_model
from tests.spectral.test_profile import TEXT, ByteTokenizer, small_profiler

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = 24
OTHERS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, **EXPERTS, sliding_window=WINDOW),
    "starcoder2": Starcoder2Config(**SMALL, sliding_window=WINDOW),
    "phimoe": PhimoeConfig(**SMALL, **EXPERTS, sliding_window=WINDOW),
    "cohere2": Cohere2Config(**SMALL, sliding_window=WINDOW),
    "gemma4": Gemma4TextConfig(
        **SMALL, head_dim=8, global_head_dim=16, sliding_window=WINDOW, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=96, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
}  # fmt: skip
"""Families with a sliding window that their configuration or their layers' types say."""
PLAIN: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2),
    "gpt_neox": GPTNeoXConfig(**SMALL),
}
"""Families whose projections of keys and values have no names of their own."""


@pytest.mark.parametrize("family", sorted(OTHERS | PLAIN))
def test_tokens_are_those_of_generate_beyond_the_window_too(family: str) -> None:
    wanted, found, loaded = both_ways(made((OTHERS | PLAIN)[family]), 2 * WINDOW, 12)
    assert (WINDOW in {layer.sliding for layer in loaded.shape.layers}) == (family in OTHERS)
    assert found == wanted


@pytest.mark.parametrize(("used", "sliding"), [(None, WINDOW), (True, WINDOW), (False, None)])
def test_a_window_that_a_configuration_switches_off_is_none(used: bool | None, sliding: int | None) -> None:
    model = made(LlamaConfig(**SMALL))
    model.config.sliding_window = WINDOW
    if used is not None:
        model.config.use_sliding_window = used
    assert {layer.sliding for layer in model_shape(model).layers} == {sliding}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_known_families_agree_and_look_as_their_configuration_says(family: str) -> None:
    loaded = random_model(family)
    assert check_own_answer(loaded) < 1e-4
    assert loaded.shape == model_shape(loaded.model)
    assert loaded.model.config._attn_implementation == NAME


BART = BartConfig(
    vocab_size=96, d_model=32, encoder_layers=3, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48,
    is_decoder=True, max_position_embeddings=512,
)  # fmt: skip
"""Counts positions by its cache's length."""


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BART, "away from its own"),
        (DiffLlamaConfig(**SMALL), "6 times"),
        (FalconH1Config(**SMALL), "its layers are hybrid"),
    ],
)
def test_a_model_that_would_answer_wrongly_is_refused(config: PreTrainedConfig, why: str) -> None:
    model = made(config)
    with pytest.raises(ModelError, match=f"{config.model_type} is not supported.*{why}"):
        wrap_model("other", model, NoTokenizer())


class Sinks(torch.nn.Module):
    """An attention module that gives the attention function what Spectral's does not know."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.layer_idx, self.k_proj = module, module.layer_idx, module.k_proj

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.module(*args, **more, s_aux=torch.zeros(4))


def test_a_model_without_named_projections_has_a_profile_and_no_comparison() -> None:
    loaded = wrap_model("gpt2", made(GPT2Config(**{**PLAIN["gpt2"].to_dict(), "vocab_size": 260})), ByteTokenizer())
    profile = small_profiler().profile_from_loaded(loaded, texts=[TEXT])
    assert [layer is not None for layer in profile.layers] == [True] * 3 and profile.ladder
    with pytest.raises(ModelError, match="gpt2: comparisons need attention with k_proj"):
        projections(loaded, 0)


def test_the_librarys_cache_knows_layers_that_differ() -> None:
    """All layers of two kinds of heads; the sliding ones stay exact, so with a fine setting tokens are the same."""
    config = Gemma4TextConfig(**{**OTHERS["gemma4"].to_dict(), "vocab_size": 260, "vocab_size_per_layer_input": 260})
    model = made(config)
    profile = small_profiler(ratios=(2.0,)).profile_from_loaded(
        wrap_model("gemma4", model, ByteTokenizer()), texts=[TEXT]
    )
    cache = SpectralCache(profile, model=model, setting="exact")
    prompt = torch.randint(3, 96, (1, 2 * WINDOW), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(prompt, **{ARGUMENT: cache}, **options)
        model.set_attn_implementation("eager")
        assert torch.equal(found, model.generate(prompt, **options))


def test_attention_sinks_are_seen_whatever_the_model_is_called() -> None:
    model = made(FAMILIES["llama"])
    for layer in model.model.layers:
        layer.self_attn = Sinks(layer.self_attn)
    with pytest.raises(ModelError, match="llama is not supported: attention sinks"):
        wrap_model("other", model, NoTokenizer())


def test_layers_may_differ_in_heads_and_sizes() -> None:
    model = made(FAMILIES["llama"])
    attention = model.model.layers[1].self_attn
    torch.manual_seed(1)
    attention.k_proj, attention.v_proj = torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(32, 8, bias=False)
    attention.num_key_value_groups = 4
    loaded = wrap_model("uneven", model, NoTokenizer())
    assert loaded.shape.layers == (LayerShape(2, 8, 8), LayerShape(1, 8, 8), LayerShape(2, 8, 8))


def test_a_model_whose_code_fails_says_why() -> None:
    model = made(FAMILIES["llama"])

    def forward(*args: Any, **more: Any) -> Any:
        raise KeyError("a mask of its own")

    model.model.layers[2].self_attn.forward = forward
    with pytest.raises(ModelError, match=r"llama is not supported: it does not run .*KeyError: 'a mask of its own'"):
        wrap_model("other", model, NoTokenizer())


class Noisy(torch.nn.Module):
    """A projection whose activations are rounded by how many there are, as int8 rounds them by what else there is."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / (100 + x.shape[-2])
        out: torch.Tensor = self.inner((x / scale).round() * scale)
        return out


def test_rounding_of_quantized_activations_is_no_other_answer() -> None:
    def noisy(**changes: Any) -> Any:
        model = made(FAMILIES["llama"])
        for layer in model.model.layers:
            layer.mlp.gate_proj, layer.mlp.down_proj = Noisy(layer.mlp.gate_proj), Noisy(layer.mlp.down_proj)
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model

    with pytest.raises(ModelError, match="away from its own"):
        wrap_model("noisy", noisy(), NoTokenizer())
    for loaded in (
        wrap_model("int8", noisy(), NoTokenizer(), quantization="int8"),
        wrap_model("ready", noisy(quantization_config={"quant_method": "any"}), NoTokenizer()),
    ):
        assert 0.002 < check_own_answer(loaded) < 0.2


def test_answers_that_are_no_numbers_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loaded = random_model("llama")
    loaded.model.lm_head.weight.data.fill_(float("inf"))
    assert check_own_answer(loaded) != check_own_answer(loaded), "NaN"
    assert "not finite" in caplog.text

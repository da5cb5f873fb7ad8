"""Published methods on models of every family: the calibration sample, and the attention that a cache would show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config, PreTrainedConfig, Qwen3MoeConfig

from spectral import baselines
from spectral.baselines import Baseline, ExactWindow, Shape
from spectral.baselines.fp8 import Fp8
from spectral.baselines.kivi import Kivi
from spectral.baselines.store import Stored
from spectral.baselines.transforms import unrope
from spectral.baselines.window import WindowOnly
from spectral.comparison import (
    Windows,
    cache_attention,
    collect_stats,
    comparison_shape,
    full_layers,
    method_blocks,
    method_bytes,
    score_method,
)
from spectral.errors import ModelError
from spectral.hf import LoadedModel, observing, wrap_model
from spectral.hf_reading import (
    decoder_layers,
    last_hidden,
    logits_of,
    projection_gradients,
    projections,
    watching_inputs,
)
from spectral.layer_outputs import LayerOutputs
from spectral.model_shapes import attention_modules
from spectral.pages import LayerShape, ModelShape
from spectral.prefill import causal_attention, softcapped
from spectral.scoring import ExactPass, Tally, summarised
from tests.spectral.helpers import FAMILIES, SMALL, NoTokenizer, random_model

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 48,
}
MORE: dict[str, PreTrainedConfig] = {
    "qwen3-moe": Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "phi3-long": Phi3Config(**SMALL, rope_parameters=LONG, original_max_position_embeddings=48),
    "gemma3-two-ropes": Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=16, sliding_window=24, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip
EVERY = [*FAMILIES, *MORE]
LENGTH = 96


def model_of(family: str) -> LoadedModel:
    """A tiny random model whose projections have biases where its family has them."""
    if family in FAMILIES:
        loaded = random_model(family)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MORE[family], attn_implementation="eager").float().eval()
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.data.mul_(4.0)  # as in helpers.random_model: make attention matter
        loaded = wrap_model(family, model, NoTokenizer())
    for name, parameter in loaded.model.named_parameters():
        if "proj.bias" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return loaded


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclasses.dataclass
class Identity(Fp8):
    """Restores everything as it was; no exact window, so nothing is rounded either."""

    @property
    def name(self) -> str:
        return "identity"

    def encode(self, layer: int, side: Any, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        return Stored(floats={"x": x})

    def decode(self, layer: int, side: Any, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        return stored.floats["x"]


@dataclasses.dataclass
class IdentityTogether(Identity):
    """The same, coded over all layers at once."""

    across_layers = True

    def roundtrip_all(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> Any:
        return keys, values


@pytest.mark.parametrize("family", EVERY)
def test_the_sample_is_what_the_projections_and_the_rotation_make(family: str) -> None:
    """Keys, RoPE undone by the model's own tables, are W_K h + b; values are W_V h + b."""
    loaded = model_of(family)
    if not full_layers(loaded):
        with pytest.raises(ModelError, match="0 kinds"):
            collect_stats(loaded, [tokens(LENGTH)], context=LENGTH)
        return
    seen: dict[int, torch.Tensor] = {}
    with watching_inputs(loaded, lambda layer, hidden: seen.setdefault(layer, hidden)):
        stats = collect_stats(loaded, [tokens(LENGTH)], context=LENGTH, sample=40)
    shape = comparison_shape(loaded)
    stats.check(shape)
    assert len(stats.positions) == 40 == len(set(stats.positions.tolist())) and len(stats.cos) == LENGTH
    for number, index in enumerate(full_layers(loaded)):
        layer, hidden = stats.layers[number], seen[index]
        torch.testing.assert_close(layer.hidden_moment, hidden.T @ hidden / LENGTH, rtol=1e-4, atol=1e-4)
        picked = hidden[stats.positions]
        values = torch.einsum("hdi,ni->nhd", layer.value_weight, picked) + layer.value_bias
        torch.testing.assert_close(layer.values, values, rtol=1e-4, atol=1e-4)
        assert layer.key_norm == (family.startswith(("qwen3", "gemma3")))
        if not layer.key_norm:
            keys = torch.einsum("hdi,ni->nhd", layer.key_weight, picked) + layer.key_bias
            bare = unrope(layer.keys, stats.positions, stats.cos, stats.sin)
            torch.testing.assert_close(bare, keys, rtol=1e-3, atol=1e-3)
        assert (layer.key_bias.abs().max() > 0) == (family == "qwen2")


@pytest.mark.parametrize("family", EVERY)
def test_projection_gradients_are_those_of_the_weights(family: str) -> None:
    """Against autograd on W_K and W_V themselves, and what the sample keeps of them."""
    loaded, ids = model_of(family), tokens(LENGTH)
    got = projection_gradients(loaded, ids)
    weights = {
        layer: [module.qkv_proj.weight] if hasattr(module, "qkv_proj") else [module.k_proj.weight, module.v_proj.weight]
        for layer, module in attention_modules(loaded.model).items()
    }
    flat = [weight.requires_grad_() for pair in weights.values() for weight in pair]
    logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    found = iter(torch.autograd.grad(loss, flat))
    for layer, pair in weights.items():
        want = torch.cat([next(found) for _ in pair])
        have = torch.cat([gradient.flatten(0, 1) for gradient in got[layer]])
        torch.testing.assert_close(have, want[-len(have) :], rtol=1e-3, atol=1e-6)
        assert float(have.abs().max()) > 0
    if full_layers(loaded):
        stats = collect_stats(loaded, [ids], context=LENGTH, sample=8, needs={"key_fisher"})
        fisher = stats.layers[0].key_fisher
        assert fisher is not None
        torch.testing.assert_close(fisher, got[full_layers(loaded)[0]][0].abs().mean((1, 2)), rtol=1e-3, atol=1e-8)
        assert collect_stats(loaded, [ids], context=LENGTH, sample=8).layers[0].key_fisher is None


@pytest.mark.parametrize("family", [family for family in EVERY if family not in {"mistral-sliding", "gemma3"}])
def test_output_errors_are_those_of_the_decoder_layers(family: str) -> None:
    """Nothing without a change; with one, what the model itself makes of it, by its own hooks."""
    loaded, windows = model_of(family), [tokens(LENGTH, seed) for seed in range(2)]
    outputs, layers = LayerOutputs(loaded, windows), full_layers(loaded)

    def halved(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert positions.tolist() == list(range(len(keys)))
        return keys * 0.5, values * torch.linspace(0, 1, values.shape[-1])

    def answering(layer: int, query: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        if layer != layers[-1]:
            return None
        back = halved(rest[0][0].transpose(0, 1), rest[1][0].transpose(0, 1), torch.arange(LENGTH))
        keys, values = (x.transpose(0, 1)[None] for x in back)
        return causal_attention(query, keys, values, scaling=rest[2], softcap=rest[3])

    wrong = total = 0.0
    found: list[torch.Tensor] = []
    handle = decoder_layers(loaded)[layers[-1]].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    for window in windows:
        last_hidden(loaded, window)
        with observing(answering):
            last_hidden(loaded, window)
        wrong += float((found[-1] - found[-2]).pow(2).sum())
        total += float(found[-2].pow(2).sum())
    handle.remove()
    assert outputs.error(layers[-1], halved) == pytest.approx((wrong / total) ** 0.5, rel=1e-4)
    assert outputs.error(layers[-1], lambda keys, values, _: (keys, values)) < 1e-5
    assert outputs.error(layers[0], halved) > 1e-3


def test_output_weights_belong_to_query_heads() -> None:
    loaded = model_of("phi3")
    got, module = projections(loaded, 0), loaded.model.model.layers[0].self_attn
    mixed = torch.randn(5, 4, 8)
    want = module.o_proj(mixed.flatten(1))
    torch.testing.assert_close(torch.einsum("nhd,hdo->no", mixed, got.output), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", [Identity, IdentityTogether])
def test_a_cache_that_loses_nothing_gives_the_exact_logits(family: str, kind: type[Baseline]) -> None:
    loaded = model_of(family)
    method = kind()
    method.shape = Shape(3, 2, 16, 4) if not full_layers(loaded) else comparison_shape(loaded)
    exact = ExactPass.run(loaded, tokens(LENGTH), keep_cache=bool(full_layers(loaded)))
    if not full_layers(loaded):
        return
    blocks = list(method_blocks(exact, method))
    own = loaded.model(input_ids=torch.tensor([exact.ids]), use_cache=False).logits[0].float()
    assert blocks[0][0] == 0
    torch.testing.assert_close(torch.cat([logits for _, logits in blocks]), own, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(exact.log_probs(10, 20), own[10:20].log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert summarised([score_method(exact, method)], LENGTH)["kl_mean"] < 1e-6


def one_by_one(
    query: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    restored: tuple[torch.Tensor, torch.Tensor],
    method: Baseline,
    softcap: float | None,
) -> torch.Tensor:
    """The same by building every query's own keys and values."""
    heads, length = exact[0].shape[:2]
    out = torch.empty(query.shape[1], length, exact[1].shape[-1])
    for t in range(length):
        seen = []
        for side, true, back in zip(("key", "value"), exact, restored, strict=True):
            window = method.exact_of(side, t + 1)
            near = torch.arange(t + 1)
            near = (near < window.sinks) | (near > t - window.recent)
            x = torch.where(near[:, None], true[:, : t + 1], back[:, : t + 1])
            seen.append(x[:, near] if method.drops_tokens else x)
        keys, values = (x.repeat_interleave(query.shape[1] // heads, 0) for x in seen)
        scores = softcapped((keys @ query[0, :, t, :, None])[..., 0] * 0.4, softcap)
        out[:, t] = (scores.softmax(-1)[..., None] * values).sum(1)
    return out[None]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "method",
    [Fp8(), Fp8(sinks=4, recent=9), Kivi(recent=8, group=4), WindowOnly(recent=5), WindowOnly(ratio=3.0)],
    ids=["none", "sliding", "kivi", "dropped", "dropped-ratio"],
)
def test_every_query_sees_its_own_window(
    method: Baseline, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral.comparison.SCORE_LIMIT", 1)  # blocks of 16 queries
    torch.manual_seed(0)
    query, length = torch.randn(1, 4, 53, 8), 53
    exact = torch.randn(2, length, 8), torch.randn(2, length, 8)
    restored = torch.randn(2, length, 8), torch.randn(2, length, 8)
    got = cache_attention(
        query, exact, restored, Windows.of(method, length, torch.device("cpu")),
        scaling=0.4, softcap=softcap, drops=method.drops_tokens,
    )  # fmt: skip
    torch.testing.assert_close(got, one_by_one(query, exact, restored, method, softcap), rtol=1e-4, atol=1e-5)


def test_with_everything_exact_it_is_causal_attention() -> None:
    query, key, value = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    zero = torch.zeros(2, 40, 8)
    windows = Windows.of(Fp8(recent=40), 40, torch.device("cpu"))
    got = cache_attention(query, (key[0], value[0]), (zero, zero), windows, scaling=0.3)
    torch.testing.assert_close(got, causal_attention(query, key, value, scaling=0.3), rtol=1e-4, atol=1e-5)


NARROW = {"turboquant-2.25bit", "turboquant-3.25bit"}
"""Need heads of 16 channels at least: a quarter of fewer is no vector to rotate."""


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3-long"])
def test_every_method_runs_on_a_model(family: str) -> None:
    loaded = model_of(family)
    needs = {"key_fisher", "output_error"}
    stats = collect_stats(loaded, [tokens(LENGTH, seed) for seed in range(3)], context=LENGTH, needs=needs)
    exact = ExactPass.run(loaded, tokens(LENGTH, 9), keep_cache=True)
    for method in baselines.get("all"):
        if method.name in NARROW and comparison_shape(loaded).head_dim < 16:
            continue
        method = dataclasses.replace(method, sinks=min(4, method.sinks), recent=min(8, method.recent))
        method.fit(stats, comparison_shape(loaded))
        found = summarised([score_method(exact, method)], LENGTH)
        assert 0 <= found["kl_mean"] < 20 and 0 <= found["top5_overlap"] <= 1, method.name
        if method.name in {"fp8-e4m3", "llamacpp-q8_0"}:
            assert found["kl_mean"] < 0.02 and found["top1"] > 0.8, method.name
        held = method_bytes(loaded, method, LENGTH)
        assert held["bytes_per_token"] > 0 and held["ratio"] > 0


def test_bytes_count_sliding_layers_in_full() -> None:
    loaded = model_of("gemma2")
    method = Fp8()
    layer = loaded.shape.layers[0].token_nbytes()
    sliding = sum(x.sliding is not None for x in loaded.shape.layers)
    got = method_bytes(loaded, method, 100)
    assert got["bytes_per_token"] == pytest.approx((sliding * 24 * layer + (3 - sliding) * 100 * layer / 2) / 100)
    assert got["ratio_without_window"] == 2.0
    assert method_bytes(loaded, WindowOnly(recent=5), 100)["ratio_without_window"] is None


def test_what_cannot_be_compared_is_refused() -> None:
    loaded = model_of("llama")
    with pytest.raises(ModelError, match="shorter than one window"):
        collect_stats(loaded, [], context=64)
    odd = dataclasses.replace(loaded, shape=ModelShape((LayerShape(2, 8, 4),) * 3, 4, 32))
    with pytest.raises(ModelError, match="leave --baselines out"):
        comparison_shape(odd)
    exact = ExactPass.run(loaded, tokens(70))
    with pytest.raises(ModelError, match="keep_cache"):
        next(iter(method_blocks(exact, IdentityTogether())))


def test_foreign_logits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model_of("llama")
    head = loaded.model.get_output_embeddings()
    assert logits_of(loaded, torch.ones(2, 32)).shape == (2, 96)
    forward = loaded.model.forward
    scaled = lambda **options: type("Out", (), {"logits": forward(**options).logits * 3})  # noqa: E731
    monkeypatch.setattr(loaded.model, "forward", scaled)
    with pytest.raises(ModelError, match="not its output embedding"):
        ExactPass.run(loaded, tokens(64))
    assert head is loaded.model.get_output_embeddings()


def test_a_tally_is_the_textbook_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral.scoring.BLOCK_ELEMENTS", 96 * 7)  # several blocks, and no kept log-probabilities
    exact = ExactPass.run(model_of("llama"), tokens(64))
    other = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tally = Tally(exact)
    for begin in range(0, 64, 5):
        tally.add(begin, other[begin : begin + 5])
    got = summarised([tally.joined()], 64)
    p, q = exact.log_probs(0, 64), other.log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)[16:]
    assert got["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4) and got["scored_tokens"] == 48
    nll = torch.nn.functional.cross_entropy(other[16:-1], torch.tensor(exact.ids[17:]))
    assert got["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)
    overlap = [
        len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(p.topk(5).indices, q.topk(5).indices, strict=True)
    ]
    assert got["top5_overlap"] == pytest.approx(sum(overlap[16:]) / 48)
    parts = got["kl_by_position"]
    assert [part["from"] for part in parts] == list(range(16, 64, 6)) and parts[-1]["to"] == 64
    assert parts[2]["kl_mean"] == pytest.approx(float(kl[12:18].mean()), rel=1e-4)
    assert ExactWindow(2, 3).tokens == 5

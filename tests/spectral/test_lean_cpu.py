"""Models whose decoding on a CPU takes fewer operations answer as before, and are asked before anything is replaced."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectral import lean, lean_cpu
from tests.spectral.helpers import FAMILIES

LAYERS = 3


@pytest.fixture(autouse=True)
def restored() -> Any:
    """transformers' own rotary functions, while a test runs and after it."""
    found = [module for name, module in [*sys.modules.items()] if ".modeling_" in name]
    homes = [module for module in found if "apply_rotary_pos_emb" in vars(module)]
    kept = [module.apply_rotary_pos_emb for module in homes]
    for module, function in zip(homes, kept, strict=True):
        module.apply_rotary_pos_emb = getattr(function, "original", function)
    yield
    for module, function in zip(homes, kept, strict=True):
        module.apply_rotary_pos_emb = function


def made(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").float().eval()
    model.requires_grad_(False)
    lean.lean(model)
    return model


@pytest.mark.parametrize("family", [*FAMILIES])
def test_whole_models_answer_as_before(family: str) -> None:
    model = made(family)
    rotary = sys.modules[type(model).__module__].apply_rotary_pos_emb
    many, one = torch.tensor([[5, 9, 3, 7]]), torch.tensor([[5]])
    with torch.inference_mode():
        wanted = [model(ids).logits for ids in (many, one)]
        norms = [m.forward for m in model.modules() if "RMSNorm" in type(m).__name__]
        counts = lean_cpu.lean_decoding(model)
        assert lean_cpu.lean_decoding(model) == counts  # once is enough
        for ids, want in zip((many, one), wanted, strict=True):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    merged = family != "phi3"  # which has merged them itself
    assert counts["projections"] == counts["gates"] == LAYERS * merged
    assert counts["turned"] == (LAYERS * (1 if merged else 4) if torch.backends.mkl.is_available() else 0)
    assert counts["head"] == torch.backends.mkl.is_available() and counts["rotary"] == 1
    assert sys.modules[type(model).__module__].apply_rotary_pos_emb is not rotary
    joined = sum(m.forward is not f for m, f in zip(_norms(model), norms, strict=True))
    assert joined == (2 * LAYERS if any(name in family for name in ("qwen3", "gemma3")) else 0)


def _norms(model: Any) -> list[Any]:
    return [m for m in model.modules() if "RMSNorm" in type(m).__name__]


def test_gradients_are_those_of_before() -> None:
    model = made("qwen3")

    def gradient() -> torch.Tensor:
        x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        assert x.grad is not None
        return x.grad

    wanted = gradient()
    lean_cpu.lean_decoding(model)
    torch.testing.assert_close(gradient(), wanted, rtol=1e-4, atol=1e-5)


def test_rotary_is_for_keys_behind_their_queries_alone() -> None:
    both = torch.randn(1, 3, 6, 8).transpose(1, 2)
    q, k = both[:, :4], both[:, 4:]
    assert lean_cpu.neighbours(q, k)
    assert not lean_cpu.neighbours(k, q)
    assert not lean_cpu.neighbours(q, k.clone())
    assert not lean_cpu.neighbours(q, both[:, 5:])
    apart = torch.randn(1, 3, 4, 8).transpose(1, 2)
    assert not lean_cpu.neighbours(apart, k)


def test_norms_of_heads_take_nothing_for_theirs_that_comes_from_elsewhere() -> None:
    model = made("qwen3")
    attention = model.model.layers[0].self_attn
    own = attention.k_norm.forward, attention.q_norm.forward
    lean_cpu.lean_decoding(model)
    size = attention.head_dim
    with torch.inference_mode():
        x = torch.randn(1, 2, 32)
        attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, size)))
        other = torch.randn(1, 2, attention.k_proj.out_features // size, size)
        torch.testing.assert_close(attention.k_norm(other), own[0](other))
        keys = attention.k_proj(x).unflatten(-1, (-1, size))
        torch.testing.assert_close(attention.k_norm(keys), own[0](keys))  # what was kept went with the other call
        other = torch.randn(1, 2, attention.q_proj.out_features // size, size)
        torch.testing.assert_close(attention.q_norm(other), own[1](other))


def test_models_of_other_kinds_stay_as_they_are() -> None:
    model = made("llama").to(torch.bfloat16)
    assert lean_cpu.lean_decoding(model) == {}
    assert all("forward" not in vars(m) for m in model.modules() if type(m) is torch.nn.Linear)

"""Models whose small operations run in fewer launches answer as before; kernels run in Triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from spectral import lean
from spectral.lean_kernels import HeadNorm, gated, rms_norm, rotary
from spectral.residency import Sleeper
from tests.spectral.helpers import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sample(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_whole_models_answer_as_before(family: str, restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").float().eval().to(DEVICE)
    ids = torch.tensor([[5, 9, 3]], device=DEVICE)
    calls = []
    monkeypatch.setattr(lean, "_here", lambda q: True)
    with torch.no_grad():
        wanted = model(ids).logits
        for name in ("rms_norm", "rotary", "gated", "angles"):
            own = getattr(sys.modules["spectral.lean_kernels"], name)

            def counting(*args: Any, _own: Any = own, _name: str = name, **more: Any) -> Any:
                calls.append(_name)
                return _own(*args, **more)

            monkeypatch.setattr(sys.modules["spectral.lean_kernels"], name, counting)
        modules = [*model.modules()]
        assert all(lean.lean_norm(m, fast=True) for m in modules if "RMSNorm" in type(m).__name__)
        counts = lean._lean_gpu(model, modules)
        calls.clear()
        found = model(ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    layers = 3
    merged = family != "phi3"  # which has merged them itself
    # In float32, products of a few rows and sums in them are not ours (tests/spectral/test_lean_products.py).
    assert counts == {
        "projections": layers * merged, "gates": layers * merged, "rotary": 1, "angles": 1, "products": 0, "layers": 0
    }  # fmt: skip
    assert calls.count("angles") == 1
    assert calls.count("rotary") == layers and calls.count("gated") == layers * merged
    assert calls.count("rms_norm") > 2 * layers


def test_gradients_flow_through_what_was_there_before(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen3"], attn_implementation="eager").float().eval().to(DEVICE)
    model.requires_grad_(False)
    monkeypatch.setattr(lean, "_here", lambda q: True)

    def gradient() -> torch.Tensor:
        x = sample(1, 3, 32).requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        assert x.grad is not None
        return x.grad

    wanted = gradient()
    with torch.no_grad():
        assert all(lean.lean_norm(m, fast=True) for m in model.modules() if "RMSNorm" in type(m).__name__)
        lean._lean_gpu(model, [*model.modules()])
    assert torch.allclose(gradient(), wanted, rtol=1e-4, atol=1e-5)


def test_merged_weights_stay_the_modules_own_and_move_once() -> None:
    """A weight that is set, or put to sleep, is set or asleep for the merged product too."""
    q, k, v = (torch.nn.Linear(8, n, bias=True) for n in (8, 4, 4))
    module = torch.nn.Module()
    module.q_proj, module.k_proj, module.v_proj = q, k, v
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        wanted = [F(x) for F in (q, k, v)]
        assert lean.lean_projections(module)
        assert all(torch.allclose(a, F(x)) for a, F in zip(wanted, (q, k, v), strict=True))
        k.weight.zero_()
        q(x)
        assert torch.equal(k(x), k.bias.expand(1, 3, 4))
        other = torch.randn(1, 3, 8)
        q(x)
        assert torch.allclose(k(other), k.bias.expand(1, 3, 4))  # not what was computed of another input
        assert torch.allclose(v(x), wanted[2])
    storages = {t.untyped_storage().data_ptr() for t in (q.weight, k.weight, v.weight)}
    assert len(storages) == 1
    assert Sleeper(module, "cpu")._model is module


def test_what_is_quantized_hooked_or_different_stays_as_it_is() -> None:
    class Quantized(torch.nn.Linear): ...

    module = torch.nn.Module()
    module.q_proj, module.k_proj, module.v_proj = Quantized(8, 8), torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    assert not lean.lean_projections(module)
    module.q_proj = torch.nn.Linear(8, 8)
    module.k_proj._hf_hook = object()  # type: ignore[assignment]
    assert not lean.lean_projections(module)

    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    odd = OddRMSNorm()
    with torch.no_grad():
        assert not lean.lean_norm(odd, fast=False)
    assert torch.equal(odd(torch.ones(2, 16)), 2 * torch.ones(2, 16))


@pytest.mark.parametrize("plus_one", [False, True])
def test_norms_of_strided_rows(plus_one: bool) -> None:
    wide, weight = sample(1, 3, 5 * 24), sample(20, seed=1)
    x = wide.view(1, 3, 5, 24)[..., :20]
    gain = 1 + weight if plus_one else weight
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain
    assert torch.allclose(rms_norm(x, weight, 1e-5, plus_one), expected, atol=1e-5)
    assert torch.allclose(rms_norm(x[0], weight, 1e-5, plus_one), expected[0], atol=1e-5)


@pytest.mark.parametrize("plus_one", [False, True])
def test_norms_of_heads_within_their_rotation(plus_one: bool) -> None:
    q, k = (sample(1, 3, h, 12, seed=h).transpose(1, 2) for h in (4, 2))
    cos, sin, weight, other = sample(1, 3, 12), sample(1, 3, 12, seed=5), sample(12, seed=6), sample(12, seed=7)
    wanted = rotary(rms_norm(q, weight, 1e-5, plus_one), rms_norm(k, other, 1e-3, not plus_one), cos, sin)
    norms = [HeadNorm(weight, 1e-5, plus_one), HeadNorm(other, 1e-3, not plus_one)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rotary(q, k, cos, sin, norms), wanted, strict=True))
    only = rotary(q, k, cos, sin, [None, norms[1]])
    assert torch.allclose(only[1], wanted[1], atol=1e-5) and torch.equal(only[0], rotary(q, k, cos, sin)[0])


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}])  # fmt: skip
def test_angles_of_long_texts(rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from 0 an angle is many turns: cos of a rounded one is another number."""
    monkeypatch.setattr(lean, "_here", lambda x: True)
    config = Qwen3Config(
        head_dim=16, hidden_size=32, num_attention_heads=2, max_position_embeddings=1 << 20,
        rope_parameters={"rope_theta": 1e6, **rope},
    )  # fmt: skip
    module = Qwen3RotaryEmbedding(config).to(DEVICE)
    position = torch.tensor([[0, 5, 4095, 131071, (1 << 20) - 1]], device=DEVICE)
    wanted = [module(torch.zeros((), dtype=kind, device=DEVICE), position) for kind in (torch.float32, torch.bfloat16)]
    assert lean.lean_angles(module)
    found = [module(torch.zeros((), dtype=kind, device=DEVICE), position) for kind in (torch.float32, torch.bfloat16)]
    for want, ours in zip(wanted, found, strict=True):
        assert all(torch.allclose(a.float(), b.float(), atol=2**-7) for a, b in zip(want, ours, strict=True))
    assert torch.allclose(wanted[0][0], found[0][0], atol=1e-5)


def test_angles_that_depend_on_the_length_stay_the_modules_own() -> None:
    config = Qwen3Config(
        head_dim=16, hidden_size=32, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
    )  # fmt: skip
    assert not lean.lean_angles(Qwen3RotaryEmbedding(config)) and not lean.lean_angles(torch.nn.Linear(2, 2))


def test_rotary_of_strided_heads_and_gates() -> None:
    q, k = sample(1, 3, 4 * 12).view(1, 3, 4, 12).transpose(1, 2), sample(1, 3, 2 * 12, seed=1).view(1, 3, 2, 12)
    k, cos, sin = k.transpose(1, 2), sample(1, 3, 12, seed=2), sample(1, 3, 12, seed=3)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., 6:], x[..., :6]], -1) * sin

    for found, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert torch.allclose(found, turned(x), atol=1e-6) and found.shape == x.shape
    x = sample(2, 3, 2 * 1500)
    gate, up = x.split(1500, -1)
    assert torch.allclose(gated(x, "silu"), torch.nn.functional.silu(gate) * up, atol=1e-5)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert torch.allclose(gated(x, "gelu_tanh"), gelu, atol=1e-5)

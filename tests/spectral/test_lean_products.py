"""Products of a few rows by kernels of our own, and layers whose sums are in them (interpreter, or a GPU)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from spectral import few_rows, lean, lean_layers, lean_products, overlap
from spectral.few_rows import captured, few, linear
from spectral.lean_products import fits, product
from tests.spectral.few_rows_helpers import DEVICE, DTYPE, close, sample
from tests.spectral.helpers import FAMILIES

pytestmark = pytest.mark.usefixtures("kernels_here")


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("outputs", "size"), [(38, 144), (64, 1024), (5, 16), (20, 2560), (12, 9728)])
def test_products_are_a_librarys(outputs: int, size: int, rows: int) -> None:
    x, weight, bias = sample(1, rows, size), sample(outputs, size, seed=1), sample(outputs, seed=2)
    residual = sample(1, rows, outputs, seed=3)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert close(product(x, weight, bias), wanted.to(DTYPE))
    assert close(product(x, weight), (wanted - bias.double()).to(DTYPE))
    assert close(product(x, weight, bias, residual=residual), wanted.to(DTYPE) + residual)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("outputs", [1, 24, 19])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gates_open_what_lies_behind_them(kind: str, outputs: int, rows: int) -> None:
    x, weight, bias = sample(rows, 80), sample(2 * outputs, 80, seed=1) / 4, sample(2 * outputs, seed=2)
    gate, up = F.linear(x.float(), weight.float(), bias.float()).to(DTYPE).chunk(2, -1)
    act = F.silu(gate.float()) if kind == "silu" else F.gelu(gate.float(), approximate="tanh")
    residual = sample(rows, outputs, seed=3)
    assert close(product(x, weight, bias, gate=kind), act.to(DTYPE) * up)
    assert close(product(x, weight, bias, gate=kind, residual=residual), act.to(DTYPE) * up + residual)


def test_rows_that_do_not_lie_together_or_begin_anywhere() -> None:
    wide, weight = sample(3, 2 * 64 + 1), sample(16, 64, seed=1)
    for x in (wide[:, ::2][:, :64], wide[:1, 1:65], wide[:, 3:67]):
        assert close(product(x, weight), F.linear(x.float(), weight.float()).to(DTYPE))


def test_one_row_of_brain_floats() -> None:
    x, weight, residual = (sample(*s, dtype=torch.bfloat16) for s in ((1, 256), (12, 256), (1, 12)))
    wanted = F.linear(x.double(), weight.double()).bfloat16() + residual
    error = (product(x, weight, residual=residual).double() - wanted.double()).abs().max()
    assert error <= 2**-6 * wanted.abs().max(), "the interpreter cuts off where a GPU rounds"


def test_what_does_not_fit_is_said() -> None:
    weight = sample(8, 64)
    with pytest.raises(ValueError, match=r"x must be 1 to 8 rows of 64"):
        product(sample(9, 64), weight)
    with pytest.raises(ValueError, match=r"x must be 1 to 8 rows of 64"):
        product(sample(1, 32), weight)
    with pytest.raises(ValueError, match="residual must be"):
        product(sample(1, 64), weight, residual=sample(1, 9))


def test_which_products_are_ours() -> None:
    x, weight = sample(1, 2, 64), sample(8, 64)
    with torch.no_grad():
        assert not few(x, weight), "nothing is captured"
        with captured():
            assert few(x, weight) and not few(sample(9, 64), weight) and not few(x[:, :0], weight)
            assert not few(x.float(), weight) and not few(x.float(), weight.float())
            assert not few(sample(1, 24), sample(8, 24)), "lines that do not begin at multiples of 16 bytes"
            assert not fits(sample(64, 8).t())
            assert torch.equal(linear(sample(9, 64), weight, None), F.linear(sample(9, 64), weight))
            with torch.enable_grad():
                assert not few(x, weight)
        assert not few(x, weight)


def test_kernels_that_are_wrong_or_fail_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = torch.nn.Linear(64, 8, bias=True).to(DEVICE, DTYPE)

    def broken(*args: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    wrong = lambda x, w, b, **more: F.linear(-x, w, b)  # noqa: E731
    for function, reason in ((broken, "RuntimeError: no such instruction"), (wrong, "they are wrong")):
        monkeypatch.setattr(few_rows, "_distrusted", [])
        monkeypatch.setattr(lean_products, "product", function)
        caplog.clear()
        with torch.no_grad():
            assert lean_layers.lean_linear(module)
            del module.forward
            with captured():
                assert not few(sample(1, 64), module.weight)
        assert reason in caplog.text and caplog.text.count("left to the library") == 1


def leaned(family: str) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]:
    """A model, token ids, its logits for the first and for all of them before anything was replaced, and the counts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").to(DEVICE, DTYPE).eval()
    ids = torch.tensor([[5, 9, 3]], device=DEVICE)
    with torch.no_grad():
        one, all_ = model(ids[:, :1]).logits, model(ids).logits
        modules = [*model.modules()]
        for module in modules:
            lean.lean_norm(module, fast=True)
        counts = lean._lean_gpu(model, modules)
    return model, ids, one, all_, counts


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_captured_models_answer_as_before(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, one, all_, counts = leaned(family)
    layers = 3
    # Gemma 2 has norms between its products and its sums.
    assert counts["layers"] == (0 if family == "gemma2" else layers)
    sums, heads = [], []
    real, turn = lean_products.product, sys.modules["spectral.lean_kernels"].rotary

    def counting(*args: Any, **more: Any) -> torch.Tensor:
        sums.append(more.get("residual") is not None)
        return real(*args, **more)

    def turning(q: Any, k: Any, cos: Any, sin: Any, norms: Any = (None, None)) -> Any:
        heads.append(norms[0] is not None)
        return turn(q, k, cos, sin, norms)

    monkeypatch.setattr(lean_products, "product", counting)
    monkeypatch.setattr(sys.modules["spectral.lean_kernels"], "rotary", turning)
    with torch.no_grad(), captured():
        found = model(ids[:, :1]).logits, model(ids).logits
    assert close(found[0], one) and close(found[1], all_)
    assert sums.count(True) == 2 * 2 * counts["layers"], "two sums a layer, in both forwards"
    assert len(sums) > sums.count(True), "the other products are ours too"
    assert heads.count(True) == (2 * layers if family == "qwen3" else 0)
    sums.clear()
    with torch.no_grad():
        assert close(model(ids).logits, all_) and not sums, "outside of a capture nothing is"


def test_layers_that_do_more_than_sums_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer does between its products is only seen by its answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation="eager").to(DEVICE, DTYPE).eval()
    first, second, third = model.model.layers

    def scaled(own: Any) -> Any:
        return lambda h, **more: h + 0.9 * (own(h, **more) - h)

    first.forward = scaled(first.forward)
    attend = second.self_attn.forward
    second.self_attn.forward = lambda hidden_states, **more: (attend(hidden_states, **more)[0] * 1.1, None)
    with torch.no_grad():
        counts = lean._lean_gpu(model, [*model.modules()])
    assert counts["layers"] == 1 and isinstance(third.forward, lean_layers.LeanLayer)
    assert not isinstance(vars(first)["forward"], lean_layers.LeanLayer) and "forward" not in vars(second)


def test_a_sum_that_is_not_asked_for_is_an_error() -> None:
    module = torch.nn.Linear(64, 8).to(DEVICE, DTYPE)
    own = lean_layers.Product(module)
    x, residual = sample(1, 64), sample(1, 8)
    with pytest.raises(RuntimeError, match="was not asked for"), own.adding(residual):
        pass
    with torch.no_grad(), own.adding(residual):
        first = own(x)
        assert close(own(x), module(x)), "one product is the sum, no more"
    assert close(first, module(x) + residual)


def test_kernels_begin_early_where_a_graph_can_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, captured, on Hopper or later, with a driver whose graphs hold such launches."""
    cuda, plain = torch.device("cuda", 0), {"EARLY": False}
    kinds = ((9, 0), 12030, True), ((12, 0), 13000, True), ((9, 0), 12020, False), ((8, 9), 13000, False)
    for capability, driver, able in kinds:
        overlap._able.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(overlap, "driver_version", lambda found=driver: found)
        assert overlap.early(cuda, 1) == plain, "nothing is captured"
        with captured():
            assert overlap.early(cuda, 1) == ({"EARLY": True, "launch_pdl": True} if able else plain)
            assert overlap.early(cuda, 2) == plain and overlap.early(torch.device("cpu"), 1) == plain
        assert overlap.alongside(cuda) == ({"ALONGSIDE": True, "launch_pdl": True} if able else {})
        assert not overlap.alongside(torch.device("cpu"))
    overlap._able.cache_clear()


def test_what_cannot_be_captured_with_early_launches_is_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launches = few_rows.EarlyLaunches()
    monkeypatch.setattr(overlap, "early_launches", launches)
    monkeypatch.setattr(overlap, "_able", lambda device: True)
    assert not launches.stop("nothing was launched early"), "so that is not what is wrong"
    with captured():
        assert overlap.early(torch.device("cuda", 0), 1)["EARLY"]
        assert launches.stop("the step cannot be captured") and not launches.stop("again")
        assert overlap.early(torch.device("cuda", 0), 1) == {"EARLY": False}
        assert not overlap.alongside(torch.device("cuda", 0))
    assert caplog.text.count("one after another from now on: the step cannot be captured") == 1


def test_the_drivers_version_is_a_number_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @staticmethod
        def cuDriverGetVersion(pointer: Any) -> int:
            pointer._obj.value = 12080
            return 0

    monkeypatch.setattr(overlap.ctypes, "CDLL", lambda name: Driver)
    assert overlap.driver_version() == 12080

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(overlap.ctypes, "CDLL", missing)
    assert overlap.driver_version() == 0
    monkeypatch.setattr(overlap.ctypes, "CDLL", lambda name: object())
    assert overlap.driver_version() == 0

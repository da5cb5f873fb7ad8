"""Products of a few rows with weights of four bits, and bitsandbytes' layers that have them (interpreter, or a GPU)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from spectral import few_rows, lean, lean_four_bits, lean_layers, lean_nibbles
from spectral.few_rows import captured
from spectral.lean_nibbles import Nibbles, alike, fits, product
from tests.spectral.few_rows_helpers import DEVICE, DTYPE, close, sample

pytestmark = pytest.mark.usefixtures("kernels_here")

NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)]
CODES = {"nf4": NF4, "fp4": FP4}


def random_nibbles(outputs: int, size: int, kind: str = "nf4", nested: bool = False, seed: int = 1) -> Nibbles:
    """Any bytes with factors of .5 to 1.5."""
    rng = torch.Generator().manual_seed(seed)
    blocks = outputs * size // 64
    packed = torch.randint(0, 256, (outputs * size // 2, 1), generator=rng, dtype=torch.uint8)
    absmax, more = torch.rand(blocks, generator=rng) + 0.5, ()
    if nested:
        absmax = torch.randint(0, 256, (blocks,), generator=rng, dtype=torch.uint8)
        more = (torch.rand(-(-blocks // 256), generator=rng) / 2, torch.linspace(-1, 1, 256), torch.tensor(1.0))
    tensors = (packed, torch.tensor(CODES[kind]), absmax, *more)
    return Nibbles(outputs, size, kind, *(x.to(DEVICE) for x in tensors))


def opened(nibbles: Nibbles) -> torch.Tensor:
    """The weights [outputs, size] in float64: by bytes, high nibble first, times the factor of every 64."""
    factor = nibbles.absmax.double()
    if nibbles.outer is not None:
        outer = nibbles.outer.double().repeat_interleave(256)[: len(factor)]
        factor = nibbles.outer_code[nibbles.absmax.long()].double() * outer + nibbles.offset.double()
    packed = nibbles.weight.flatten().long()
    codes = nibbles.code.double()[torch.stack((packed >> 4, packed & 15), -1).flatten()]
    return (codes.view(-1, 64) * factor[:, None]).view(nibbles.outputs, nibbles.size)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("outputs", "size", "rows"),
    [(38, 64, 1), (38, 64, 3), (16, 192, 2), (5, 320, 8), (17, 1088, 1), (33, 2112, 2), (48, 4160, 8)],
)
def test_products_are_those_with_weights_that_were_opened(outputs: int, size: int, rows: int, nested: bool) -> None:
    """Lines, blocks of a line and rows that do not fill what a program has of them."""
    nibbles = random_nibbles(outputs, size, nested=nested)
    x, bias, residual = sample(1, rows, size), sample(outputs, seed=2), sample(1, rows, outputs, seed=3)
    wanted = F.linear(x.double(), opened(nibbles))
    assert close(product(x, (nibbles,)), wanted.to(DTYPE))
    assert close(product(x, (nibbles,), (bias,)), (wanted + bias.double()).to(DTYPE))
    assert close(product(x, (nibbles,), (bias,), residual=residual), (wanted + bias.double()).to(DTYPE) + residual)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("rows", [1, 4])
def test_both_kinds_of_codes_in_both_kinds_of_numbers(rows: int, kind: str) -> None:
    nibbles = random_nibbles(24, 256, kind)
    for dtype, part in ((torch.float16, 2**-9), (torch.bfloat16, 2**-6)):  # the interpreter cuts off, a GPU rounds
        x = sample(rows, 256, dtype=dtype)
        assert close(product(x, (nibbles,)), F.linear(x.double(), opened(nibbles)).to(dtype), part)


def test_all_bytes_stand_for_their_two_codes() -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    nibbles = random_nibbles(4, 128)._replace(weight=packed, absmax=torch.ones(8, device=DEVICE))
    for k in range(0, 128, 8):
        rows = torch.eye(128, device=DEVICE, dtype=DTYPE)[k : k + 8]
        assert close(product(rows, (nibbles,)), opened(nibbles)[:, k : k + 8].t().to(DTYPE), 2**-10)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("outputs", "size", "rows", "nested"), [(16, 320, 1, True), (19, 128, 1, False), (19, 320, 3, False)]
)
def test_gates_open_what_has_weights_of_its_own(outputs: int, size: int, rows: int, nested: bool, kind: str) -> None:
    gate, up = (random_nibbles(outputs, size, nested=nested, seed=seed) for seed in (1, 2))
    x, residual = sample(rows, size) / 8, sample(rows, outputs, seed=3)
    first, second = (F.linear(x.double(), opened(w)).to(DTYPE) for w in (gate, up))
    act = F.silu(first.float()) if kind == "silu" else F.gelu(first.float(), approximate="tanh")
    wanted = act.to(DTYPE) * second
    assert close(product(x, (gate, up), gate=kind), wanted, 2**-8)
    assert close(product(x, (gate, up), gate=kind, residual=residual), wanted + residual, 2**-8)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_three_matrices_have_one_product(rows: int, nested: bool) -> None:
    weights = tuple(random_nibbles(16 * n, 320, nested=nested, seed=n) for n in (3, 1, 2))
    x, biases = sample(rows, 320), tuple(sample(one.outputs, seed=one.outputs) for one in weights)
    wanted = torch.cat([F.linear(x.double(), opened(one)) for one in weights], -1)
    assert close(product(x, weights), wanted.to(DTYPE))
    assert close(product(x, weights, biases), (wanted + torch.cat(biases).double()).to(DTYPE))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("tiles", "warps"), [(2, 4), (4, 1)])
def test_programs_of_any_size_answer_the_same(
    tiles: int, warps: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nibbles, x = random_nibbles(70, 576, nested=True), sample(rows, 576)
    tile = {"TILES": tiles, "WARPS": warps, "REGISTERS": 128}
    monkeypatch.setattr(lean_nibbles, "_tile", lambda *_: tile)
    assert close(product(x, (nibbles,)), F.linear(x.double(), opened(nibbles)).to(DTYPE))


def test_what_does_not_fit_is_said() -> None:
    nibbles = random_nibbles(8, 128)
    assert fits(nibbles) and fits(random_nibbles(8, 128, nested=True))
    wrong: dict[str, Any] = {"kind": "int4", "absmax": nibbles.absmax[:-1], "outputs": 7, "size": 64}
    assert not any(fits(nibbles._replace(**{name: value})) for name, value in wrong.items())
    assert not fits(nibbles._replace(absmax=nibbles.absmax.to(torch.uint8))), "bytes without what they stand for"
    for x in (sample(9, 128), sample(1, 64), sample(1, 128).float()):
        with pytest.raises(ValueError, match=r"x must be 1 to 8 rows of 128"):
            product(x, (nibbles,))
    with pytest.raises(ValueError, match="residual must be"):
        product(sample(1, 128), (nibbles,), residual=sample(1, 9))
    more = random_nibbles(16, 128), random_nibbles(16, 128, nested=True), random_nibbles(16, 192)
    for weights in ((nibbles, nibbles), (nibbles,) * 3, (more[0], more[0], more[1]), (more[0], more[2], more[0])):
        with pytest.raises(ValueError, match="weights are not of one product"):
            product(sample(1, 128), weights)
    for weights, biases in (((nibbles,), None), ((nibbles, more[0]), None), ((nibbles,) * 2, (sample(8),) * 2)):
        with pytest.raises(ValueError, match="weights are not of one product"):
            product(sample(1, 128), weights, biases, gate="silu")


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same, with something between any two numbers."""
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda x: x[:-1]),
        ("weight", apart),
        ("weight", lambda x: x.view(torch.int8)),
        ("weight", lambda x: torch.cat([x[:1], x])[1:]),
        ("code", lambda x: x[:3]),
        ("code", torch.Tensor.half),
        ("code", lambda x: x.to("meta")),
        ("absmax", lambda x: x[:3]),
        ("absmax", apart),
        ("outer", lambda x: None),
        ("outer", lambda x: x[:0]),
        ("outer", torch.Tensor.half),
        ("outer_code", lambda x: x[:5]),
        ("outer_code", lambda x: None),
        ("offset", lambda x: x.expand(2)),
        ("outputs", lambda x: 0),
        ("size", lambda x: 96),
        ("kind", lambda x: "int4"),
    ],
)
def test_weights_that_are_not_the_kernels_are_named(name: str, change: Any) -> None:
    """`fits` says no without a word; `product` says what is wrong."""
    nibbles = random_nibbles(16, 128, nested=True)
    wrong = nibbles._replace(**{name: change(getattr(nibbles, name))})
    assert fits(nibbles) and not fits(wrong)
    with pytest.raises(ValueError, match=rf"weights\[1\]\.(outputs and )?{name}( and size)? must"):
        product(sample(1, 128), (nibbles, wrong, nibbles))


def test_what_goes_with_weights_is_named() -> None:
    nibbles, x = random_nibbles(16, 128), sample(2, 128)
    assert not fits(nibbles._replace(absmax=nibbles.absmax.half()))
    assert not fits(nibbles._replace(outer=nibbles.absmax)), "factors of factors that are no bytes"
    for bias in (sample(3), sample(16).float(), apart(sample(16)), sample(16).to("meta"), sample(1, 16)):
        with pytest.raises(ValueError, match=r"biases\[0\] must be contiguous float16 \[16\]"):
            product(x, (nibbles,), (bias,))
    for wrong in (x.to("meta"), torch.tensor(1.0, device=DEVICE).half(), x[:0], x.int()):
        with pytest.raises(ValueError, match="x must be 1 to 8 rows of 128 16-bit numbers"):
            product(wrong, (nibbles,))
    with pytest.raises(ValueError, match="gate must be one of"):
        product(x, (nibbles, nibbles), gate="relu")
    for weights, biases in (((), None), ((nibbles,), (sample(16),) * 2), ((nibbles,), ())):
        with pytest.raises(ValueError, match="weights are not of one product"):
            product(x, weights, biases)
    for residual in (sample(2, 16).to("meta"), sample(2, 16).float()):
        with pytest.raises(ValueError, match="residual must be"):
            product(x, (nibbles,), residual=residual)


def test_rows_and_what_is_added_lie_anywhere() -> None:
    nibbles, x, residual = random_nibbles(16, 128), sample(2, 128), sample(2, 16, seed=3)
    wanted = product(x, (nibbles,), residual=residual)
    assert torch.equal(product(apart(x), (nibbles,), residual=residual.t().contiguous().t()), wanted)


def test_codes_of_one_product_are_compared() -> None:
    nibbles, other = random_nibbles(16, 128), random_nibbles(16, 128, seed=2)
    assert alike(nibbles, other, nibbles), "equal codes, each with its own"
    assert not alike(nibbles, other._replace(code=2 * other.code)) and not alike(nibbles, random_nibbles(16, 192))


class Linear4bit(torch.nn.Linear):
    """As bitsandbytes' layer holds its weights, from random bytes."""

    def __init__(self, size: int, outputs: int, bias: bool = False, nested: bool = False, seed: int = 1) -> None:
        torch.manual_seed(seed)
        super().__init__(size, outputs, bias=bias, device=DEVICE, dtype=DTYPE)
        found = random_nibbles(outputs, size, nested=nested, seed=seed)
        self.weight = torch.nn.Parameter(found.weight, requires_grad=False)
        second = SimpleNamespace(absmax=found.outer, code=found.outer_code, blocksize=256) if nested else None
        self.weight.quant_state = SimpleNamespace(  # type: ignore[attr-defined]
            absmax=found.absmax if nested else found.absmax / size, code=found.code, blocksize=64, quant_type="nf4",
            shape=torch.Size([outputs, size]), dtype=DTYPE, state2=second, offset=found.offset,
        )  # fmt: skip
        self.compute_dtype: torch.dtype | None = DTYPE
        self.asked = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        nibbles = lean_four_bits.nibbles_of(self, DTYPE)
        assert nibbles is not None
        return F.linear(x.float(), opened(nibbles).float(), None if self.bias is None else self.bias.float()).to(DTYPE)


Linear4bit.__module__ = "bitsandbytes.nn.modules"


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_layers_of_four_bits_are_ours_where_steps_are_captured(nested: bool) -> None:
    module = Linear4bit(128, 24, bias=True, nested=nested)
    x, residual = sample(1, 3, 128), sample(1, 3, 24, seed=3)
    wanted = module(x)
    assert lean_four_bits.lean_linear(module) and not lean_four_bits.lean_linear(module), "once"
    assert not few_rows._distrusted
    own: Any = module.forward
    module.asked = 0
    assert torch.equal(module(x), wanted) and module.asked == 1 and not own.few(x), "nothing is captured"
    with captured(), own.adding(residual):
        assert own.few(x) and close(module(x), wanted + residual) and module.asked == 1
    with captured():
        assert not own.few(sample(9, 128)) and not own.few(x.float()) and not own.few(x.bfloat16())
        assert torch.equal(module(sample(9, 128)), module.__class__.forward(module, sample(9, 128)))
    with own.adding(residual):
        assert torch.equal(module(x), residual + wanted)


@torch.no_grad()
def test_weights_are_read_where_they_lie_now() -> None:
    """A model's storages go to host memory and come back elsewhere."""
    module = Linear4bit(64, 16)
    assert lean_four_bits.lean_linear(module)
    state, x = module.weight.quant_state, sample(2, 64)  # type: ignore[union-attr]
    module.weight.data = torch.randint_like(module.weight, 0, 256)
    state.absmax = state.absmax * 2
    wanted = Linear4bit.forward(module, x)
    with captured():
        assert close(module(x), wanted)


@torch.no_grad()
def test_layers_that_are_not_what_kernels_know_stay_as_they_are() -> None:
    assert not lean_four_bits.lean_linear(torch.nn.Linear(64, 8))
    for name, value in (("blocksize", 128), ("quant_type", "af4"), ("shape", torch.Size([64, 16]))):
        module = Linear4bit(64, 16)
        setattr(module.weight.quant_state, name, value)  # type: ignore[union-attr]
        assert not lean_four_bits.lean_linear(module), name
    module = Linear4bit(64, 16, nested=True)
    module.weight.quant_state.state2.blocksize = 128  # type: ignore[union-attr]
    assert not lean_four_bits.lean_linear(module)
    hooked, other, unquantized = Linear4bit(64, 16), Linear4bit(64, 16), Linear4bit(64, 16)
    hooked._hf_hook = object()
    other.compute_dtype = torch.float32
    del unquantized.weight.quant_state  # type: ignore[union-attr]
    assert not any(map(lean_four_bits.lean_linear, (hooked, other, unquantized)))


@torch.no_grad()
def test_kernels_that_are_wrong_leave_weights_of_16_bits_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, dense = Linear4bit(64, 16), torch.nn.Linear(64, 16).to(DEVICE, DTYPE)
    real = lean_four_bits.product
    monkeypatch.setattr(lean_four_bits, "product", lambda *args, **more: -real(*args, **more))
    assert lean_four_bits.lean_linear(module) and lean_layers.lean_linear(dense)
    assert "weights of 4 bits are left to the library: they are wrong" in caplog.text
    x = sample(1, 64)
    with captured():
        assert not module.forward.few(x) and dense.forward.few(x)  # type: ignore[attr-defined]
        assert torch.equal(module(x), Linear4bit.forward(module, x))


def quantized() -> Any:
    """A model with layers of four bits, their factors so small that it stays in the range of fp16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE, DTYPE).eval()
    for number, (name, module) in enumerate(list(model.model.named_modules())):
        if isinstance(module, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            layer = Linear4bit(module.in_features, module.out_features, seed=number)
            setattr(model.model.get_submodule(parent), last, layer)
    return model


@torch.no_grad()
def test_captured_models_answer_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = quantized(), torch.tensor([[5, 9, 3]], device=DEVICE)
    one, all_ = model(ids[:, :1]).logits, model(ids).logits
    counts = lean._lean_gpu(model, [*model.modules()])
    assert counts == {"projections": 2, "gates": 2, "rotary": 1, "angles": 1, "products": 2 * 4 + 1, "layers": 2}
    asked: list[tuple[int, bool, bool]] = []
    real = lean_four_bits.product

    def counting(*args: Any, **more: Any) -> torch.Tensor:
        asked.append((len(args[1]), more.get("residual") is not None, bool(more.get("gate"))))
        return real(*args, **more)

    monkeypatch.setattr(lean_four_bits, "product", counting)
    with captured():
        found = model(ids[:, :1]).logits, model(ids).logits
    assert close(found[0], one, 2**-7) and close(found[1], all_, 2**-7)
    layer = [(3, False, False), (1, True, False), (2, False, True), (1, True, False)]
    assert asked == layer * 4, "projections, their sum, a gate and its sum: of two layers, twice"
    asked.clear()
    assert close(model(ids).logits, all_) and not asked, "outside of a capture nothing is"


@torch.no_grad()
def test_projections_of_other_inputs_are_their_own() -> None:
    names = ("q_proj", "k_proj", "v_proj")
    parent: Any = torch.nn.Module()
    for number, name in enumerate(names):
        setattr(parent, name, Linear4bit(128, 16 * (3 - number), bias=True, seed=number))
    x, other = sample(1, 3, 128), sample(1, 3, 128, seed=5)
    wanted = [getattr(parent, name)(x) for name in names]
    others = [getattr(parent, name)(other) for name in names]
    assert lean_four_bits.lean_projections(parent) and not lean_four_bits.lean_projections(parent), "once"
    with captured():
        assert close(parent.q_proj(x), wanted[0]) and close(parent.v_proj(other), others[2])
        assert close(parent.k_proj(x), wanted[1]) and close(parent.v_proj(x), wanted[2])
        parent.q_proj(x)
    assert torch.equal(parent.q_proj(other), others[0]), "nothing is captured"
    assert torch.equal(parent.k_proj(x), wanted[1]), "what was left of a step that broke off is not taken"
    uneven = torch.nn.Module()
    for name, outputs in zip(names, (48, 8, 8), strict=True):
        setattr(uneven, name, Linear4bit(128, outputs))
    assert not lean_four_bits.lean_projections(uneven) and lean_four_bits.lean_linear(uneven.q_proj)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_what_bitsandbytes_says(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes comes with the extra gpu alone")
    weight = sample(40, 192, dtype=torch.float32) / 8
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    module = SimpleNamespace(
        weight=SimpleNamespace(quant_state=state, data=packed), bias=None, compute_dtype=DTYPE, out_features=40,
        in_features=192,
    )  # fmt: skip
    nibbles = lean_four_bits.nibbles_of(module, DTYPE)
    assert nibbles is not None
    theirs = functional.dequantize_4bit(packed, state)
    assert close(opened(nibbles).float(), theirs, 1e-6)
    for rows in (1, 3):
        x = sample(rows, 192)
        assert close(product(x, (nibbles,)), F.linear(x.double(), theirs.double()).to(DTYPE))

"""Layers that bitsandbytes quantized to four bits: products of a few rows by spectral.lean_nibbles, in captured steps.

bitsandbytes is not imported here: its layers are known by what they hold. That is read again for every product, since a
model's storages go to host memory and come back elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from spectral import lean
from spectral.few_rows import ask, for_kernels
from spectral.lean_layers import Product
from spectral.lean_nibbles import BLOCK, LINES, OUTER, Nibbles, alike, fits, product

WEIGHTS = "4 bits"
"""As spectral.few_rows calls them."""
NAMES = ("Linear4bit", "LinearNF4", "LinearFP4")


def nibbles_of(module: Any, dtype: torch.dtype) -> Nibbles | None:
    """A layer's weights; None where the kernels do not serve it, or not with inputs of this kind."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or module.compute_dtype not in (None, dtype) or dtype not in (torch.bfloat16, torch.float16):
        return None
    if module.bias is not None and module.bias.dtype != dtype:
        return None
    second = state.state2
    if state.blocksize != BLOCK or (second is not None and second.blocksize != OUTER):
        return None
    outer = (None, None, None) if second is None else (second.absmax, second.code, state.offset)
    outputs, size = state.shape
    found = Nibbles(outputs, size, state.quant_type, module.weight.data, state.code, state.absmax, *outer)
    return found if (found.outputs, found.size) == (module.out_features, module.in_features) and fits(found) else None


def quantized(module: Any) -> bool:
    """Whether this is a layer of bitsandbytes' with weights of four bits, which nothing was done to."""
    kind = type(module)
    if kind.__name__ not in NAMES or kind.__module__.partition(".")[0] != "bitsandbytes":
        return False
    untouched = not hasattr(module, "_hf_hook") and "forward" not in vars(module)
    return untouched and getattr(module.weight, "quant_state", None) is not None


def _inputs(module: Any) -> torch.Tensor:
    """What a layer may be asked with: [1, 3, K]."""
    dtype = module.compute_dtype or module.weight.quant_state.dtype
    return lean.sample(1, 3, module.in_features, like=torch.empty(0, dtype=dtype, device=module.weight.device))


class FourBitProduct(Product):
    """The forward of a layer whose weights have four bits."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._own = module.forward

    def nibbles(self, x: torch.Tensor) -> Nibbles | None:
        """The weights, where the product of x [..., K] is the kernels'."""
        return nibbles_of(self._module, x.dtype) if for_kernels(x, WEIGHTS) else None

    def few(self, x: torch.Tensor) -> bool:
        return self.nibbles(x) is not None

    def _answer(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        nibbles = self.nibbles(x)
        if nibbles is not None:
            bias = self._module.bias
            return product(x, (nibbles,), None if bias is None else (bias,), residual=residual)
        found: torch.Tensor = self._own(x)
        return found if residual is None else residual + found


def lean_linear(module: Any) -> bool:
    """A product of a few rows by kernels of our own, in a layer that nothing was done to."""
    if not quantized(module):
        return False
    x = _inputs(module)
    if nibbles_of(module, x.dtype) is None:
        return False
    own = FourBitProduct(module)
    ask(lambda rows: module(x[:, :rows]), lambda rows: own(x[:, :rows]), WEIGHTS, lean.close)
    module.forward = own
    return True


class SharedFourBits(lean.Shared):
    """Projections of one input as one launch, where a step is captured; their weights stay where they are."""

    def _join(self, lay: Any) -> None:
        self._products = [FourBitProduct(one) for one in self._linears]

    def few(self, x: torch.Tensor) -> bool:
        """Whether their product with x [..., K] is the kernels'."""
        return all(one.few(x) for one in self._products)

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        weights = [one.nibbles(x) for one in self._products]
        biases = [one.bias for one in self._linears if one.bias is not None]
        return product(x, tuple(one for one in weights if one is not None), tuple(biases) or None)

    def _own(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self._products[number](x)

    def __call__(self, x: torch.Tensor, *, number: int) -> torch.Tensor:
        if number == 0 and not self.few(x):
            self._input, self._left = None, {}
            return self._own(x, number)
        return super().__call__(x, number=number)


def lean_projections(module: Any) -> bool:
    """q, k and v of one input as one launch, where a step is captured."""
    linears: tuple[Any, ...] = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if not all(map(quantized, linears)) or len({one.bias is None for one in linears}) != 1:
        return False
    x = _inputs(linears[0])
    weights = [nibbles_of(one, x.dtype) for one in linears]
    fitting = [one for one in weights if one is not None and one.outputs % LINES == 0]
    if len(fitting) < len(linears) or not alike(*fitting):
        return False
    shared = SharedFourBits(linears)
    wanted = torch.cat([one(x) for one in linears], -1)

    def found(rows: int) -> torch.Tensor:
        part = x[:, :rows]
        return torch.cat([shared(part, number=number) for number in range(len(linears))], -1)

    ask(lambda rows: wanted[:, :rows], found, WEIGHTS, lean.close)
    for number, own in enumerate(linears):
        own.forward = partial(shared, number=number)
    return True


def lean_gate(module: Any) -> bool:
    """down(act(gate x) * up x): gate, up and what lies between them as one launch, where a step is captured."""
    ends: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(map(quantized, ends)) or not callable(getattr(module, "act_fn", None)) or hasattr(module, "_hf_hook"):
        return False
    if any(end.bias is not None for end in ends[:2]) or ends[0].out_features != ends[1].out_features:
        return False
    (gate, up), down = (FourBitProduct(end) for end in ends[:2]), ends[2]
    x = _inputs(ends[0])
    first, second = (nibbles_of(end, x.dtype) for end in ends[:2])
    kind = lean.gate_kind(module.act_fn, x)
    if first is None or second is None or kind is None or not alike(first, second):
        return False
    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        first, second = gate.nibbles(x), up.nibbles(x)
        if first is None or second is None:
            return original(x)  # type: ignore[no-any-return]
        return down(product(x, (first, second), gate=kind))  # type: ignore[no-any-return]

    wanted = original(x)
    ask(lambda rows: wanted[:, :rows], lambda rows: forward(x[:, :rows]), WEIGHTS, lean.close)
    module.forward = forward
    return True


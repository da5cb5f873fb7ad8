"""Layers that bitsandbytes quantized to four bits: products of a few rows by spectral.lean_nibbles, in captured steps.

bitsandbytes is not imported here: its layers are known by what they hold. That is read again for every product, since a
model's storages go to host memory and come back elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch

from spectral import lean
from spectral.few_rows import ask, for_kernels
from spectral.lean_layers import Product
from spectral.lean_nibbles import BLOCK, OUTER, Nibbles, fits, product

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


def known(module: Any) -> bool:
    """Whether this is a layer of bitsandbytes' with weights of four bits, which nothing was done to."""
    kind = type(module)
    if kind.__name__ not in NAMES or kind.__module__.partition(".")[0] != "bitsandbytes":
        return False
    return not hasattr(module, "_hf_hook") and "forward" not in vars(module)


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
            return product(x, nibbles, self._module.bias, residual=residual)
        found: torch.Tensor = self._own(x)
        return found if residual is None else residual + found


def lean_linear(module: Any) -> bool:
    """A product of a few rows by kernels of our own, in a layer that nothing was done to."""
    if not known(module) or getattr(module.weight, "quant_state", None) is None:
        return False
    x = _inputs(module)
    if nibbles_of(module, x.dtype) is None:
        return False
    own = FourBitProduct(module)
    ask(lambda rows: module(x[:, :rows]), lambda rows: own(x[:, :rows]), WEIGHTS)
    module.forward = own
    return True


def lean_gate(module: Any) -> bool:
    """down(act(gate x) * up x): gate, up and what lies between them as one launch, where a step is captured."""
    ends: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(map(known, ends)) or not callable(getattr(module, "act_fn", None)) or hasattr(module, "_hf_hook"):
        return False
    gate, up = (FourBitProduct(end) for end in ends[:2])
    down = ends[2]
    if any(end.bias is not None or getattr(end.weight, "quant_state", None) is None for end in ends[:2]):
        return False
    x = _inputs(ends[0])
    first, second = (nibbles_of(end, x.dtype) for end in ends[:2])
    kind = lean.gate_kind(module.act_fn, x)
    if first is None or second is None or kind is None or not _alike(first, second):
        return False
    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        first, second = gate.nibbles(x), up.nibbles(x)
        if first is None or second is None:
            return original(x)  # type: ignore[no-any-return]
        return down(product(x, first, opened=second, gate=kind))  # type: ignore[no-any-return]

    wanted = original(x)
    ask(lambda rows: wanted[:, :rows], lambda rows: forward(x[:, :rows]), WEIGHTS)
    module.forward = forward
    return True


def _alike(first: Nibbles, second: Nibbles) -> bool:
    """Whether a kernel can go through both at once."""
    return (first.outputs, first.size, first.kind, first.absmax.dtype) == (
        second.outputs, second.size, second.kind, second.absmax.dtype,
    )  # fmt: skip

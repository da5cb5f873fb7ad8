"""Layers whose sums are part of the products before them, where a step of a few rows is captured.

    h + o(attention(q, k, v of norm(h)))        the sum goes into the product o, norms of query and key heads into
    h + down(act(gate) * up of norm(h))         their rotary embedding, the sum into the product down

With `spectral.lean`'s rule: a layer's forward is replaced where it answers as the layer's own does. What that does
between products is not known here, so a layer is asked while its model runs, with whatever the model tells it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spectral import lean
from spectral.few_rows import ask, captured, few, linear
from spectral.lean_products import fits

log = logging.getLogger("spectral.engine")

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def lean_linear(module: Any) -> bool:
    """A product of a few rows by kernels of our own, in a layer that nothing was done to."""
    if not lean.plain(module) or "forward" in vars(module) or not fits(module.weight):
        return False
    x = lean.sample(1, 3, module.in_features, like=module.weight)
    own = Product(module)
    ask(lambda rows: module(x[:, :rows]), lambda rows: own(x[:, :rows]))
    module.forward = own
    return True


class Product:
    """A linear layer's forward, and what it is to be added to. Of layers with weights of 16 bits; others derive."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._residual: torch.Tensor | None = None

    def few(self, x: torch.Tensor) -> bool:
        """Whether the product of x [..., K] is the kernels'."""
        return few(x, self._module.weight)

    def _answer(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """residual + the layer's own, whoever computes it."""
        return linear(x, self._module.weight, self._module.bias, residual)

    @contextmanager
    def adding(self, residual: torch.Tensor) -> Iterator[None]:
        """Within: the one product that is asked for is a sum with this. Raises RuntimeError where none was."""
        self._residual = residual
        try:
            yield
            if self._residual is not None:
                raise RuntimeError("the product of a sum was not asked for")
        finally:
            self._residual = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        residual, self._residual = self._residual, None
        return self._answer(x, residual)


def lean_layers(model: Any) -> int:
    """Replace the forwards of a model's layers where they can be; how many were."""
    layers = [module for module in model.modules() if all(hasattr(module, name) for name in PARTS)]
    asked = [Asked(layer) for layer in layers if _known(layer)]
    if not asked:
        return 0
    try:
        for rows in (1, 3):
            model(input_ids=torch.arange(3, 3 + rows, device=model.device)[None], use_cache=False)
    except Exception as failure:  # no model of tokens, or one that wants more
        log.debug("layers were not asked: %s", failure)
        return 0
    finally:
        for one in asked:
            one.end()
    return sum(one.right() for one in asked)


def _known(layer: Any) -> bool:
    """Whether a layer has the products that sums can be taken into."""
    ends = getattr(layer.self_attn, "o_proj", None), getattr(layer.mlp, "down_proj", None)
    return not hasattr(layer, "_hf_hook") and all(isinstance(_forward(end), Product) for end in ends)


def _forward(module: Any) -> Any:
    return None if module is None else vars(module).get("forward")


class Asked:
    """A layer's own forward, which the model runs, and beside it ours on numbers of the same shape."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._own, self._was = layer, layer.forward, _forward(layer)
        self._ours: Callable[..., torch.Tensor] = LeanLayer(layer)
        self._answers: list[bool] = []
        layer.forward = self._ask

    def _ask(self, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        # Numbers so small that what a layer adds to them is most of its answer.
        x = lean.sample(*hidden_states.shape, like=hidden_states) / 32
        wanted = self._own(x, *args, **more)
        right = isinstance(wanted, torch.Tensor) and not args
        if right:
            try:
                with captured():
                    found = self._ours(x, **more)
                error = (found.float() - wanted.float()).norm() / (wanted.float() - x.float()).norm()
                right = bool(error <= 2 * lean.TOLERANCE[x.dtype])  # of two sums, each of what was rounded before
            except Exception as failure:  # whatever a layer does with what it is not used to
                log.debug("a layer stays as it is: %s", failure)
                right = False
        self._answers.append(right)
        return self._own(hidden_states, *args, **more)

    def end(self) -> None:
        """The model has run: the layer is as it was."""
        if self._was is None:
            del self._layer.forward
        else:
            self._layer.forward = self._was

    def right(self) -> bool:
        """Whether ours answered as the layer's own; then it takes its place."""
        if len(self._answers) < 2 or not all(self._answers):
            return False
        self._layer.forward = self._ours
        return True


class LeanLayer:
    """The forward of a layer in a captured step of few rows; for anything else the layer's own."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._own = layer, layer.forward

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        layer, h = self._layer, hidden_states
        if args or not layer.self_attn.o_proj.forward.few(h):
            return self._own(h, *args, **more)
        token = lean.HEADS.set({})
        try:
            with layer.self_attn.o_proj.forward.adding(h):
                h, *_ = layer.self_attn(hidden_states=layer.input_layernorm(h), **more)
            if lean.HEADS.get():
                raise RuntimeError("attention has not taken the norms of its heads")
        finally:
            lean.HEADS.reset(token)
        with layer.mlp.down_proj.forward.adding(h):
            return layer.mlp(layer.post_attention_layernorm(h))

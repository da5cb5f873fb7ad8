"""What profiling and evaluation read of a model: rotary tables, projections, hidden states, logits.

Beside `spectral.hf` the only file that knows the insides of transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spectral.errors import ModelError
from spectral.hf import LoadedModel
from spectral.model_shapes import attention_modules, text_config
from spectral.prefill import softcapped


@dataclass
class Projections:
    """One attention layer's W_K [H, d, hidden], W_V [H, dv, hidden], W_O [Hq, dv, hidden] and biases [H, d] and [H, dv]
    (zeros where it has none), float32 on the CPU. `key_norm`: a norm stands between W_K and RoPE."""

    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    key_norm: bool


class _Found(Exception):
    """Ends a forward as soon as its hook has what it wanted."""


@torch.no_grad()
def rotary_tables(loaded: LoadedModel, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, r] float32 as the model hands them to a layer when it reads `length` tokens at once."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        if isinstance(tables, tuple):
            found.append(tables)
        raise _Found

    handle = attention_modules(loaded.model)[layer].register_forward_pre_hook(take, with_kwargs=True)
    try:
        with suppress(_Found):
            loaded.model(input_ids=torch.zeros((1, length), dtype=torch.long, device=loaded.device), use_cache=False)
    finally:
        handle.remove()
    if not found:
        raise ModelError(f"{loaded.name}: layer {layer} is not handed rotary tables; comparisons need RoPE")
    return found[0][0][0].float().cpu(), found[0][1][0].float().cpu()


def rope_frequencies(loaded: LoadedModel, layer: int) -> np.ndarray | None:
    """RoPE frequencies of a layer in radians per token, float64 [r / 2], read off the model's own tables.

    None for a layer without RoPE, or with another layout than half-split: its keys are then coded as they are.
    """
    try:
        cos, sin = rotary_tables(loaded, layer, 2)
    except ModelError:
        return None
    half = cos.shape[-1] // 2
    if not half or not torch.equal(cos[1, :half], cos[1, half:]):
        return None
    return torch.atan2(sin[1, :half].double(), cos[1, :half].double()).numpy()


def _projecting(loaded: LoadedModel) -> dict[int, Any]:
    """Attention modules whose projections of keys and values are known by name. Raises ModelError."""
    modules = attention_modules(loaded.model)
    if not all(hasattr(m, "qkv_proj") or (hasattr(m, "k_proj") and hasattr(m, "v_proj")) for m in modules.values()):
        raise ModelError(f"{loaded.name}: comparisons need attention with k_proj and v_proj, or qkv_proj")
    return modules


@torch.no_grad()
def projections(loaded: LoadedModel, layer: int) -> Projections:
    """W_K, W_V and W_O of a layer, asked of its modules by unit vectors: quantized weights are no special case."""
    module, shape = _projecting(loaded)[layer], loaded.shape.layers[layer]
    heads, queries, hidden = shape.kv_heads, loaded.shape.query_heads, loaded.shape.hidden_size
    dtype = loaded.model.get_input_embeddings().weight.dtype

    def matrix(linear: Any, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [out, width] and bias [out]."""
        bias = linear(torch.zeros((1, width), dtype=dtype, device=loaded.device))[0].float().cpu()
        unit = torch.eye(width, dtype=dtype, device=loaded.device)
        return linear(unit).float().cpu().T - bias[:, None], bias

    if hasattr(module, "qkv_proj"):
        fused, bias = matrix(module.qkv_proj, hidden)
        sizes = [queries * shape.key_dim, heads * shape.key_dim, heads * shape.value_dim]
        _, key, value = fused.split(sizes)
        _, key_bias, value_bias = bias.split(sizes)
    else:
        key, key_bias = matrix(module.k_proj, hidden)
        value, value_bias = matrix(module.v_proj, hidden)
    output, _ = matrix(module.o_proj, queries * shape.value_dim)
    return Projections(
        key=key.reshape(heads, shape.key_dim, hidden),
        value=value.reshape(heads, shape.value_dim, hidden),
        output=output.T.reshape(queries, shape.value_dim, -1),
        key_bias=key_bias.view(heads, shape.key_dim),
        value_bias=value_bias.view(heads, shape.value_dim),
        key_norm=hasattr(module, "k_norm"),
    )


@contextmanager
def watching_inputs(loaded: LoadedModel, watch: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Within: `watch(layer, hidden [N, hidden])` sees what every layer's key and value projections are given."""
    handles = []
    for layer, module in _projecting(loaded).items():
        linear = module.qkv_proj if hasattr(module, "qkv_proj") else module.k_proj

        def take(_: Any, args: tuple[Any, ...], at: int = layer) -> None:
            watch(at, args[0].detach().flatten(0, -2))

        handles.append(linear.register_forward_pre_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def projection_gradients(loaded: LoadedModel, ids: Sequence[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the gradients of the mean next-token loss by W_K [H, d, hidden] and W_V [H, dv, hidden], float32.

    They are those of the projections' outputs times their inputs, so weights may be quantized and need no gradient.
    """
    inputs: dict[tuple[int, str], torch.Tensor] = {}
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    handles = [loaded.model.get_input_embeddings().register_forward_hook(lambda _, __, x: x.requires_grad_())]
    for layer, module in _projecting(loaded).items():
        for name in ("qkv_proj",) if hasattr(module, "qkv_proj") else ("k_proj", "v_proj"):

            def take(_: Any, args: tuple[Any, ...], output: torch.Tensor, at: tuple[int, str] = (layer, name)) -> None:
                inputs[at], outputs[at] = args[0][0].detach().float(), output

            handles.append(getattr(module, name).register_forward_hook(take))
    try:
        with torch.enable_grad():
            tokens = torch.tensor([list(ids)], device=loaded.device)
            logits = loaded.model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:].to(logits.device))
            places = list(outputs)
            found = torch.autograd.grad(loss, [outputs[at] for at in places])
    finally:
        for handle in handles:
            handle.remove()
    whole = {at: grad[0].float().T @ inputs[at] for at, grad in zip(places, found, strict=True)}
    out = {}
    for layer, shape in enumerate(loaded.shape.layers):
        sizes = [shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim]
        if (layer, "qkv_proj") in whole:
            _, key, value = whole[layer, "qkv_proj"].split([loaded.shape.query_heads * shape.key_dim, *sizes])
        else:
            key, value = whole[layer, "k_proj"], whole[layer, "v_proj"]
        out[layer] = key.unflatten(0, (shape.kv_heads, -1)), value.unflatten(0, (shape.kv_heads, -1))
    return out


def decoder_layers(loaded: LoadedModel) -> dict[int, Any]:
    """Layer index -> the module that holds its attention, its MLP and the additions to the stream."""
    names = {id(module): name for name, module in loaded.model.named_modules()}
    modules = attention_modules(loaded.model)
    return {i: loaded.model.get_submodule(names[id(m)].rpartition(".")[0]) for i, m in modules.items()}


@torch.no_grad()
def decoder_inputs(loaded: LoadedModel, ids: Sequence[int]) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Per layer what its decoder layer is called with when the model reads a sequence in one forward."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for layer, module in decoder_layers(loaded).items():

        def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = layer) -> None:
            found[at] = args, kwargs

        handles.append(module.register_forward_pre_hook(take, with_kwargs=True))
    try:
        loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def last_hidden(loaded: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """The final hidden states [N, hidden] of a sequence in one forward: a fraction of its logits' memory. Raises
    ModelError when `logits_of` does not give this model's own logits."""
    found: list[torch.Tensor] = []

    def take(_: Any, __: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output.last_hidden_state)[0])

    handle = loaded.model.get_decoder().register_forward_hook(take)
    try:
        with torch.inference_mode():
            tokens = torch.tensor([list(ids)], device=loaded.device)
            own = loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
    finally:
        handle.remove()
    again = logits_of(loaded, found[0][-1:])[0]
    if not torch.allclose(own.float(), again, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise ModelError(f"{loaded.name}: its logits are not its output embedding of the last hidden state")
    return found[0]


def logits_of(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, vocab] of final hidden states [n, hidden]."""
    config = text_config(loaded.model)
    with torch.inference_mode():
        logits = loaded.model.get_output_embeddings()(hidden).float()
        logits *= (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        return softcapped(logits, getattr(config, "final_logit_softcapping", None))

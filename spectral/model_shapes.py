"""The attention layers of a transformers model: from its configuration, and as its attention was seen to be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spectral.errors import ModelError
from spectral.shapes import LayerShape, ModelShape

UNSUPPORTED = {
    "gpt_oss": "attention sinks inside the softmax",
    "deepseek_v2": "latent attention (its cache is compressed already)",
    "deepseek_v3": "latent attention (its cache is compressed already)",
}

LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}
"""Kinds of layers that Spectral knows, by the names of configurations, and whether they slide."""


class DifferentLayersError(ModelError):
    """A configuration whose layers differ in heads or sizes: what they are shows when they are called."""


class SeenLayer(NamedTuple):
    """One call of the attention function: sizes of its tensors, its sliding window, and what else it was given."""

    layer: int
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    sliding: int | None
    more: dict[str, Any]


def text_config(model: Any) -> Any:
    """The configuration of a model's language part (multimodal models keep several)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def kind_of(model: Any) -> str:
    """The family's name in transformers, for messages."""
    return str(getattr(text_config(model), "model_type", "?"))


def attention_modules(model: Any) -> dict[int, Any]:
    """Layer index -> attention module: the first with that `layer_idx` (attention to an encoder follows it)."""
    found: dict[int, Any] = {}
    for module in model.modules():
        projects = hasattr(module, "k_proj") or hasattr(module, "qkv_proj")
        if (projects or "Attention" in type(module).__name__) and hasattr(module, "layer_idx"):
            found.setdefault(module.layer_idx, module)
    return found


def model_shape(model: Any) -> ModelShape:
    """The attention layers of a decoder-only model by its configuration. Raises ModelError for kinds that Spectral
    cannot serve."""
    config = text_config(model)
    slides = _slides(model)
    try:
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    except Exception as error:  # a configuration whose layers differ says so, in its own way
        raise DifferentLayersError(f"{kind_of(model)} is not supported here: {error}") from error
    layers = [LayerShape(kv_heads, head_dim, head_dim, window) for window in slides]
    return ModelShape(tuple(layers), heads, int(config.hidden_size))


def seen_shape(model: Any, seen: Sequence[SeenLayer]) -> ModelShape:
    """The same as attention was called in one forward, where layers may differ. Raises ModelError."""
    config = text_config(model)
    slides, kind = _slides(model), kind_of(model)
    by_layer = {one.layer: one for one in seen}
    if sorted(by_layer) != list(range(len(slides))) or len(seen) != len(slides):
        raise ModelError(
            f"{kind} is not supported: in one forward its {len(slides)} layers called the attention function of "
            f"transformers {len(seen)} times, for the layers {sorted(by_layer)}; each must do so once"
        )
    for one in seen:
        if one.more.get("s_aux") is not None:
            raise ModelError(f"{kind} is not supported: {UNSUPPORTED['gpt_oss']}")
    heads = {one.query_heads for one in seen}
    if len(heads) != 1:
        raise ModelError(f"{kind} is not supported: its layers have different numbers of query heads, {sorted(heads)}")
    typed = bool(getattr(config, "layer_types", None))
    layers = []
    for number, window in enumerate(slides):
        one = by_layer[number]
        own = window if typed or window else one.sliding  # some have it in the module alone
        layers.append(LayerShape(one.kv_heads, one.key_dim, one.value_dim, own))
    return ModelShape(tuple(layers), heads.pop(), int(config.hidden_size))


def _slides(model: Any) -> list[int | None]:
    """Of every layer the tokens of its sliding window, None where it sees all. Raises ModelError."""
    config, kind = text_config(model), kind_of(model)
    if kind in UNSUPPORTED:
        raise ModelError(f"{kind} is not supported: {UNSUPPORTED[kind]}")
    modules, count = attention_modules(model), int(config.num_hidden_layers)
    if sorted(modules) != list(range(count)):
        raise ModelError(
            f"{kind} is not supported: {len(modules)} of its {count} layers have ordinary attention; "
            "Spectral serves decoder-only models whose every layer is attention (Llama, Mistral, Qwen, Gemma, Phi-3)"
        )
    types = list(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    size = int(window) if window and getattr(config, "use_sliding_window", True) is not False else None
    if not types:  # models of one kind of layers use their window in all of them
        return [size] * count
    unknown = sorted({str(name) for name in types} - {*LAYER_TYPES})
    if unknown or len(types) != count:
        what = ", ".join(unknown) or f"{len(types)} of {count}"
        raise ModelError(
            f"{kind} is not supported: its layers are {what}; Spectral knows {', '.join(LAYER_TYPES)}"
        )
    return [size if LAYER_TYPES[name] else None for name in types]

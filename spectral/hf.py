"""What touches transformers' attention and model internals; `spectral.hf_reading` reads a model's parts.

Models run unmodified: transformers calls the attention function registered as "spectral" with post-RoPE queries, keys
and values. Inside `attending(batch)` that function appends to and reads from a page store; inside `observing(...)` it
shows them to a profiler first; from a `SpectralCache` it gets codes and attends over those; otherwise it is exact
attention. (`spectral/cache.py` derives from transformers' cache classes: the one exception to the first sentence.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spectral.importing import uncollected

with uncollected():
    import torch
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from spectral.attention import attend
    from spectral.coded import CodedStates, dense_attention
    from spectral.dispatch import launching
    from spectral.errors import ModelError
    from spectral.lean import lean
    from spectral.model_shapes import SeenLayer, attention_modules, text_config
    from spectral.own_answer import check_own_answer, probed_shape
    from spectral.pages import ModelShape, StepBatch

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float, "float | None"], "torch.Tensor | None"]
"""Called with (layer, query, key, value, scaling, softcap); may answer the attention itself: [B, Hq, N, dv]."""

_BATCH: ContextVar[StepBatch | None] = ContextVar("spectral_batch", default=None)
_OBSERVER: ContextVar[Observer | None] = ContextVar("spectral_observer", default=None)
_SEEN: ContextVar[list[SeenLayer] | None] = ContextVar("spectral_seen", default=None)

NAME = "spectral"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, Hq, N, d], key/value [B, H, N, d] -> [B, N, Hq, dv]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(key, CodedStates):  # from a SpectralCache
        with launching(query.device):
            return key.update.attend(query, attention_mask, scaling=scale, softcap=softcap), None
    batch = _BATCH.get()
    if batch is not None:
        if len({*batch.store.devices}) == 1:
            return attend(batch, layer, query, key, value, scaling=scale, softcap=softcap), None
        with launching(query.device):
            return attend(batch.on(query.device), layer, query, key, value, scaling=scale, softcap=softcap), None
    seen = _SEEN.get()
    if seen is not None:
        sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        seen.append(SeenLayer(layer, *sizes, sliding_window, more))
    observer = _OBSERVER.get()
    if observer is not None:
        answer = observer(layer, query, key, value, scale, softcap)
        if answer is not None:
            return answer.transpose(1, 2), None
    out = dense_attention(query, key, value, attention_mask, scaling=scale, softcap=softcap, sliding=sliding_window)
    return out.transpose(1, 2), None


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **rest: Any,
) -> torch.Tensor | None:
    """transformers' mask interface. The attention function knows what is causal: it needs to be told of padding only.

    Returns None without padding; bool [B, kv_length], True for tokens; or bool [B, 1, q_length, kv_length] where the
    model adds to the mask (use_vmap) or the keys have places that are still empty (a static cache).
    """
    if _BATCH.get() is not None:
        return None
    if use_vmap or bool(q_offset + q_length != kv_offset + kv_length):
        sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
        return sdpa_mask(
            **sizes, attention_mask=attention_mask, use_vmap=use_vmap, **{**rest, "allow_is_causal_skip": False}
        )
    if attention_mask is None:
        return None
    short = kv_offset + kv_length - attention_mask.shape[-1]
    if short > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, short))
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    return None if bool(attention_mask.all()) else attention_mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def _within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def attending(model: torch.nn.Module, batch: StepBatch) -> AbstractContextManager[None]:
    """Within: the model's attention appends to and reads from the batch's store."""
    return _within(_BATCH, batch)


def observing(observer: Observer) -> AbstractContextManager[None]:
    """Within: the observer sees every attention call (no store) and may answer it; else attention is exact."""
    return _within(_OBSERVER, observer)


def seeing(seen: list[SeenLayer]) -> AbstractContextManager[None]:
    """Within: every attention call (no store) is told to `seen`."""
    return _within(_SEEN, seen)


@dataclass
class LoadedModel:
    """A model ready to serve.

    Attributes:
        name: as asked for; model, tokenizer: transformers'; shape: its attention layers.
        fingerprint: identity of architecture and trained norms (not changed by weight quantization).
        context_length: most positions it was made for; eos_token_ids: tokens that end an answer.
        device, quantization.
    """

    name: str
    model: Any
    tokenizer: Any
    shape: ModelShape
    fingerprint: str
    context_length: int
    eos_token_ids: set[int]
    device: torch.device
    quantization: str = "none"

    @cached_property
    def layer_devices(self) -> list[torch.device]:
        """Where each attention layer is."""
        modules = attention_modules(self.model)
        return [next(modules[layer].parameters()).device for layer in sorted(modules)]

    @cached_property
    def split(self) -> bool:
        """Whether the layers lie on several devices."""
        return len({*self.layer_devices, self.device}) > 1

    @cached_property
    def no_mask(self) -> torch.Tensor:
        """bool [1, 1, 1, 1], False. Spectral's attention needs no mask; transformers takes a four-dimensional one as it
        is, without building its own in every step, and the attention function ignores it."""
        return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.device)

    def kept(self, places: list[int]) -> Any:
        """These places as transformers' `logits_to_keep`. Plain numbers for a model on several devices: its hooks take
        every tensor, wherever it was, to the first one, and the hidden states that it would index are on the last."""
        return places if self.split else torch.tensor(places, dtype=torch.long, device=self.device)

    def weight_shares(self) -> dict[str, float]:
        """Each device's part of the parameters' bytes."""
        sizes: dict[str, int] = {}
        for parameter in self.model.parameters():
            name = str(parameter.device)
            sizes[name] = sizes.get(name, 0) + parameter.numel() * parameter.element_size()
        return {name: size / sum(sizes.values()) for name, size in sorted(sizes.items())}

    @property
    def weights_nbytes(self) -> int:
        """Bytes of parameters and buffers, tied ones counted once."""
        seen = {t.data_ptr(): t.numel() * t.element_size() for t in self.model.parameters()}
        seen |= {t.data_ptr(): t.numel() * t.element_size() for t in self.model.buffers()}
        return sum(seen.values())


def fingerprint(model: Any) -> str:
    """SHA-256 over the architecture and the trained norm vectors: differs between models and revisions, and stays the
    same under weight quantization (which leaves norms alone)."""
    config = text_config(model)
    keys = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    digest = hashlib.sha256(json.dumps({k: getattr(config, k, None) for k in keys}, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        if "norm" in name:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _quantization_config(quantization: str) -> Any:
    if quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {quantization!r} needs bitsandbytes: install the extra with "
            "`pip install spectral-serve[gpu]`, or set quantization to none"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ModelError(f"quantization must be none, nf4 or int8, got {quantization!r}")


def choose_device(device: str = "auto") -> torch.device:
    """ "auto": the first CUDA device if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r} was asked for and no CUDA device is available; set device to cpu or auto")
    return torch.device(device)


def _placement(device: torch.device, max_memory: dict[str, int] | None, layers: int = 1) -> dict[str, Any]:
    """Where from_pretrained puts the weights: on one device, or whole layers spread by accelerate, device after device.

    "auto" would divide them evenly, whatever each device has free. A device takes whole layers, so half of one more
    than its part; the first one is asked by accelerate to keep a layer's room, which nothing here ever uses.
    """
    if not max_memory:
        return {"device_map": None if device.type == "cpu" else {"": device}}
    total, limits = sum(max_memory.values()), {}
    for number, (name, size) in enumerate(max_memory.items()):
        room = size + (3 if number == 0 else 1) * total // (2 * max(1, layers))
        limits[torch.device(name).index if name.startswith("cuda") else name] = room
    limits[next(reversed(limits))] = total  # the last one takes what is left
    return {"device_map": "sequential", "max_memory": limits}


def load_model(
    name: str,
    *,
    quantization: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    max_memory: dict[str, int] | None = None,
) -> LoadedModel:
    """Load a decoder-only model by folder or hub name, with Spectral's attention.

    Args:
        dtype: "auto" is float32 on a CPU (bf16 arithmetic is several times slower there) and the checkpoint's own
            type elsewhere; or "float32", "bfloat16", "float16".
        max_memory: bytes of weights that each device of two or more is to have, in this order; the layers are spread
            like that, and `device` is not asked.

    A GPU becomes this thread's current one, since kernels are launched there.

    Raises ModelError with the reason and a remedy.
    """
    from spectral.resources import model_path

    where = choose_device(next(iter(max_memory)) if max_memory else device)
    path = str(model_path(name))
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    if dtype == "auto":
        torch_dtype: Any = torch.float32 if where.type == "cpu" else "auto"
    else:
        torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
        if torch_dtype is None:
            raise ModelError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    quant = _quantization_config(quantization)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch_dtype,
            attn_implementation=NAME,
            quantization_config=quant,
            **_placement(where, max_memory, int(getattr(config, "num_hidden_layers", None) or 1)),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model {name!r} could not be loaded: {error}") from error
    model.requires_grad_(False)
    lost = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if max_memory and "cpu" not in max_memory and lost:
        have = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in max_memory.items())
        raise ModelError(f"model {name!r} does not fit on {have}: quantize it, or give it more or larger devices")
    return wrap_model(name, model, tokenizer, quantization=quantization)


def wrap_model(name: str, model: Any, tokenizer: Any, *, quantization: str = "none") -> LoadedModel:
    """A LoadedModel around a model that exists already (its attention is set to Spectral's). Raises ModelError for a
    kind of model that Spectral cannot serve, or that would answer otherwise than by itself."""
    model.set_attn_implementation(NAME)
    lean(model)
    config = text_config(model)
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends |= {int(v) for v in (value if isinstance(value, list) else [value]) if v is not None}
    loaded = LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        shape=probed_shape(model),
        fingerprint=fingerprint(model),
        context_length=int(getattr(config, "max_position_embeddings", None) or 2048),
        eos_token_ids=ends,
        device=next(model.parameters()).device,
        quantization=quantization,
    )
    check_own_answer(loaded)
    return loaded

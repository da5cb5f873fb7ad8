"""The only file that touches transformers' attention and model internals.

Models run unmodified: transformers calls the attention function registered as "spectral" with post-RoPE queries, keys
and values. Inside `attending(batch)` that function appends to and reads from a page store; inside `observing(...)` it
shows them to a profiler first; otherwise it is exact causal attention.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from spectral.attention import attend, causal_attention, softcapped
from spectral.errors import ModelError
from spectral.pages import LayerShape, ModelShape, StepBatch

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float, "float | None"], "torch.Tensor | None"]
"""Called with (layer, query, key, value, scaling, softcap); may answer the attention itself: [B, Hq, N, dv]."""

_BATCH: ContextVar[StepBatch | None] = ContextVar("spectral_batch", default=None)
_OBSERVER: ContextVar[Observer | None] = ContextVar("spectral_observer", default=None)

NAME = "spectral"

UNSUPPORTED = {
    "gpt_oss": "attention sinks inside the softmax",
    "deepseek_v2": "latent attention (its cache is compressed already)",
    "deepseek_v3": "latent attention (its cache is compressed already)",
}


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, Hq, N, d], key/value [B, H, N, d] -> [B, N, Hq, dv]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    batch = _BATCH.get()
    if batch is not None:
        return attend(batch, layer, query, key, value, scaling=scale, softcap=softcap), None
    observer = _OBSERVER.get()
    if observer is not None:
        answer = observer(layer, query, key, value, scale, softcap)
        if answer is not None:
            return answer.transpose(1, 2), None
    out = causal_attention(query, key, value, scaling=scale, softcap=softcap, sliding=sliding_window)
    return out.transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The attention function knows which tokens each query sees: no mask is built."""
    return


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def attending(model: torch.nn.Module, batch: StepBatch) -> Iterator[None]:
    """Within: the model's attention appends to and reads from the batch's store."""
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Within: the observer sees every attention call (no store) and may answer it; else attention is exact."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


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

    @property
    def weights_nbytes(self) -> int:
        """Bytes of parameters and buffers, tied ones counted once."""
        seen = {t.data_ptr(): t.numel() * t.element_size() for t in self.model.parameters()}
        seen |= {t.data_ptr(): t.numel() * t.element_size() for t in self.model.buffers()}
        return sum(seen.values())


def _text_config(model: Any) -> Any:
    """The configuration of a model's language part (multimodal models keep several)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_modules(model: Any) -> dict[int, Any]:
    """Layer index -> attention module (with `k_proj` and `v_proj`, or a fused `qkv_proj`)."""
    projecting = (m for m in model.modules() if hasattr(m, "k_proj") or hasattr(m, "qkv_proj"))
    return {m.layer_idx: m for m in projecting if hasattr(m, "layer_idx")}


def model_shape(model: Any) -> ModelShape:
    """The attention layers of a decoder-only model. Raises ModelError for kinds that Spectral cannot serve."""
    config = _text_config(model)
    kind = str(getattr(config, "model_type", "?"))
    if kind in UNSUPPORTED:
        raise ModelError(f"{kind} is not supported: {UNSUPPORTED[kind]}")
    modules = attention_modules(model)
    count = int(config.num_hidden_layers)
    if sorted(modules) != list(range(count)):
        raise ModelError(
            f"{kind} is not supported: {len(modules)} of its {count} layers have ordinary attention; "
            "Spectral serves decoder-only models whose every layer is attention (Llama, Mistral, Qwen, Gemma, Phi-3)"
        )
    types = getattr(config, "layer_types", None) or []
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    layers = []
    for index in range(count):
        module_window = getattr(modules[index], "sliding_window", None)
        slides = types[index] == "sliding_attention" if types else (window is not None and module_window is not None)
        if not types and module_window is None and kind in {"mistral", "phi3"} and window:
            slides = True  # these keep the window in the config only
        layers.append(LayerShape(kv_heads, head_dim, head_dim, int(window) if slides and window else None))
    return ModelShape(tuple(layers), heads, int(config.hidden_size))


def fingerprint(model: Any) -> str:
    """SHA-256 over the architecture and the trained norm vectors: differs between models and revisions, and stays the
    same under weight quantization (which leaves norms alone)."""
    config = _text_config(model)
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


def load_model(
    name: str,
    *,
    quantization: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a decoder-only model by folder or hub name, with Spectral's attention.

    Args:
        dtype: "auto" is float32 on a CPU (bf16 arithmetic is several times slower there) and the checkpoint's own
            type elsewhere; or "float32", "bfloat16", "float16".

    Raises ModelError with the reason and a remedy.
    """
    from spectral.resources import model_path

    where = choose_device(device)
    path = str(model_path(name))
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
            device_map=None if where.type == "cpu" else {"": where},
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model {name!r} could not be loaded: {error}") from error
    model.requires_grad_(False)
    return wrap_model(name, model, tokenizer, quantization=quantization)


def wrap_model(name: str, model: Any, tokenizer: Any, *, quantization: str = "none") -> LoadedModel:
    """A LoadedModel around a model that exists already (its attention is set to Spectral's)."""
    model.set_attn_implementation(NAME)
    config = _text_config(model)
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends |= {int(v) for v in (value if isinstance(value, list) else [value]) if v is not None}
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        shape=model_shape(model),
        fingerprint=fingerprint(model),
        context_length=int(getattr(config, "max_position_embeddings", None) or 2048),
        eos_token_ids=ends,
        device=next(model.parameters()).device,
        quantization=quantization,
    )


# == what the evaluation reads of a model: rotary tables, projections, hidden states ===================================


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


@torch.no_grad()
def projections(loaded: LoadedModel, layer: int) -> Projections:
    """W_K, W_V and W_O of a layer, asked of its modules by unit vectors: quantized weights are no special case."""
    module, shape = attention_modules(loaded.model)[layer], loaded.shape.layers[layer]
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
    for layer, module in attention_modules(loaded.model).items():
        linear = module.qkv_proj if hasattr(module, "qkv_proj") else module.k_proj

        def take(_: Any, args: tuple[Any, ...], at: int = layer) -> None:
            watch(at, args[0].detach().flatten(0, -2))

        handles.append(linear.register_forward_pre_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    config = _text_config(loaded.model)
    with torch.inference_mode():
        logits = loaded.model.get_output_embeddings()(hidden).float()
        logits *= (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        return softcapped(logits, getattr(config, "final_logit_softcapping", None))

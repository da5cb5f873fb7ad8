"""Whether a model answers through Spectral's attention as it does by itself.

Any decoder-only model of transformers may be asked for. What Spectral keeps of a text is keys and values, and the text
comes in pieces. A model that keeps something else between tokens (a state, a convolution), counts positions by itself
or attends in another way would answer wrongly and say nothing. So each reads a few tokens both ways before it serves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from spectral.dispatch import launching
from spectral.errors import ModelError
from spectral.model_shapes import DifferentLayersError, SeenLayer, kind_of, model_shape, seen_shape
from spectral.pages import PageStore
from spectral.scoring import store_blocks
from spectral.shapes import ModelShape

if TYPE_CHECKING:
    from spectral.hf import LoadedModel

log = logging.getLogger("spectral.engine")

TOKENS, CHUNK = 17, 8
"""Tokens that are read, and of them at a time: a prompt, another chunk and a decode step. Each costs a pass over all
weights; the first says nothing of what is kept."""

MOST = {torch.float32: 0.002, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest error of an ordinary model. Rounding made up to 3e-6, 0.006 and 0.05 in random models of 36 layers (Qwen3,
Llama, Gemma 2, Qwen3 with experts); what is not attended to, or at the wrong place, makes 0.06 to 1. Activations that
are quantized (bitsandbytes' int8) made 0.02 in float32 too: quantized models have the largest."""


@contextmanager
def attending_by(model: Any, implementation: str) -> Iterator[None]:
    """Within: the model attends by another implementation of transformers' or Spectral's."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def probed_shape(model: Any) -> ModelShape:
    """The attention layers of a model as one forward through Spectral's attention calls it. Raises ModelError."""
    from spectral.hf import NAME, seeing

    device = next(model.parameters()).device
    seen: list[SeenLayer] = []
    with torch.inference_mode(), launching(device), attending_by(model, NAME), seeing(seen), _refusing(model):
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    return seen_shape(model, seen)


def any_shape(model: Any) -> ModelShape:
    """The same by the configuration, where that says it for all layers."""
    try:
        return model_shape(model)
    except DifferentLayersError:
        return probed_shape(model)


def check_own_answer(loaded: LoadedModel) -> float:
    """Compare the logits that a model has through Spectral's attention, which is set, with its own. The error: of the
    middle position after the first chunk, relative to its logits less their mean; NaN where nothing can be said.

    Raises ModelError where it is too large, or where the model does not run like this at all.
    """
    if loaded.context_length < TOKENS:
        return float("nan")
    model = loaded.model
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (TOKENS,), generator=rng)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), launching(loaded.device), _refusing(model):
            with attending_by(model, "eager"):
                own = model(input_ids=ids[None].to(loaded.device), use_cache=False).logits[0, CHUNK:].float()
            store = PageStore(
                loaded.shape, device=loaded.device, window_dtype=model.dtype, devices=loaded.layer_devices
            )
            found = torch.cat([part for _, part in store_blocks(loaded, store, ids.tolist(), chunk=CHUNK)])[CHUNK:]
    finally:
        model.train(training)
    if not own.isfinite().all():
        log.warning("%s: its own answers are not finite, so ours were not compared with them", loaded.name)
        return float("nan")
    error = float(((found - own).norm(dim=-1) / (own - own.mean(-1, keepdim=True)).norm(dim=-1)).median())
    quantized = loaded.quantization != "none" or getattr(model.config, "quantization_config", None) is not None
    most = max(MOST.values()) if quantized else MOST.get(model.dtype, max(MOST.values()))
    log.debug("%s: %.2g from its own answers", loaded.name, error)
    if not error <= most:
        raise ModelError(
            f"{kind_of(model)} is not supported: through Spectral's attention its logits are {error:.2g} away from its "
            f"own (at most {most} are expected). It keeps something else between tokens than keys and values, or "
            "attends in another way than softmax over all tokens or the last ones"
        )
    return error


@contextmanager
def _refusing(model: Any) -> Iterator[None]:
    """Whatever a model's code raises inside, where it is not given what it expects, says that it is not supported. Out
    of memory is something else."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ModelError(
            f"{kind_of(model)} is not supported: it does not run with Spectral's attention ({reason})"
        ) from error

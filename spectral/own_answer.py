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
from spectral.model_shapes import DifferentLayersError, SeenLayer, model_shape, seen_shape
from spectral.pages import PageStore
from spectral.shapes import ModelShape

if TYPE_CHECKING:
    from spectral.hf import LoadedModel

log = logging.getLogger("spectral.engine")

PIECES = (4, 1, 11)
"""Tokens of the pieces in which the text comes: a prompt, a decode step, another chunk. Each costs a pass over all
weights."""

MOST = {torch.float32: 0.002, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest error of an ordinary model. Rounding made up to 3e-6, 0.006 and 0.05 in random models of 36 layers (Qwen3,
Llama, Gemma 2, Qwen3 with experts); what is not attended to, or at the wrong place, makes 0.06 to 1. Activations that
are quantized (bitsandbytes' int8) made 0.02 in float32 too: quantized models have the largest."""


def probed_shape(model: Any) -> ModelShape:
    """The attention layers of a model as one forward through Spectral's attention calls it. Raises ModelError."""
    from spectral.hf import NAME, seeing

    model_type, device = _kind(model), next(model.parameters()).device
    seen: list[SeenLayer] = []
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode(), launching(device), seeing(seen), _refusing(model_type):
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return seen_shape(model, seen)


def any_shape(model: Any) -> ModelShape:
    """The same by the configuration, where that says it for all layers."""
    try:
        return model_shape(model)
    except DifferentLayersError:
        return probed_shape(model)


def check_own_answer(loaded: LoadedModel, implementation: str) -> float:
    """Compare the logits that a model has through Spectral's attention, which is set (`implementation`: its name), with
    its own. The error: of the middle position after the first piece, relative to its logits less their mean; NaN where
    nothing can be said.

    Raises ModelError where it is too large, or where the model does not run like this at all.
    """
    if loaded.context_length < sum(PIECES):
        return float("nan")
    kind = _kind(loaded.model)
    rng = torch.Generator().manual_seed(0)
    size = loaded.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (1, sum(PIECES)), generator=rng).to(loaded.device)
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.inference_mode(), launching(loaded.device), _refusing(kind):
            own = _own(loaded, ids, implementation)
            found = _ours(loaded, ids)
    finally:
        loaded.model.train(training)
    if not own.isfinite().all():
        log.warning("%s: its own answers are not finite, so ours were not compared with them", loaded.name)
        return float("nan")
    error = float(((found - own).norm(dim=-1) / (own - own.mean(-1, keepdim=True)).norm(dim=-1)).median())
    quantized = loaded.quantization != "none" or getattr(loaded.model.config, "quantization_config", None) is not None
    most = max(MOST.values()) if quantized else MOST.get(loaded.model.dtype, max(MOST.values()))
    log.debug("%s: %.2g from its own answers", loaded.name, error)
    if not error <= most:
        raise ModelError(
            f"{kind} is not supported: through Spectral's attention its logits are {error:.2g} away from its own (at "
            f"most {most} are expected). It keeps something else between tokens than keys and values, or attends in "
            "another way than softmax over all tokens or the last ones"
        )
    return error


def _kind(model: Any) -> str:
    return str(getattr(model.config, "model_type", "?"))


@contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """Whatever a model's code raises inside, where it is not given what it expects, says that it is not supported. Out
    of memory is something else."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ModelError(f"{kind} is not supported: it does not run with Spectral's attention ({reason})") from error


def _own(loaded: LoadedModel, ids: torch.Tensor, implementation: str) -> torch.Tensor:
    """float32 [positions after the first piece, vocabulary], by transformers alone."""
    loaded.model.set_attn_implementation("eager")
    try:
        logits = loaded.model(input_ids=ids, use_cache=False).logits
    finally:
        loaded.model.set_attn_implementation(implementation)
    return logits[0, PIECES[0] :].float()


def _ours(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """The same through an exact cache, piece by piece."""
    from spectral.hf import attending

    store = PageStore(
        loaded.shape, device=loaded.device, window_dtype=loaded.model.dtype, devices=loaded.layer_devices
    )
    row, out, begin = store.open(), [], 0
    no_mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=loaded.device)
    for count in PIECES:
        batch = store.begin([(row, count)])
        span = torch.arange(begin, begin + count, device=loaded.device)
        with attending(loaded.model, batch):
            answer = loaded.model(
                input_ids=ids[:, begin : begin + count],
                attention_mask=no_mask,
                position_ids=span[None],
                use_cache=False,
            )
        batch.commit()
        out.append(answer.logits[0])
        begin += count
    return torch.cat(out)[PIECES[0] :].float()

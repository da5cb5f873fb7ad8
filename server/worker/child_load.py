"""A worker's first task: from a Load message to an engine and the figures that the gateway shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from server.worker import messages as wire
from spectral.engine.types import EngineLimits

if TYPE_CHECKING:
    from spectral.engine.build import Built

log = logging.getLogger("spectral.worker")

REFERENCE_CONTEXT = 2048
CHUNK_TOKENS = {"cpu": (256, 512), "gpu": (1024, 4096)}
"""Tokens of a prompt's chunks, and of a step, where the limits do not ask for others. On a GPU a forward of a large
model costs tens of milliseconds in launches alone."""


def import_libraries() -> None:
    """What every load needs, and what transformers imports only when it is used. No device is touched."""

    import spectral.engine.build
    import spectral.hf  # noqa: F401


def load(spec: wire.Load, tell: Callable[[wire.ToParent], None]) -> tuple[Built, wire.Ready]:
    """Load the model and its profile and build an engine; `tell` gets the stages. Raises SpectralError, or others."""
    tell(wire.Loading("importing libraries", 0.0))
    from spectral.engine.build import build_engine, find_profile
    from spectral.hf import load_model

    tell(wire.Loading("loading weights", 0.2))
    loaded = load_model(
        spec.path or spec.name,
        quantization=spec.quantization,
        dtype=spec.dtype,
        device=spec.device,
        trust_remote_code=spec.trust_remote_code,
        max_memory=spec.max_memory if len(spec.max_memory) > 1 else None,
    )
    tell(wire.Loading("loading profile", 0.8))
    profile, setting = find_profile(loaded, spec.profile), spec.setting
    if profile is None and setting == "auto":
        log.warning(
            "%s has no spectral profile, so its cache stays exact; `spectral profile build %s --output FILE` makes one",
            spec.name,
            spec.path or spec.name,
        )
        setting = "exact"
    chunk, step = CHUNK_TOKENS["cpu" if loaded.device.type == "cpu" else "gpu"]
    chunk = spec.limits.prefill_chunk or chunk
    limits = EngineLimits(
        max_concurrency=spec.limits.max_concurrency,
        max_queue=spec.limits.max_queue,
        context_length=spec.limits.context_length,
        max_kv_bytes=spec.limits.max_kv_bytes,
        prefill_chunk=chunk,
        token_budget=max(step, chunk + spec.limits.max_concurrency),
        cold_level=spec.cold_level,
    )
    built = build_engine(loaded, profile, setting=setting, limits=limits)
    tell(wire.Loading("warming up", 0.9))
    built.engine.warm_up()
    return built, describe(built)


def describe(built: Built) -> wire.Ready:
    """The figures that the gateway shows. Bytes per token at the reference context, or the model's if it is shorter."""
    from spectral.engine.chat import has_template, prepare, thought_format, tool_format

    engine, profile, row = built.engine, built.profile, built.row
    loaded = engine.loaded
    prepare(loaded.tokenizer)
    context = min(REFERENCE_CONTEXT, engine.context_length)
    exact = float(loaded.shape.token_nbytes())
    return wire.Ready(
        context_length=engine.context_length,
        setting=engine.setting,
        rank=0.0 if row is None else built.rank(row),
        bits_per_element=16.0 if row is None else row.bits_per_element,
        kl_mean=0.0 if row is None else row.kl_mean,
        bytes_per_token=engine.store.bytes_per_token(context),
        bytes_per_token_exact=exact,
        reference_context=context,
        weights_bytes=loaded.weights_nbytes,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        device=str(loaded.device),
        shares=loaded.weight_shares() if loaded.split else {},
        dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        quantization=loaded.quantization,
        chat_template=has_template(loaded.tokenizer),
        tool_format=tool_format(loaded.tokenizer),
        thought_format=thought_format(loaded.tokenizer),
        eos_token_ids=sorted(loaded.eos_token_ids),
        vocab_size=engine.vocab_size,
        fingerprint=loaded.fingerprint,
        profile_id="" if profile is None else profile.content_hash,
        ladder=[
            wire.LadderFigure(
                name=step.name,
                bits_per_element=step.bits_per_element,
                kl_mean=step.kl_mean,
                ratio=exact / step.bytes_per_token(REFERENCE_CONTEXT),
                rank=built.rank(step),
            )
            for step in (profile.ladder if profile is not None else [])
        ],
    )

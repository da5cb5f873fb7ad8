"""A GPU and a shape of layers that nobody has measured yet: the worker that meets them first does, before it is ready,
and keeps the result for the next ones (spectral.kernels.choices)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spectral.code_dispatch import codes_for
from spectral.codec import Codebook, LayerCodec
from spectral.dispatch import kernels_for
from spectral.kernels.choice_files import (
    UNFINISHED,
    EntryError,
    cached_entry,
    entry_path,
    make_entry,
    only_one,
    unfinished,
    write_entry,
)
from spectral.kernels.choices import (
    KINDS,
    CodeChoices,
    DecodeChoices,
    Shape,
    gpu_name,
    known,
    measured,
    settle,
    tuning_wanted,
)
from spectral.kernels.scoring import interpreted
from spectral.kernels.search import Found
from spectral.kernels.tune import DECODE_SHARE, Bench, CodeBench, DecodeBench, entry_of, summary, tune

log = logging.getLogger("spectral.tune")

SECONDS = 30.0
"""That tuning adds to a first start, for decoding and for codes together. What the defaults compile is needed in any
case and not counted."""


def tune_at_first_use(codebook: Codebook, query_heads: int, dtype: torch.dtype) -> None:
    """Measure what is not known of a setting's layers: of each device and shape once for this user and machine.

    For a worker that is not ready yet. Whatever fails is a warning, and the defaults serve. Raises SettingError for a
    wrong word in SPECTRAL_TUNE.
    """
    if not tuning_wanted() or interpreted():
        return
    left, seen = SECONDS, set()
    for codec in codebook.layers:
        if not isinstance(codec, LayerCodec):
            continue
        device, group = codec.units[0].mean.device, query_heads // codec.kv_heads
        kernels, layer = kernels_for(codec, codebook.window, group, dtype), codes_for(codec)
        found: list[tuple[type[Any], Shape, Callable[[], Bench], float]] = []
        if kernels is not None:
            bench = partial(DecodeBench, kernels, group, dtype)
            found.append((DecodeChoices, kernels.shape(group), bench, DECODE_SHARE))
        if layer is not None:
            found.append((CodeChoices, layer.shape, partial(CodeBench, layer, dtype), 1.0))
        for kind, shape, make, share in found:
            if device.type == "cuda" and (kind, device, shape) not in seen:
                seen.add((kind, device, shape))
                left -= _at_first_use(kind, device, shape, make, left * share)


def _at_first_use(
    kind: type[Any], device: torch.device, shape: Shape, bench: Callable[[], Bench], seconds: float
) -> float:
    """Seconds that it took, but for waiting on another process."""
    if known(kind, device, shape).origin != "default":
        return 0.0
    name = gpu_name(device)
    what = f"{KINDS[kind]} of {shape} on {name}"
    settle(device, shape, kind(), "untuned")  # not again in this process, whatever happens
    found = None
    try:
        path = entry_path(name, KINDS[kind], str(shape))
        if path is None:
            log.warning("%s is not tuned: this user has no home to keep it in; set XDG_CACHE_HOME", what)
            return 0.0
        with only_one(path, SECONDS) as mine:
            own = measured(kind, name, shape)
            if own is not None:  # by a process that was waited for
                settle(device, shape, own[0], "measured")
            elif not mine:
                log.info("%s is being tuned by another process; this one begins with the defaults", what)
            elif _died(path, kind, name, shape):
                log.warning("tuning %s did not end, so the defaults serve; `spectral tune` tries it again", what)
            else:
                log.info("tuning %s, this once, for up to %.0f s (SPECTRAL_TUNE=off does without)", what, seconds)
                found = _measure(kind, name, shape, bench, path, seconds)
    except OSError as failure:
        log.warning("%s is not tuned: %s; set XDG_CACHE_HOME to a folder that can be written", what, failure)
    except Exception as failure:  # whatever a compiler or a driver raises
        log.warning("%s could not be tuned and has the defaults: %s", what, failure)
    if found is None:
        return 0.0
    settle(device, shape, found.choices, "measured")
    log.info("%s", summary(what, found))
    return found.seconds


def _measure(kind: type[Any], name: str, shape: Shape, bench: Callable[[], Bench], path: Path, seconds: float) -> Found:
    """Measure, and keep the result. A process that ends meanwhile leaves an entry that says so."""
    write_entry(path, make_entry(name, KINDS[kind], str(shape), {}, **{UNFINISHED: True}))
    try:
        found = tune(bench(), seconds)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        torch.cuda.empty_cache()
    try:
        write_entry(path, entry_of(name, shape, found))
    except OSError as failure:
        path.unlink(missing_ok=True)
        log.warning("what was tuned serves this process only: %s", failure)
    return found


def _died(path: Path, kind: type[Any], name: str, shape: Shape) -> bool:
    """Whether an earlier measurement took its process down."""
    try:
        entry = cached_entry(path, name, KINDS[kind], str(shape))
    except EntryError:
        return False
    return entry is not None and unfinished(entry)

"""A profile from key and value tensors alone: no model, no text.

What a model does with its keys and values is unknown here. So the metric is the identity (or, for keys, the second
moment of queries, if those are given), scaled so that each layer's keys and values count alike; keys are coded as they
are, since nothing says how they were turned. Nothing is measured: the ladder's KL and perplexity are not numbers. A
profile of `SpectralProfiler.profile_from_model` is better in all of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from spectral.basis import block_diagonal
from spectral.calibrate import LADDER
from spectral.errors import ProfileError
from spectral.fit import default_by_energy, fit, ladder
from spectral.profile import SpectralProfile
from spectral.shapes import LayerShape, ModelShape
from spectral.statistics import LayerStatistics, Statistics, UnitStatistics, unit_heads


def profile_from_tensors(
    kv_tensors: Sequence[Sequence[torch.Tensor] | torch.Tensor | None],
    *,
    queries: Sequence[torch.Tensor | None] | None = None,
    sliding: Sequence[int | None] | None = None,
    target_energy: float = 0.95,
    ratios: Sequence[float] = LADDER,
    prefer: str = "quality",
    sinks: int = 4,
    recent: int = 112,
    page_tokens: int = 16,
    model: str = "tensors",
    fingerprint: str | None = None,
) -> SpectralProfile:
    """Profile given keys and values.

    Args:
        kv_tensors: per layer (keys [H, N, d], values [H, N, dv]), as a pair or as one tensor [2, H, N, d]; any float
            dtype, post-RoPE, N of at least one page in the order of the text; a leading batch dimension [B, H, N, d]
            is allowed. None: a layer with sliding attention, which stays exact.
        queries: per layer [Hq, N, d], Hq a multiple of H. sliding: per layer the window of tokens, None where it
            sees all; needed where `kv_tensors` has None and the profile is to be used in a cache.
        target_energy: the default setting is the coarsest that keeps this share of the weighted variance.
        ratios: all-in ratios of the settings, finest first; sinks, recent, page_tokens: the exact window.
        prefer: "quality", "balanced" or "speed" (spectral.fit.PREFERENCES): see `SpectralProfiler`.
        model: the name of the model that the tensors come from, if known.
        fingerprint: that model's (`spectral.hf.fingerprint`), if known.

    Raises ProfileError for tensors that do not fit together.
    """
    if not 0 < target_energy <= 1:
        raise ProfileError(f"target_energy must be above 0 and at most 1, got {target_energy!r}")
    pairs = [None if pair is None else _pair(pair, index) for index, pair in enumerate(kv_tensors)]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        raise ProfileError("a profile needs keys and values of at least one layer")
    asked = queries or [None] * len(pairs)
    if len(asked) != len(pairs) or (sliding is not None and len(sliding) != len(pairs)):
        raise ProfileError("queries and sliding must have one entry per layer")
    widths = list(sliding) if sliding is not None else []
    if widths and [w is None for w in widths] != [pair is not None for pair in pairs]:
        raise ProfileError("layers with a sliding window have no keys and values to profile, and the others must")
    layers = {
        index: _layer_statistics(*pair, query, page_tokens, index)
        for index, (pair, query) in enumerate(zip(pairs, asked, strict=True))
        if pair is not None
    }
    first = next(iter(layers.values())).shape
    shapes = [
        layers[index].shape
        if index in layers
        else LayerShape(first.kv_heads, first.key_dim, first.value_dim, widths[index] if widths else 0)
        for index in range(len(pairs))
    ]
    shape = ModelShape(tuple(shapes), first.kv_heads, first.kv_heads * first.key_dim)
    fitted = fit(Statistics(layers, tokens=1, fisher_tokens=1), page_tokens, prefer)
    rows, bits = ladder(fitted, shape, ratios, sinks=sinks, recent=recent, page_tokens=page_tokens)
    return SpectralProfile(
        model=model,
        fingerprint=fingerprint or _digest(known),
        token_nbytes=shape.token_nbytes(),
        layers=[fitted.layers.get(index) for index in range(len(pairs))],
        tables=fitted.tables,
        bits=bits,
        ladder=rows,
        default=default_by_energy(rows, target_energy),
        provenance={"corpus": "tensors", "tokens": min(pair[0].shape[1] for pair in known)},
        sliding=widths,
    )


def _pair(pair: Sequence[torch.Tensor] | torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, N, d] float64 on the CPU."""
    if len(pair) != 2:
        raise ProfileError(f"layer {index}: expected keys and values, got {len(pair)} tensors")
    out = []
    for tensor in (pair[0], pair[1]):
        if tensor.ndim == 4:
            tensor = tensor.transpose(0, 1).flatten(1, 2)
        if tensor.ndim != 3 or tensor.shape[1] < 2:
            raise ProfileError(f"layer {index}: expected [heads, tokens, size], two tokens or more, got {tensor.shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise ProfileError(f"layer {index}: a tensor has values that are not finite")
        out.append(tensor.detach().double().cpu())
    if out[0].shape[:2] != out[1].shape[:2]:
        raise ProfileError(f"layer {index}: keys {tuple(out[0].shape)} and values {tuple(out[1].shape)} do not fit")
    return out[0], out[1]


def _layer_statistics(
    keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None, page_tokens: int, index: int
) -> LayerStatistics:
    """One layer's sums, as means over its tokens: keys [H, N, d], values [H, N, dv], queries [Hq, N, d] or None."""
    shape = LayerShape(keys.shape[0], keys.shape[2], values.shape[2])
    if keys.shape[1] < page_tokens:
        raise ProfileError(f"layer {index}: a page of {page_tokens} tokens at least is needed, got {keys.shape[1]}")
    metrics = [_metric(keys, queries), _metric(values, None)]  # each [H, d, d], of mean energy 1
    statistics = LayerStatistics(shape, unit_heads(shape), None)
    for number, (first, last) in enumerate(statistics.heads):
        x = torch.cat([side[first:last].transpose(0, 1).flatten(1) for side in (keys, values)], 1)
        fisher = np.zeros((x.shape[1], x.shape[1]))
        split = (last - first) * shape.key_dim
        fisher[:split, :split] = block_diagonal(metrics[0][first:last])
        fisher[split:, split:] = block_diagonal(metrics[1][first:last])
        statistics.units[number] = UnitStatistics(x.mean(0), x.T @ x / x.shape[0], torch.from_numpy(2.0 * fisher))
        whole = x.shape[0] // page_tokens * page_tokens
        statistics.sample[number] = [x[:whole].unflatten(0, (-1, page_tokens)).float()]
    return statistics


def _metric(states: torch.Tensor, looking: torch.Tensor | None) -> np.ndarray:
    """[H, d, d]: the identity, or the queries' second moment, scaled so that all heads together have energy 1."""
    heads, tokens, dim = states.shape
    metric: np.ndarray = np.broadcast_to(np.eye(dim), (heads, dim, dim)).copy()
    if looking is not None:
        if looking.ndim != 3 or looking.shape[0] % heads or looking.shape[2] != dim:
            raise ProfileError(f"queries {tuple(looking.shape)} do not fit {heads} KV heads of {dim}")
        grouped = looking.detach().double().cpu().reshape(heads, -1, dim)
        metric = torch.matmul(grouped.transpose(1, 2), grouped).div(grouped.shape[1]).numpy()
    centred = states - states.mean(1, keepdim=True)
    covariance = torch.matmul(centred.transpose(1, 2), centred).div(tokens).numpy()
    return metric / max(float((metric * covariance).sum()), 1e-30)


def _digest(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """An identity for the profile of unknown tensors: SHA-256 of them."""
    digest = hashlib.sha256(b"tensors")
    for pair in pairs:
        for tensor in pair:
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()

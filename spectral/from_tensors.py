"""A profile from key and value tensors alone: no model, no text.

What a model does with its keys and values is unknown here. So the metric is the identity (or, for keys, the second
moment of queries, if those are given), scaled so that each layer's keys and values count alike. Nothing is measured:
the ladder's KL and perplexity are not numbers. A profile of `SpectralProfiler.profile_from_model` is better in both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from spectral.basis import block_diagonal, weighted_basis
from spectral.bits import allocate, plane_layout
from spectral.errors import ProfileError
from spectral.pages import LayerShape
from spectral.profile import LadderRow, LayerProfile, SpectralProfile

LADDER_BITS = (4.5, 3.4, 2.6, 2.0, 1.6, 1.3, 1.0)


def profile_from_tensors(
    kv_tensors: Sequence[Sequence[torch.Tensor] | torch.Tensor | None],
    *,
    queries: Sequence[torch.Tensor | None] | None = None,
    sliding: Sequence[int | None] | None = None,
    target_energy: float = 0.95,
    ladder_bits: Sequence[float] = LADDER_BITS,
    sinks: int = 4,
    recent: int = 32,
    page_tokens: int = 16,
    model: str = "tensors",
    fingerprint: str | None = None,
) -> SpectralProfile:
    """Profile given keys and values.

    Args:
        kv_tensors: per layer (keys [H, N, d], values [H, N, dv]), as a pair or as one tensor [2, H, N, d]; any float
            dtype, post-RoPE, the same H in all layers; a leading batch dimension [B, H, N, d] is allowed. None: a
            layer with sliding attention, which stays exact.
        queries: per layer [Hq, N, d], Hq a multiple of H. sliding: per layer the window of tokens, None where it
            sees all; needed where `kv_tensors` has None and the profile is to be used in a cache.
        target_energy: the default setting is the coarsest whose channels with bits hold this share of the energy.
        ladder_bits: bits per element of the settings, finest first. sinks, recent, page_tokens: the exact window.
        model, fingerprint: of the model that the tensors come from (`spectral.hf.fingerprint`), if known.

    Raises ProfileError for tensors that do not fit together.
    """
    pairs = [None if pair is None else _pair(pair, index) for index, pair in enumerate(kv_tensors)]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        raise ProfileError("a profile needs keys and values of at least one layer")
    heads = {pair[0].shape[0] for pair in known}
    if len(heads) > 1:
        raise ProfileError(f"all layers must have the same number of KV heads, got {sorted(heads)}")
    asked = queries or [None] * len(pairs)
    if len(asked) != len(pairs) or (sliding is not None and len(sliding) != len(pairs)):
        raise ProfileError("queries and sliding must have one entry per layer")
    widths = list(sliding) if sliding is not None else []
    if widths and [w is None for w in widths] != [pair is not None for pair in pairs]:
        raise ProfileError("layers with a sliding window have no keys and values to profile, and the others must")
    layers = [None if pair is None else _layer_profile(*pair, query) for pair, query in zip(pairs, asked, strict=True)]
    shape = LayerShape(known[0][0].shape[0], known[0][0].shape[2], known[0][1].shape[2])
    profile = SpectralProfile(
        model=model,
        fingerprint=fingerprint or _digest(known),
        token_nbytes=len(pairs) * shape.token_nbytes(),
        kv_heads=shape.kv_heads,
        layers=layers,
        bits={},
        ladder=[],
        default="",
        provenance={"corpus": "tensors", "tokens": min(pair[0].shape[1] for pair in known)},
        sliding=widths,
    )
    _fill_ladder(profile, shape, ladder_bits, (sinks, recent, page_tokens))
    profile.default = default_by_energy(profile, target_energy)
    return profile


def default_by_energy(profile: SpectralProfile, target_energy: float) -> str:
    """The coarsest setting of the ladder whose channels with bits hold `target_energy` of the weighted variance.

    Summed over all layers, keys and values. Where even the finest holds less: the finest. Raises ProfileError unless
    0 < target_energy <= 1.
    """
    if not 0 < target_energy <= 1:
        raise ProfileError(f"target_energy must be above 0 and at most 1, got {target_energy!r}")
    for row in reversed(profile.ladder):
        if retained_energy(profile, row.name) >= target_energy:
            return row.name
    return profile.ladder[0].name


def retained_energy(profile: SpectralProfile, setting: str) -> float:
    """Share of the weighted variance that lies in channels with bits, 0 to 1, over all layers, keys and values."""
    widths = profile.bits[profile.resolve(setting)]
    kept = total = 0.0
    for index, layer in enumerate(profile.layers):
        for side, basis in enumerate((layer.key, layer.value) if layer is not None else ()):
            total += float(basis.variance.sum())
            kept += float(basis.variance[widths[index, side, : basis.variance.size] > 0].sum())
    return kept / max(total, 1e-300)


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


def _layer_profile(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None) -> LayerProfile:
    """One layer's bases: keys [H, N, d], values [H, N, dv], queries [Hq, N, d] or None."""
    bases, metrics = [], []
    for states, looking in ((keys, queries), (values, None)):
        heads, tokens, dim = states.shape
        flat = states.transpose(0, 1).reshape(tokens, heads * dim).numpy()
        mean = flat.mean(0)
        covariance = (flat - mean).T @ (flat - mean) / tokens
        metric: np.ndarray = np.broadcast_to(np.eye(dim), (heads, dim, dim)).copy()
        if looking is not None:
            if looking.ndim != 3 or looking.shape[0] % heads or looking.shape[2] != dim:
                raise ProfileError(f"queries {tuple(looking.shape)} do not fit {heads} KV heads of {dim}")
            grouped = looking.detach().double().cpu().reshape(heads, -1, dim)
            metric = torch.matmul(grouped.transpose(1, 2), grouped).div(grouped.shape[1]).numpy()
            metric = metric + 3e-3 * np.trace(metric, axis1=1, axis2=2)[:, None, None] / dim * np.eye(dim)
        energy = float((block_diagonal(metric) * covariance).sum())  # trace of metric times covariance
        metrics.append((metric / max(energy, 1e-30)).astype(np.float32))
        bases.append(weighted_basis(mean, covariance, block_diagonal(metrics[-1].astype(np.float64))))
    return LayerProfile(bases[0], bases[1], metrics[0], metrics[1])


def _fill_ladder(
    profile: SpectralProfile, shape: LayerShape, ladder_bits: Sequence[float], exact: tuple[int, int, int]
) -> None:
    """Allot bits for every setting, over all layers at once, and add its row. exact: sinks, recent, page tokens."""
    sides = [(i, s, b) for i, x in enumerate(profile.layers) if x for s, b in enumerate((x.key, x.value))]
    elements = sum(basis.variance.size for _, _, basis in sides)
    weighted = np.zeros((len(profile.layers), 2, max(basis.variance.size for _, _, basis in sides)))
    for index, side, basis in sides:
        weighted[index, side, : basis.variance.size] = basis.variance
    sinks, recent, page_tokens = exact
    windows = [width or sinks + recent + page_tokens for width in profile.sliding or [None] * len(profile.layers)]
    for bits in ladder_bits:
        widths: np.ndarray = allocate(weighted, int(bits * elements)).astype(np.uint8)
        given = float(widths.sum()) / elements
        row = LadderRow(
            name=f"{16 / given:.3g}x",
            bits_per_element=given,
            rank=int((widths > 0).sum()),
            gain=False,
            sinks=sinks,
            window=recent,
            page_tokens=page_tokens,
            page_nbytes=sum(plane_layout(widths[i, s]).nbytes(page_tokens) for i, s, _ in sides),
            window_nbytes=sum(windows) * shape.token_nbytes(),
        )
        if not math.isfinite(given) or row.name in profile.bits:
            continue  # so few channels that two settings come out the same
        profile.bits[row.name] = widths
        profile.ladder.append(row)


def _digest(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """An identity for the profile of unknown tensors: SHA-256 of them."""
    digest = hashlib.sha256(b"tensors")
    for pair in pairs:
        for tensor in pair:
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Fitting and keeping the predictors of spectral.linked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from spectral.bits import row_classes
from spectral.codec import Codebook, LayerCodec
from spectral.errors import CacheError, SessionError
from spectral.files import write_atomically
from spectral.linked import (
    BINS,
    COEFFICIENT_MAX,
    COEFFICIENT_SCALE,
    EXACT_SUM,
    SOURCES,
    LayerLinks,
    Links,
    layer_integers,
    predicted_bins,
)

FORMAT_VERSION = 1
MAX_FILE_BYTES = 1 << 30
RIDGE = 0.02
STEPS_PER_DEVIATION = 4.0


def tokens_needed(book: Codebook) -> int:
    """Tokens in pages that `fit_links` takes at least; 0 where no layer has another one below to be predicted from."""
    ranks = [sum(unit.rank for unit in codec.units) for codec in book.layers if isinstance(codec, LayerCodec)]
    below = [sum(ranks[max(0, i - SOURCES) : i]) if rank else 0 for i, rank in enumerate(ranks)]
    return 2 * max(below, default=0)


def fit_links(
    book: Codebook, pages: Sequence[torch.Tensor | None], progress: Callable[[float], None] | None = None
) -> Links:
    """Predictors for a setting, from pages of sample text.

    Args:
        book: the setting; every compressed layer must hold packed pages.
        pages: per layer uint8 [n, page_nbytes], the same pages of the same sequences in every layer (None where the
            layer has none). Some ten thousand tokens: a layer's map has about as many rows as latents.
        progress: called with the part of the layers that is done.

    Raises:
        CacheError: layers that do not fit the setting, or too few pages.
    """
    layers: list[LayerLinks | None] = []
    counts: dict[int, np.ndarray] = {}
    below: list[torch.Tensor] = []
    for number, (codec, sample) in enumerate(zip(book.layers, pages, strict=True)):
        if progress is not None:
            progress(number / len(pages))
        if codec is None or sample is None:
            layers.append(None)
            continue
        if not isinstance(codec, LayerCodec):
            raise CacheError("the exact setting has no codes to link")
        linked = any(z.shape[2] for z in below) and any(unit.rank for unit in codec.units)
        found = _fit_layer(codec, sample, torch.cat(below, 2)) if linked else None
        if found is not None:
            _count(counts, codec, sample, predicted_bins(found, torch.cat(below, 2)))
        layers.append(found)
        below = [*below, layer_integers(codec, sample)][-SOURCES:]
    return Links(book.profile_hash, book.setting, layers, {w: _ranks(table) for w, table in counts.items()})


def _fit_layer(codec: LayerCodec, pages: torch.Tensor, below: torch.Tensor) -> LayerLinks:
    """One linear map for all frequencies, and for each class how far it is to be trusted (a Wiener gain)."""
    deviation = torch.cat([unit.deviation for unit in codec.units], 1).double()  # [P, R]
    level = torch.cat([u.levels(pages[:, b]) for u, b in zip(codec.units, codec._bounds, strict=True)], 2)
    x = below.flatten(0, 1).float() / COEFFICIENT_SCALE  # [n * P, source latents]
    y = (level * deviation.float()).flatten(0, 1)
    if len(x) < 2 * x.shape[1]:
        raise CacheError(f"{len(x)} tokens are too few to fit maps of {x.shape[1]} latents")
    scale = x.pow(2).mean(0).sqrt().clamp_min(1e-6)
    x = x / scale
    gram, cross = (x.T @ x).double(), (x.T @ y).double()
    gram += RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram, cross) / scale.double()[:, None]  # per unit of a coefficient below
    step = weight.abs().amax(0).clamp_min(1e-12) / 127
    # Many large weights could leave the range where sums are exact: coarser steps then.
    step = torch.maximum(step, weight.abs().sum(0) * 1.01 * COEFFICIENT_MAX / (EXACT_SUM - 2**19))
    whole = (weight / step).round().clamp(-127, 127)
    per_sum = step / COEFFICIENT_SCALE  # a unit of the integer sum, in the target's own unit
    p = (below.flatten(0, 1).float() @ whole.float()).view_as(level).double() * per_sum
    gains = []
    for rows in row_classes(codec.page_tokens, codec.classes):
        span = slice(rows[0], rows[-1] + 1)
        inside = p[:, span] / deviation[span]
        trust = (inside * level[:, span]).sum((0, 1)) / inside.pow(2).sum((0, 1)).clamp_min(1e-9)
        gains.append(trust.clamp(0, 1.2) * per_sum / deviation[rows[0]] * STEPS_PER_DEVIATION)
    return LayerLinks(whole.to(torch.int8), torch.stack(gains).float())


def _count(counts: dict[int, np.ndarray], codec: LayerCodec, pages: torch.Tensor, bins: torch.Tensor) -> None:
    """Add how often each code came with each bin."""
    start = 0
    for unit, bounds in zip(codec.units, codec._bounds, strict=True):
        given = bins[:, :, start : start + unit.rank].flatten(1)
        start += unit.rank
        codes = unit.codes(pages[:, bounds])
        for width, place in unit.width_places.items():
            index = given.index_select(1, place).long() * 2**width + codes.index_select(1, place)
            table = np.bincount(index.flatten().numpy(), minlength=BINS * 2**width).reshape(BINS, -1)
            counts[width] = counts.get(width, 0) + table


def _ranks(counts: np.ndarray) -> torch.Tensor:
    """Counts [BINS, codes] -> ranks, likeliest first. Tables are symmetric, so a bin's mirror image counts as well."""
    total = counts + counts[::-1, ::-1]
    # Where nothing was seen, the order of the nearest bin towards the middle is the better guess: spread a little.
    smooth = total + 1e-3 * (np.roll(total, 1, 0) + np.roll(total, -1, 0)) + 1e-9 * total.sum(0)
    order = np.argsort(-smooth, axis=1, kind="stable")
    return torch.from_numpy(np.argsort(order, axis=1, kind="stable").astype(np.uint8))


def save_links(links: Links, path: str | os.PathLike[str]) -> Path:
    """Write links to a safetensors file, atomically. Returns the path."""
    from safetensors.torch import save

    document = {
        "format_version": FORMAT_VERSION,
        "profile": links.profile_hash,
        "setting": links.setting,
        "layers": len(links.layers),
        "digest": links.digest,
    }
    data = save(
        {name: tensor.contiguous() for name, tensor in links.tensors().items()},
        metadata={"spectral_links": json.dumps(document, sort_keys=True)},
    )
    return write_atomically(path, data, mode=0o644)


def load_links(path: str | os.PathLike[str]) -> Links:
    """Read links. Raises SessionError for a file that is damaged or of another version, OSError if it is not there."""
    from safetensors import SafetensorError, safe_open

    if os.path.getsize(path) > MAX_FILE_BYTES:
        raise SessionError("the links file is too large")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("spectral_links", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise SessionError(f"this is not a file of links: {error}") from None
    if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
        raise SessionError(f"the links are not of format version {FORMAT_VERSION}")
    try:
        layers = [
            LayerLinks(tensors[f"{i}.weight"], tensors[f"{i}.gain"]) if f"{i}.weight" in tensors else None
            for i in range(document["layers"])
        ]
        ranks = {int(name[5:]): tensor for name, tensor in tensors.items() if name.startswith("rank.")}
        links = Links(document["profile"], document["setting"], layers, ranks)
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"the links are damaged: {error}") from None
    if links.digest != document.get("digest"):
        raise SessionError("the links are damaged: their checksum does not match")
    return links

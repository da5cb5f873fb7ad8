"""A smaller and slower cold form: codes of a layer coded by what the layers below say about them.

A page's codes are close to independent within a layer, so no coder gains much there. Layers are not independent: a
linear map of the two layers below predicts a coefficient well (docs/cold-tier.md has the figures). `Links` holds such
maps for one profile and setting, fitted on pages of any text. A code is replaced by its rank among the width's codes,
likeliest first, given the prediction; ranks are mostly small, and zstd's Huffman stage takes what that is worth.

Prediction must be the same number on every machine, or pages would come back wrong. It is: coefficients and weights are
integers whose products add up to less than 2^24, so that a float32 matrix product is exact in whatever order it is
summed, and all that follows is one rounding per element.
"""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from spectral.archive import archive_pages, layout_digest, open_streams, restore_pages, seal_streams
from spectral.bits import row_classes
from spectral.codec import Codebook, LayerCodec
from spectral.errors import CacheError, SessionError
from spectral.unit_codec import UnitCodec, byte_fields, pack_fields

SOURCES = 2
"""Layers below that a layer is predicted from. One: 3 % larger; three: 1 % smaller, half again as slow."""

BINS = 31
"""Predictions are told apart in steps of 1/4 of a standard deviation, up to 15 of them on either side."""

COEFFICIENT_MAX, COEFFICIENT_SCALE = 255, 16.0
EXACT_SUM = 1 << 24
"""Sums of integers below this are exact in float32."""

_CHUNK = 128
"""Pages at a time: their intermediate values stay in the processor's cache."""

# Ranks of a width that share a byte. Three bits: two codes, as their two fields would lose what links them.
_PER_BYTE = {1: 8, 2: 4, 3: 2, 4: 2, 6: 1, 8: 1}


@dataclass
class LayerLinks:
    """What predicts one layer: weight int8 [source latents, R], gain float32 [classes, R]: bins per unit of the sum."""

    weight: torch.Tensor
    gain: torch.Tensor


@dataclass
class Links:
    """Predictors of one profile's setting.

    Attributes:
        profile_hash, setting: what they were fitted for.
        layers: per layer of the model; None for those without pages, and where there is nothing to predict (from).
        ranks: width -> uint8 [BINS, 2^width], the rank of every code given the prediction's bin.
    """

    profile_hash: str
    setting: str
    layers: list[LayerLinks | None]
    ranks: dict[int, torch.Tensor]
    _codes: dict[int, torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer is None:
                continue
            if layer.weight.dtype != torch.int8 or layer.gain.dtype != torch.float32 or not layer.weight.numel():
                raise SessionError("the links are damaged: a layer's numbers are of the wrong kind")
            largest = int(layer.weight.int().abs().sum(0).max()) * COEFFICIENT_MAX
            if largest >= EXACT_SUM or not torch.isfinite(layer.gain).all():
                raise SessionError("the links are damaged: their predictions would not be exact")
        self._codes = {}
        for width, table in self.ranks.items():
            if (
                table.dtype != torch.uint8
                or table.shape != (BINS, 2**width)
                or (table.long().sort(1).values != torch.arange(2**width)).any()
            ):
                raise SessionError(f"the links are damaged: ranks of width {width} are no permutations")
            self._codes[width] = table.long().argsort(1).to(torch.uint8)

    @property
    def digest(self) -> str:
        """Identity of the content: pages archived with other links cannot be restored with these."""
        state = hashlib.blake2b(f"{self.profile_hash} {self.setting}".encode(), digest_size=16)
        for tensor in self.tensors().values():
            state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is fitted, by name, in a fixed order."""
        out = {}
        for index, layer in enumerate(self.layers):
            if layer is not None:
                out[f"{index}.weight"], out[f"{index}.gain"] = layer.weight, layer.gain
        return {**out, **{f"rank.{width}": self.ranks[width] for width in sorted(self.ranks)}}


class Chain:
    """Archives or restores a row's layers, one after the other from the first: later ones need those below.

    Raises CacheError for links of another profile or setting.
    """

    def __init__(self, book: Codebook, links: Links) -> None:
        if (links.profile_hash, links.setting) != (book.profile_hash, book.setting):
            raise CacheError(f"these links were fitted for setting {links.setting!r} of another profile or for another")
        self._codecs = [_on_cpu(codec) if isinstance(codec, LayerCodec) else None for codec in book.layers]
        self._links = links
        self._below: deque[torch.Tensor] = deque(maxlen=SOURCES)
        self._digest = bytes.fromhex(links.digest)
        self._check()

    def _check(self) -> None:
        """Raise CacheError unless the links' shapes are those that the layers ask for."""
        below: deque[int] = deque(maxlen=SOURCES)
        fits = len(self._links.layers) == len(self._codecs)
        for codec, layer in zip(self._codecs, self._links.layers, strict=False):
            if codec is None:
                fits = fits and layer is None
                continue
            latents = sum(unit.rank for unit in codec.units)
            if layer is not None:
                classes = codec.classes
                fits = fits and layer.weight.shape == (sum(below), latents) and layer.gain.shape == (classes, latents)
                fits = fits and all(width in self._links.ranks for unit in codec.units for width in unit.width_places)
            below.append(latents)
        if not fits:
            raise CacheError("these links do not fit the setting's layers, although they name it; fit them again")

    def archive(self, layer: int, pages: torch.Tensor) -> bytes:
        """Pages of a layer, uint8 [n, page_nbytes] -> a blob, as spectral.archive.archive_pages makes them."""
        codec, links = self._parts(layer)
        pages = pages.cpu()
        if links is None:
            data = archive_pages(pages, codec)
        else:
            chunks = [
                _ranked(codec, part, self._bins(links, span), self._links.ranks) for span, part in _chunked(pages)
            ]
            columns = [torch.cat(column).numpy() for column in zip(*chunks, strict=True)]
            data = seal_streams(columns, len(pages), codec.page_nbytes, self._identity(codec))
        self._below.append(layer_integers(codec, pages))
        return data

    def restore(self, layer: int, data: bytes) -> torch.Tensor:
        """What `archive` got for this layer: uint8 [n, page_nbytes]. Raises SessionError for anything else."""
        codec, links = self._parts(layer)
        if links is None:
            pages = restore_pages(data, codec)
        else:
            widths = [width for unit in codec.units for width in _stream_nbytes(unit).values()]
            count, columns = open_streams(data, widths, codec.page_nbytes, self._identity(codec))
            if count != len(self._below[-1]):
                raise SessionError("the archive is damaged: its layers have different numbers of pages")
            pages = torch.empty((count, codec.page_nbytes), dtype=torch.uint8)
            streams = [torch.from_numpy(column.copy()) for column in columns]
            for span, part in _chunked(pages):
                part[:] = _unranked(codec, [s[span] for s in streams], self._bins(links, span), self._links._codes)
        self._below.append(layer_integers(codec, pages))
        return pages

    def _parts(self, layer: int) -> tuple[LayerCodec, LayerLinks | None]:
        codec = self._codecs[layer]
        if codec is None:
            raise CacheError(f"layer {layer} has no packed pages")
        return codec, self._links.layers[layer]

    def _identity(self, codec: LayerCodec) -> bytes:
        return hashlib.blake2b(layout_digest(codec) + self._digest, digest_size=16).digest()

    def _bins(self, links: LayerLinks, span: slice) -> torch.Tensor:
        return predicted_bins(links, torch.cat([z[span] for z in self._below], 2))


def predicted_bins(links: LayerLinks, below: torch.Tensor) -> torch.Tensor:
    """Integers of the layers below, int16 [n, P, source latents] -> bins uint8 [n, P, R]."""
    tokens = below.shape[1]
    counts = torch.tensor([len(rows) for rows in row_classes(tokens, len(links.gain))])
    total = below.flatten(0, 1).float() @ links.weight.float()  # exact: see the module's docstring
    half = BINS // 2
    steps = total.view(*below.shape[:2], links.weight.shape[1]).mul_(links.gain.repeat_interleave(counts, 0)).round_()
    return steps.clamp_(-half, half).add_(half).to(torch.uint8)


def layer_integers(codec: LayerCodec, pages: torch.Tensor) -> torch.Tensor:
    """Coefficients of a layer's pages as integers, int16 [n, P, R]: what predicts the layers above."""
    out = torch.empty((len(pages), codec.page_tokens, sum(unit.rank for unit in codec.units)), dtype=torch.int16)
    for span, part in _chunked(pages):
        y = torch.cat([u.coefficients(part[:, b]) for u, b in zip(codec.units, codec._bounds, strict=True)], 2)
        out[span] = y.mul_(COEFFICIENT_SCALE).round_().clamp_(-COEFFICIENT_MAX, COEFFICIENT_MAX).to(torch.int16)
    return out


def _on_cpu(codec: LayerCodec) -> LayerCodec:
    """The codec with its tables on the CPU: a GPU's matrix products may round where the CPU's are exact."""
    clone = copy.copy(codec)
    clone._modules = dict(codec._modules)
    units = []
    for unit in codec.units:
        part = copy.copy(unit)
        part.__dict__ = {name: _to_cpu(value) for name, value in vars(unit).items()}
        units.append(part)
    clone.units = torch.nn.ModuleList(units)
    return clone


def _to_cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_cpu(x) for x in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _chunked(pages: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    spans = [slice(begin, begin + _CHUNK) for begin in range(0, max(1, len(pages)), _CHUNK)]
    return [(span, pages[span]) for span in spans]


def _stream_nbytes(unit: UnitCodec) -> dict[int, int]:
    """Bytes per page of each width's ranks."""
    return {width: place.numel() // _PER_BYTE[width] for width, place in unit.width_places.items()}


def _per_unit(codec: LayerCodec, bins: torch.Tensor) -> list[torch.Tensor]:
    """Bins [n, P, R of all units] -> [n, P * R] of each unit."""
    return [part.flatten(1) for part in bins.split([unit.rank for unit in codec.units], 2)]


def _ranked(
    codec: LayerCodec, pages: torch.Tensor, bins: torch.Tensor, ranks: dict[int, torch.Tensor]
) -> list[torch.Tensor]:
    """Streams of a chunk, uint8 [n, bytes] for every unit and width."""
    out = []
    for unit, bounds, given in zip(codec.units, codec._bounds, _per_unit(codec, bins), strict=True):
        codes = unit.codes(pages[:, bounds])
        for width, place in unit.width_places.items():
            index = given.index_select(1, place).int().mul_(2**width).add_(codes.index_select(1, place))
            rank = ranks[width].flatten().index_select(0, index.flatten()).view(index.shape)
            out.append(pack_fields(rank, 8 // _PER_BYTE[width]))
    return out


def _unranked(
    codec: LayerCodec, streams: Sequence[torch.Tensor], bins: torch.Tensor, codes: dict[int, torch.Tensor]
) -> torch.Tensor:
    """What `_ranked` got: pages uint8 [n, page_nbytes]."""
    left = iter(streams)
    parts = []
    for unit, given in zip(codec.units, _per_unit(codec, bins), strict=True):
        code = torch.zeros((len(bins), given.shape[1]), dtype=torch.uint8)
        for width, place in unit.width_places.items():
            # Masked, as a forged byte may hold a rank that the width does not have (three bits in four).
            rank = _spread(next(left), 8 // _PER_BYTE[width]) & (2**width - 1)
            index = given.index_select(1, place).int().mul_(2**width).add_(rank)
            found = codes[width].flatten().index_select(0, index.flatten()).view(index.shape)
            code.index_copy_(1, place, found.to(torch.uint8))
        parts.append(unit.pack(code))
    return torch.cat(parts, 1) if parts else torch.zeros((len(bins), 0), dtype=torch.uint8)


def unpacked_codes(unit: UnitCodec, packed: torch.Tensor, width: int) -> torch.Tensor:
    """A unit's packed pages uint8 [n, bytes] -> codes of one width, uint8 [n, count], ordered as in `width_places`."""
    return unit.codes(packed).index_select(1, unit.width_places[width])


def _spread(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes uint8 [n, count] -> their fields, lowest bits first: uint8 [n, count * 8 / bits]."""
    if bits == 8:
        return packed
    table = torch.from_numpy(byte_fields(bits).astype(np.uint8))
    return table.index_select(0, packed.flatten().int()).view(len(packed), packed.shape[1] * 8 // bits)

"""SpectralKVCompressor: one head's keys or values as packed codes, and attention scores computed on them.

The codec of a cache works on whole layers; this is the same idea for one head, small enough to read in one go:
weighted basis, bits by reverse water-filling, bit planes, and scores that never rebuild a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectral.basis import weighted_basis
from spectral.bits import PLANES, allocate, gaussian_step, plane_layout
from spectral.codec import pack_planes, unpack_planes
from spectral.errors import CacheError, ProfileError, SettingError

if TYPE_CHECKING:
    from spectral.profile import SpectralProfile

GROUP = 8
"""Tokens are packed in groups of 8, so that each bit plane fills whole bytes; the last group may be padded."""


@dataclass(frozen=True)
class Projection:
    """What a profile knows about one head's keys or values, float64.

    Attributes:
        layer, head: where in the model. mean: [d]; covariance: [d, d] about it.
        metric: [d, d], positive semi-definite: an error e costs e^T metric e.
    """

    layer: int
    head: int
    mean: np.ndarray
    metric: np.ndarray
    covariance: np.ndarray


def projection_of(profile: SpectralProfile, layer: int, head: int, side: str = "key") -> Projection:
    """One head's statistics out of a profile: the only function here that knows how a profile stores them.

    Raises ProfileError for a layer, head or side that the profile does not have.
    """
    if side not in ("key", "value"):
        raise ProfileError(f"side must be 'key' or 'value', got {side!r}")
    if not 0 <= layer < len(profile.layers) or not 0 <= head < profile.kv_heads:
        raise ProfileError(
            f"layer {layer}, head {head}: the profile of {profile.model!r} has {len(profile.layers)} layers "
            f"and {profile.kv_heads} KV heads"
        )
    held = profile.layers[layer]
    if held is None:
        raise ProfileError(f"layer {layer} has sliding attention and stays exact: choose a layer with full attention")
    basis, metric = (held.key, held.key_metric) if side == "key" else (held.value, held.value_metric)
    dim = metric.shape[1]
    span = slice(head * dim, (head + 1) * dim)
    # x = mean + decode z with uncorrelated z, so the head's covariance is a block of decode diag(variance) decode^T.
    rows = basis.decode[span]
    return Projection(layer, head, basis.mean[span], metric[head].astype(np.float64), (rows * basis.variance) @ rows.T)


@dataclass(frozen=True)
class CompressedKV:
    """Packed codes of `tokens` vectors: uint8 [bytes]."""

    codes: torch.Tensor
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.codes.untyped_storage().nbytes()


class SpectralKVCompressor:
    """Compresses vectors of one head.

    Args:
        projection: from `profile.get_projection(layer, head)`.
        bits: mean bits per element, 0 < bits <= 8. Directions that matter get more, many get none.
        device: where its matrices and the codes live.
    """

    def __init__(self, projection: Projection, bits: float = 4, *, device: torch.device | str = "cpu") -> None:
        dim = projection.mean.shape[0]
        if not 0 < bits <= 8 or int(bits * dim) < 1:
            raise SettingError(f"bits must be above 0 and at most 8, at least one bit per vector; got {bits!r}")
        self.projection, self.bits, self.dim = projection, bits, dim
        basis = weighted_basis(projection.mean, projection.covariance, projection.metric)
        self.layout = plane_layout(allocate(basis.variance, int(bits * dim)))
        order, width = np.array(self.layout.order, dtype=np.int64), np.array(self.layout.widths, dtype=np.int64)
        step = np.sqrt(basis.variance[order]) * np.array([gaussian_step(int(b))[0] for b in width])
        step = np.maximum(step, 1e-12)
        columns = [c for plane in PLANES for c in self.layout.columns[plane]]
        weights = np.array([w for plane in PLANES for w in self.layout.weights[plane]], dtype=np.float64)
        unit = basis.decode[:, order] * step  # [d, rank]: one code unit of each channel
        centre = projection.mean + unit @ (0.5 - 2.0 ** (width - 1))  # what all-zero codes stand for

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(np.ascontiguousarray(array), dtype=torch.float32, device=device)

        self._mean, self._centre = tensor(projection.mean), tensor(centre)  # [d]
        self._encode = tensor(basis.encode[:, order] / step)  # [d, rank]: latents in units of their step
        self._half, self._top = tensor(2.0 ** (width - 1)), tensor(2.0**width - 1)  # [rank]
        self._fold = tensor(unit[:, columns] * weights)  # [d, planes' columns]: what a plane's code unit adds

    @property
    def rank(self) -> int:
        """Directions that have bits."""
        return self.layout.rank

    @property
    def nbytes(self) -> int:
        """Bytes of the compressor's own matrices, shared by everything that it compresses."""
        held = (self._mean, self._centre, self._encode, self._half, self._top, self._fold)
        return sum(x.untyped_storage().nbytes() for x in held)

    @torch.no_grad()
    def compress(self, states: torch.Tensor) -> CompressedKV:
        """Keys or values [n, d], any float dtype -> packed codes. Raises CacheError for another shape."""
        if states.ndim != 2 or states.shape[1] != self.dim:
            raise CacheError(f"this head's vectors are [tokens, {self.dim}], got {tuple(states.shape)}")
        tokens = states.shape[0]
        latent = (states.to(self._encode).sub(self._mean)) @ self._encode + self._half
        codes = torch.minimum(latent.floor_().clamp_min_(0), self._top).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -tokens % GROUP))
        return CompressedKV(pack_planes(codes, self.layout), tokens)

    def _planes(self, compressed: CompressedKV) -> torch.Tensor:
        """Plane codes float32 [n, columns]."""
        padded = compressed.tokens + -compressed.tokens % GROUP
        return unpack_planes(compressed.codes[None], self.layout, padded)[0, : compressed.tokens]

    @torch.no_grad()
    def decompress(self, compressed: CompressedKV) -> torch.Tensor:
        """The vectors again, [n, d] float32, with the error of their codes."""
        return self._planes(compressed) @ self._fold.T + self._centre

    @torch.no_grad()
    def approximate_attention(self, compressed: CompressedKV, query: torch.Tensor) -> torch.Tensor:
        """q . k for queries [m, d] (post-RoPE, any float dtype) and every compressed key: [m, n] float32, not scaled.

        The query is projected once and multiplied with the codes; no key is rebuilt.
        """
        if query.ndim != 2 or query.shape[1] != self.dim:
            raise CacheError(f"queries are [number, {self.dim}], got {tuple(query.shape)}")
        query = query.to(self._fold)
        return (query @ self._fold) @ self._planes(compressed).T + (query @ self._centre)[:, None]

    def compression_ratio(self, tokens: int = 4096) -> float:
        """fp16 bytes of `tokens` vectors over everything kept for them: their codes, padding, and the matrices.

        The matrices do not grow with the tokens, so the ratio rises towards 16 / bits.
        """
        if tokens < 1:
            raise CacheError(f"tokens must be at least 1, got {tokens}")
        kept = self.layout.nbytes(tokens + -tokens % GROUP) + self.nbytes
        return 2 * self.dim * tokens / kept

    def vram_saved_mb(self, cache_mb: float, tokens: int = 4096) -> float:
        """Megabytes that `cache_mb` megabytes of fp16 cache shrink by, at `compression_ratio(tokens)`."""
        return cache_mb * (1 - 1 / self.compression_ratio(tokens))

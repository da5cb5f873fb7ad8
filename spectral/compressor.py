"""SpectralKVCompressor: one head's keys or values as packed codes, and attention scores computed on them.

The codec of a cache works on whole layers; this is the same idea for one head, small enough to read in one go:
weighted basis, bits by reverse water-filling, packed codes, and scores that never rebuild a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spectral.basis import weighted_basis
from spectral.bits import WIDTHS, allocate, gaussian_step, gaussian_tables
from spectral.errors import CacheError, SettingError
from spectral.layout import PLANES
from spectral.unit_codec import byte_fields, pack_fields


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
        variance = np.maximum(basis.variance, 1e-24)
        errors = np.array([variance * gaussian_step(width)[1] for width in WIDTHS])
        widths = allocate(errors, np.ones(dim), int(bits * dim))
        self._tables = gaussian_tables()

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(np.ascontiguousarray(array), dtype=torch.float32, device=device)

        order = np.concatenate([np.flatnonzero(widths == w) for w in PLANES])
        self._counts = {w: int((widths == w).sum()) for w in PLANES if (widths == w).any()}
        scale = np.sqrt(variance[order])
        self._mean = tensor(projection.mean)  # [d]
        self._encode = tensor(basis.encode[:, order] / scale)  # [d, rank]: latents in standard deviations, by width
        self._decode = tensor(basis.decode[:, order] * scale)  # [d, rank]
        self._thresholds = {w: tensor(self._tables[w].cuts) for w in self._counts}
        self._levels = {w: tensor(self._tables[w].levels) for w in self._counts}

    @property
    def rank(self) -> int:
        """Directions that have bits."""
        return self._encode.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the compressor's own matrices and tables, shared by everything that it compresses."""
        held = (self._mean, self._encode, self._decode, *self._thresholds.values(), *self._levels.values())
        return sum(x.untyped_storage().nbytes() for x in held)

    def codes_nbytes(self, tokens: int) -> int:
        """Bytes of the codes of `tokens` vectors, padding included."""
        return sum(-(-tokens * count * size // 8) for width, count in self._counts.items() for size, _ in PLANES[width])

    @torch.no_grad()
    def compress(self, states: torch.Tensor) -> CompressedKV:
        """Keys or values [n, d], any float dtype -> packed codes. Raises CacheError for another shape."""
        if states.ndim != 2 or states.shape[1] != self.dim:
            raise CacheError(f"this head's vectors are [tokens, {self.dim}], got {tuple(states.shape)}")
        latents = states.to(self._encode).sub(self._mean) @ self._encode
        parts = []
        for width, latent in zip(self._counts, latents.split(list(self._counts.values()), 1), strict=True):
            codes = torch.bucketize(latent.reshape(-1).contiguous(), self._thresholds[width]).to(torch.uint8)
            for size, shift in PLANES[width]:
                values = (codes >> shift) & (2**size - 1)
                parts.append(pack_fields(torch.nn.functional.pad(values, (0, -values.numel() % (8 // size))), size))
        return CompressedKV(torch.cat(parts), states.shape[0])

    def _latents(self, compressed: CompressedKV) -> torch.Tensor:
        """Latents in standard deviations, as quantized: [n, rank] float32."""
        out, start = [], 0
        for width, count in self._counts.items():
            code = torch.zeros(compressed.tokens * count, dtype=torch.int64, device=compressed.codes.device)
            for size, shift in PLANES[width]:
                stop = start - (-compressed.tokens * count * size // 8)
                fields = torch.from_numpy(byte_fields(size)).to(code.device)[compressed.codes[start:stop].int()]
                code |= fields.flatten()[: code.numel()] << shift
                start = stop
            out.append(self._levels[width][code].view(compressed.tokens, count))
        return torch.cat(out, 1)

    @torch.no_grad()
    def decompress(self, compressed: CompressedKV) -> torch.Tensor:
        """The vectors again, [n, d] float32, with the error of their codes."""
        return self._latents(compressed) @ self._decode.T + self._mean

    @torch.no_grad()
    def approximate_attention(self, compressed: CompressedKV, query: torch.Tensor) -> torch.Tensor:
        """q . k for queries [m, d] (post-RoPE, any float dtype) and every compressed key: [m, n] float32, not scaled.

        The query is projected once and multiplied with the codes; no key is rebuilt.
        """
        if query.ndim != 2 or query.shape[1] != self.dim:
            raise CacheError(f"queries are [number, {self.dim}], got {tuple(query.shape)}")
        query = query.to(self._decode)
        return (query @ self._decode) @ self._latents(compressed).T + (query @ self._mean)[:, None]

    def compression_ratio(self, tokens: int = 4096) -> float:
        """fp16 bytes of `tokens` vectors over everything kept for them: their codes, padding, and the matrices.

        The matrices do not grow with the tokens, so the ratio rises towards 16 / bits.
        """
        if tokens < 1:
            raise CacheError(f"tokens must be at least 1, got {tokens}")
        kept = self.codes_nbytes(tokens) + self.nbytes
        return 2 * self.dim * tokens / kept

    def vram_saved_mb(self, cache_mb: float, tokens: int = 4096) -> float:
        """Megabytes that `cache_mb` megabytes of fp16 cache shrink by, at `compression_ratio(tokens)`."""
        return cache_mb * (1 - 1 / self.compression_ratio(tokens))

"""Rotations and bases that several methods share: Hadamard, random rotations, RoPE and its inverse, principal axes."""

from __future__ import annotations

import torch

from spectral.baselines.base import CalibrationStats, LayerStats, Side


def hadamard(size: int) -> torch.Tensor:
    """Normalised Hadamard matrix [size, size]: symmetric, orthogonal, its own inverse.

    A size that is no power of two gets a block diagonal of the largest blocks that divide it.
    """
    block = size & -size
    out = torch.ones(1, 1)
    while out.shape[0] < block:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return torch.block_diag(*[out / block**0.5] * (size // block))


def bit_reversal(size: int) -> torch.Tensor:
    """Permutation [size] int64 that reverses the bits of an index; the identity unless size is a power of two."""
    index = torch.arange(size)
    if size & (size - 1):
        return index
    out = torch.zeros_like(index)
    for bit in range(size.bit_length() - 1):
        out = (out << 1) | ((index >> bit) & 1)
    return out


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """A uniformly random orthogonal matrix [size, size] float32, the same for a seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * torch.sign(torch.diagonal(r))).float()


def _rotated_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _tables(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if int(positions.max()) >= len(cos) or int(positions.min()) < 0:
        raise ValueError(f"positions reach {int(positions.max())}, the RoPE tables have {len(cos)} rows")
    index = positions.to(cos.device)
    return cos[index].to(x.device)[:, None], sin[index].to(x.device)[:, None]


def rope(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, d] to its positions [T]; channels beyond the tables' width stay as they are."""
    c, s = _tables(x, positions, cos, sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * c + _rotated_half(turned) * s, rest], -1)


def unrope(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The inverse of `rope` (also where the tables carry an attention scaling)."""
    c, s = _tables(x, positions, cos, sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([(turned * c - _rotated_half(turned) * s) / (c * c + s * s), rest], -1)


def eigenbasis(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors [..., D, D] (columns) and eigenvalues of symmetric matrices, largest first, signs fixed. float32."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    peak = vectors.abs().argmax(-2, keepdim=True)
    return (vectors * torch.sign(vectors.gather(-2, peak))).float(), values.float()


def principal_axes(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The first min(rank, N, D) right singular vectors [D, R] of x [N, D], by the smaller Gram matrix. float32."""
    rank = min(rank, *x.shape)
    y = x.double()
    if x.shape[1] <= x.shape[0]:
        return eigenbasis(y.T @ y)[0][:, :rank]
    left, values = eigenbasis(y @ y.T)
    axes = y.T @ left[:, :rank].double() / values[:rank].double().sqrt().clamp_min(1e-12)
    # Directions of the sample's null space come out as noise: QR replaces them by some orthonormal completion.
    return torch.linalg.qr(axes)[0].float()


def frame(stats: CalibrationStats, layer: int, side: Side) -> torch.Tensor:
    """The sample [N, H, d] in the frame that projections produce: keys without RoPE, values as they are."""
    sample = stats.layers[layer]
    return unrope(sample.keys, stats.positions, stats.cos, stats.sin) if side == "key" else sample.values


def projection_bias(stats: CalibrationStats, layer: int, side: Side) -> torch.Tensor:
    """The constant [H, d] that a method on the weights need not compress: the projection's bias, added after it."""
    sample = stats.layers[layer]
    bias = sample.key_bias if side == "key" else sample.value_bias
    if bias is None or (side == "key" and sample.key_norm):
        return torch.zeros(sample.keys.shape[1:], device=sample.keys.device)
    return bias


def projection_moment(stats: CalibrationStats, layer: int, side: Side) -> torch.Tensor:
    """Second moment [H*d, H*d] of pre-RoPE keys or of values, from the weights: W E[h h^T] W^T.

    Its eigenvectors are the left singular vectors of W E[h h^T]^(1/2). Where a norm stands between W_K and the cache
    the weights do not describe the keys, and the sample's own moment takes their place.
    """
    sample: LayerStats = stats.layers[layer]
    weight = sample.key_weight if side == "key" else sample.value_weight
    if weight is None or sample.hidden_moment is None or (side == "key" and sample.key_norm):
        flat = (frame(stats, layer, side) - projection_bias(stats, layer, side)).flatten(1).double()
        return flat.T @ flat / len(flat)
    flat = weight.flatten(0, 1).double()
    return flat @ sample.hidden_moment.double() @ flat.T

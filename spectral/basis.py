"""Weighted eigenbases (pure: no I/O, no clock, no logging). Everything here is float64 NumPy.

With a metric M (positive definite) the error that matters is e^T M e. Let S = M^(1/2). The eigenvectors U of
S C S, C being the covariance of the data, give the basis B = S^-1 U (columns, B^T M B = I) and its dual E = S U
(latents z = E^T (x - mean), reconstruction x = mean + B z). In these coordinates the weighted error of a token is the
plain squared error of its latents, and the latents are uncorrelated: allocation decouples per channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FLOOR = 1e-6
"""Eigenvalues of a metric below this share of the largest are raised to it: directions that no query
has looked at in calibration must not become free to distort."""


@dataclass(frozen=True)
class Basis:
    """One joint basis of a vector of D numbers.

    Attributes:
        mean: [D] the mean removed before projection.
        decode: [D, R] columns b_r; x = mean + sum_r z_r b_r.
        encode: [D, R] the dual basis; z = encode^T (x - mean).
        variance: [R] variance of every latent, descending.
    """

    mean: np.ndarray
    decode: np.ndarray
    encode: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True)
class Unit:
    """Keys and values of a run of KV heads in one basis: x = [k of every head | v of every head], D = h * (d + dv); or
    the keys alone, or the values.

    Latents are scaled to unit variance: a column of `decode` is what one standard deviation of a latent adds to x.

    Attributes:
        heads: first KV head and one past the last; mean: [D]; decode, encode: [D, R], encode^T decode = I;
        variance: [R] importance of the latents: expected loss in nats per token when one is dropped, descending.
        deviation: [classes, R] standard deviation of the latents' page DCT in each frequency class; one class where
            pages are not transformed (spectral.bits.row_classes).
        side: "both", "key" or "value": what x holds.
    """

    heads: tuple[int, int]
    mean: np.ndarray
    decode: np.ndarray
    encode: np.ndarray
    variance: np.ndarray
    deviation: np.ndarray
    side: str = "both"


def side_numbers(heads: tuple[int, int], side: str, key_dim: int, value_dim: int) -> tuple[int, int]:
    """Numbers of keys and of values that a unit of heads[0] .. heads[1] - 1 with this side has."""
    count = heads[1] - heads[0]
    return (0 if side == "value" else count * key_dim), (0 if side == "key" else count * value_dim)


def holding(sides: Iterable[str], side: str) -> list[int]:
    """Numbers of the units that hold "key" or "value", of all units' sides."""
    return [number for number, own in enumerate(sides) if own in ("both", side)]


def covered_heads(units: Sequence[tuple[tuple[int, int], str]]) -> int:
    """KV heads of a layer with units given as (heads, side).

    Raises ValueError unless those with keys, and those with values, cover the heads from 0 on in order, each once.
    """
    found = []
    for side in ("key", "value"):
        spans = [units[number][0] for number in holding((own for _, own in units), side)]
        ends = [0, *(last for _, last in spans)]
        if len(ends) < 2 or any(first != end or last <= first for (first, last), end in zip(spans, ends, strict=False)):
            raise ValueError(f"the units' {side}s do not cover the KV heads in order")
        found.append(ends[-1])
    if found[0] != found[1]:
        raise ValueError(f"the units hold keys of {found[0]} heads and values of {found[1]}")
    return found[0]


def symmetric_roots(matrix: np.ndarray, floor: float = FLOOR) -> tuple[np.ndarray, np.ndarray]:
    """Square root and inverse square root of a positive semi-definite [n, n] matrix, eigenvalues floored."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    top = float(values[-1])
    if not np.isfinite(top):
        raise ValueError("the matrix has values that are not finite")
    values = np.maximum(values, max(top, 1e-30) * floor)
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    """[H, d, d] -> [H*d, H*d] with the blocks on the diagonal."""
    heads, size, _ = blocks.shape
    out = np.zeros((heads * size, heads * size), dtype=np.float64)
    for head in range(heads):
        span = slice(head * size, (head + 1) * size)
        out[span, span] = blocks[head]
    return out


def regularised(metric: np.ndarray, parts: tuple[int, ...], share: float = 0.01) -> np.ndarray:
    """A metric [D, D] plus a share of the mean diagonal of each part (keys and values have scales of their own) on that
    part's diagonal: directions that no query looked at in calibration keep some weight."""
    out = np.array(metric, dtype=np.float64)
    start = 0
    diagonal = np.diagonal(out).copy()
    for size in parts:
        scale = float(diagonal[start : start + size].mean())
        out[np.arange(start, start + size), np.arange(start, start + size)] += share * max(scale, 1e-12)
        start += size
    return out


def weighted_basis(mean: np.ndarray, covariance: np.ndarray, metric: np.ndarray) -> Basis:
    """The basis of the module's docstring.

    Args:
        mean: [D]; covariance: [D, D] about the mean; metric: [D, D] positive semi-definite.
    """
    root, inverse = symmetric_roots(metric)
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    order = np.argsort(values)[::-1]
    vectors = vectors[:, order]
    # An eigenvector's sign is arbitrary: fix it, so that the same statistics give the same file everywhere.
    vectors *= np.where(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return Basis(mean, inverse @ vectors, root @ vectors, np.maximum(values[order], 0.0))

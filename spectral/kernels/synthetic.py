"""A layer without a model: bases, a spectrum and widths as measured profiles have them, to time kernels on."""

from __future__ import annotations

import numpy as np

from spectral.basis import Unit, side_numbers
from spectral.bits import (
    CHANNEL_GROUP,
    WIDTHS,
    allocate,
    class_count,
    gaussian_step,
    gaussian_tables,
    row_classes,
)
from spectral.codec import LayerCodec
from spectral.fit import preferred
from spectral.frames import BlockFrame

BITS = {"4x": 3.774, "8x": 1.774, "16x": 0.742}
"""Bits per number that settings of these names spend on codes (the ladder of a measured profile at 4,096 tokens)."""

PAGE, SINKS, RECENT, BLOCK = 16, 4, 112, 512


def synthetic_unit(
    heads: tuple[int, int],
    dim: int,
    bits: float,
    seed: int,
    *,
    side: str = "both",
    field_bits: float = 0.0,
    transform: bool = True,
) -> tuple[Unit, np.ndarray]:
    """A unit with an exponential spectrum and tokens that vary slowly, and its widths at `bits` a number."""
    rng = np.random.default_rng(seed)
    size = sum(side_numbers(heads, side, dim, dim))
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    variance = np.exp(-8.0 * np.arange(size) / size)
    counts = np.array([len(rows) for rows in row_classes(PAGE, class_count(PAGE, transform))])
    tilt = np.exp(-0.35 * np.arange(len(counts))[:, None] * (1 - 0.5 * np.arange(size) / size))
    deviation = tilt / np.sqrt((tilt**2 * counts[:, None]).sum(0) / PAGE)
    scale = np.sqrt(variance / variance.sum() * dim)
    runs = size // CHANNEL_GROUP
    energy = (variance * deviation**2 * counts[:, None] / PAGE).reshape(len(counts), runs, CHANNEL_GROUP).sum(2)
    errors = np.stack([energy.ravel() * gaussian_step(w)[1] for w in WIDTHS])
    sizes: np.ndarray = np.repeat(CHANNEL_GROUP * counts / PAGE, runs)
    picked = allocate(errors, sizes, bits * size, field_bits=field_bits)
    widths = picked.reshape(len(counts), runs).repeat(CHANNEL_GROUP, axis=1)
    mean = rng.normal(size=size) * 0.1
    return Unit(heads, mean, basis * scale, basis / scale, variance, deviation, side), widths


def synthetic_parts(
    kv_heads: int, dim: int, bits: float, prefer: str = "quality"
) -> list[tuple[Unit, np.ndarray]]:
    """Units of a layer with as many heads each as make 1,024 numbers of keys and values, and their widths, as a profile
    with this preference (spectral.fit.PREFERENCES) has them."""
    wanted = preferred(prefer)
    run = max(1, min(kv_heads, 1024 // (2 * dim)))
    spans = [(a, min(a + run, kv_heads)) for a in range(0, kv_heads, run)]
    parts = [(span, side) for side in wanted.sides for span in spans]
    return [
        synthetic_unit(
            span, dim, bits, seed, side=side, field_bits=wanted.field_bits, transform=wanted.transform
        )
        for seed, (span, side) in enumerate(parts)
    ]


def synthetic_codec(kv_heads: int, dim: int, bits: float, device: str, prefer: str = "quality") -> LayerCodec:
    """A layer of `synthetic_parts`."""
    parts = synthetic_parts(kv_heads, dim, bits, prefer)
    frequencies = 1e6 ** (-np.arange(0, dim, 2) / dim)
    frame = BlockFrame(frequencies, block_tokens=BLOCK, page_tokens=PAGE, sinks=SINKS, device=device)
    return LayerCodec(
        parts, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=PAGE, device=device
    )

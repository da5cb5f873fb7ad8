"""Codecs of any widths for the tests of the cold tier."""

from __future__ import annotations

import numpy as np

from spectral.basis import Unit, block_diagonal, weighted_basis
from spectral.bits import CHANNEL_GROUP, frequency_classes, gaussian_tables
from spectral.codec import Codebook, LayerCodec
from spectral.frames import BlockFrame
from spectral.shapes import ModelShape


def random_unit(heads: tuple[int, int], dim: int, *, page: int, seed: int) -> Unit:
    """A unit of random, decaying statistics, keys and values `dim` wide."""
    rng = np.random.default_rng(seed)
    size = 2 * dim * (heads[1] - heads[0])
    mixing = rng.normal(size=(size, size)) * (0.9 ** np.arange(size))
    basis = weighted_basis(rng.normal(size=size), mixing @ mixing.T, block_diagonal(np.eye(size)[None]))
    scale = np.sqrt(np.maximum(basis.variance, 1e-6))
    deviation = 0.5 + rng.random((len(frequency_classes(page)), size))
    return Unit(heads, basis.mean, basis.decode * scale, basis.encode / scale, basis.variance, deviation)


def layer_codec(
    widths: np.ndarray, *, units: int = 1, dim: int = 16, page: int = 16, sinks: int = 4, seed: int = 0
) -> LayerCodec:
    """A layer of `units` units of one head each. widths: [classes, 2 * dim / 16] of every run of 16 latents."""
    full = np.repeat(np.asarray(widths), CHANNEL_GROUP, axis=1)
    parts = [(random_unit((u, u + 1), dim, page=page, seed=seed + u), full) for u in range(units)]
    frame = BlockFrame(None, block_tokens=0, page_tokens=page, sinks=sinks)
    return LayerCodec(parts, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page)


def cold_codebook(shape: ModelShape, *, setting: str = "test", profile: str = "profile", bits: int = 8) -> Codebook:
    """A setting with random bases for every full layer: 4 sinks, a window of 16 tokens, pages of 8."""
    page, sinks = 8, 4
    layers = []
    for i, layer in enumerate(shape.layers):
        if layer.sliding:
            layers.append(None)
            continue
        runs = 2 * layer.key_dim // CHANNEL_GROUP
        widths = np.tile([[8], [6], [4], [3]], (1, runs))
        layers.append(layer_codec(widths, units=layer.kv_heads, dim=layer.key_dim, page=page, sinks=sinks, seed=10 * i))
    return Codebook(setting, profile, sinks, 16, page, layers, window_bits=bits)

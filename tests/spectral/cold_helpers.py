"""Codecs of any widths for the tests of the cold tier."""

from __future__ import annotations

import numpy as np

from spectral.bits import CHANNEL_GROUP, gaussian_tables
from spectral.codec import LayerCodec
from spectral.frames import BlockFrame
from tests.spectral.helpers import random_unit


def layer_codec(widths: np.ndarray, *, units: int = 1, dim: int = 16, page: int = 16, seed: int = 0) -> LayerCodec:
    """A layer of `units` units of one head each. widths: [classes, 2 * dim / 16] of every run of 16 latents."""
    full = np.repeat(np.asarray(widths), CHANNEL_GROUP, axis=1)
    parts = [(random_unit((u, u + 1), dim, seed + u, page), full) for u in range(units)]
    frame = BlockFrame(None, block_tokens=0, page_tokens=page, sinks=4)
    return LayerCodec(parts, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page)

"""Codecs of any widths for the tests of the cold tier."""

from __future__ import annotations

import numpy as np
import torch

from spectral.bits import CHANNEL_GROUP, gaussian_tables
from spectral.codec import LayerCodec
from spectral.frames import BlockFrame
from tests.spectral.helpers import random_unit


def layer_codec(
    widths: np.ndarray, *, units: int = 1, dim: int = 16, page: int = 16, seed: int = 0, apart: bool = False
) -> LayerCodec:
    """A layer of `units` units of one head each, or that many for keys and for values (`apart`). widths: [classes,
    2 * dim / 16] of every run of 16 latents, keys' first where they are apart; one class: pages are not transformed."""
    full = np.repeat(np.asarray(widths), CHANNEL_GROUP, axis=1)
    sides = {"key": full[:, :dim], "value": full[:, dim:]} if apart else {"both": full}
    parts = [
        (random_unit((u, u + 1), dim, seed + u, page, side, flat=len(own) == 1), own)
        for side, own in sides.items()
        for u in range(units)
    ]
    frame = BlockFrame(None, block_tokens=0, page_tokens=page, sinks=4)
    return LayerCodec(parts, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page)


def any_pages(codec: LayerCodec, count: int, seed: int, spread: int = 255) -> torch.Tensor:
    """Pages of any codes, uint8 [count, page_nbytes]: also such as no encoder would have written. Padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, spread + 1, (count, codec.page_nbytes), generator=generator).to(torch.uint8)
    return torch.cat([u.pack(u.codes(raw[:, b])) for u, b in zip(codec.units, codec._bounds, strict=True)], 1)

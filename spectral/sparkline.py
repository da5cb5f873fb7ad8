"""A spectrum as one line of text, for terminals: no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
DECADES = 4.0
"""Powers of ten below the largest value that the line shows; anything lower is blank."""


def sparkline(shares: Sequence[float], width: int = 48) -> str:
    """Shares as at most `width` block characters on a logarithmic scale; a character is the mean of its run."""
    width = min(width, len(shares))
    edges = [round(i * len(shares) / width) for i in range(width + 1)] if width else []
    means = [sum(shares[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    top = max(means, default=0.0)
    out = ""
    for mean in means:
        height = 1 + math.log10(mean / top) / DECADES if mean > 0 and top > 0 else 0.0
        out += BLOCKS[max(0, min(8, math.ceil(height * 8)))]
    return out


def channels_for(shares: Sequence[float], target: float = 0.95) -> int:
    """How many of the largest shares make up `target` of their sum."""
    total, wanted = 0.0, target * sum(shares)
    for count, share in enumerate(sorted(shares, reverse=True), 1):
        total += share
        if total >= wanted:
            return count
    return len(shares)


def spectrum_lines(spectrum: Sequence[dict[str, Sequence[float]] | None], width: int = 48) -> list[str]:
    """One line per layer and unit; sliding layers (None) say that they stay exact."""
    longest = max((len(name) for layer in spectrum if layer is not None for name in layer), default=0)
    lines = []
    for index, layer in enumerate(spectrum):
        if layer is None:
            lines.append(f"layer {index:3d}  sliding window: stays exact")
            continue
        for name, shares in layer.items():
            line, count = sparkline(shares, width), channels_for(shares)
            lines.append(f"layer {index:3d} {name:>{longest}} |{line}| 95 % in {count} of {len(shares)} channels")
    return lines

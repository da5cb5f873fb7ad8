"""What decoded keys and values are multiplied with, so that they are not too small (pure).

A quantizer that is right in the mean gives back less than was there: of a coefficient with mean squared error e (in
variances) 1 - e of its energy comes back, of a latent without bits nothing. That is best for the squared error and not
for the model: what attention reads is then too short throughout, which a later norm does not know from noise. Full
energy would be too much, for it makes the noise longer too. Between the two, on a logarithmic scale, KL has a broad
minimum: at much the same part for all settings, and further up for text that is far from the calibration's. The parts
below win there without losing at home (docs/codec-research.md, part 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spectral.bits import WIDTHS, gaussian_step, row_classes

if TYPE_CHECKING:
    from spectral.basis import Unit

KEY_PART = 0.2
"""How far keys go from what is right in the mean (0) to their full length (1)."""
VALUE_PART = 0.3
"""The same for values. Keys are given less: their errors go through a softmax."""


def side_energy(unit: Unit, key_numbers: int) -> np.ndarray:
    """What a unit of every latent adds to the energy of the keys and of the values: float64 [2, latents].

    `key_numbers`: how many of the unit's D numbers are keys.
    """
    decode = np.asarray(unit.decode, dtype=np.float64)
    return np.stack([np.einsum("dr,dr->r", side, side) for side in (decode[:key_numbers], decode[key_numbers:])])


def decode_gains(energy: np.ndarray, unit: Unit, widths: np.ndarray, page_tokens: int) -> tuple[float, float]:
    """Factors of the decoded keys and values of a unit at a setting, both at least 1.

    Args:
        energy: of :func:`side_energy`; widths: [classes, latents] bits of every coefficient.
    """
    kept = np.zeros(max(WIDTHS) + 1)
    kept[list(WIDTHS)] = [1 - gaussian_step(width)[1] for width in WIDTHS]
    rows = np.array([len(members) for members in row_classes(page_tokens, len(unit.deviation))], dtype=np.float64)
    power = rows[:, None] * np.asarray(unit.deviation, dtype=np.float64) ** 2  # [classes, latents]
    whole, back = power.sum(0), (power * kept[np.asarray(widths)]).sum(0)
    gains = []
    for side, part in zip(energy, (KEY_PART, VALUE_PART), strict=True):
        there, left = float(side @ whole), float(side @ back)
        gains.append((there / left) ** (part / 2) if left > 0 else 1.0)
    return gains[0], gains[1]

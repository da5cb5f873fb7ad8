"""Kernels that begin before the one before them has ended (programmatic dependent launch, from Hopper on).

A kernel says at its beginning that the next may come, and waits for the one before it, all of whose numbers are there
then, before it reads or writes anything that others write: so a chain of such kernels is as if they came one after
another, but for the time that each takes to begin.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from spectral.few_rows import is_captured

GRAPHS_DRIVER = 12030
"""CUDA version of the first driver whose graphs hold such launches."""

__all__ = ["early", "gdc_launch_dependents", "gdc_wait"]


def early(device: torch.device, rows: int) -> dict[str, Any]:
    """What a launch is told, whose kernel has an EARLY: so where launches are captured, of a single row (with more,
    kernels that wait take places which those that they wait for would have had), and the device can."""
    able = rows == 1 and is_captured() and device.type == "cuda" and _able(device)
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


@cache
def _able(device: torch.device) -> bool:
    driver = torch._C._cuda_getDriverVersion()
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0) and driver >= GRAPHS_DRIVER

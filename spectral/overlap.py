"""Kernels that begin before the one before them has ended (programmatic dependent launch, from Hopper on).

A kernel says at its beginning that the next may come, and waits for the one before it, all of whose numbers are there
then, before it reads or writes anything that others write: so a chain of such kernels is as if they came one after
another, but for the time that each takes to begin.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from spectral.few_rows import early_launches, is_captured

GRAPHS_DRIVER = 12030
"""CUDA version of the first driver whose graphs hold such launches."""

__all__ = ["alongside", "early", "gdc_launch_dependents", "gdc_wait"]


def early(device: torch.device, rows: int) -> dict[str, Any]:
    """What a launch is told, whose kernel has an EARLY: so where launches are captured, of a single row (with more,
    kernels that wait take places which those that they wait for would have had), and the device can."""
    wanted = rows == 1 and is_captured() and not early_launches.stopped
    if not wanted or device.type != "cuda" or not _able(device):
        return {"EARLY": False}
    early_launches.used = True
    return {"EARLY": True, "launch_pdl": True}


def alongside(device: torch.device) -> dict[str, Any]:
    """What the launch of a kernel is told that needs nothing of the one before it, and has an ALONGSIDE: to begin as
    soon as that one lets it, and to end after it, so that whatever is launched next comes after both. Empty where the
    device cannot."""
    if device.type != "cuda" or early_launches.stopped or not _able(device):
        return {}
    early_launches.used = True
    return {"ALONGSIDE": True, "launch_pdl": True}


@cache
def _able(device: torch.device) -> bool:
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and driver_version() >= GRAPHS_DRIVER


def driver_version() -> int:
    """The newest CUDA that the driver knows, 12030 for 12.3; 0 where there is no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value

"""Which implementation reads a layer's codes: the Triton kernels or the torch reference.

SPECTRAL_ATTENTION=reference|triton forces one; without it the kernels serve NVIDIA GPUs from compute capability 8.0 up.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch

from spectral.codec import LayerCodec, PageCodec
from spectral.errors import SettingError

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels

VARIABLE = "SPECTRAL_ATTENTION"


def attention_choice() -> str:
    """ "auto", "reference" or "triton". Raises SettingError for anything else in the environment."""
    choice = os.environ.get(VARIABLE, "auto") or "auto"
    if choice not in ("auto", "reference", "triton"):
        raise SettingError(f"{VARIABLE} must be reference or triton (or unset), got {choice!r}")
    return choice


def kernels_for(codec: PageCodec | None, window: int) -> LayerKernels | None:
    """The kernels of a layer with this codec and an exact window of so many tokens; None: read it with the reference.

    Raises SettingError where the kernels are forced and cannot serve.
    """
    choice = attention_choice()
    if choice == "reference" or not isinstance(codec, LayerCodec):
        return None
    device = codec.units[0].mean.device
    if choice == "auto" and not _able(device):
        return None
    if not _installed():
        raise SettingError(f"{VARIABLE}=triton needs triton: install spectral-serve[gpu]")
    from spectral.kernels.decode import LayerKernels, interpreted, unsupported

    if device.type != "cuda" and not interpreted():
        raise SettingError(f"{VARIABLE}=triton needs an NVIDIA GPU, and this cache lies on {device}")
    reason = unsupported(codec, window)
    if reason:
        if choice == "triton":
            raise SettingError(f"{VARIABLE}=triton cannot serve {reason}; use {VARIABLE}=reference")
        return None
    found = codec.__dict__.get("_kernels")
    if found is None:
        found = codec.__dict__["_kernels"] = LayerKernels(codec)
    return found  # type: ignore[no-any-return]


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _able(device: torch.device) -> bool:
    """Whether the kernels run here without being asked to."""
    if device.type != "cuda" or torch.version.hip is not None or not _installed():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)

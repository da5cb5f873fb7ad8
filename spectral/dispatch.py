"""Which implementation reads a layer's codes: the Triton kernels or the torch reference.

SPECTRAL_ATTENTION=reference|triton forces one; without it the kernels serve NVIDIA GPUs from compute capability 8.0 up,
once a first layer's answer has been compared with float64 arithmetic there: a device on which they are wrong, or do not
compile, is read with the reference, and the log says so.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import TYPE_CHECKING

import torch

from spectral.codec import LayerCodec, PageCodec
from spectral.errors import SettingError

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels

log = logging.getLogger("spectral.attention")

VARIABLE = "SPECTRAL_ATTENTION"

_trusted: dict[torch.device, bool] = {}
"""Devices on which the kernels were compared, and whether they were right."""


def attention_choice() -> str:
    """ "auto", "reference" or "triton". Raises SettingError for anything else in the environment."""
    choice = os.environ.get(VARIABLE, "auto") or "auto"
    if choice not in ("auto", "reference", "triton"):
        raise SettingError(f"{VARIABLE} must be reference or triton (or unset), got {choice!r}")
    return choice


def kernels_for(codec: PageCodec | None, window: int, group: int, dtype: torch.dtype) -> LayerKernels | None:
    """The kernels of a layer with this codec, an exact window of so many tokens, and queries of this dtype, `group`
    heads to a KV head; None: read it with the reference.

    Raises SettingError where the kernels are forced and cannot serve.
    """
    choice = attention_choice()
    if choice == "reference" or not isinstance(codec, LayerCodec):
        return None
    device = codec.units[0].mean.device
    if choice == "auto" and not (_trusted.get(device, True) and able(device)):
        return None
    if not installed():
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
    if choice == "auto" and device not in _trusted:
        _trusted[device] = _right(found, group, dtype)
        return found if _trusted[device] else None
    return found  # type: ignore[no-any-return]


def _right(kernels: LayerKernels, group: int, dtype: torch.dtype) -> bool:
    """Whether the kernels give right answers on their device."""
    from spectral.kernels.check import TOLERANCE, relative_error

    try:
        error = relative_error(kernels, group, dtype)
    except Exception as failure:  # whatever a compiler or a driver raises: the reference serves
        log.warning("the attention kernels do not run on this device; the reference serves: %s", failure)
        return False
    if error <= TOLERANCE:
        return True
    log.warning("the attention kernels are wrong by %.2g on this device; the reference serves", error)
    return False


@cache
def installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def able(device: torch.device) -> bool:
    """Whether the kernels run here without being asked to."""
    if device.type != "cuda" or torch.version.hip is not None or not installed():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)

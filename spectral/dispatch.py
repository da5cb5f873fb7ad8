"""Which implementation reads a layer's codes, or makes them (spectral.code_dispatch): Triton kernels or the reference.

SPECTRAL_ATTENTION=reference|triton forces one; without it the kernels serve NVIDIA GPUs from compute capability 8.0 up,
once their first answer to a task has been compared there: where they are wrong, or do not compile, the reference
serves, and the log says so.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from spectral.codec import LayerCodec, PageCodec
from spectral.errors import SettingError

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels

log = logging.getLogger("spectral.attention")

VARIABLE = "SPECTRAL_ATTENTION"

READ = "read"
"""The task of decoding; spectral.code_dispatch has others."""

READ_TOKENS = {False: "read untransformed", True: "read large untransformed"}
"""The same of kernels for pages whose rows are tokens, and those with many entries (spectral.kernels.flat)."""

_trusted: dict[tuple[torch.device, str], bool] = {}
"""Devices and tasks in which the kernels were compared, and whether they were right."""


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
    if not isinstance(codec, LayerCodec) or not wanted(codec.units[0].mean.device, READ):
        return None
    from spectral.kernels.decode import LayerKernels, unsupported

    reason = unsupported(codec, window)
    if reason:
        if attention_choice() == "triton":
            raise SettingError(f"{VARIABLE}=triton cannot serve {reason}; use {VARIABLE}=reference")
        return None
    found: LayerKernels | None = codec.__dict__.get("_kernels")
    if found is None:
        found = codec.__dict__["_kernels"] = LayerKernels(codec.twin())
    device, fault = codec.units[0].mean.device, partial(_fault, found, group, dtype)
    if found.flat:
        if trusted(device, READ_TOKENS[found.many], fault, "those for transformed ones serve"):
            return found
        found.read_tokens(False)
    return found if trusted(device, READ, fault) else None


def _fault(kernels: LayerKernels, group: int, dtype: torch.dtype) -> str:
    from spectral.kernels.check import wrong

    return wrong(kernels, group, dtype)


def wanted(device: torch.device, task: str) -> bool:
    """Whether kernels are to do a task on a device, as far as is known. Raises SettingError where they are forced and
    cannot run."""
    choice = attention_choice()
    if choice == "reference":
        return False
    if choice == "auto":
        return able(device) and _trusted.get((device, task), True)
    if not installed():
        raise SettingError(f"{VARIABLE}=triton needs triton: install spectral-serve[gpu]")
    from spectral.kernels.scoring import interpreted

    if device.type != "cuda" and not interpreted():
        raise SettingError(f"{VARIABLE}=triton needs an NVIDIA GPU, and this cache lies on {device}")
    return True


def trusted(
    device: torch.device, task: str, compare: Callable[[], str], instead: str = "the reference serves"
) -> bool:
    """Whether the kernels may do a task on a device: forced, or once compared there. `compare` says what is wrong with
    their answer, "" if nothing; `instead`, for the log, what serves then."""
    if attention_choice() == "triton":
        return True
    if (device, task) not in _trusted:
        try:
            with launching(device):
                fault = compare()
        except Exception as failure:  # whatever a compiler or a driver raises
            fault = f"they do not run: {failure}"
        if fault:
            log.warning("the kernels that %s pages are not used on this device; %s: %s", task, instead, fault)
        _trusted[device, task] = not fault
    return _trusted[device, task]


def launching(device: torch.device) -> AbstractContextManager[Any]:
    """Within: kernels are launched on this device, where their tensors lie. Triton asks torch which one is meant, and
    without this the second GPU's cache is worked on by the first, in no order with what else happens to it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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

"""Which implementation encodes, opens and squeezes pages, by the same switch as decoding (spectral.dispatch).

Before a process trusts a device, the kernels' first answer there is compared with the reference's.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch

from spectral.codec import Codebook, LayerCodec, PageCodec
from spectral.dispatch import VARIABLE, able, attention_choice, installed
from spectral.errors import SettingError

if TYPE_CHECKING:
    from spectral.kernels.code_layer import CodeLayer
    from spectral.kernels.squeeze import SqueezeLayer

log = logging.getLogger("spectral.attention")

_trusted: dict[tuple[torch.device, str], bool] = {}
"""Devices and tasks in which the kernels were compared, and whether they were right."""


def codes_for(codec: PageCodec | None) -> CodeLayer | None:
    """What the kernels that encode and open a codec's pages need; None: use the reference.

    Raises SettingError where the kernels are forced and cannot serve.
    """
    if not isinstance(codec, LayerCodec) or not _wanted(codec.units[0].mean.device):
        return None
    from spectral.kernels.code_layer import CodeLayer, unsupported_codes

    reason = unsupported_codes(codec)
    if reason:
        if attention_choice() == "triton":
            raise SettingError(f"{VARIABLE}=triton cannot serve {reason}; use {VARIABLE}=reference")
        return None
    found = codec.__dict__.get("_code_layer")
    if found is None:
        found = codec.__dict__["_code_layer"] = CodeLayer(codec)
    return found if _trust(found.device, "encode and open", (found,)) else None


def squeezer(old: LayerCodec, new: LayerCodec) -> SqueezeLayer | None:
    """The kernels that take pages of one setting to another; None: use the reference.

    Raises SettingError where the kernels are forced and cannot serve.
    """
    device = old.units[0].mean.device
    if not _wanted(device):
        return None
    from spectral.kernels.squeeze import SqueezeLayer

    known = new.__dict__.get("_squeezer")  # from whom, weakly: what a cache was squeezed from must not live on for this
    if known is not None and known[0]() is old:
        return known[1] if _trust(device, "squeeze", (known[1], old, new)) else None
    try:
        found = SqueezeLayer(old, new)
    except ValueError as error:
        if attention_choice() == "triton":
            raise SettingError(f"{VARIABLE}=triton cannot squeeze: {error}; use {VARIABLE}=reference") from error
        return None
    new.__dict__["_squeezer"] = weakref.ref(old), found
    return found if _trust(device, "squeeze", (found, old, new)) else None


def warm_codes(codebook: Codebook) -> None:
    """Compile, on the device of a setting, what chunks over codes and squeezing run: once for all its layers."""
    codec = next((codec for codec in codebook.layers if isinstance(codec, LayerCodec)), None)
    layer = codes_for(codec)
    if codec is None or layer is None:
        return
    from spectral.kernels import check_codes

    check_codes.code_error(layer)
    squeeze = squeezer(codec, codec)
    if squeeze is not None:
        check_codes.squeeze_error(squeeze, codec, codec)


def _wanted(device: torch.device) -> bool:
    """Whether kernels are to serve a device. Raises SettingError where they are forced and cannot run."""
    choice = attention_choice()
    if choice == "reference":
        return False
    if choice == "auto":
        return able(device)
    if not installed():
        raise SettingError(f"{VARIABLE}=triton needs triton: install spectral-serve[gpu]")
    from spectral.kernels.decode import interpreted

    if device.type != "cuda" and not interpreted():
        raise SettingError(f"{VARIABLE}=triton needs an NVIDIA GPU, and this cache lies on {device}")
    return True


def _trust(device: torch.device, task: str, parts: tuple[object, ...]) -> bool:
    """Whether the kernels may do a task on a device: forced, or once compared there."""
    if attention_choice() == "triton":
        return True
    if (device, task) not in _trusted:
        from spectral.kernels import check_codes

        try:
            wrong = str(check_codes.CHECKS[task](*parts))
        except Exception as failure:  # whatever a compiler or a driver raises: the reference serves
            wrong = f"they do not run: {failure}"
        if wrong:
            log.warning("the kernels that %s pages are not used on this device; the reference serves: %s", task, wrong)
        _trusted[device, task] = not wrong
    return _trusted[device, task]

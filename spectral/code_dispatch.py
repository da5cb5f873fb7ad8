"""Which implementation encodes, opens and squeezes pages, by the same switch as decoding (spectral.dispatch).

Before a process trusts a device, the kernels' first answer there is compared with the reference's.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

from spectral.codec import Codebook, LayerCodec, PageCodec
from spectral.dispatch import VARIABLE, attention_choice, launching, trusted, wanted
from spectral.errors import SettingError

if TYPE_CHECKING:
    import torch

    from spectral.kernels.code_layer import CodeLayer
    from spectral.kernels.squeeze import SqueezeLayer

CODES, SQUEEZE = "encode and open", "squeeze"
"""Tasks, as the log names them."""


def codes_for(codec: PageCodec | None) -> CodeLayer | None:
    """What the kernels that encode and open a codec's pages need; None: use the reference.

    Raises SettingError where the kernels are forced and cannot serve.
    """
    if not isinstance(codec, LayerCodec) or not wanted(codec.units[0].mean.device, CODES):
        return None
    from spectral.kernels.check_codes import code_error
    from spectral.kernels.code_layer import CodeLayer, unsupported_codes

    reason = unsupported_codes(codec)
    if reason:
        if attention_choice() == "triton":
            raise SettingError(f"{VARIABLE}=triton cannot serve {reason}; use {VARIABLE}=reference")
        return None
    found: CodeLayer | None = codec.__dict__.get("_code_layer")
    if found is None:
        found = codec.__dict__["_code_layer"] = CodeLayer(codec.twin())
    return found if trusted(found.device, CODES, partial(code_error, found)) else None


def squeezer(old: LayerCodec, new: LayerCodec) -> SqueezeLayer | None:
    """The kernels that take pages of one setting to another; None: use the reference.

    Raises SettingError where the kernels are forced and cannot serve.
    """
    device = old.units[0].mean.device
    if not wanted(device, SQUEEZE):
        return None
    from spectral.kernels.check_codes import squeeze_error
    from spectral.kernels.squeeze import SqueezeLayer

    known = new.__dict__.get("_squeezer")  # from whom, weakly: what a cache was squeezed from must not live on for this
    if known is not None and known[0]() is old:
        found = known[1]
    else:
        try:
            found = SqueezeLayer(old, new)
        except ValueError as error:
            if attention_choice() == "triton":
                raise SettingError(f"{VARIABLE}=triton cannot squeeze: {error}; use {VARIABLE}=reference") from error
            return None
        new.__dict__["_squeezer"] = weakref.ref(old), found
    return found if trusted(device, SQUEEZE, partial(squeeze_error, found, old, new)) else None


def warm_codes(codebook: Codebook) -> None:
    """Compile what chunks over codes and squeezing run: on each device of a setting, once for all its layers there."""
    firsts: dict[torch.device, LayerCodec] = {}
    for codec in codebook.layers:
        if isinstance(codec, LayerCodec):
            firsts.setdefault(codec.units[0].mean.device, codec)
    for device, codec in firsts.items():
        layer = codes_for(codec)
        if layer is not None:
            with launching(device):
                _warm_codec(codec, layer)


def _warm_codec(codec: LayerCodec, layer: CodeLayer) -> None:
    from spectral.kernels import check_codes

    check_codes.code_error(layer)
    squeeze = squeezer(codec, codec)
    if squeeze is not None:
        from spectral.kernels.squeeze import compile_all

        check_codes.squeeze_error(squeeze, codec, codec)
        compile_all(layer.device)

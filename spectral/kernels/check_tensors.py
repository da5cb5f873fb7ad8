"""What wrappers of kernels ask of tensors before they launch: what a kernel would otherwise read as something else.

All of it is compared on the host, by attributes: nothing is computed, and nothing waits for the device. What numbers
on the device say (ids of pages, places, slots) is therefore not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from spectral.shapes import LayerShape
from spectral.windows import ExactWindow

HALF = (torch.float16,)
SINGLE = (torch.float32,)
SHORT = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*SHORT, torch.float64)
INT32, INT64, BYTES = (torch.int32,), (torch.int64,), (torch.uint8,)

ALIGNED = 8
"""Bytes whose multiple a pool begins at, as its pages do: kernels read so many at once."""


class Order(NamedTuple):
    """How numbers lie in memory: words before a tensor's dtype and behind its shape, and whether they do."""

    before: str
    behind: str
    holds: Callable[[torch.Tensor], bool]


def _numbers_together(x: torch.Tensor) -> bool:
    return x.shape[-1] < 2 or x.stride(-1) == 1 or not x.numel()


def _tokens_together(x: torch.Tensor) -> bool:
    return _numbers_together(x) and (x.shape[-2] < 2 or x.stride(-2) == x.shape[-1] or not x.numel())


ANY = Order("", "", lambda x: True)
WHOLE = Order("contiguous ", "", torch.Tensor.is_contiguous)
NUMBERS = Order("", " with contiguous numbers of a token", _numbers_together)
TOKENS = Order("", " with contiguous tokens of a head", _tokens_together)


def fault(
    name: str,
    x: torch.Tensor,
    kinds: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    device: torch.device,
    order: Order = WHOLE,
) -> str:
    """What is wrong with a tensor, in words with its name; "" where it is of one of these kinds, this shape and order
    and on this device. Sizes that are words may be any."""
    if x.dtype in kinds and x.device == device and (x.shape == shape or _sized(x.shape, shape)) and order.holds(x):
        return ""
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    kind = "floating point" if kinds == FLOATS else " or ".join(names)
    sizes = ", ".join(map(str, shape))
    found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
    return f"{name} must be {order.before}{kind} [{sizes}]{order.behind} on {device}, got {found}"


def check(
    name: str,
    x: torch.Tensor,
    kinds: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    device: torch.device,
    order: Order = WHOLE,
) -> None:
    """Raise ValueError with the `fault` of a tensor that has one."""
    wrong = fault(name, x, kinds, shape, device, order)
    if wrong:
        raise ValueError(wrong)


def check_pool(name: str, pool: torch.Tensor, pages: int | str, nbytes: int, device: torch.device) -> None:
    """Raise ValueError for what is no pool: uint8 [pages, nbytes], contiguous, beginning at a multiple of ALIGNED."""
    check(name, pool, BYTES, (pages, nbytes), device)
    if pool.data_ptr() % ALIGNED:
        raise ValueError(f"{name} must begin at a multiple of {ALIGNED} bytes, got address {pool.data_ptr():#x}")


def check_window(window: ExactWindow, shape: LayerShape, device: torch.device) -> None:
    """Raise ValueError for the window of a layer of other heads or sizes, on another device, or in pieces."""
    own = window.shape
    found, wanted = (own.kv_heads, own.key_dim, own.value_dim), (shape.kv_heads, shape.key_dim, shape.value_dim)
    if found != wanted:
        raise ValueError(f"window must have (KV heads, key size, value size) {wanted}, as the layer has, got {found}")
    for tensor in window.tensors():
        if tensor.device != device or not tensor.is_contiguous():
            where = "on" if tensor.is_contiguous() else "in pieces on"
            raise ValueError(f"window must have contiguous tensors on {device}, got some {where} {tensor.device}")


def check_heads(query_heads: int, kv_heads: int) -> None:
    """Raise ValueError for queries whose heads cannot share the KV heads."""
    if not query_heads or not kv_heads or query_heads % kv_heads:
        raise ValueError(f"query must have a multiple of the {kv_heads} KV heads, got {query_heads} heads")


def _sized(sizes: torch.Size, wanted: tuple[int | str, ...]) -> bool:
    if len(sizes) != len(wanted):
        return False
    return all(size == want or isinstance(want, str) for size, want in zip(sizes, wanted, strict=True))

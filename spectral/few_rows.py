"""Where products with weights are of a few rows and nothing launches them one by one: kernels of our own take them
(spectral.lean_products, spectral.lean_nibbles). Elsewhere a library's product costs the host less."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

log = logging.getLogger("spectral.engine")

MOST_ROWS = 8
"""Rows that count as few."""

_CAPTURED: ContextVar[bool] = ContextVar("spectral_captured", default=False)


@contextmanager
def captured() -> Iterator[None]:
    """Within: what is launched is, or will be, replayed as a graph."""
    token = _CAPTURED.set(True)
    try:
        yield
    finally:
        _CAPTURED.reset(token)


_distrusted: list[str] = []
"""Weights whose products are left to libraries."""


def distrust(reason: str, weights: str = "16 bits") -> None:
    """From now on, in this process, libraries compute all products with such weights."""
    if weights not in _distrusted:
        log.warning("products of a few rows with weights of %s are left to the library: %s", weights, reason)
    _distrusted.append(weights)


def is_captured() -> bool:
    """Whether this is within `captured`."""
    return _CAPTURED.get()


class EarlyLaunches:
    """Whether kernels are launched before the one before them has ended (spectral.overlap)."""

    def __init__(self) -> None:
        self.used = self.stopped = False

    def stop(self, reason: str) -> bool:
        """From now on none is, where any was: what could not be captured may be without."""
        if not self.used or self.stopped:
            return False
        self.stopped = True
        log.warning("kernels are launched one after another from now on: %s", reason)
        return True


early_launches = EarlyLaunches()


def _here(x: torch.Tensor) -> bool:
    """Whether kernels serve a tensor."""
    return x.is_cuda


def for_kernels(x: torch.Tensor, weights: str) -> bool:
    """Whether x [..., K] is what kernels multiply, if they can those weights."""
    if weights in _distrusted or not _CAPTURED.get() or not _here(x) or torch.is_grad_enabled():
        return False
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of x [..., K] with weight [N, K] is the kernels'."""
    if not for_kernels(x, "16 bits"):
        return False
    from spectral.lean_products import fits

    return fits(weight) and x.dtype == weight.dtype


def ask(
    wanted: Callable[[int], torch.Tensor],
    found: Callable[[int], torch.Tensor],
    weights: str = "16 bits",
    alike: Callable[[torch.Tensor, torch.Tensor], bool] | None = None,
) -> None:
    """Compare the kernels' answers for one row and for three, on a device and of a shape that may be new to them. Where
    they are not `alike` (None: spectral.lean.same), or cannot be had, libraries compute all products with such weights
    from then on."""
    from spectral.lean import same

    try:
        with captured():
            right = all((alike or same)(wanted(rows), found(rows)) for rows in (1, 3))
    except Exception as failure:  # whatever a compiler or a driver raises
        distrust(f"{type(failure).__name__}: {failure}".splitlines()[0][:200], weights)
    else:
        if not right:
            distrust("they are wrong", weights)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + x weight^T + bias, whoever computes it."""
    if not few(x, weight):
        found = F.linear(x, weight, bias)
        return found if residual is None else residual + found
    from spectral.lean_products import product

    return product(x, weight, bias, residual=residual)

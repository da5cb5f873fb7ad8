"""Products on a CPU of which no row depends on who else is served.

A library sums a product of one row in another order than one of eight, and a long sum otherwise than a short one. The
roundings are small, but codes of a cache and random draws make other tokens of them, and a request's text must not
depend on what else runs. So decode rows are multiplied with weights each by itself, in batches of products of one row
with as many columns of the weights as a processor's second cache holds, so that they are read once for all rows. That
takes some tenth longer than a product of all rows. And what attention's reference multiplies for several sequences at
once has shapes that MKL treats alike, as measured on one machine; others are asked (`rounds_alike`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F

LEAST_ROWS, LEAST_COLUMNS, LEAST_TERMS = 4, 16, 16
"""Rows, columns and terms of a sum from which on MKL rounds products alike; fewer go other ways."""
LEAST_SIZE = 400
"""Multiplications of a product; smaller ones PyTorch does by itself."""
WHOLE_TERMS, HALVED_TERMS = 192, 384
"""MKL adds up to so many terms in one go; more, and fewer than the second number, in two halves; more than that in
pieces of the first number. Zeros at the end change nothing but for the halves."""

PIECE = 1 << 17
"""Numbers of a matrix that all rows are multiplied with before the next ones are: 512 KiB."""
ALIGNED = 16
"""Columns of a piece are a multiple of so many, 64 bytes: what lies otherwise is rounded otherwise."""

_ASKED: ContextVar[tuple[bool, bool]] = ContextVar("spectral_row_by_row", default=(False, False))


@contextmanager
def row_by_row(everywhere: bool = True, answers: bool = False) -> Iterator[None]:
    """Within, `linear` multiplies so, if that is wanted `everywhere`, or for `answers`, the output layer, alone: of a
    forward of many tokens few answers are wanted."""
    token = _ASKED.set((everywhere, everywhere or answers))
    try:
        yield
    finally:
        _ASKED.reset(token)


def answers_asked() -> bool:
    """Whether answers are to be multiplied so."""
    return _ASKED.get()[1]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, single: bool) -> torch.Tensor:
    """x [..., K] weight^T [K, N] + bias [N]. `single`: whether the library's product of one row is what this one has
    for each, see `single_alike`."""
    count = x.numel() // x.shape[-1]
    if not _ASKED.get()[0] or (single and count == 1):
        return F.linear(x, weight, bias)
    rows = x.reshape(count, 1, -1)
    columns = max(4, PIECE // (ALIGNED * weight.shape[1])) * ALIGNED
    even = weight.shape[0] // ALIGNED * ALIGNED
    parts = [torch.bmm(rows, part.t().expand(count, -1, -1)) for part in weight[:even].split(columns)] if even else []
    if even < weight.shape[0]:
        parts.append((rows * weight[even:]).sum(-1)[:, None])
    found = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).view(*x.shape[:-1], -1)
    return found if bias is None else found.add_(bias)


def single_alike(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `F.linear` rounds the product of one row with these as `linear` does."""
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.inference_mode(), row_by_row():
        found = linear(x, weight, bias, False)
        return all(torch.equal(F.linear(x[at : at + 1], weight, bias), found[at : at + 1]) for at in (0, 1))


def of_any_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [n, M, K] y [n, K, N], where M depends on other sequences."""
    rows = x.shape[1]
    size = min(x.shape[2], LEAST_TERMS) * min(y.shape[2], LEAST_COLUMNS)
    more = max(LEAST_ROWS, -(-LEAST_SIZE // size)) - rows
    if more <= 0 or x.device.type != "cpu":
        return torch.bmm(x, y)
    return torch.bmm(F.pad(x, (0, 0, 0, more)), y)[:, :rows]


def for_any_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [n, M, K] y^T [n, K, N], y [n, N, K], where N depends on other sequences."""
    count = y.shape[1]
    if count >= LEAST_COLUMNS or x.device.type != "cpu":
        return of_any_rows(x, y.transpose(1, 2))
    return of_any_rows(x, F.pad(y, (0, 0, 0, LEAST_COLUMNS - count)).transpose(1, 2))[..., :count]


def of_any_terms(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [n, M, K] y [n, K, N], where other sequences decide how many zeros x ends with."""
    terms = x.shape[2]
    most = LEAST_TERMS if terms < LEAST_TERMS else HALVED_TERMS if terms > WHOLE_TERMS else terms
    more = max(0, most - terms)
    if not more or x.device.type != "cpu":
        return of_any_rows(x, y)
    return of_any_rows(F.pad(x, (0, more)), F.pad(y, (0, 0, 0, more)))


@cache
def rounds_alike() -> bool:
    """Whether this machine's library treats those shapes alike. Where it does not, a row's numbers may differ by
    roundings with what else runs."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for terms in (16, 80, 176, 208, 304, 400, 1040):
            x, y = (torch.randn(2, size, terms, generator=generator) for size in (37, 129))
            whole = of_any_rows(x, y.transpose(1, 2))
            few = [of_any_rows(x[:, :rows], y.transpose(1, 2)) for rows in (1, 2, 3, 4, 7, 16)]
            alike = [(part, whole[:, : part.shape[1]]) for part in few]
            alike.append((for_any_rows(x, y[:, :8]), whole[..., :8]))
            more = F.pad(x, (0, 1600)), F.pad(y, (0, 1600), value=1.0).transpose(1, 2)
            alike.append((of_any_terms(*more), of_any_terms(x, y.transpose(1, 2))))
            if not all(torch.equal(*both) for both in alike):
                return False
    return True

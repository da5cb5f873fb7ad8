"""What tests of products of a few rows share."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16
"""Triton's interpreter multiplies no matrices in bfloat16."""


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, part: float = 2**-9) -> bool:
    """But for a rounding of fp16, or two."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return bool((found.double() - wanted.double()).abs().max() <= part * wanted.double().abs().max())

"""Products of a few rows with weights of four bits, as bitsandbytes keeps them: packed bytes are read once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from spectral.few_rows import MOST_ROWS
from spectral.kernels.nibbles import nibbles_kernel
from spectral.kernels.scoring import interpreted
from spectral.lean_products import GATES, aligned
from spectral.overlap import early

BLOCK = 64
"""Numbers of a line that have a factor of their own."""
OUTER = 256
"""Factors that have a factor of their own, where they are bytes."""
FACTORS = {"nf4": 1.437006, "fp4": 12.0}
"""What codes are multiplied with before they are rounded. In bfloat16 nf4's codes are then wrong by .06 % in the mean
instead of .11 (bitsandbytes' weights by .12), fp4's not at all."""


class Nibbles(NamedTuple):
    """Weights [outputs, size] of four bits.

    weight: uint8, two numbers a byte; absmax: of every BLOCK numbers, fp32, or uint8, each of which stands for
    outer_code[it] * outer[number // 256] + offset; code: fp32 [16], kind: its name.
    """

    outputs: int
    size: int
    kind: str
    weight: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    outer: torch.Tensor | None = None
    outer_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def pointers(self) -> tuple[torch.Tensor, ...]:
        """What a kernel reads of them; where there are no outer factors, something in their place."""
        outer = (self.outer, self.outer_code, self.offset)
        return self.weight, self.absmax, *(self.absmax if x is None else x for x in outer)


def fits(nibbles: Nibbles) -> bool:
    """Whether products here are for these weights: whole blocks a line, of a kind that is known."""
    outer = [x is not None for x in (nibbles.outer, nibbles.outer_code, nibbles.offset)]
    plain = nibbles.absmax.dtype == torch.float32 and not any(outer)
    nested = nibbles.absmax.dtype == torch.uint8 and all(outer)
    right = nibbles.kind in FACTORS and (plain or nested) and nibbles.size % BLOCK == 0
    counts = 2 * nibbles.weight.numel(), BLOCK * nibbles.absmax.numel()
    right = right and all(count == nibbles.outputs * nibbles.size for count in counts)
    tensors = [x for x in nibbles if isinstance(x, torch.Tensor)]
    return right and nibbles.weight.data_ptr() % 16 == 0 and all(x.is_contiguous() for x in tensors)


def product(
    x: torch.Tensor,
    nibbles: Nibbles,
    bias: torch.Tensor | None = None,
    *,
    opened: Nibbles | None = None,
    gate: str = "",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + x weight^T + bias, of 1 to MOST_ROWS rows, weights as `fits` wants them.

    Args:
        x: [..., size], bfloat16 or float16.
        gate: "silu" or "gelu_tanh": act(x weight^T) * x opened^T instead of the product, without a bias.
        residual: what is added, of the answer's shape.

    Returns:
        [..., outputs], in x's dtype, rounded between these steps as a model does that takes them one by one.
    """
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= MOST_ROWS or x.shape[-1] != nibbles.size or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x must be 1 to {MOST_ROWS} rows of {nibbles.size} 16-bit numbers, got {list(x.shape)}")
    out = torch.empty((*x.shape[:-1], nibbles.outputs), dtype=x.dtype, device=x.device)
    x = aligned(x)
    if residual is not None:
        residual = residual.contiguous()
        if residual.shape != out.shape or residual.dtype != out.dtype:
            raise ValueError(f"residual must be {out.dtype} {list(out.shape)}, got {list(residual.shape)}")
    if bool(gate) != (opened is not None) or (gate and bias is not None):
        raise ValueError("a gate has what it opens, and no bias")
    tile = dict(_tile(bool(gate)))
    registers, lines, blocks = tile.pop("REGISTERS"), 16 * tile["TILES"] // (2 if gate else 1), nibbles.size // BLOCK
    step = 4 if blocks >= 4 else 1
    grid = (triton.cdiv(nibbles.outputs, lines),)
    nibbles_kernel[grid](
        x, nibbles.code, *nibbles.pointers(), *(opened or nibbles).pointers(),
        x if bias is None else bias, x if residual is None else residual, out, rows, nibbles.outputs,
        triton.cdiv(blocks, step * tile["WARPS"]), SIZE=nibbles.size, STEP=step, FACTOR=FACTORS[nibbles.kind], NESTED=nibbles.absmax.dtype == torch.uint8,
        **tile, EVEN=nibbles.outputs % lines == 0, BIAS=bias is not None, GATE=GATES[gate], RESIDUAL=residual is not None,
        num_warps=tile["WARPS"], num_stages=1, **_fast(registers), **early(x.device, rows),
    )  # fmt: skip
    return out


def _tile(gate: bool) -> dict[str, int]:
    """What a program has in hand: sixteens of lines, warps that share them, whether all are asked for at once, and
    registers of a lane: without a limit the compiler uses fewer, and asks for bytes when they are needed."""
    if gate:
        return {"TILES": 2, "WARPS": 4, "AHEAD": 1, "REGISTERS": 128}
    return {"TILES": 1, "WARPS": 8, "AHEAD": 1, "REGISTERS": 80}


def _fast(registers: int) -> dict[str, int | bool]:
    """How a kernel is launched that is written by lane."""
    return {"FAST": False} if interpreted() else {"FAST": True, "maxnreg": registers}

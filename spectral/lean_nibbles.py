"""Products of a few rows with weights of four bits, as bitsandbytes keeps them: packed bytes are read once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from spectral.few_rows import MOST_ROWS
from spectral.kernels.nibbles import nibbles_kernel
from spectral.kernels.scoring import by_lane
from spectral.lean_products import GATES, operands
from spectral.overlap import early

BLOCK = 64
"""Numbers of a line that have a factor of their own."""
OUTER = 256
"""Factors that have a factor of their own, where they are bytes."""
LINES = 16
"""Outputs of a program, where several matrices have one product."""
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

    def pointers(self, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What a kernel reads; in the place of what there is not, something else."""
        more = (self.outer, self.outer_code, self.offset, bias)
        return self.weight, self.absmax, *(self.absmax if x is None else x for x in more)


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


def alike(*weights: Nibbles) -> bool:
    """Whether a kernel can go through all of these at once."""
    return len({(one.size, one.kind, one.absmax.dtype, one.weight.device) for one in weights}) == 1


def product(
    x: torch.Tensor,
    weights: tuple[Nibbles, ...],
    biases: tuple[torch.Tensor, ...] | None = None,
    *,
    gate: str = "",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + x weight^T + bias, of 1 to MOST_ROWS rows.

    Args:
        x: [..., size], bfloat16 or float16.
        weights: as `fits` wants them, one or `alike`. Without a gate three are possible, of multiples of LINES outputs:
            the answer has all of theirs.
        gate: "silu" or "gelu_tanh": act(x first^T) * x second^T of two weights of one shape, without biases.
        residual: what is added, of the answer's shape.

    Returns:
        [..., outputs], in x's dtype, rounded between these steps as a model does that takes them one by one.
    """
    first = weights[0]
    rows, blocks = x.numel() // x.shape[-1], first.size // BLOCK
    if not 0 < rows <= MOST_ROWS or x.shape[-1] != first.size or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x must be 1 to {MOST_ROWS} rows of {first.size} 16-bit numbers, got {list(x.shape)}")
    _check(weights, biases, gate)
    outputs = first.outputs if gate else sum(one.outputs for one in weights)
    x, residual, out = operands(x, outputs, residual)
    tile = dict(_tile(outputs, bool(gate), rows == 1))
    registers, lines, step = tile.pop("REGISTERS"), 16 * tile["TILES"] // (2 if gate else 1), 4 if blocks >= 4 else 1
    matrices = [one.pointers(None if biases is None else biases[n]) for n, one in enumerate(weights)]
    matrices += [matrices[0]] * (3 - len(matrices))
    grid = (triton.cdiv(outputs, lines),)
    begins = first.outputs // lines, (first.outputs + weights[len(weights) // 2].outputs) // lines
    found = {"SIZE": first.size, "STEP": step, "SINGLE": rows == 1 and step > 1, "FACTOR": FACTORS[first.kind]}
    found |= {"NESTED": first.absmax.dtype == torch.uint8, "SEVERAL": len(weights) == 3, "BIAS": biases is not None}
    nibbles_kernel[grid](
        x, first.code, *matrices[0], *matrices[1], *matrices[2], x if residual is None else residual, out, rows,
        outputs, triton.cdiv(blocks, step * tile["WARPS"]), *begins, **found, **tile, EVEN=outputs % lines == 0,
        GATE=GATES[gate], RESIDUAL=residual is not None, **by_lane(tile["WARPS"], registers), **early(x.device, rows),
    )  # fmt: skip
    return out


def _check(weights: tuple[Nibbles, ...], biases: tuple[torch.Tensor, ...] | None, gate: str) -> None:
    """Raises ValueError for what is not one product."""
    if gate:
        right = len(weights) == 2 and weights[0].outputs == weights[1].outputs and biases is None
    else:
        right = len(weights) == 1 or (len(weights) == 3 and not any(one.outputs % LINES for one in weights))
        right = right and (biases is None or len(biases) == len(weights))
    if not right or not alike(*weights):
        raise ValueError(f"weights are not of one product: {[(x.outputs, x.size) for x in weights]}, gate {gate!r}")


def _tile(outputs: int, gate: bool, single: bool) -> dict[str, int]:
    """What a program has in hand, as it was fastest on an H200 (bench/research/four_bits.py): sixteens of lines, warps
    that share them (a single row's programs of few lines are too few for four), and registers of a lane: without a
    limit the compiler uses fewer, and asks for bytes when they are needed."""
    if gate:
        return {"TILES": 2, "WARPS": 4, "REGISTERS": 168}
    return {"TILES": 1, "WARPS": 8 if single and outputs <= 8192 else 4, "REGISTERS": 128}

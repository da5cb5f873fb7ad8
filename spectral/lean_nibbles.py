"""Products of a few rows with weights of four bits, as bitsandbytes keeps them: packed bytes are read once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from spectral.few_rows import MOST_ROWS
from spectral.kernels.check_tensors import check
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
    """Weights [outputs, size] of four bits, all contiguous and on one device.

    weight: uint8, two numbers a byte, at a multiple of 16 bytes; absmax: of every BLOCK numbers, fp32, or uint8, each
    of which stands for outer_code[it] * outer[number // 256] + offset; code: fp32 [16], kind: its name. outer, offset
    (one number) and outer_code [256]: fp32, there where absmax is uint8.
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
    """Whether products here are for these weights: whole blocks a line, of a kind that is known, and every tensor as
    `Nibbles` has it."""
    return not _fault(nibbles)


def _fault(nibbles: Nibbles) -> str:
    """What about weights is not the kernels', in words; "" where nothing is."""
    if nibbles.kind not in FACTORS:
        return f"kind must be one of {sorted(FACTORS)}, got {nibbles.kind!r}"
    if nibbles.outputs < 1 or nibbles.size < BLOCK or nibbles.size % BLOCK:
        return f"outputs and size must be 1 at least and a multiple of {BLOCK}, got {nibbles.outputs}, {nibbles.size}"
    blocks, device = nibbles.outputs * nibbles.size // BLOCK, nibbles.weight.device
    nested = nibbles.absmax.dtype == torch.uint8
    kind = torch.uint8 if nested else torch.float32
    wanted = [("weight", torch.uint8, BLOCK // 2 * blocks), ("code", torch.float32, 16), ("absmax", kind, blocks)]
    more = [("outer", torch.float32, triton.cdiv(blocks, OUTER)), ("outer_code", torch.float32, 256)]
    more.append(("offset", torch.float32, 1))
    for name, _, _ in more:
        if (getattr(nibbles, name) is not None) != nested:
            return f"{name} must be there where absmax is uint8, and there alone"
    for name, kind, count in wanted + more if nested else wanted:
        x = getattr(nibbles, name)
        if x.dtype != kind or x.numel() != count or x.device != device or not x.is_contiguous():
            found = f"{x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
            return f"{name} must be {count} contiguous numbers of {kind} on {device}, got {found}"
    return "" if nibbles.weight.data_ptr() % 16 == 0 else "weight must begin at a multiple of 16 bytes"


def alike(*weights: Nibbles) -> bool:
    """Whether a kernel can go through all of these at once. Waits for the device, where their codes lie."""
    codes = [one.code for one in weights]
    return _one_kind(weights) and all(torch.equal(code, codes[0]) for code in codes[1:])


def _one_kind(weights: tuple[Nibbles, ...]) -> bool:
    """Whether weights are `alike`, as far as is known without the device."""
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
        x: [..., size], bfloat16 or float16, on the weights' device; by any strides, as residual.
        weights: as `fits` wants them, one or `alike`. Without a gate three are possible, of multiples of LINES outputs:
            the answer has all of theirs.
        biases: of every weight [outputs], contiguous, in x's dtype.
        gate: "silu" or "gelu_tanh": act(x first^T) * x second^T of two weights of one shape, without biases.
        residual: what is added, of the answer's shape.

    Returns:
        [..., outputs], in x's dtype, rounded between these steps as a model does that takes them one by one.

    Raises ValueError for weights that do not fit and for tensors of other shapes, dtypes, strides or devices. Whether
    several have equal codes is `alike`'s to say, before: they lie on the device, and the host would have to wait.
    """
    _check(x, weights, biases, gate)
    first = weights[0]
    rows, blocks = x.numel() // first.size, first.size // BLOCK
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


def _check(
    x: torch.Tensor, weights: tuple[Nibbles, ...], biases: tuple[torch.Tensor, ...] | None, gate: str
) -> None:
    """Raise ValueError naming what does not fit, or is not one product."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {sorted(GATES)}, got {gate!r}")
    for number, one in enumerate(weights):
        wrong = _fault(one)
        if wrong:
            raise ValueError(f"weights[{number}].{wrong}")
    if gate:
        right = len(weights) == 2 and weights[0].outputs == weights[1].outputs and biases is None
    else:
        right = len(weights) == 1 or (len(weights) == 3 and not any(one.outputs % LINES for one in weights))
        right = right and (biases is None or len(biases) == len(weights))
    if not right or not _one_kind(weights):
        found = [(one.outputs, one.size) for one in weights]
        count = None if biases is None else len(biases)
        raise ValueError(f"weights are not of one product: {found}, gate {gate!r}, biases: {count}")
    size, device = weights[0].size, weights[0].weight.device
    few = x.ndim > 0 and x.shape[-1] == size and 0 < x.numel() <= MOST_ROWS * size
    if not few or x.dtype not in (torch.bfloat16, torch.float16) or x.device != device:
        wanted = f"1 to {MOST_ROWS} rows of {size} 16-bit numbers on {device}"
        raise ValueError(f"x must be {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")
    for number, (bias, one) in enumerate(zip(biases or (), weights, strict=False)):
        check(f"biases[{number}]", bias, (x.dtype,), (one.outputs,), device)


def _tile(outputs: int, gate: bool, single: bool) -> dict[str, int]:
    """What a program has in hand, as it was fastest on an H200 (bench/research/four_bits.py): sixteens of lines, warps
    that share them (a single row's programs of few lines are too few for four), and registers of a lane: without a
    limit the compiler uses fewer, and asks for bytes when they are needed."""
    if gate:
        return {"TILES": 2, "WARPS": 4, "REGISTERS": 168}
    return {"TILES": 1, "WARPS": 8 if single and outputs <= 8192 else 4, "REGISTERS": 128}

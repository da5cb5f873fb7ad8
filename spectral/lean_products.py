"""Products of a few rows with weights, which read every weight once and do beside it what comes after.

A decoding step of a large model is these products: what counts is how fast memory is read, and how often it is not
because something small runs in between. So a product here ends with the gate of two halves of its outputs and the sum
with what goes around it, where libraries' products take launches of their own, and begins before what it waits for has
ended.

    row_kernel   one row: products in fp32 by plain arithmetic, whole lines of weights on their way to registers
    rows_kernel  2 to 8 rows: by tensor cores, weights on their way to shared memory some tiles ahead
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral.few_rows import MOST_ROWS
from spectral.lean_kernels import activated
from spectral.overlap import early, gdc_launch_dependents, gdc_wait

GATES = {"": 0, "silu": 1, "gelu_tanh": 2}


@triton.jit
def finished(sums, bias_ptr, residual_ptr, out_ptr, m, rows, outputs, TALL: tl.constexpr, EVEN: tl.constexpr,
              BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """Store what a program's products sums [TALL, rows] become, rounded where a model rounds; m: their rows."""
    kind: tl.constexpr = out_ptr.dtype.element_ty
    EACH: tl.constexpr = TALL // 2 if GATE > 0 else TALL
    ROWS: tl.constexpr = sums.shape[1]
    if BIAS:
        sums += tl.load(bias_ptr + _lines(outputs, TALL, EVEN, GATE)).to(tl.float32)[:, None]
    n = tl.program_id(0) * EACH + tl.arange(0, EACH)
    real = (m < rows)[None, :] & (n < outputs)[:, None]
    if GATE > 0:
        sums = sums.to(kind).to(tl.float32)
        gate, up = tl.split(tl.permute(tl.reshape(sums, [2, EACH, ROWS]), (1, 2, 0)))
        y = (activated(gate, GATE == 1).to(kind).to(tl.float32) * up).to(kind)
    else:
        y = sums.to(kind)
    place = m[None, :] * outputs + n[:, None]
    if RESIDUAL:
        y = (y.to(tl.float32) + tl.load(residual_ptr + place, mask=real, other=0.0).to(tl.float32)).to(kind)
    tl.store(out_ptr + place, y, mask=real)


@triton.jit
def _lines(outputs, TALL: tl.constexpr, EVEN: tl.constexpr, GATE: tl.constexpr):
    """The weights' lines of a program: TALL after one another, or half as many of the gates and of what they open."""
    EACH: tl.constexpr = TALL // 2 if GATE > 0 else TALL
    line = tl.arange(0, TALL)
    n = tl.program_id(0) * EACH + line % EACH
    if not EVEN:
        n = tl.minimum(n, outputs - 1)
    return n + line // EACH * outputs


@triton.jit(do_not_specialize=["outputs"])
def row_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, outputs,
    K: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Outputs of one row: x [K], w [outputs (twice as many with GATE: gates, then what they open), K].

    TALL lines of w by WIDE numbers at a time, the next ones on their way. EARLY: launched while the kernel before runs,
    and lets the next one be; weights are there before anything runs, so they are asked for before it is waited for.
    """
    if EARLY:
        gdc_launch_dependents()
    k = tl.arange(0, WIDE)
    w_line = w_ptr + _lines(outputs, TALL, EVEN, GATE)[:, None].to(tl.int64) * K + k[None, :]
    w = tl.load(w_line, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    sums = tl.zeros((TALL, WIDE), tl.float32)
    for at in range(0, K, WIDE):
        if K % WIDE == 0:
            x = tl.load(x_ptr + at + k)
        else:
            x = tl.load(x_ptr + at + k, mask=at + k < K, other=0.0)
        following = w
        if K > WIDE:
            behind = at + WIDE
            left = (behind + k < K)[None, :]
            following = tl.load(w_line + behind, mask=left, other=0.0, eviction_policy="evict_first")
        sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
        w = following
    found = tl.sum(sums, 1)[:, None]
    finished(found, bias_ptr, residual_ptr, out_ptr, tl.arange(0, 1), 1, outputs, TALL, EVEN, BIAS, GATE, RESIDUAL)


@triton.jit(do_not_specialize=["rows", "outputs"])
def rows_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, rows, outputs,
    K: tl.constexpr, ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Outputs of up to ROWS rows: x [rows, K], w as `row_kernel` has it, residual and out [rows, outputs]."""
    m = tl.arange(0, ROWS)
    k = tl.arange(0, WIDE)
    here = (m < rows)[None, :]
    w_line = w_ptr + _lines(outputs, TALL, EVEN, GATE)[:, None].to(tl.int64) * K + k[None, :]
    x_row = x_ptr + m[None, :] * K + k[:, None]
    sums = tl.zeros((TALL, ROWS), tl.float32)
    for at in tl.range(0, K, WIDE, num_stages=STAGES):
        if K % WIDE == 0:
            w = tl.load(w_line + at, eviction_policy="evict_first")
            x = tl.load(x_row + at, mask=here, other=0.0)
        else:
            inside = at + k < K
            w = tl.load(w_line + at, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_row + at, mask=here & inside[:, None], other=0.0)
        sums = tl.dot(w, x, sums)
    finished(sums, bias_ptr, residual_ptr, out_ptr, m, rows, outputs, TALL, EVEN, BIAS, GATE, RESIDUAL)


def fits(weight: torch.Tensor) -> bool:
    """Whether products here are for weights [N, K]: two bytes a number, whole lines that begin at multiples of 16
    bytes."""
    right = weight.ndim == 2 and weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous()
    return right and weight.shape[1] % 16 == 0 and weight.data_ptr() % 16 == 0


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gate: str = "",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + act(x weight^T + bias), of 1 to MOST_ROWS rows.

    Args:
        x: [..., K] and weight [N, K], of one dtype, the weight as `fits` wants it; bias: [N].
        gate: "silu" or "gelu_tanh": outputs are act(first half) * second half, [..., N / 2].
        residual: what is added, of the answer's shape.

    Returns:
        [..., N or N / 2], in x's dtype, rounded between these steps as a model does that takes them one by one.
    """
    size = x.shape[-1]
    rows = x.numel() // size
    if not 0 < rows <= MOST_ROWS or size != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(f"x must be 1 to {MOST_ROWS} rows of {weight.shape[1]} {weight.dtype}, got {list(x.shape)}")
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    x, residual, out = operands(x, outputs, residual)
    found = {"K": size, "BIAS": bias is not None, "GATE": GATES[gate], "RESIDUAL": residual is not None}
    tile = _row_tile(size) if rows == 1 else _rows_tile(bool(gate))
    each = tile["TALL"] // 2 if gate else tile["TALL"]
    grid, even = (triton.cdiv(outputs, each),), outputs % each == 0
    bias, residual = weight if bias is None else bias, x if residual is None else residual
    if rows == 1:
        row_kernel[grid](
            x, weight, bias, residual, out, outputs, EVEN=even, **found, **tile, **early(x.device, rows)
        )
    else:
        rows_kernel[grid](x, weight, bias, residual, out, rows, outputs, ROWS=MOST_ROWS, EVEN=even, **found, **tile)
    return out


def operands(
    x: torch.Tensor, outputs: int, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x and what is added as kernels read them, and where the answer [..., outputs] goes. Raises ValueError for what
    cannot be added."""
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    x = x.contiguous()
    if x.data_ptr() % 16:  # anything but multiples of 16 bytes is another kernel, and slower
        x = x.clone()
    if residual is not None:
        residual = residual.contiguous()
        if residual.shape != out.shape or residual.dtype != out.dtype or residual.device != out.device:
            found = f"{residual.dtype} {list(residual.shape)} on {residual.device}"
            raise ValueError(f"residual must be {out.dtype} {list(out.shape)} on {out.device}, got {found}")
    return x, residual, out


def _row_tile(size: int) -> dict[str, int]:
    """What a program of row_kernel has in hand, as it was fastest on an H200 (bench/research/few_rows.py)."""
    wide = size <= 2048 or (size <= 8192 and triton.cdiv(size, 2048) * 2048 <= 1.25 * size)
    return {"TALL": 2, "WIDE": 2048, "num_warps": 4} if wide else {"TALL": 4, "WIDE": 512, "num_warps": 4}


def _rows_tile(gate: bool) -> dict[str, int]:
    """What a program of rows_kernel has in hand."""
    if gate:
        return {"TALL": 32, "WIDE": 128, "STAGES": 4, "num_warps": 2}
    return {"TALL": 16, "WIDE": 256, "STAGES": 4, "num_warps": 1}

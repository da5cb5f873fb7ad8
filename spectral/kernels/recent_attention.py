"""Attention over the exact window, and in how many parts it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from spectral.kernels.choices import DecodeChoices
from spectral.kernels.combine import window_kernel
from spectral.kernels.scoring import interpreted
from spectral.windows import ExactWindow, QuantizedWindow

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels, StepTables

MOST_PARTS = 4
"""Parts in which a row's window is read at most."""

SHORT_STEP = 128
"""Blocks of a step, by unit and head group, up to which it is."""


def read_window(
    choices: DecodeChoices,
    window: ExactWindow,
    step: StepTables,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    cap: float,
    top: torch.Tensor,
    total: torch.Tensor,
    mixed: torch.Tensor,
    *,
    first: bool = False,
) -> None:
    """Over window and new tokens, fp32, by part of the window: into top and total the largest score and the sum of
    weights [B, Hq, parts], into mixed the weighted sum of values [B, Hq, parts, dv]. `first`: the next launch may begin
    beside this one."""
    rows, heads, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[2]
    bits, group = 16, 1
    high = low = scales = window.store
    if isinstance(window, QuantizedWindow):
        high, low, scales, bits, group = window.high, window.low, window.scale, window.bits, window.groups
    parts = top.shape[2]
    window_kernel[(kv_heads, rows, parts)](
        query, key, value, window.store, high, low, scales, step.slot, step.length, step.first, step.before,
        top, total, mixed, dim, heads, kv_heads, window.sinks, window.ring, scale,
        GROUP=heads // kv_heads, G=max(16, triton.next_power_of_2(heads // kv_heads)),
        D=max(16, triton.next_power_of_2(dim)), E=max(16, triton.next_power_of_2(value_dim)), DIM=dim, VDIM=value_dim,
        BITS=bits, SCALE=group, T=_window_tile(choices, max(dim, value_dim)), SOFTCAP=cap, PARTS=parts,
        FIRST=first, SHORT=_short(query, window), num_warps=choices.window_warps, **_registers(bits, choices),
    )  # fmt: skip


def _registers(bits: int, choices: DecodeChoices) -> dict[str, int]:
    """Registers a lane has at most: two of its programs leave a multiprocessor room for others, and nothing is spilled
    (on GPUs from 8.0 to 12.0, with heads of up to 256)."""
    return {"maxnreg": 168} if bits == 8 and choices.window_warps == 4 and not interpreted() else {}


def _short(query: torch.Tensor, window: ExactWindow) -> bool:
    """Whether products are those of 16-bit numbers (Triton's interpreter has none of bf16)."""
    kinds = (torch.float16,) if interpreted() else (torch.float16, torch.bfloat16)
    return query.dtype == window.store.dtype and query.dtype in kinds


def _window_tile(choices: DecodeChoices, dim: int) -> int:
    """Integers' tokens that a program has in hand at once."""
    return choices.window_tile if dim <= 128 else 16  # what fits a consumer card's shared memory


def window_parts(
    layer: LayerKernels, choices: DecodeChoices, window: ExactWindow, rows: int, group: int, blocks: int
) -> int:
    """Parts in which a row's window is read. Each is a chain of accesses of its own, which is what a short step waits
    for; where scores fill the GPU, there is no room for so many programs beside them."""
    codec, quantized = layer.codec, isinstance(window, QuantizedWindow)
    tile = _window_tile(choices, max(codec.key_dim, codec.value_dim)) if quantized else 16
    parts = min(triton.cdiv(window.ring, tile) + 1, MOST_PARTS)
    few = rows * len(layer.unit_heads) * layer.head_groups(group) * blocks <= SHORT_STEP
    # Whole, or in as many: two kernels, no more.
    return parts if blocks and few and rows * codec.kv_heads * parts <= choices.window_programs else 1

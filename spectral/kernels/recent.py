"""Recent tokens in and out of a window of integers (spectral.windows.QuantizedWindow): one launch each, where the
same in torch takes a dozen. The integers and scales are the same, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral.kernels.check_tensors import ANY, BYTES, FLOATS, HALF, INT64, NUMBERS, check
from spectral.windows import QuantizedWindow

TILE = 8
"""Tokens of a program."""


@triton.jit(do_not_specialize=["count", "sinks", "ring"])
def read_kernel(
    slot_ptr, place_ptr, store_ptr, high_ptr, low_ptr, scale_ptr, out_ptr,
    count, heads, sinks, ring,
    WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, EACH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """TILE tokens of one head, fp32.

    slot_ptr: int64 [1], or (EACH) [count]; place_ptr: int64 [count]; store_ptr: [slots, heads, sinks, WIDTH];
    high_ptr: int8 [slots, heads, ring, WIDTH]; low_ptr: uint8 [..., WIDTH / 4]; scale_ptr: fp16 [..., WIDTH / GROUP].
    out_ptr: [heads, count, WIDTH].
    """
    head = tl.program_id(1)
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.arange(0, C)
    own = tl.load(slot_ptr + t * EACH, mask=t < count, other=0) * heads + head
    place = tl.load(place_ptr + t, mask=t < count, other=0)
    real = (t < count)[:, None] & (c < WIDTH)[None, :]
    is_sink = (place < sinks)[:, None]
    kept = store_ptr + (own * sinks + place)[:, None] * WIDTH + c[None, :]
    x = tl.load(kept, mask=real & is_sink, other=0.0).to(tl.float32)
    row = (own * ring + place - sinks)[:, None]
    recent = real & (place >= sinks)[:, None]
    code = tl.load(high_ptr + row * WIDTH + c[None, :], mask=recent, other=0).to(tl.int32)
    if BITS == 10:
        low = tl.load(low_ptr + row * (WIDTH // 4) + c[None, :] // 4, mask=recent, other=0).to(tl.int32)
        code = code * 4 + ((low >> (c % 4 * 2)[None, :]) & 3)
    scale = tl.load(scale_ptr + row * (WIDTH // GROUP) + c[None, :] // GROUP, mask=recent, other=0.0).to(tl.float32)
    x += code.to(tl.float32) * scale
    tl.store(out_ptr + (head.to(tl.int64) * count + t)[:, None] * WIDTH + c[None, :], x, mask=real)


@triton.jit
def _keep(
    x, row, here, known, column, high_ptr, low_ptr, scale_ptr,
    FIRST: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Numbers x [T, groups, WIDE] of tokens as integers and scales, at rows [T] of the ring where they are `here`;
    column [groups, WIDE]: which of the token's DIM they are, behind FIRST others, where `known`."""
    T: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1]
    WIDE: tl.constexpr = x.shape[2]
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    group = tl.arange(0, GROUPS)
    scale = tl.max(tl.abs(x), 2) * (1.0005 / TOP)
    scale = tl.minimum(tl.maximum(scale, 6e-5), 6e4).to(tl.float16)
    target = scale_ptr + row[:, None] * (WIDTH // GROUP) + FIRST // GROUP + group[None, :]
    tl.store(target, scale, mask=here[:, None] & (group < DIM // GROUP)[None, :])
    code = tl.div_rn(x, tl.broadcast_to(scale.to(tl.float32)[:, :, None], [T, GROUPS, WIDE]))
    code = (code + 12582912.0) - 12582912.0  # rounds half to even, as torch does
    code = tl.minimum(tl.maximum(code, -TOP * 1.0), TOP * 1.0).to(tl.int32)
    place = row[:, None, None] * WIDTH + FIRST + column[None, :, :]
    if BITS == 10:
        low = tl.reshape(code & 3, [T, GROUPS, WIDE // 4, 4]) << (tl.arange(0, 4) * 2)[None, None, None, :]
        low = tl.sum(low, 3)
        quarter = tl.arange(0, WIDE // 4)
        byte = group[:, None] * (GROUP // 4) + quarter[None, :]
        some = (quarter < GROUP // 4)[None, :] & (byte < DIM // 4)
        at = row[:, None, None] * (WIDTH // 4) + FIRST // 4 + byte[None, :, :]
        tl.store(low_ptr + at, low.to(tl.uint8), mask=here[:, None, None] & some[None, :, :])
        code = code >> 2
    tl.store(high_ptr + place, code.to(tl.int8), mask=here[:, None, None] & known[None, :, :])


@triton.jit(do_not_specialize=["count", "sinks", "ring", "x_head", "x_row"])
def write_kernel(
    slot_ptr, place_ptr, source_ptr, x_ptr, high_ptr, low_ptr, scale_ptr,
    count, heads, sinks, ring, x_head, x_row,
    FIRST: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head's keys (FIRST 0) or values (FIRST: the keys' size) of TILE tokens into a slot's ring.

    source_ptr: int64 [count]: which tokens of x_ptr [heads, tokens, DIM] (by its strides) go to places place_ptr
    [count]. The others are those of `read_kernel`. Numbers lie in GROUPS groups of GROUP, WIDE places each (powers of
    two).
    """
    head = tl.program_id(1)
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = tl.arange(0, WIDE)
    own = tl.load(slot_ptr) * heads + head
    here = t < count
    row = own * ring + tl.load(place_ptr + t, mask=here, other=0) - sinks
    token = tl.load(source_ptr + t, mask=here, other=0)
    column = tl.arange(0, GROUPS)[:, None] * GROUP + inside[None, :]
    known = (inside < GROUP)[None, :] & (column < DIM)
    x = x_ptr + head.to(tl.int64) * x_head + (token * x_row)[:, None, None] + column[None, :, :]
    x = tl.load(x, mask=here[:, None, None] & known[None, :, :], other=0.0).to(tl.float32)
    _keep(x, row, here, known, column, high_ptr, low_ptr, scale_ptr, FIRST, DIM, WIDTH, GROUP, BITS)


@triton.jit(do_not_specialize=["rows", "slots", "sinks", "ring"])
def step_kernel(
    slot_ptr, place_ptr, x_ptr, high_ptr, low_ptr, scale_ptr,
    rows, slots, heads, sinks, ring,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One head of a step's tokens, each of its own slot, in the ring of one of several layers.

    slot_ptr, place_ptr: int64 [rows]; x_ptr: [layers, rows, heads, WIDTH], contiguous; high_ptr: int8 [layers, slots,
    heads, ring, WIDTH], and low_ptr and scale_ptr likewise.
    """
    at, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = tl.arange(0, WIDE)
    slot = tl.load(slot_ptr + at + tl.arange(0, 1))
    row = ((layer * slots + slot) * heads + head) * ring + tl.load(place_ptr + at) - sinks
    column = tl.arange(0, GROUPS)[:, None] * GROUP + inside[None, :]
    known = (inside < GROUP)[None, :] & (column < WIDTH)
    x = x_ptr + ((layer * rows + at) * heads + head) * WIDTH + column[None, :, :]
    x = tl.load(x, mask=known[None, :, :], other=0.0).to(tl.float32)
    _keep(x, row, row >= 0, known, column, high_ptr, low_ptr, scale_ptr, 0, WIDTH, WIDTH, GROUP, BITS)


def served(window: object) -> bool:
    """Whether these kernels read and write a window."""
    return isinstance(window, QuantizedWindow) and (window.bits == 8 or window.groups % 4 == 0)


def read_recent(window: QuantizedWindow, slot: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Tokens at places [t] of slot [1], or each of its own slot [t], all int64: float32 [H, t, d + dv], as
    `window.read_places`.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Slots and places are not checked against
    the window: they lie on the device, and the host would have to wait for it."""
    heads, count = window.shape.kv_heads, place.numel()
    _check(window, slot, place, each=slot.numel() == count)
    out = torch.empty((heads, count, window.shape.head_numbers), dtype=torch.float32, device=place.device)
    if not count:
        return out
    read_kernel[(triton.cdiv(count, TILE), heads)](
        slot, place, window.store, window.high, window.low, window.scale, out,
        count, heads, window.sinks, window.ring,
        WIDTH=window.shape.head_numbers, C=triton.next_power_of_2(window.shape.head_numbers), GROUP=window.groups,
        BITS=window.bits, EACH=int(slot.numel() > 1), TILE=TILE, num_warps=4,
    )  # fmt: skip
    return out


def write_recent(
    window: QuantizedWindow,
    slot: torch.Tensor,
    place: torch.Tensor,
    source: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Tokens source [n] of key [H, t, d] and value [H, t, dv] to places [n] of slot [1], all int64. No place may be a
    sink's: its token would go where another head, or another slot, has its own.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Slot, places and sources are not checked
    against window and tokens, nor for sinks: they lie on the device, and the host would have to wait for it."""
    heads, count, device = window.shape.kv_heads, place.numel(), window.high.device
    _check(window, slot, place)
    check("source", source, INT64, (count,), device)
    check("key", key, FLOATS, (heads, "tokens", window.shape.key_dim), device, NUMBERS)
    check("value", value, FLOATS, (heads, key.shape[1], window.shape.value_dim), device, NUMBERS)
    if not count:
        return
    first = 0
    for x, dim in ((key, window.shape.key_dim), (value, window.shape.value_dim)):
        write_kernel[(triton.cdiv(count, TILE), heads)](
            slot, place, source, x, window.high, window.low, window.scale,
            count, heads, window.sinks, window.ring, x.stride(0), x.stride(1),
            FIRST=first, DIM=dim, WIDTH=window.shape.head_numbers, GROUP=window.groups,
            GROUPS=triton.next_power_of_2(dim // window.groups), WIDE=max(4, triton.next_power_of_2(window.groups)),
            BITS=window.bits, TILE=TILE, num_warps=4,
        )  # fmt: skip
        first += dim


def write_step(
    window: QuantizedWindow, tensors: list[torch.Tensor], slot: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Tokens [layers, n, H, d + dv] to slot [n] and place [n], both int64, into `tensors` [layers, slots, ...] of
    windows like this one. No place may be a sink's: its token would go where another head, or another slot, has its
    own.

    Raises ValueError for tensors of other shapes, dtypes, strides or devices. Slots and places are not checked against
    the windows, nor for sinks: they lie on the device, and the host would have to wait for it."""
    _, high, low, scale = tensors
    heads, width, rows, device = window.shape.kv_heads, window.shape.head_numbers, slot.numel(), window.high.device
    _check(window, slot, place, each=True)
    check("place", place, INT64, (rows,), device)
    check("tokens", tokens, FLOATS, ("layers", rows, heads, width), device, ANY)
    layers = tokens.shape[0]
    check("high", high, (torch.int8,), (layers, "slots", heads, window.ring, width), device)
    lead = (layers, high.shape[1], heads, window.ring)
    check("low", low, BYTES, (*lead, window.low.shape[-1]), device)
    check("scale", scale, HALF, (*lead, width // window.groups), device)
    step_kernel[(rows, heads, layers)](
        slot, place, tokens.contiguous(), high, low, scale, rows, high.shape[1], heads, window.sinks, window.ring,
        WIDTH=width, GROUP=window.groups, GROUPS=triton.next_power_of_2(width // window.groups),
        WIDE=max(4, triton.next_power_of_2(window.groups)), BITS=window.bits, num_warps=1,
    )  # fmt: skip


def _check(window: QuantizedWindow, slot: torch.Tensor, place: torch.Tensor, *, each: bool = False) -> None:
    """Raise ValueError naming what does not fit."""
    check("slot", slot, INT64, ("slots",), window.high.device)
    check("place", place, INT64, ("places",), window.high.device)
    if slot.numel() != 1 and not each:
        raise ValueError(f"slot must be one, got {slot.numel()}")
    if not all(x.is_contiguous() for x in (window.store, window.high, window.low, window.scale)):
        raise ValueError("window must have contiguous tensors")

"""Pages at one setting to pages at a coarser one, code to code, with nothing in between in memory.

A lane makes one byte of the new page: what it must know of its quads stays in registers while it goes over pages. Each
byte of a new page is written exactly once. Old and new codes are uniform with one deviation (spectral.bits), so a new
code is a line of the old one, rounded down and clamped: integer arithmetic that equals the reference's exactly
(spectral.kernels.quads.linear_map looks for the line, and compares all codes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from spectral.codec import LayerCodec
from spectral.kernels.check_tensors import check_pool
from spectral.kernels.quads import SHIFT, squeeze_parcels
from spectral.layout import PLANE_ORDER

LANES = 128
PAGES = 8
"""Pages that a program has in hand at once."""

ROUNDS = 8
"""How often it takes that many."""

@triton.jit
def _lines(row, lanes, real):
    """The 9 numbers of a quad of every lane (see `SqueezeLayer`), each [LANES, 1]."""
    word = tl.load(row, mask=real, other=0)[:, None]
    bit = tl.load(row + lanes, mask=real, other=0)[:, None]
    size = tl.load(row + 2 * lanes, mask=real, other=1)[:, None]
    low = tl.load(row + 3 * lanes, mask=real, other=-1)[:, None]
    low_bit = tl.load(row + 4 * lanes, mask=real, other=0)[:, None]
    scale = tl.load(row + 5 * lanes, mask=real, other=0)[:, None]
    offset = tl.load(row + 6 * lanes, mask=real, other=0)[:, None]
    top = tl.load(row + 7 * lanes, mask=real, other=0)[:, None]
    shift = tl.load(row + 8 * lanes, mask=real, other=0)[:, None]
    return word, bit, size, low, low_bit, scale, offset, top, shift


@triton.jit
def _fields(source, inside, lines, BITS: tl.constexpr, COUNT: tl.constexpr, DOUBLE: tl.constexpr, BINARY: tl.constexpr):
    """COUNT new fields of BITS bits, the first in the lowest: int32 [LANES, PAGES]. source: pointers [1, PAGES]."""
    word, bit, size, low, low_bit, scale, offset, top, shift = lines
    mask = (1 << size) - 1
    x = tl.load(source + word, mask=inside, other=0) >> bit
    if DOUBLE:
        y = tl.load(source + low, mask=inside & (low >= 0), other=0) >> low_bit
        twice = tl.where(low >= 0, 4, 1)
    out = tl.zeros_like(x)
    for i in tl.static_range(COUNT):
        code = x & mask
        x = x >> size
        if DOUBLE:
            code = code * twice + (y & 3)
            y = y >> 2
        code = (code * scale + offset) >> BINARY
        code = tl.minimum(tl.maximum(code, 0), top)
        out |= ((code >> shift) & ((1 << BITS) - 1)) << (BITS * i)
    return out


@triton.jit(do_not_specialize=["lanes", "count", "rounds", "old_nbytes", "new_nbytes"])
def squeeze_kernel(
    old_ptr, new_ptr, at_ptr, table_ptr,
    lanes, count, rounds, old_nbytes, new_nbytes,
    BITS: tl.constexpr, DOUBLE: tl.constexpr, BINARY: tl.constexpr, LANES: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Bytes of fields of BITS bits, LANES of them in PAGES * rounds pages.

    old_ptr: int32 words of [count, old_nbytes]; new_ptr: uint8 [count, new_nbytes]; at_ptr: int32 [lanes];
    table_ptr: int32 [Q, 9, lanes] (see `SqueezeLayer`).
    """
    # Lanes come first: among dimensions without known contiguity the compiler runs threads along the first.
    COUNT: tl.constexpr = 4 if BITS <= 2 else 8 // BITS
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < lanes
    at = tl.load(at_ptr + lane, mask=real, other=0)[:, None]
    first = tl.program_id(1).to(tl.int64) * PAGES * rounds + tl.arange(0, PAGES)
    lower = _lines(table_ptr + lane, lanes, real)
    upper = lower
    if BITS == 1:
        upper = _lines(table_ptr + 9 * lanes + lane, lanes, real)
    for turn in range(rounds):
        page = (first + turn * PAGES)[None, :]
        inside = (page < count) & real[:, None]
        source = old_ptr + page * (old_nbytes // 4)
        byte = _fields(source, inside, lower, BITS, COUNT, DOUBLE, BINARY)
        if BITS == 1:
            byte |= _fields(source, inside, upper, BITS, COUNT, DOUBLE, BINARY) << 4
        tl.store(new_ptr + page * new_nbytes + at, byte.to(tl.uint8), mask=inside)


def compile_all(device: torch.device) -> None:
    """Compile every variant of the kernel: which ones a squeeze needs depends on both settings, and the first one comes
    when memory is short and streams run."""
    at = torch.arange(LANES, dtype=torch.int32, device=device)
    table = torch.zeros((2, 9, LANES), dtype=torch.int32, device=device)
    table[:, 2], table[:, 3] = 1, -1  # fields of one bit, no low ones
    pages = torch.zeros((PAGES, LANES), dtype=torch.uint8, device=device)
    for bits in PLANE_ORDER:
        for double in (False, True):
            squeeze_kernel[(1, 1)](
                pages.view(torch.int32), torch.empty_like(pages), at, table, LANES, PAGES, 1, LANES, LANES,
                BITS=bits, DOUBLE=double, BINARY=SHIFT, LANES=LANES, PAGES=PAGES, num_warps=4,
            )  # fmt: skip


@dataclass
class _Launch:
    """Tables of one launch on a device. at: int32 [m]; table: int32 [Q, 9, m]."""

    bits: int
    double: bool
    at: torch.Tensor
    table: torch.Tensor


def _kinds(codec: LayerCodec) -> dict[str, object]:
    """What two settings of one layer have in common, by name."""
    return {
        "page_tokens": codec.page_tokens,
        "classes": codec.classes,
        "key_dim": codec.key_dim,
        "value_dim": codec.value_dim,
        "units (heads, sides, latents)": [(unit.heads, unit.side, unit.channels) for unit in codec.units],
        "quantizers": codec.units[0].steps,
    }


class SqueezeLayer:
    """From one codec's pages to another's of the same layer, on the first one's device. Raises ValueError where these
    are not of one layer, or the kernel cannot map them."""

    def __init__(self, old: LayerCodec, new: LayerCodec) -> None:
        before, after = _kinds(old), _kinds(new)
        other = [name for name in before if before[name] != after[name]]
        if other:
            differ = "; ".join(f"{name} {before[name]} and {after[name]}" for name in other)
            raise ValueError(f"both settings must have one page size and the same units, got {differ}")
        self.old_nbytes, self.new_nbytes = old.page_nbytes, new.page_nbytes
        self.device = old.units[0].mean.device
        found = squeeze_parcels(old, new)
        tensors = found.parcel.to(self.device)
        self.launches = [_Launch(*kind, *tensors[2 * i : 2 * i + 2]) for i, kind in enumerate(found.kinds)]

    def __call__(self, pages: torch.Tensor, out: torch.Tensor) -> None:
        """pages uint8 [n, old bytes] -> out uint8 [n, new bytes], both contiguous, on the codec's device. Raises
        ValueError for others, and for what begins at no multiple of 8 bytes."""
        check_pool("pages", pages, "pages", self.old_nbytes, self.device)
        count = pages.shape[0]
        check_pool("out", out, count, self.new_nbytes, self.device)
        if not count or not self.new_nbytes:
            return
        words = pages.view(torch.int32) if pages.numel() else out.view(torch.int32)
        rounds = max(1, min(ROUNDS, count // PAGES))
        for launch in self.launches:
            lanes = launch.at.numel()
            grid = (triton.cdiv(lanes, LANES), triton.cdiv(count, PAGES * rounds))
            squeeze_kernel[grid](
                words, out, launch.at, launch.table, lanes, count, rounds, self.old_nbytes, self.new_nbytes,
                BITS=launch.bits, DOUBLE=launch.double, BINARY=SHIFT, LANES=LANES, PAGES=PAGES, num_warps=4,
            )  # fmt: skip

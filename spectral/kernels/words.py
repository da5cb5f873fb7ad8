"""Words of global memory by lane, in PTX: Triton's search for coalesced layouts is quadratic in loads.

The same in plain Triton for the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_words(p, FAST: tl.constexpr):
    """Eight aligned bytes as two words."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [p.to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        x = tl.load(p.to(tl.pointer_type(tl.int64)))
        return x.to(tl.int32), (x >> 32).to(tl.int32)


@triton.jit
def four_words(p, FAST: tl.constexpr):
    """Sixteen aligned bytes as four words, of a table that shall stay in the first cache; p: pointer to int32."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ld.global.nc.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [p.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)


@triton.constexpr_function
def _table_text(stride: int, offset: int) -> str:
    factors = "ld.global.nc.L1::evict_last.v2.b32 {$0, $1}"
    place = "ld.global.nc.L1::evict_last.b32 $2"
    return (
        f"{{.reg .b64 at; mad.wide.s32 at, $4, {int(stride)}, $3; "
        f"{factors}, [at+{int(offset)}]; {place}, [at+{int(offset + stride + 8)}];}}"
    )


@triton.jit
def table_words(p, n, STRIDE: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr):
    """Of an entry n STRIDE + OFFSET words behind p the factors, and of one STRIDE words behind it the place of the
    run. One instruction makes their address."""
    if FAST:
        return tl.inline_asm_elementwise(
            _table_text(4 * STRIDE, 4 * OFFSET),
            "=&r,=&r,=r,l,r",
            [p.to(tl.int64), n],
            dtype=(tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        p += n * STRIDE + OFFSET
        return tl.load(p), tl.load(p + 1), tl.load(p + STRIDE + 2)


@triton.jit
def word(p, NBYTES: tl.constexpr, FAST: tl.constexpr):
    """One, two or four aligned bytes as a word."""
    if FAST:
        if NBYTES == 4:
            return tl.inline_asm_elementwise(
                "ld.global.nc.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
            )
        elif NBYTES == 2:
            return tl.inline_asm_elementwise(
                "{.reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h;}",
                "=r,l",
                [p.to(tl.int64)],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "ld.global.nc.u8 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
            )
    elif NBYTES == 4:
        return tl.load(p.to(tl.pointer_type(tl.int32)))
    elif NBYTES == 2:
        return tl.load(p.to(tl.pointer_type(tl.int16))).to(tl.int32) & 0xFFFF
    else:
        return tl.load(p.to(tl.pointer_type(tl.uint8))).to(tl.int32)

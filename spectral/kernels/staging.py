"""Packed bytes on their way through shared memory: asynchronous copies by lane, in PTX (NVIDIA GPUs from sm_80 up).

A warp keeps a ring of stages of its own: it asks for a stage's bytes some steps before it uses them, so that a few
warps hide the memory's latency. Triton has no words for that below whole tensors, so the ring is declared and used by
these functions alone; the interpreter reads the same bytes straight from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _declared(nbytes: int) -> str:
    return f".shared .align 128 .b8 spectral_stage[{int(nbytes)}]; mov.u32 $0, spectral_stage;"


@triton.constexpr_function
def _copies(sources: int, each: int, nbytes: int, to_stride: int, from_stride: int, source_stride: int) -> str:
    """Operands: result (0), destination, sources (64 bit). Copy `each` pieces from every source."""
    lines = []
    for s in range(int(sources)):
        for k in range(int(each)):
            to, at = s * int(source_stride) + k * int(to_stride), k * int(from_stride)
            cache = "cg" if int(nbytes) == 16 else "ca"  # sixteen bytes pass the first cache by
            lines.append(f"cp.async.{cache}.shared.global [$1+{to}], [${2 + s}+{at}], {int(nbytes)};")
    return "\n".join([*lines, "mov.b32 $0, 0;"])


@triton.constexpr_function
def _longs(count: int) -> str:
    return ",".join(["=r", "r"] + ["l"] * int(count))


@triton.constexpr_function
def _waiting(pending: int) -> str:
    return f"cp.async.wait_group {int(pending)};\nbar.warp.sync 0xffffffff;\nmov.b32 $0, 0;"


@triton.constexpr_function
def _held(nbytes: int) -> str:
    return {
        4: "ld.shared.b32 $0, [$1];",
        2: "{.reg .b16 h; ld.shared.b16 h, [$1]; cvt.u32.u16 $0, h;}",
        1: "ld.shared.u8 $0, [$1];",
    }[int(nbytes)]


@triton.jit
def stage(lane, NBYTES: tl.constexpr):
    """Address of NBYTES (at most 48 KiB) of the program's shared memory, for every lane. Once in a kernel."""
    return tl.inline_asm_elementwise(_declared(NBYTES), "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy_pieces(
    to, sources, EACH: tl.constexpr, NBYTES: tl.constexpr, TO_STRIDE: tl.constexpr, FROM_STRIDE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Ask for pieces of 4, 8 or 16 bytes: piece k of source s goes to `to` + s SOURCE_STRIDE + k TO_STRIDE. `sources`:
    a tuple of int64 addresses."""
    tl.inline_asm_elementwise(
        _copies(len(sources), EACH, NBYTES, TO_STRIDE, FROM_STRIDE, SOURCE_STRIDE),
        _longs(len(sources)),
        (to,) + sources,
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def close_stage(lane):
    """What was asked for since the last call is one stage."""
    tl.inline_asm_elementwise(
        "cp.async.commit_group;\nmov.b32 $0, 0;", "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_stages(lane, PENDING: tl.constexpr):
    """Until all but the last PENDING stages are there, for all lanes of the warp."""
    tl.inline_asm_elementwise(_waiting(PENDING), "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def held_word(at, NBYTES: tl.constexpr):
    """One, two or four aligned bytes of shared memory as a word."""
    return tl.inline_asm_elementwise(_held(NBYTES), "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def held_two(at):
    """Eight aligned bytes of shared memory as two words."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.constexpr_function
def _chunk_text(pieces: int) -> str:
    copy = "cp.async.cg.shared.global"
    lines = ["{.reg .pred p; setp.ne.b32 p, $3, 0;"]
    lines += [f"{copy} [$1+{64 * k}], [$2+{64 * k}], 16;" for k in range(int(pieces))]
    return " ".join([*lines, f"@p {copy} [$1+{64 * int(pieces)}], [$2+{64 * int(pieces)}], 16;", "mov.b32 $0, 0;}"])


@triton.jit
def copy_part(to, source, last, PIECES: tl.constexpr):
    """Ask for PIECES pieces of sixteen bytes, 64 bytes apart, and where `last` is not zero for another; they go to as
    far behind `to` as they lie behind `source` (int64 address)."""
    tl.inline_asm_elementwise(
        _chunk_text(PIECES), "=r,r,l,r", [to, source, last], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def hold_four(at, a, b, c, d):
    """Four words to sixteen aligned bytes of shared memory."""
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5};\nmov.b32 $0, 0;",
        "=r,r,r,r,r,r",
        [at, a, b, c, d],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def held_four(at):
    """Sixteen aligned bytes of shared memory as four words."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def hold_float(at, x):
    """An fp32 number to four aligned bytes of shared memory."""
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2;\nmov.b32 $0, 0;", "=r,r,f", [at, x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def held_float(at):
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def store_four(p, a, b, c, d, FAST: tl.constexpr):
    """Four words to sixteen aligned bytes of global memory; p: pointer to int32."""
    if FAST:
        tl.inline_asm_elementwise(
            "st.global.v4.b32 [$1], {$2, $3, $4, $5};\nmov.b32 $0, 0;",
            "=r,l,r,r,r,r",
            [p.to(tl.int64), a, b, c, d],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(p, a)
        tl.store(p + 1, b)
        tl.store(p + 2, c)
        tl.store(p + 3, d)


@triton.jit
def store_word(p, a, FAST: tl.constexpr):
    """A word to four aligned bytes of global memory; p: pointer to int32."""
    if FAST:
        tl.inline_asm_elementwise(
            "st.global.b32 [$1], $2;\nmov.b32 $0, 0;",
            "=r,l,r",
            [p.to(tl.int64), a],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(p, a)


@triton.jit
def store_half(p, a, FAST: tl.constexpr):
    """A number as fp16; p: pointer to fp16."""
    if FAST:
        tl.inline_asm_elementwise(
            "{.reg .b16 h; cvt.rn.f16.f32 h, $2; st.global.b16 [$1], h; mov.b32 $0, 0;}",
            "=r,l,f",
            [p.to(tl.int64), a],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(p, a.to(tl.float16))


@triton.jit
def prefetch(p):
    """Ask for the line of global memory at a pointer to come nearer."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1];\nmov.b32 $0, 0;", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )

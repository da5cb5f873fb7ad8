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
def _policy() -> str:
    """What is read once is what the second-level cache gives up first: the weights that a step leaves for its next
    kernel stay. (The assembler makes a constant of it.)"""
    return ".reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"


@triton.constexpr_function
def _piece(number: int) -> str:
    """Operands: result (0), destination, source (64 bit). The first cache is passed by."""
    at = 64 * number
    return f"cp.async.cg.shared.global.L2::cache_hint [$1+{at}], [$2+{at}], 16, policy;"


@triton.constexpr_function
def _pieces(count: int) -> str:
    return " ".join(_piece(k) for k in range(int(count)))


@triton.constexpr_function
def _pieces_text(count):
    return f"{{{_policy()} {_pieces(count)} mov.b32 $0, 0;}}"


@triton.constexpr_function
def _part_text(count):
    pieces = f"{_pieces(count)} @p {_piece(int(count))}"
    return f"{{{_policy()} .reg .pred p; setp.ne.b32 p, $3, 0; {pieces} mov.b32 $0, 0;}}"


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
def copy_pieces(to, source, PIECES: tl.constexpr):
    """Ask for PIECES pieces of sixteen bytes, 64 bytes apart, from an int64 address; they go to as far behind `to` as
    they lie behind `source`."""
    tl.inline_asm_elementwise(
        _pieces_text(PIECES), "=r,r,l", [to, source], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def copy_part(to, source, last, PIECES: tl.constexpr):
    """The same, and where `last` is not zero another one behind them."""
    tl.inline_asm_elementwise(
        _part_text(PIECES), "=r,r,l,r", [to, source, last], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def _lines_text(apart):
    """Operands: result (0), destination, two sources (64 bit), whether each has a last piece."""
    lines = []
    for k in range(2):
        for at in (0, 128, 256):
            copy = f"cp.async.cg.shared.global.L2::cache_hint [$1+{int(apart) * k + at}], [${2 + k}+{at}], 16, policy;"
            lines.append(f"@p{k} {copy}" if at == 256 else copy)
    last = " ".join(f"setp.ne.b32 p{k}, ${4 + k}, 0;" for k in range(2))
    return f"{{{_policy()} .reg .pred p<2>; {last} {' '.join(lines)} mov.b32 $0, 0;}}"


@triton.jit
def copy_lines(to, near, far, last_near, last_far, APART: tl.constexpr):
    """Ask for two pieces of sixteen bytes, 128 bytes apart, from each of two int64 addresses, and where `last_` is not
    zero for another one behind them. The second two go to APART bytes behind the first."""
    tl.inline_asm_elementwise(
        _lines_text(APART), "=r,r,l,l,r,r", [to, near, far, last_near, last_far],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.constexpr_function
def _operands_text():
    """Operands: result (0), destination, two sources (64 bit). They come through the first cache: a sector has two
    lanes' words."""
    words = [(k, far) for k in (0, 1) for far in (0, 1)]
    copies = [f"cp.async.ca.shared.global [$1+{8 * k + 4 * far}], [${2 + far}+{4 * k}], 4;" for k, far in words]
    return f"{' '.join(copies)} mov.b32 $0, 0;"


@triton.jit
def copy_operands(to, near, far):
    """Ask for two words each from two int64 addresses; they go to sixteen bytes in turns."""
    tl.inline_asm_elementwise(
        _operands_text(), "=r,r,l,l", [to, near, far], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def copy_reused(to, source):
    """Ask for sixteen bytes from an int64 address, that other programs will ask for too."""
    tl.inline_asm_elementwise(
        "cp.async.cg.shared.global [$1], [$2], 16; mov.b32 $0, 0;",
        "=r,r,l",
        [to, source],
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

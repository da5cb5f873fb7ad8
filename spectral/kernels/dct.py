"""The page transform of one lane: an orthonormal DCT of as many numbers as a page has tokens, all in one lane's
registers."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.lanes import constraints, floats


@triton.constexpr_function
def _dct(size: int, inverse: bool) -> str:
    """`size` numbers through the orthonormal DCT-II matrix (frequency by token), or back to tokens."""
    from spectral.bits import dct_matrix

    matrix = dct_matrix(size)
    half = size // 2
    word = _float_word
    lines = ["{", f".reg .f32 e<{size}>, o<{size}>;"]
    x = [f"${size + i}" for i in range(size)]
    for t in range(half):
        if inverse:  # tokens t and size - 1 - t: the sum and the difference of even and odd frequencies
            for name, first in (("e", 0), ("o", 1)):
                for k, f in enumerate(range(first, size, 2)):
                    factor = word(matrix[f, t])
                    lines.append(
                        f"mul.f32 {name}{t}, {x[f]}, {factor};"
                        if k == 0
                        else f"fma.rn.f32 {name}{t}, {x[f]}, {factor}, {name}{t};"
                    )
        else:
            lines += [
                f"add.f32 e{t}, {x[t]}, {x[size - 1 - t]};",
                f"sub.f32 o{t}, {x[t]}, {x[size - 1 - t]};",
            ]
    if inverse:
        for t in range(half):
            lines += [f"add.f32 ${t}, e{t}, o{t};", f"sub.f32 ${size - 1 - t}, e{t}, o{t};"]
    else:
        for f in range(size):
            name = "eo"[f % 2]
            for t in range(half):
                factor = word(matrix[f, t])
                lines.append(
                    f"mul.f32 ${f}, {name}{t}, {factor};"
                    if t == 0
                    else f"fma.rn.f32 ${f}, {name}{t}, {factor}, ${f};"
                )
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def _float_word(value: float) -> str:
    import struct

    return "0f" + struct.pack(">f", float(value)).hex().upper()


@triton.constexpr_function
def dct_text(size, inverse):
    return _dct(int(size), bool(inverse))


@triton.jit
def dct(x, SIZE: tl.constexpr, INVERSE: tl.constexpr, FAST: tl.constexpr):
    """SIZE fp32 numbers a lane: tokens to frequencies, or back."""
    if FAST:
        return tl.inline_asm_elementwise(
            dct_text(SIZE, INVERSE), constraints(SIZE, SIZE, 0), x, dtype=floats(SIZE), is_pure=True, pack=1
        )
    else:
        i = tl.arange(0, SIZE)
        angle = (i[None, :] + 0.5) * i[:, None] * (3.141592653589793 / SIZE)
        matrix = tl.cos(angle) * tl.where(i == 0, 1.0, 1.4142135623730951)[:, None] * (SIZE**-0.5)  # [frequency, token]
        if INVERSE:
            matrix = tl.trans(matrix)
        return unstacked(tl.sum(matrix[None, :, :] * stacked(x, SIZE)[:, None, :], 2), SIZE)


@triton.jit
def stacked(x, SIZE: tl.constexpr):
    """A tuple of [n] as [n, SIZE]."""
    if SIZE == 1:
        return x[0][:, None]
    else:
        both = tl.join(stacked(x[0::2], SIZE // 2), stacked(x[1::2], SIZE // 2))
        return tl.reshape(both, [x[0].shape[0], SIZE])


@triton.jit
def unstacked(x, SIZE: tl.constexpr):
    """The inverse of `stacked`."""
    if SIZE == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], SIZE // 2, 2]))
        a, b = unstacked(even, SIZE // 2), unstacked(odd, SIZE // 2)
        out = ()
        for k in tl.static_range(SIZE // 2):
            out = out + (a[k], b[k])
        return out

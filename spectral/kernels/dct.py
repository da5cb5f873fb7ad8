"""The page transform of one lane: an orthonormal DCT of as many numbers as a page has tokens, all in one lane's
registers."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import log2
from spectral.kernels.lanes import constraints, floats


@triton.constexpr_function
def _sums(out, x, matrix):
    """out = matrix x, [outputs, inputs], as lines of PTX; names of registers."""
    lines = []
    for name, row in zip(out, matrix, strict=True):
        for k, factor in enumerate(row):
            value = _float_word(factor)
            lines.append(
                f"mul.f32 {name}, {x[k]}, {value};" if k == 0 else f"fma.rn.f32 {name}, {x[k]}, {value}, {name};"
            )
    return lines


@triton.constexpr_function
def _steps(out, x, matrix, inverse, depth):
    """Lines of the transform. To tokens the first half is the sum of what even and odd frequencies add, the second
    half their difference; even ones are a transform of half the size. matrix: [frequency, token]."""
    size = len(x)
    half = size // 2
    if not half:
        return _sums(out, x, matrix)
    even, odd = [f"e{depth}_{t}" for t in range(half)], [f"o{depth}_{t}" for t in range(half)]
    inner = matrix[0::2, :half], matrix[1::2, :half]
    if inverse:
        lines = _steps(even, x[0::2], inner[0], inverse, depth + 1) + _sums(odd, x[1::2], inner[1].T)
        for t in range(half):
            lines += [f"add.f32 {out[t]}, {even[t]}, {odd[t]};", f"sub.f32 {out[size - 1 - t]}, {even[t]}, {odd[t]};"]
        return lines
    lines = []
    for t in range(half):
        lines += [f"add.f32 {even[t]}, {x[t]}, {x[size - 1 - t]};", f"sub.f32 {odd[t]}, {x[t]}, {x[size - 1 - t]};"]
    return lines + _steps(out[0::2], even, inner[0], inverse, depth + 1) + _sums(out[1::2], odd, inner[1])


@triton.constexpr_function
def _dct(size: int, inverse: bool) -> str:
    """`size` numbers through the orthonormal DCT-II matrix (frequency by token), or back to tokens."""
    from spectral.bits import dct_matrix

    depths = [(d, size >> (d + 1)) for d in range(log2(size))]
    declared = [f".reg .f32 {name}{d}_<{n}>;" for d, n in depths for name in "eo"]
    out, x = [f"${t}" for t in range(size)], [f"${size + t}" for t in range(size)]
    return "\n".join(["{", *declared, *_steps(out, x, dct_matrix(size), inverse, 0), "}"])


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
    """A tuple of SIZE tensors of one shape, side by side in a last axis."""
    if SIZE == 1:
        return tl.expand_dims(x[0], -1)
    elif SIZE == 2:
        return tl.join(x[0], x[1])
    else:
        both = tl.join(stacked(x[0::2], SIZE // 2), stacked(x[1::2], SIZE // 2))
        return tl.reshape(both, x[0].shape + [SIZE])


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

"""From scores of a page's rows to weights: softmax within a block, and where the weights are left."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.dct import dct
from spectral.kernels.lanes import packed
from spectral.kernels.staging import store_four, store_half, store_word


@triton.jit
def _column(s, i: tl.constexpr, P: tl.constexpr):
    """Number i of every row."""
    out = ()
    for row in tl.static_range(P):
        out = out + (s[4 * row + i],)
    return out


@triton.jit
def largest(x, P: tl.constexpr):
    top = x[0]
    for i in tl.static_range(1, P):
        top = tl.maximum(top, x[i])
    return top


@triton.jit
def over_lanes(x, WARPS: tl.constexpr):
    """The largest over the lanes t of a head and over warps, for every lane."""
    x = tl.max(tl.max(tl.reshape(x, [WARPS, 8, 4]), 2), 0)
    return tl.reshape(tl.broadcast_to(x[None, :, None], [WARPS, 8, 4]), [32 * WARPS])


@triton.constexpr_function
def quad_text(added):
    operation = "add.f32" if added else "max.f32"
    turns = [f"shfl.sync.bfly.b32 y, $0, {k}, 0x1f, 0xffffffff; {operation} $0, $0, y;" for k in (1, 2)]
    return "{.reg .f32 y; mov.f32 $0, $1; " + " ".join(turns) + "}"


@triton.jit
def over_quad(x, ADDED: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr):
    """The largest over the lanes t of a head, or (ADDED) their sum, for each of them."""
    if FAST:
        return tl.inline_asm_elementwise(quad_text(ADDED), "=&f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        x = tl.reshape(x, [WARPS * 8, 4])
        x = tl.sum(x, 1) if ADDED else tl.max(x, 1)
        return tl.reshape(tl.broadcast_to(x[:, None], [WARPS * 8, 4]), [32 * WARPS])


@triton.jit
def softcapped(x, P: tl.constexpr, SOFTCAP: tl.constexpr):
    """Gemma's c tanh(s / c), all in units of log2."""
    out = ()
    for i in tl.static_range(P):
        z = tl.exp2(tl.abs(x[i]) * (-2.8853900817779268 / SOFTCAP))
        out = out + (tl.where(x[i] < 0, -SOFTCAP, SOFTCAP) * (1 - z) / (1 + z),)
    return out


@triton.jit
def _valid(x, valid, P: tl.constexpr):
    """-inf where there is no page."""
    out = ()
    for k in tl.static_range(P):
        out = out + (tl.where(valid, x[k], float("-inf")),)
    return out


@triton.jit
def tokens(
    s, i: tl.constexpr, mean, valid, P: tl.constexpr, FLAT: tl.constexpr, SOFTCAP: tl.constexpr, FAST: tl.constexpr
):
    """Scores of a page's tokens for one head, -inf where there is no page: number i of every row."""
    return token_scores(_column(s, i, P), mean, valid, P, FLAT, SOFTCAP, FAST)


@triton.jit
def token_scores(
    s, mean, valid, P: tl.constexpr, FLAT: tl.constexpr, SOFTCAP: tl.constexpr, FAST: tl.constexpr
):
    """The same from one number of every row; FLAT: rows are tokens."""
    if FLAT:
        x = ()
        for k in tl.static_range(P):
            x = x + (s[k] + mean,)
        if SOFTCAP > 0:
            x = softcapped(x, P, SOFTCAP)
        return _valid(x, valid, P)
    first = s[0] + mean * (P**0.5)  # what the first frequency adds to every token is this over the root of P
    if SOFTCAP > 0:
        return _valid(softcapped(dct((first,) + s[1:], P, True, FAST), P, SOFTCAP), valid, P)
    else:
        return dct((tl.where(valid, first, float("-inf")),) + s[1:], P, True, FAST)


@triton.jit
def block_weights(x, top, P: tl.constexpr, FLAT: tl.constexpr, FAST: tl.constexpr):
    """Weights of a page's tokens relative to `top`, as rows."""
    e = ()
    for k in tl.static_range(P):
        e = e + (tl.exp2(x[k] - top),)
    if FLAT:
        return e
    else:
        return dct(e, P, False, FAST)


@triton.jit
def quad(u, v, FIRST: tl.constexpr, FAST: tl.constexpr):
    """Four rows of two heads as words."""
    return (
        packed(u[FIRST], u[FIRST + 1], FAST),
        packed(u[FIRST + 2], u[FIRST + 3], FAST),
        packed(v[FIRST], v[FIRST + 1], FAST),
        packed(v[FIRST + 2], v[FIRST + 3], FAST),
    )


@triton.jit
def _store_quads(slot, pages_max, number, u, v, P: tl.constexpr, FAST: tl.constexpr):
    """A page's weights of the classes of four and more rows."""
    x = quad(u, v, 4, FAST)
    store_four(slot + (pages_max // 16 * 4 + number // 4) * 128 + number % 4 * 4, x[0], x[1], x[2], x[3], FAST)
    if P == 16:
        at = slot + (pages_max // 16 * 8 + number // 2) * 128 + number % 2 * 8
        for half in tl.static_range(2):
            y = quad(u, v, 8 + 4 * half, FAST)
            store_four(at + 4 * half, y[0], y[1], y[2], y[3], FAST)


@triton.jit
def _page_slot(slot, number, P: tl.constexpr):
    """Where a page's weights lie whose rows are one class."""
    if P == 16:
        return slot + number * 128
    else:  # sixteen rows are two pages
        return slot + number // 2 * 128 + number % 2 * 8


@triton.jit
def store_page(at, u, v, P: tl.constexpr, STEP: tl.constexpr, FAST: tl.constexpr):
    """A page's weights where its rows are one class: four rows of two heads STEP words behind the four before."""
    for k in tl.static_range(P // 4):
        x = quad(u, v, 4 * k, FAST)
        store_four(at + STEP * k, x[0], x[1], x[2], x[3], FAST)


@triton.jit
def store_weights(
    place, pages_max, number, g, t, u0, u1, v0, v1, P: tl.constexpr, FLAT: tl.constexpr, FAST: tl.constexpr
):
    """Weights of pages `number` and number + 1 (u: of head g, v: of head g + 8), for every class in the order of its
    matrix operands: [step of 16 rows][g][t][rows 4 t .. of head g, then of head g + 8], fp16.

    place: pointer to int32: 256 halves for every sixteen rows of a class, class after class.
    """
    slot = place + g * 16
    if FLAT:
        store_page(_page_slot(slot, number, P), u0, v0, P, 4, FAST)
        store_page(_page_slot(slot, number + 1, P), u1, v1, P, 4, FAST)
    else:
        _store_classes(slot, pages_max, number, t, u0, u1, v0, v1, P, FAST)


@triton.jit
def _store_classes(slot, pages_max, number, t, u0, u1, v0, v1, P: tl.constexpr, FAST: tl.constexpr):
    """Two pages' weights, class after class."""
    for row in tl.static_range(2):  # classes 0 and 1: a step is sixteen pages
        at = slot + (pages_max // 16 * row + number // 16) * 128 + (number % 16) // 4 * 4 + (number // 2) % 2
        store_word(at, packed(u0[row], u1[row], FAST), FAST)
        store_word(at + 2, packed(v0[row], v1[row], FAST), FAST)
    at = slot + (pages_max // 16 * 2 + number // 8) * 128 + (number % 8) // 2 * 4
    x = quad((u0[2], u0[3], u1[2], u1[3]), (v0[2], v0[3], v1[2], v1[3]), 0, FAST)
    store_four(at, x[0], x[1], x[2], x[3], FAST)
    _store_quads(slot, pages_max, number, u0, v0, P, FAST)
    _store_quads(slot, pages_max, number + 1, u1, v1, P, FAST)


@triton.jit
def store_column(place, pages_max, number, g, side, u, P: tl.constexpr, FLAT: tl.constexpr, FAST: tl.constexpr):
    """One page's weights of one head, g or (side = 1) g + 8, where store_weights leaves them."""
    slot = place + g * 16 + 2 * side
    if FLAT:
        at = _page_slot(slot, number, P)
        for k in tl.static_range(P // 4):
            store_word(at + 4 * k, packed(u[4 * k], u[4 * k + 1], FAST), FAST)
            store_word(at + 4 * k + 1, packed(u[4 * k + 2], u[4 * k + 3], FAST), FAST)
    else:
        _store_column_classes(slot, pages_max, number, u, P, FAST)


@triton.jit
def _store_column_classes(slot, pages_max, number, u, P: tl.constexpr, FAST: tl.constexpr):
    """One page's weights, class after class."""
    for row in tl.static_range(2):
        at = slot + (pages_max // 16 * row + number // 16) * 128 + (number % 16) // 4 * 4 + (number // 2) % 2
        store_half(at.to(tl.pointer_type(tl.float16)) + number % 2, u[row], FAST)
    at = slot + (pages_max // 16 * 2 + number // 8) * 128 + (number % 8) // 2 * 4 + number % 2
    store_word(at, packed(u[2], u[3], FAST), FAST)
    at = slot + (pages_max // 16 * 4 + number // 4) * 128 + number % 4 * 4
    store_word(at, packed(u[4], u[5], FAST), FAST)
    store_word(at + 1, packed(u[6], u[7], FAST), FAST)
    if P == 16:
        at = slot + (pages_max // 16 * 8 + number // 2) * 128 + number % 2 * 8
        for quad in tl.static_range(2):
            store_word(at + 4 * quad, packed(u[8 + 4 * quad], u[9 + 4 * quad], FAST), FAST)
            store_word(at + 4 * quad + 1, packed(u[10 + 4 * quad], u[11 + 4 * quad], FAST), FAST)

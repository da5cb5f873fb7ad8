"""Norms, rotary embeddings and gated activations as one launch each, rounded where transformers rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral.overlap import early, gdc_launch_dependents, gdc_wait

ELEMENTS = 1024


class HeadNorm(NamedTuple):
    """The RMS norm of heads: weight [d] (or, plus_one, what is added to 1), and epsilon."""

    weight: torch.Tensor
    eps: float
    plus_one: bool


@triton.jit
def norm_kernel(
    x_ptr, w_ptr, out_ptr, inner, outer_stride, inner_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, PLUS_ONE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of D numbers: x [outer, inner, D] strided, out contiguous."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    at = (row // inner).to(tl.int64) * outer_stride + (row % inner) * inner_stride
    d = tl.arange(0, BLOCK)
    mask = d < D
    w = tl.load(w_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x = tl.load(x_ptr + at + d, mask=mask, other=0.0).to(tl.float32)
    y = x / tl.sqrt(tl.sum(x * x, 0) / D + EPS)
    if PLUS_ONE:
        y = y * (1.0 + w)
    else:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32) * w
    tl.store(out_ptr + row.to(tl.int64) * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normed(a, b, weight_ptr, i, mask, kind: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """The norm of a head's halves, as `norm_kernel` has it. NORM: 1 gain, 2 one plus gain."""
    root = tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPS)
    w0 = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + HALF + i, mask=mask, other=0.0).to(tl.float32)
    a, b = a / root, b / root
    if NORM == 2:
        a, b = a * (1.0 + w0), b * (1.0 + w1)
    else:
        a, b = a.to(kind).to(tl.float32) * w0, b.to(kind).to(tl.float32) * w1
    return a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, qo_ptr, ko_ptr, q_weight, k_weight,
    q_head, q_token, k_head, k_token, cos_token, heads, kv_heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, Q_NORM: tl.constexpr, Q_EPS: tl.constexpr, K_NORM: tl.constexpr,
    K_EPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one token: q and k [heads, tokens, 2 HALF] strided; answers [tokens, heads, 2 HALF], contiguous.
    Q_NORM, K_NORM: norms that come before: 0 none, 1 gain, 2 one plus gain."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    cos = cos_ptr + token.to(tl.int64) * cos_token
    sin = sin_ptr + token.to(tl.int64) * cos_token
    c0 = tl.load(cos + i, mask=mask, other=0.0).to(tl.float32)
    c1 = tl.load(cos + HALF + i, mask=mask, other=0.0).to(tl.float32)
    s0 = tl.load(sin + i, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin + HALF + i, mask=mask, other=0.0).to(tl.float32)
    if head < heads:
        x = q_ptr + head * q_head + token.to(tl.int64) * q_token
        out = qo_ptr + (token.to(tl.int64) * heads + head) * (2 * HALF)
    else:
        x = k_ptr + (head - heads) * k_head + token.to(tl.int64) * k_token
        out = ko_ptr + (token.to(tl.int64) * kv_heads + head - heads) * (2 * HALF)
    kind: tl.constexpr = qo_ptr.dtype.element_ty
    a = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + HALF + i, mask=mask, other=0.0).to(tl.float32)
    if Q_NORM > 0:  # noqa: SIM102 (a constant and a tensor)
        if head < heads:
            a, b = _normed(a, b, q_weight, i, mask, kind, HALF, Q_NORM, Q_EPS)
    if K_NORM > 0:  # noqa: SIM102 (a constant and a tensor)
        if head >= heads:
            a, b = _normed(a, b, k_weight, i, mask, kind, HALF, K_NORM, K_EPS)
    first = (a * c0).to(kind).to(tl.float32) - (b * s0).to(kind).to(tl.float32)
    second = (b * c1).to(kind).to(tl.float32) + (a * s1).to(kind).to(tl.float32)
    tl.store(out + i, first.to(kind), mask=mask)
    tl.store(out + HALF + i, second.to(kind), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["position_ptr"])
def angle_kernel(position_ptr, inverse_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                 SCALING: tl.constexpr):  # fmt: skip
    """cos and sin of one token's position times HALF frequencies, times SCALING, twice one after another."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    angle = tl.load(position_ptr + token).to(tl.float32) * tl.load(inverse_ptr + i, mask=mask, other=0.0)
    kind = cos_ptr.dtype.element_ty
    cos, sin = (tl.cos(angle) * SCALING).to(kind), (tl.sin(angle) * SCALING).to(kind)
    at = token * (2 * HALF) + i
    tl.store(cos_ptr + at, cos, mask=mask)
    tl.store(cos_ptr + at + HALF, cos, mask=mask)
    tl.store(sin_ptr + at, sin, mask=mask)
    tl.store(sin_ptr + at + HALF, sin, mask=mask)


@triton.jit
def activated(gate, SILU: tl.constexpr):
    """silu(gate), or gelu(gate) by tanh."""
    if SILU:
        return gate / (1.0 + tl.exp(-gate))
    else:
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * z))  # (1 + tanh z) / 2


@triton.jit
def gate_kernel(x_ptr, out_ptr, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """act(x[:size]) * x[size:] of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    gate = tl.load(x_ptr + row * (2 * size) + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * size) + size + i, mask=mask, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    y = activated(gate, SILU).to(kind).to(tl.float32) * up
    tl.store(out_ptr + row * size + i, y.to(kind), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """x [..., D] over the root of its mean square, times weight [D] (or one plus it); contiguous."""
    size = x.shape[-1]
    rows = x.reshape(-1, size) if x.ndim != 4 or x.shape[0] != 1 else x[0]
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    inner, outer_stride, inner_stride = 1, rows.stride(0), 0
    if rows.ndim == 3:
        inner, inner_stride = rows.shape[1], rows.stride(1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    norm_kernel[(out.numel() // size,)](
        rows, weight, out, inner, outer_stride, inner_stride,
        D=size, BLOCK=block, EPS=eps, PLUS_ONE=plus_one, num_warps=min(16, max(1, block // 512)),
        **early(x.device, rows.shape[0]),
    )  # fmt: skip
    return out


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: Sequence[HeadNorm | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [1, Hq, N, d] and k [1, H, N, d] turned by cos and sin [1, N, d], half-split; answers lie as [1, N, H, d].
    norms: of q's and of k's heads, before that."""
    (_, heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    turned = [torch.empty((1, tokens, h, dim), dtype=q.dtype, device=q.device) for h in (heads, kv_heads)]
    (q_weight, q_eps, q_norm), (k_weight, k_eps, k_norm) = (
        (cos, 0.0, 0) if norm is None else (norm.weight, norm.eps, 1 + norm.plus_one) for norm in norms
    )
    rotary_kernel[(tokens, heads + kv_heads)](
        q, k, cos, sin, *turned, q_weight, k_weight,
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), cos.stride(1), heads, kv_heads,
        HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), Q_NORM=q_norm, Q_EPS=q_eps, K_NORM=k_norm, K_EPS=k_eps,
        num_warps=1, **early(q.device, tokens),
    )  # fmt: skip
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def angles(
    position: torch.Tensor, inverse: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, N, d] of positions [1, N] times frequencies [d / 2], both halves alike, times scaling."""
    position, inverse, half = position.contiguous(), inverse.float().contiguous(), inverse.shape[0]
    cos, sin = (torch.empty((*position.shape, 2 * half), dtype=dtype, device=position.device) for _ in range(2))
    angle_kernel[(position.numel(),)](
        position, inverse, cos, sin, HALF=half, BLOCK=triton.next_power_of_2(half), SCALING=scaling, num_warps=1
    )
    return cos, sin


def gated(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [..., 2 I] contiguous -> act(first half) * second half, [..., I]; kind: "silu" or "gelu_tanh"."""
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    grid = (out.numel() // size, triton.cdiv(size, ELEMENTS))
    gate_kernel[grid](x, out, size, SILU=kind == "silu", BLOCK=ELEMENTS, num_warps=4)
    return out

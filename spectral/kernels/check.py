"""The kernels against float64 arithmetic on the same codes: what a process asks once before it trusts a device."""

from __future__ import annotations

import torch

from spectral.kernels.choices import block_pages, forced
from spectral.kernels.decode import LayerKernels, StepTables, decode_attention
from spectral.pools import empty_pool
from spectral.shapes import LayerShape
from spectral.windows import ExactWindow, WindowGroup, make_window

TOLERANCE = 0.01
"""Largest relative error of an answer that counts as right; fp16 operands leave some 0.001."""


class Case:
    """Rows of equal length on a layer, with random codes, window and tokens.

    Args:
        group: query heads of a KV head; context: tokens, the new one included; chunk: the rows are tokens of one
            chunk, `context` being the first one's.
    """

    def __init__(
        self,
        kernels: LayerKernels,
        rows: int,
        context: int,
        group: int,
        dtype: torch.dtype,
        *,
        sinks: int = 4,
        recent: int = 112,
        window_bits: int = 8,
        chunk: bool = False,
    ) -> None:
        codec, device = kernels.codec, kernels.key_basis.device
        self.kernels, self.group = kernels, group
        shape = LayerShape(codec.kv_heads, codec.key_dim, codec.value_dim)
        pages = max(0, (context - sinks - recent) // codec.page_tokens)
        rng = torch.Generator(device).manual_seed(0)
        self.pool = empty_pool(rows * pages, codec.page_nbytes, device)
        self.pool.random_(0, 256, generator=rng)
        ring = recent + codec.page_tokens
        self.window: ExactWindow = make_window(shape, sinks, ring, torch.bfloat16, device, window_bits)
        WindowGroup([self.window]).resize(rows)
        places = torch.arange(sinks + ring, device=device)
        for slot in range(rows):
            tokens = torch.randn(len(places), shape.kv_heads, shape.head_numbers, generator=rng, device=device)
            self.window.write(slot, places, tokens)

        def column(value: int) -> torch.Tensor:
            return torch.full((rows,), value, dtype=torch.int32, device=device)

        ids = torch.randperm(rows * pages, generator=rng, device=device).view(rows, pages).int()
        slots = torch.arange(rows, dtype=torch.int32, device=device)
        first = sinks + pages * codec.page_tokens
        if chunk:
            ids, slots, before = ids[:1].expand(rows, -1).contiguous(), column(0), slots
        else:
            before = column(0)
        self.step = StepTables(ids, column(pages), slots, column(context - 1), column(first), before)
        heads = codec.kv_heads
        sides = ((heads * group, codec.key_dim), (heads, codec.key_dim), (heads, codec.value_dim))
        self.query, self.key, self.value = (
            torch.randn(rows, count, dim, generator=rng, device=device).to(dtype) for count, dim in sides
        )
        self.nbytes = rows * (pages * codec.page_nbytes + self.window.slot_nbytes)
        self.bf16_nbytes = rows * context * shape.token_nbytes()

    def run(self) -> torch.Tensor:
        """One decoding step of the layer: [rows, query heads, dv]."""
        scaling = self.kernels.codec.key_dim**-0.5
        return decode_attention(
            self.kernels, self.pool, self.window, self.step, self.query, self.key, self.value, scaling=scaling
        )

    def error(self) -> float:
        """Relative error of the last row's answer."""
        codec, window = self.kernels.codec, self.window
        ids, before = self.step.pages[-1].long(), int(self.step.before[-1])
        keys, values = codec.decode(self.pool[ids], torch.arange(len(ids), device=ids.device))
        k, v = (x.double().transpose(0, 1).flatten(1, 2) for x in (keys, values))  # [H, t, d]
        length, first = int(self.step.length[-1]), int(self.step.first[-1])
        recent = [p for p in range(length) if p < window.sinks or p >= first]
        place = torch.tensor([[window.index(p) for p in recent]], device=ids.device)
        held = window.read_places(self.step.slot[-1:].long(), place)[0].double()
        new = slice(len(self.key) - before - 1, None)
        k = torch.cat([k, held[..., : codec.key_dim], self.key[new].double().transpose(0, 1)], 1)
        v = torch.cat([v, held[..., codec.key_dim :], self.value[new].double().transpose(0, 1)], 1)
        q = self.query[-1].double().view(codec.kv_heads, self.group, -1) * codec.key_dim**-0.5
        expected = ((q @ k.transpose(1, 2)).softmax(-1) @ v).flatten(0, 1)
        return float((self.run()[-1].double() - expected).norm() / expected.norm())


def relative_error(kernels: LayerKernels, group: int, dtype: torch.dtype) -> float:
    """Error of one row of a block and a half of pages, whose scores are shared, and of the second of two tokens of a
    chunk, whose are not. (Where rows are tokens: blocks by themselves, and one program for all, or, the third, two for
    a unit's pieces. The window: in parts, and in one.)"""
    pages = block_pages(kernels.codec) * 3 // 2
    most, errors = 1 << 30, []
    cases = [(1, most, most), (2, 0, 1)]
    if kernels.flat:
        cases.append((1, most, 8 * len(kernels.unit_heads) * kernels.head_groups(group)))
    for rows, blocks, pieces in cases:
        programs = dict.fromkeys(("score_programs", "window_programs"), max(1, blocks))
        with forced(shared_blocks=blocks, piece_programs=pieces, **programs):
            case = Case(kernels, rows, 116 + pages * kernels.codec.page_tokens, group, dtype, chunk=rows > 1)
            errors.append(case.error())
    return max(errors)


def wrong(kernels: LayerKernels, group: int, dtype: torch.dtype) -> str:
    """What is wrong with the kernels' answers on their device, in words; "" if nothing."""
    error = relative_error(kernels, group, dtype)
    return "" if error <= TOLERANCE else f"they are wrong by {error:.2g}"

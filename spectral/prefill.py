"""Attention of a chunk of one row: exact within the chunk, over codes and window for what came before; and its
appending.

With the kernels, pages are opened into keys and values in fp16 and read by a flash kernel, and encoded by two kernels
and a product (spectral.kernels.chunk, .encode); the reference reads coefficients in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from spectral.code_dispatch import codes_for
from spectral.codec import PageCodec
from spectral.step_batch import StepBatch
from spectral.windows import ExactWindow, QuantizedWindow

SCORE_LIMIT = 1 << 24
"""Most score elements held at once in a prefill (64 MiB of float32): longer chunks are cut into query blocks."""


@contextmanager
def planless() -> Iterator[None]:
    """PyTorch's attention without cuDNN's, which it prefers on some GPUs. For cuDNN it makes a plan of every new
    combination of sizes and strides and keeps it for good: prompts of all lengths, beside others in one step, would
    each wait for one. 10,000 such requests left 5.4 GB in a process on an H200."""
    preferred = torch.backends.cuda.cudnn_sdp_enabled()
    if preferred:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if preferred:
            torch.backends.cuda.enable_cudnn_sdp(True)


def softcapped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma 2's logit soft-capping: c * tanh(s / c)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding: int | None = None,
) -> torch.Tensor:
    """Exact causal attention of a sequence with itself: query [B, Hq, N, d], key/value [B, H, N, d]; [B, Hq, N, dv]."""
    length = query.shape[2]
    if softcap is None and (sliding is None or length <= sliding):
        with planless():
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=length > 1, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcapped(torch.matmul(query, key.transpose(2, 3)).float() * scaling, softcap)
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    hidden = distance < 0 if sliding is None else (distance < 0) | (distance >= sliding)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(value.dtype)
    return torch.matmul(weights, value)


def prefill(
    batch: StepBatch,
    layer: int,
    index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """One row's chunk: query [1, Hq, n, d], key/value [H, n, d] -> [n, Hq, dv]; appends the chunk to the store."""
    store = batch.store
    window, codec = store.windows[layer], store.codebook.layers[layer]
    row, _ = batch.work[index]
    sliding = window.ring if codec is None else None
    kernels, pool = codes_for(codec), store.pools[layer]
    past = None
    if row.length == 0 and (kernels is None or softcap is None):
        out = causal_attention(query, key[None], value[None], scaling=scaling, softcap=softcap, sliding=sliding)[0]
    elif kernels is not None and pool is not None:
        from spectral.kernels.chunk import attend_chunk

        plan = chunk_plan(batch, layer, index)
        past = read_tokens(window, plan.slot, plan.past[0], kernels=True)
        out = attend_chunk(kernels, pool, plan.pages, past, query[0], key, value, scaling=scaling, softcap=softcap)
    else:
        out = _with_past(batch, layer, index, query[0], key, value, scaling, softcap, sliding)
    if codec is None:
        _append_sliding(window, row.slot, row.length, key, value)
    else:
        append(batch, layer, index, key, value, past)
    return out.transpose(0, 1)


def past_window(window: ExactWindow, slot: int, first: int, end: int, sinks: int) -> tuple[torch.Tensor, list[int]]:
    """Tokens that a row's window holds, in order: float32 [H, t, d + dv] and their positions."""
    positions = list(range(sinks)) + list(range(max(first, window.sinks), end))
    device = window.store.device
    places = torch.tensor([[window.index(p) for p in positions]], dtype=torch.long, device=device)
    return window.read_places(torch.tensor([slot], device=device), places)[0], positions


def _with_past(
    batch: StepBatch,
    layer: int,
    index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sliding: int | None,
) -> torch.Tensor:
    """Chunk attention with a past: query [Hq, n, d], key/value [H, n, d] -> [Hq, n, dv]."""
    store = batch.store
    window, codec, pool = store.windows[layer], store.codebook.layers[layer], store.pools[layer]
    row, _ = batch.work[index]
    heads, length, _ = key.shape
    groups = query.shape[0] // heads
    if codec is None:
        first, sinks = max(0, row.length - window.ring + 1), 0
    else:
        first, sinks = window.sinks + len(row.pages) * codec.page_tokens, min(row.length, window.sinks)
    past, positions = past_window(window, row.slot, first, row.length, sinks)
    exact_keys = torch.cat([past[..., : key.shape[-1]], key.float()], 1)  # [H, t + n, d]
    exact_values = torch.cat([past[..., key.shape[-1] :], value.float()], 1)
    device = query.device
    key_position = torch.tensor(positions + list(range(row.length, row.length + length)), device=device)
    pages = (
        codec.open(pool[torch.tensor(row.pages, device=device)][None])
        if codec is not None and row.pages and pool is not None
        else None
    )
    paged = len(row.pages) * codec.page_tokens if codec is not None else 0
    block = max(1, SCORE_LIMIT // (query.shape[0] * (paged + exact_keys.shape[1])))
    out = query.new_empty((query.shape[0], length, value.shape[-1]))
    for begin in range(0, length, block):
        q = query[:, begin : begin + block].float() * scaling
        n = q.shape[1]
        q = q.reshape(heads, groups * n, -1)
        scores = torch.matmul(q, exact_keys.transpose(1, 2)).view(heads, groups, n, -1)
        query_position = torch.arange(row.length + begin, row.length + begin + n, device=device)
        distance = query_position[:, None] - key_position[None, :]
        hidden = distance < 0 if sliding is None else (distance < 0) | (distance >= sliding)
        scores = softcapped(scores, softcap).masked_fill(hidden, float("-inf"))
        if codec is not None and pages is not None:
            coded = pages.scores(q[None])[0].view(heads, groups, n, -1)
            scores = torch.cat([softcapped(coded, softcap), scores], -1)
        weights = scores.softmax(-1).view(heads, groups * n, -1)
        mixed = torch.matmul(weights[..., paged:], exact_values)
        if codec is not None and pages is not None:
            mixed = mixed + pages.mix(weights[None, ..., :paged])[0]
        out[:, begin : begin + n] = mixed.view(heads * groups, n, -1).to(out.dtype)
    return out


@dataclass
class ChunkPlan:
    """Where one row's chunk reads and writes: made once for all layers with such a window.

    Attributes:
        slot: int64 [1]; past: int64 [1, t] places of the tokens before the chunk that are in no page, the first
            `sinks` of them sinks; pages: int32 [m] the row's pages before the chunk.
        number, spot: int64 [k] index in the row, and id, of the pages that the chunk completes; bound: of `number`.
        held: tokens of `past`, after the sinks, that they take; fresh: tokens of the chunk that they take.
        sink_place, sink_from, place, source: int64: which of the chunk's tokens go where in the window.
    """

    slot: torch.Tensor
    past: torch.Tensor
    sinks: int
    pages: torch.Tensor
    number: torch.Tensor
    spot: torch.Tensor
    bound: int
    held: int
    fresh: slice
    sink_place: torch.Tensor
    sink_from: torch.Tensor
    place: torch.Tensor
    source: torch.Tensor


def chunk_plan(batch: StepBatch, layer: int, index: int) -> ChunkPlan:
    """The plan of a row of a step for a layer with pages."""
    store = batch.store
    window, codec = store.windows[layer], store.codebook.layers[layer]
    kind = f"chunk:{index}:{window.sinks}:{window.ring}"
    plan = batch.plans.get(kind)
    if isinstance(plan, ChunkPlan):
        return plan
    assert codec is not None
    (row, count), granted = batch.work[index], batch.new_pages[index]
    first = window.sinks + len(row.pages) * codec.page_tokens  # the oldest token that is in no page yet
    sealed = first + len(granted) * codec.page_tokens
    sinks, length = min(row.length, window.sinks), row.length
    new_sinks = range(length, min(length + count, window.sinks))
    recent = range(max(length, sealed, window.sinks), length + count)
    number = range(len(row.pages), len(row.pages) + len(granted))
    past = [*range(sinks), *range(first, length)]
    lists = [
        [row.slot], [window.index(p) for p in past], row.pages, [*number], granted,
        [window.index(p) for p in new_sinks], [p - length for p in new_sinks],
        [window.index(p) for p in recent], [p - length for p in recent],
    ]  # fmt: skip
    packed = torch.tensor([x for found in lists for x in found], dtype=torch.long).to(store.device)  # one transfer
    parts = packed.split([len(found) for found in lists])
    plan = ChunkPlan(
        parts[0],
        parts[1][None],
        sinks,
        parts[2].int(),
        parts[3],
        parts[4],
        number.stop,
        min(max(0, length - first), sealed - first),
        slice(max(0, first - length), max(0, sealed - length)),
        *parts[5:],
    )
    batch.plans[kind] = plan
    return plan


def _append_sliding(window: ExactWindow, slot: int, length: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write a chunk's last tokens into a rolling window."""
    count = key.shape[1]
    kept = min(count, window.ring)
    positions = range(length + count - kept, length + count)
    places = torch.tensor([window.index(p) for p in positions], dtype=torch.long, device=key.device)
    window.write(slot, places, torch.cat([key, value], -1)[:, count - kept :].transpose(0, 1))


def append(
    batch: StepBatch,
    layer: int,
    index: int,
    key: torch.Tensor,
    value: torch.Tensor,
    past: torch.Tensor | None = None,
) -> None:
    """Write a chunk into sinks, pages and ring of a full-attention layer; `past`: what `ChunkPlan.past` names, if it
    was read already."""
    store = batch.store
    window, codec, pool = store.windows[layer], store.codebook.layers[layer], store.pools[layer]
    assert codec is not None and pool is not None
    plan, kernels = chunk_plan(batch, layer, index), codes_for(codec) is not None
    if plan.spot.numel():
        if past is None:
            past = read_tokens(window, plan.slot, plan.past[0], kernels)
        held = past[:, plan.sinks : plan.sinks + plan.held]
        encode_pages(
            codec, window, held, key[:, plan.fresh], value[:, plan.fresh], plan.number, plan.bound, pool, plan.spot
        )

    def tokens(source: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.index_select(1, source) for x in (key, value)], -1).transpose(0, 1)

    if plan.sink_place.numel():
        window.write(plan.slot.expand(len(plan.sink_place)), plan.sink_place, tokens(plan.sink_from))
    if kernels and isinstance(window, QuantizedWindow):
        from spectral.kernels.recent import served, write_recent

        if served(window):
            write_recent(window, plan.slot, plan.place, plan.source, key, value)
            return
    if plan.place.numel():
        window.write(plan.slot.expand(len(plan.place)), plan.place, tokens(plan.source))


def read_tokens(window: ExactWindow, slot: torch.Tensor, place: torch.Tensor, kernels: bool) -> torch.Tensor:
    """Tokens at places [t] of slot [1], or each of its own slot [t], all int64: float32 [H, t, d + dv]."""
    if kernels and isinstance(window, QuantizedWindow):
        from spectral.kernels.recent import read_recent, served

        if served(window):
            return read_recent(window, slot, place)
    if len(slot) == 1:
        return window.read_places(slot, place[None])[0]
    return window.read_places(slot, place[:, None])[:, :, 0].transpose(0, 1)


def encode_pages(
    codec: PageCodec,
    window: ExactWindow,
    held: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    number: torch.Tensor,
    bound: int,
    pool: torch.Tensor,
    spot: torch.Tensor,
) -> None:
    """Encode tokens of n whole pages into a pool.

    Args:
        held: float32 [H, t, d + dv], tokens as the window gave them; key [H, m, d], value [H, m, dv]: the following
            ones, as the model made them. Pages see what the window would have held, however tokens came: one by one
            or in chunks.
        number: int64 [n] index of each page in its sequence, all below `bound`; spot: int64 [n] where it goes.
    """
    kernels = codes_for(codec)
    if kernels is not None:
        from spectral.kernels.encode import Tokens, encode

        tokens = Tokens(held, key, value)
        if isinstance(window, QuantizedWindow):
            tokens.top, tokens.group = 2 ** (window.bits - 1) - 1, window.groups
        elif key.dtype != window.store.dtype:
            tokens.keys, tokens.values = (window.as_kept(x) for x in (key, value))
        encode(kernels, tokens, number.int(), kernels.codec.frame.blocks(bound), pool, spot.int())
        return
    paged = torch.cat([held, window.as_kept(torch.cat([key, value], -1))], 1)  # [H, n * P, d + dv]
    paged = paged.unflatten(1, (len(number), codec.page_tokens)).transpose(0, 1)
    keys, values = paged.split([key.shape[-1], value.shape[-1]], -1)
    pool[spot] = codec.encode(keys, values, number)

"""Attention of a chunk of one row: exact within the chunk, over codes and window for what came before; and its
appending."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spectral.step_batch import StepBatch
from spectral.windows import ExactWindow

SCORE_LIMIT = 1 << 24
"""Most score elements held at once in a prefill (64 MiB of float32): longer chunks are cut into query blocks."""


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
    if row.length == 0:
        out = causal_attention(query, key[None], value[None], scaling=scaling, softcap=softcap, sliding=sliding)[0]
    else:
        out = _with_past(batch, layer, index, query[0], key, value, scaling, softcap, sliding)
    if codec is None:
        _append_sliding(window, row.slot, row.length, key, value)
    else:
        append(batch, layer, index, key, value)
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


def _append_sliding(window: ExactWindow, slot: int, length: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write a chunk's last tokens into a rolling window."""
    count = key.shape[1]
    kept = min(count, window.ring)
    positions = range(length + count - kept, length + count)
    places = torch.tensor([window.index(p) for p in positions], dtype=torch.long, device=key.device)
    window.write(slot, places, torch.cat([key, value], -1)[:, count - kept :].transpose(0, 1))


def append(batch: StepBatch, layer: int, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write a chunk into sinks, pages and ring of a full-attention layer."""
    store = batch.store
    window, codec, pool = store.windows[layer], store.codebook.layers[layer], store.pools[layer]
    assert codec is not None and pool is not None
    (row, count), granted = batch.work[index], batch.new_pages[index]
    page_tokens, device = codec.page_tokens, key.device
    end = row.length + count
    tokens = torch.cat([key, value], -1)  # [H, n, d + dv]
    first = window.sinks + len(row.pages) * page_tokens  # the oldest token that is in no page yet
    sealed = first + len(granted) * page_tokens
    if granted:
        old, _ = past_window(window, row.slot, first, row.length, 0)
        new = tokens[:, max(0, first - row.length) : max(0, sealed - row.length)]
        # Pages see what the window would have held, however the tokens came: one by one or in chunks.
        paged = torch.cat([old[:, : sealed - first], window.as_kept(new)], 1)  # [H, n * P, d + dv]
        paged = paged.unflatten(1, (len(granted), page_tokens)).transpose(0, 1)
        number = torch.arange(len(row.pages), len(row.pages) + len(granted), device=device)
        keys, values = paged.split([key.shape[-1], value.shape[-1]], -1)
        pages = codec.encode(keys, values, number)
        pool[torch.tensor(granted, device=device)] = pages
    kept = [p for p in range(row.length, end) if p < window.sinks or p >= sealed]
    if kept:
        places = torch.tensor([window.index(p) for p in kept], dtype=torch.long, device=device)
        chosen = torch.tensor([p - row.length for p in kept], dtype=torch.long, device=device)
        window.write(row.slot, places, tokens.index_select(1, chosen).transpose(0, 1))

"""Attention over exact window and codes: one function for the model's attention layers, one place that picks how.

`attend` appends a forward's new keys and values to the store and answers its queries. The forward is flattened: one
batch dimension of size 1 whose N tokens belong to the step's rows in order. Rows with one new token (decode) run as
one batch; rows with more (prefill chunks) run one by one: exact attention inside the chunk, codes for what came before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from spectral.codec import PageCodec
from spectral.pages import StepBatch
from spectral.windows import ExactWindow

SCORE_LIMIT = 1 << 24
"""Most score elements held at once in a prefill (64 MiB of float32): longer chunks are cut into query blocks."""


@dataclass
class DecodePlan:
    """Index tensors of a step's decode rows, shared by all layers of a kind.

    token: [B] flattened index of each row's token; slot: [B]; write: [B] place in the window.
    table: [B, m] page ids (0 where a row has fewer); bias: [B, 1, 1, m*P + capacity], 0 or -inf.
    seal_*: rows whose oldest recent tokens become a page in this step: slot, place in the window, page id, and the
        page's index in its row.
    """

    token: torch.Tensor
    slot: torch.Tensor
    write: torch.Tensor
    table: torch.Tensor
    bias: torch.Tensor
    seal_slot: torch.Tensor | None
    seal_place: torch.Tensor | None
    seal_page: torch.Tensor | None
    seal_index: torch.Tensor | None


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


@torch.no_grad()
def attend(
    batch: StepBatch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Append this layer's new tokens and attend.

    Args:
        batch: the step; layer: the model's layer index.
        query: [1, Hq, N, d]; key: [1, H, N, d]; value: [1, H, N, dv]; post-RoPE, the model's dtype.

    Returns:
        [1, N, Hq, dv] in the query's dtype.
    """
    out = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))  # [N, Hq, dv]
    singles = [i for i, (_, count) in enumerate(batch.work) if count == 1]
    if singles:
        _decode(batch, layer, singles, query[0], key[0], value[0], out, scaling, softcap)
    for i, (_, count) in enumerate(batch.work):
        if count > 1:
            span = slice(batch.starts[i], batch.starts[i] + count)
            out[span] = _prefill(
                batch, layer, i, query[:, :, span], key[0, :, span], value[0, :, span], scaling, softcap
            )
    return out.unsqueeze(0)


# -- decode -----------------------------------------------------------------------------------------------------------


def _decode_plan(batch: StepBatch, singles: list[int], window: ExactWindow, codec: PageCodec | None) -> DecodePlan:
    store, rows = batch.store, [batch.work[i][0] for i in singles]
    device = store.device
    seals: list[tuple[int, int, int, int]] = []
    tables: list[list[int]] = []
    capacity = window.sinks + window.ring
    window_bias = torch.full((len(rows), capacity), float("-inf"))
    for at, (i, row) in enumerate(zip(singles, rows, strict=True)):
        after = row.length + 1
        if codec is None:
            window_bias[at, : min(after, window.ring)] = 0.0
            tables.append([])
            continue
        page_tokens = store.codebook.page_tokens
        for number, page in enumerate(batch.new_pages[i], start=len(row.pages)):
            seals.append((row.slot, window.index(window.sinks + number * page_tokens), page, number))
        tables.append(row.pages + batch.new_pages[i])
        first = window.sinks + len(tables[-1]) * page_tokens  # oldest token that is in the ring only
        window_bias[at, : min(after, window.sinks)] = 0.0
        for begin, end in ring_spans(window, first, after):
            window_bias[at, begin:end] = 0.0
    width = max(len(table) for table in tables)
    page_bias = torch.zeros((len(rows), 0))
    if codec is not None and width:
        tokens = torch.arange(width * codec.page_tokens)
        held = torch.tensor([len(table) * codec.page_tokens for table in tables])
        page_bias = torch.where(tokens[None, :] < held[:, None], 0.0, float("-inf"))
    bias = torch.cat([page_bias, window_bias], 1)[:, None, None, :].to(device)
    table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.long, device=device)

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return DecodePlan(
        token=column([batch.starts[i] for i in singles]),
        slot=column([row.slot for row in rows]),
        write=column([window.index(row.length) for row in rows]),
        table=table,
        bias=bias,
        seal_slot=column([s[0] for s in seals]) if seals else None,
        seal_place=column([s[1] for s in seals]) if seals else None,
        seal_page=column([s[2] for s in seals]) if seals else None,
        seal_index=column([s[3] for s in seals]) if seals else None,
    )


def ring_spans(window: ExactWindow, first: int, end: int) -> list[tuple[int, int]]:
    """Places in a slot of the non-sink tokens [first, end) as one or two half-open spans."""
    first = max(first, window.sinks)
    if end <= first:
        return []
    begin, last = window.index(first), window.index(end - 1)
    if begin <= last:
        return [(begin, last + 1)]
    return [(begin, window.sinks + window.ring), (window.sinks, last + 1)]


def _decode(
    batch: StepBatch,
    layer: int,
    singles: list[int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> None:
    """Decode rows: query [Hq, N, d], key/value [H, N, d]; writes out[token]."""
    store = batch.store
    window, codec, pool = store.windows[layer], store.codebook.layers[layer], store.pools[layer]
    kind = f"decode:{window.sinks}:{window.ring}:{codec is None}"
    plan = batch.plans.get(kind)
    if not isinstance(plan, DecodePlan):
        plan = batch.plans[kind] = _decode_plan(batch, singles, window, codec)
    heads = key.shape[0]
    whole = len(singles) == query.shape[1]  # nothing but decode rows: no gather needed
    q, k, v = (x if whole else x.index_select(1, plan.token) for x in (query, key, value))
    count = q.shape[1]
    window.write(plan.slot, plan.write, torch.cat([k, v], -1).transpose(0, 1))
    if codec is not None and plan.seal_slot is not None:
        _seal(window, codec, pool, plan)
    q = q.transpose(0, 1).reshape(count, heads, -1, q.shape[-1]).float() * scaling  # [B, H, G, d]
    wk, wv = window.read(plan.slot).split([key.shape[-1], value.shape[-1]], -1)
    scores = torch.matmul(q, wk.transpose(2, 3))
    paged = plan.table.shape[1] if codec is not None else 0
    if codec is not None and pool is not None and paged:
        pages = codec.open(pool.index_select(0, plan.table.flatten()).view(count, paged, -1))
        scores = torch.cat([pages.scores(q), scores], -1)
    weights = (softcapped(scores, softcap) + plan.bias).softmax(-1)
    if codec is not None and paged:
        cut = paged * codec.page_tokens
        mixed = torch.matmul(weights[..., cut:], wv) + pages.mix(weights[..., :cut])
    else:
        mixed = torch.matmul(weights, wv)
    mixed = mixed.reshape(count, -1, mixed.shape[-1]).to(out.dtype)
    if whole:
        out.copy_(mixed)
    else:
        out.index_copy_(0, plan.token, mixed)


def _seal(window: ExactWindow, codec: PageCodec, pool: torch.Tensor | None, plan: DecodePlan) -> None:
    """Encode pages whose tokens all lie in their row's ring (a page never wraps: the ring is a multiple of it)."""
    assert pool is not None and plan.seal_slot is not None and plan.seal_place is not None
    assert plan.seal_page is not None and plan.seal_index is not None
    inside = torch.arange(codec.page_tokens, device=pool.device)
    tokens = window.read_places(plan.seal_slot, plan.seal_place[:, None] + inside)  # [n, H, P, d + dv]
    keys, values = tokens.split([window.shape.key_dim, window.shape.value_dim], -1)
    pool[plan.seal_page] = codec.encode(keys, values, plan.seal_index)


# -- prefill ----------------------------------------------------------------------------------------------------------


def _prefill(
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
        out = _prefill_with_past(batch, layer, index, query[0], key, value, scaling, softcap, sliding)
    if codec is None:
        _append_sliding(window, row.slot, row.length, key, value)
    else:
        _append(batch, layer, index, key, value)
    return out.transpose(0, 1)


def _past_window(window: ExactWindow, slot: int, first: int, end: int, sinks: int) -> tuple[torch.Tensor, list[int]]:
    """Tokens that a row's window holds, in order: float32 [H, t, d + dv] and their positions."""
    positions = list(range(sinks)) + list(range(max(first, window.sinks), end))
    device = window.store.device
    places = torch.tensor([[window.index(p) for p in positions]], dtype=torch.long, device=device)
    return window.read_places(torch.tensor([slot], device=device), places)[0], positions


def _prefill_with_past(
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
    past, positions = _past_window(window, row.slot, first, row.length, sinks)
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


def _append(batch: StepBatch, layer: int, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
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
        old, _ = _past_window(window, row.slot, first, row.length, 0)
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

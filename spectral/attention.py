"""Attention over exact window and codes: one function for the model's attention layers, one place that picks how.

`attend` appends a forward's new keys and values to the store and answers its queries. The forward is flattened: one
batch dimension of size 1 whose N tokens belong to the step's rows in order. Rows with one new token (decode) run as
one batch, through the kernels or the reference (spectral.dispatch); rows with more run one by one (spectral.prefill).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from spectral.codec import PageCodec
from spectral.dispatch import kernels_for
from spectral.pages import StepBatch
from spectral.prefill import encode_pages, prefill, softcapped
from spectral.windows import ExactWindow

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels, StepTables

READ_AHEAD = 8 << 20
"""Bytes of windows that a decoding step reads at once, over several layers."""


@dataclass
class DecodePlan:
    """Index tensors of a step's decode rows, shared by all layers of a kind.

    token: [B] flattened index of each row's token; slot: [B]; write: [B] place in the window.
    table: [B, m] page ids (0 where a row has fewer).
    seal_*: rows whose oldest recent tokens become a page in this step: slot, place in the window, page id, and the
        page's index in its row. rows: [B] 0 .. B - 1, None for a single row; write_first: the first row's place.
    views: by group of windows, the first layer that was read ahead and what was read.
    counts, firsts, lengths: per row its pages, the oldest token that only the ring holds, and its tokens before this
        step.
    step, bias: what the kernels and the reference make of these; bias: [B, 1, 1, m*P + capacity], 0 or -inf.
    """

    token: torch.Tensor
    slot: torch.Tensor
    write: torch.Tensor
    table: torch.Tensor
    seal_slot: torch.Tensor | None
    seal_place: torch.Tensor | None
    seal_page: torch.Tensor | None
    seal_index: torch.Tensor | None
    rows: torch.Tensor | None
    write_first: int
    counts: list[int]
    firsts: list[int]
    lengths: list[int]
    views: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)
    step: StepTables | None = None
    bias: torch.Tensor | None = None


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
            out[span] = prefill(
                batch, layer, i, query[:, :, span], key[0, :, span], value[0, :, span], scaling, softcap
            )
    return out.unsqueeze(0)


# -- decode -----------------------------------------------------------------------------------------------------------


def _decode_plan(batch: StepBatch, singles: list[int], window: ExactWindow, codec: PageCodec | None) -> DecodePlan:
    store, rows = batch.store, [batch.work[i][0] for i in singles]
    device = store.device
    seals: list[tuple[int, int, int, int]] = []
    tables: list[list[int]] = []
    for i, row in zip(singles, rows, strict=True):
        if codec is None:
            tables.append([])
            continue
        page_tokens = store.codebook.page_tokens
        for number, page in enumerate(batch.new_pages[i], start=len(row.pages)):
            seals.append((row.slot, window.index(window.sinks + number * page_tokens), page, number))
        tables.append(row.pages + batch.new_pages[i])
    width = max(len(table) for table in tables)
    table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.long, device=device)

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return DecodePlan(
        token=column([batch.starts[i] for i in singles]),
        slot=column([row.slot for row in rows]),
        write=column([window.index(row.length) for row in rows]),
        table=table,
        seal_slot=column([s[0] for s in seals]) if seals else None,
        seal_place=column([s[1] for s in seals]) if seals else None,
        seal_page=column([s[2] for s in seals]) if seals else None,
        seal_index=column([s[3] for s in seals]) if seals else None,
        rows=torch.arange(len(rows), device=device) if len(rows) > 1 else None,
        write_first=window.index(rows[0].length),
        counts=[len(found) for found in tables],
        firsts=[window.sinks + len(found) * store.codebook.page_tokens for found in tables],
        lengths=[row.length for row in rows],
    )


def _bias(plan: DecodePlan, window: ExactWindow, codec: PageCodec | None) -> torch.Tensor:
    """What hides the places that a row does not hold: [B, 1, 1, m*P + capacity], 0 or -inf."""
    window_bias = torch.full((len(plan.counts), window.sinks + window.ring), float("-inf"))
    for at, (length, first) in enumerate(zip(plan.lengths, plan.firsts, strict=True)):
        after = length + 1
        if codec is None:
            window_bias[at, : min(after, window.ring)] = 0.0
            continue
        window_bias[at, : min(after, window.sinks)] = 0.0
        for begin, end in ring_spans(window, first, after):
            window_bias[at, begin:end] = 0.0
    page_bias = torch.zeros((len(plan.counts), 0))
    if codec is not None and plan.table.shape[1]:
        tokens = torch.arange(plan.table.shape[1] * codec.page_tokens)
        held = torch.tensor(plan.counts) * codec.page_tokens
        page_bias = torch.where(tokens[None, :] < held[:, None], 0.0, float("-inf"))
    return torch.cat([page_bias, window_bias], 1)[:, None, None, :].to(plan.table.device)


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
    new = torch.cat([k, v], -1).transpose(0, 1)  # [B, H, d + dv]
    kernels = kernels_for(codec, store.codebook.window, query.shape[0] // heads, query.dtype)
    if kernels is not None and pool is not None and codec is not None:
        _keep(batch, layer, plan, new)
        if plan.seal_slot is not None:
            _seal(window, codec, pool, plan)
        mixed = _decode_on_codes(kernels, window, pool, plan, q, k, v, scaling, softcap)
        _put(out, plan, mixed, whole)
        return
    view = _window_view(batch, layer, plan, new)
    if codec is not None and plan.seal_slot is not None:
        _seal(window, codec, pool, plan)
    q = q.transpose(0, 1).reshape(count, heads, -1, q.shape[-1]).float() * scaling  # [B, H, G, d]
    wk, wv = view.split([key.shape[-1], value.shape[-1]], -1)
    scores = torch.matmul(q, wk.transpose(2, 3))
    paged = plan.table.shape[1] if codec is not None else 0
    if codec is not None and pool is not None and paged:
        pages = codec.open(pool.index_select(0, plan.table.flatten()).view(count, paged, -1))
        scores = torch.cat([pages.scores(q), scores], -1)
    if plan.bias is None:
        plan.bias = _bias(plan, window, codec)
    weights = (softcapped(scores, softcap) + plan.bias).softmax(-1)
    if codec is not None and paged:
        cut = paged * codec.page_tokens
        mixed = torch.matmul(weights[..., cut:], wv) + pages.mix(weights[..., :cut])
    else:
        mixed = torch.matmul(weights, wv)
    _put(out, plan, mixed.reshape(count, -1, mixed.shape[-1]).to(out.dtype), whole)


def _put(out: torch.Tensor, plan: DecodePlan, mixed: torch.Tensor, whole: bool) -> None:
    """The decode rows' answers [B, Hq, dv] to their tokens' places."""
    if whole:
        out.copy_(mixed)
    else:
        out.index_copy_(0, plan.token, mixed)


def _decode_on_codes(
    kernels: LayerKernels,
    window: ExactWindow,
    pool: torch.Tensor,
    plan: DecodePlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """`_decode` through the kernels: query [Hq, B, d], key/value [H, B, d] -> [B, Hq, dv] in the query's dtype."""
    from spectral.kernels.decode import StepTables, decode_attention

    if plan.step is None:
        rows = [plan.counts, plan.lengths, plan.firsts]
        count, length, first = torch.tensor(rows, dtype=torch.int32).to(pool.device).unbind(0)
        plan.step = StepTables(plan.table.int(), count, plan.slot.int(), length, first)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return decode_attention(kernels, pool, window, plan.step, q, k, v, scaling=scaling, softcap=softcap)


def _keep(batch: StepBatch, layer: int, plan: DecodePlan, new: torch.Tensor) -> None:
    """Remember new tokens [B, H, d + dv]: they are written when the step is committed."""
    number, at = batch.store.group_of[layer]
    batch.kept.setdefault(number, []).append((at, new))
    batch.spots[number] = plan.slot, plan.write


def _window_view(batch: StepBatch, layer: int, plan: DecodePlan, new: torch.Tensor) -> torch.Tensor:
    """The window as this layer's decode rows see it, new tokens [B, H, d + dv] included: float32 [B, H, S + ring, dim].

    New tokens are exact in their own step and written at its end, all layers at once; what the window holds already is
    read for several layers at once. Without an exact window (`window` 0) a page can be full with the new token: then
    it is written first.
    """
    store = batch.store
    window, (number, at) = store.windows[layer], store.group_of[layer]
    if store.codebook.layers[layer] is not None and not store.codebook.window:
        window.write(plan.slot, plan.write, new)
        return window.read(plan.slot)
    group = store.groups[number]
    first, views = plan.views.get(number, (0, None))
    if views is None or not first <= at < first + len(views):
        most = max(1, READ_AHEAD // (4 * new.numel() * (window.sinks + window.ring)))
        first, views = at, group.read(at, min(at + most, len(group.windows)), plan.slot)
        plan.views[number] = first, views
    view = views[at - first]
    if plan.rows is None:
        view[0, :, plan.write_first] = new[0].float()
    else:
        view[plan.rows, :, plan.write] = new.float()
    _keep(batch, layer, plan, new)
    return view


def _seal(window: ExactWindow, codec: PageCodec, pool: torch.Tensor | None, plan: DecodePlan) -> None:
    """Encode pages whose tokens all lie in their row's ring (a page never wraps: the ring is a multiple of it)."""
    assert pool is not None and plan.seal_slot is not None and plan.seal_place is not None
    assert plan.seal_page is not None and plan.seal_index is not None
    inside = torch.arange(codec.page_tokens, device=pool.device)
    tokens = window.read_places(plan.seal_slot, plan.seal_place[:, None] + inside)  # [n, H, P, d + dv]
    held = tokens.transpose(0, 1).flatten(1, 2)  # [H, n * P, d + dv]
    keys, values = held[:, :0].split([window.shape.key_dim, window.shape.value_dim], -1)
    encode_pages(codec, window, held, keys, values, plan.seal_index, max(plan.counts), pool, plan.seal_page)

"""Attention over exact window and codes: one function for the model's attention layers, one place that picks how.

`attend` appends a forward's new keys and values to the store and answers its queries. The forward is flattened: one
batch dimension of size 1 whose N tokens belong to the step's rows in order. Rows with one new token (decode) run as
one batch, through the kernels or the reference (spectral.dispatch); rows with more run one by one (spectral.prefill),
or a row for each token, where they are few (spectral.engine.chunk_step).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
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

    slot: [B]; write: [B] place in the window; table: [B, m] page ids (0 where a row has fewer).
    seal_*: rows whose oldest recent tokens become a page in this step: slot, place in the window, page id, and the
        page's index in its row. rows: [B] 0 .. B - 1, None for a single row; write_first: the first row's place.
    views: by group of windows, the first layer that was read ahead and what was read.
    counts, firsts, lengths: per row its pages, the oldest token that only the ring holds, and its tokens before this
        step.
    step, bias: what the kernels and the reference make of these; bias: [B, 1, 1, capacity + m*P], 0 or -inf.
    visible: bool [B, B], where rows are tokens of chunks (spectral.engine.chunk_step): whose new token a row sees, its
        own among them. They lie behind the window's places then, also in `bias`. None: its own only, in its place.
    """

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
    views: dict[int, tuple[int, tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    step: StepTables | None = None
    bias: torch.Tensor | None = None
    visible: torch.Tensor | None = None

    @cached_property
    def flat_table(self) -> torch.Tensor:
        """[B * m]"""
        return self.table.flatten()


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
    singles = _singles(batch, query.device)
    if singles.token is None:
        return _decode(batch, layer, singles.index, query[0], key[0], value[0], scaling, softcap).unsqueeze(0)
    out = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))  # [N, Hq, dv]
    if singles.index:
        q, k, v = (x[0].index_select(1, singles.token) for x in (query, key, value))
        out.index_copy_(0, singles.token, _decode(batch, layer, singles.index, q, k, v, scaling, softcap))
    for i, (_, count) in enumerate(batch.work):
        if count > 1:
            span = slice(batch.starts[i], batch.starts[i] + count)
            out[span] = prefill(
                batch, layer, i, query[:, :, span], key[0, :, span], value[0, :, span], scaling, softcap
            )
    return out.unsqueeze(0)


@dataclass
class Singles:
    """A forward's decode rows: their `index` in its work; each one's `token` in the flattened order, None where there
    are no other rows."""

    index: list[int]
    token: torch.Tensor | None


def _singles(batch: StepBatch, device: torch.device) -> Singles:
    found = batch.plans.get("singles")
    if not isinstance(found, Singles):
        index = [i for i, (_, count) in enumerate(batch.work) if count == 1]
        starts = [batch.starts[i] for i in index]
        token = None if len(index) == len(batch.work) else torch.tensor(starts, dtype=torch.long, device=device)
        found = batch.plans["singles"] = Singles(index, token)
    return found


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
    """What hides the places that a row does not hold: [B, 1, 1, capacity + m*P], 0 or -inf. Pages come last: how many
    there are depends on other rows, and a row's softmax must not."""
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
    return torch.cat([window_bias, page_bias], 1)[:, None, None, :].to(plan.table.device)


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
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Decode rows `singles`: query [Hq, B, d], key [H, B, d], value [H, B, dv] -> [B, Hq, dv] in the query's dtype."""
    store = batch.store
    window, codec, pool = store.windows[layer], store.codebook.layers[layer], store.pools[layer]
    kind = f"decode:{window.sinks}:{window.ring}:{codec is None}"
    plan = batch.plans.get(kind)
    if not isinstance(plan, DecodePlan):
        plan = batch.plans[kind] = _decode_plan(batch, singles, window, codec)
    heads, count, width = key.shape
    kernels = kernels_for(codec, store.codebook.window, query.shape[0] // heads, query.dtype)
    if kernels is not None and pool is not None and codec is not None:
        _keep(batch, layer, plan, key.transpose(0, 1), value.transpose(0, 1))
        if plan.seal_slot is not None:
            _seal(window, codec, pool, plan)
        return _decode_on_codes(kernels, window, pool, plan, query, key, value, scaling, softcap)
    new = torch.cat([key, value], -1).transpose(0, 1)  # [B, H, d + dv]
    view = _window_view(batch, layer, plan, new).flatten(0, 1)  # [B * H, places, d + dv]
    if codec is not None and plan.seal_slot is not None:
        _seal(window, codec, pool, plan)
    if plan.bias is None:
        plan.bias = _bias(plan, window, codec)
    q = query.transpose(0, 1).reshape(count, heads, -1, width).float()  # [B, H, G, d]
    keys, values = view.split_with_sizes([width, value.shape[2]], 2)
    scores = torch.bmm(q.flatten(0, 1), keys.transpose(1, 2)).view(count, heads, -1, view.shape[1])
    pages = None
    if codec is not None and pool is not None and plan.table.shape[1]:
        pages = codec.open(pool.index_select(0, plan.flat_table).view(*plan.table.shape, -1))
        scores = torch.cat([scores, pages.scores(q)], -1)
    if softcap is None:
        scores = torch.add(plan.bias, scores, alpha=scaling)
    else:
        scores = softcapped(scores * scaling, softcap) + plan.bias
    weights = scores.softmax(-1)
    if pages is None:
        mixed = torch.bmm(weights.flatten(0, 1), values)
    else:
        recent, paged = weights.split_with_sizes([view.shape[1], scores.shape[3] - view.shape[1]], 3)
        mixed = torch.baddbmm(pages.mix(paged).flatten(0, 1), recent.contiguous().flatten(0, 1), values)
    return mixed.view(count, query.shape[0], -1).to(query.dtype)


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
        number = len(plan.counts)
        spare = [0] * (-number % 4)  # kernels are compiled anew for addresses that are no multiples of 16 bytes
        rows = [[*row, *spare] for row in (plan.counts, plan.lengths, plan.firsts, [0] * number)]
        count, length, first, before = torch.tensor(rows, dtype=torch.int32).to(pool.device)[:, :number].unbind(0)
        plan.step = StepTables(plan.table.int(), count, plan.slot.int(), length, first, before)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return decode_attention(kernels, pool, window, plan.step, q, k, v, scaling=scaling, softcap=softcap)


def _keep(batch: StepBatch, layer: int, plan: DecodePlan, *new: torch.Tensor) -> None:
    """Remember new tokens [B, H, d + dv], or their keys and values: they are written when the step is committed."""
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
    first, views = plan.views.get(number, (0, ()))
    if not first <= at < first + len(views):
        most = max(1, READ_AHEAD // (4 * new.numel() * (window.sinks + window.ring)))
        first, views = at, group.read(at, min(at + most, len(group.windows)), plan.slot).unbind(0)
        plan.views[number] = first, views
    view = views[at - first]
    if plan.visible is not None:
        _keep(batch, layer, plan, new)
        # Not hidden by a weight of 0 alone: another sequence's may be NaN.
        seen = new.float().transpose(0, 1).where(plan.visible[:, None, :, None], 0.0)  # [B, H, B, d + dv]
        return torch.cat([view, seen], 2)
    if plan.rows is None:
        view.select(2, plan.write_first).copy_(new)
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

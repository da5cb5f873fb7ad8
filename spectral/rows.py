"""Rows of a page store as wholes: read one back, cut it, copy it, put a batch of them into another order.

The engine never needs these, a transformers cache does: dense attention reads keys and values back, assisted
generation takes tokens away, beam search copies and drops sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral.errors import CacheError
from spectral.pages import PageStore, Row
from spectral.prefill import append, past_window


def read_row(store: PageStore, layer: int, row: Row, *, plain: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [H, length, d] and values [H, length, dv] of a row in a full-attention layer, decoded from its codes.

    float32; the result is new memory. They are what attention reads; `plain`: without the gains of decoding
    (spectral.gains), which is what can be appended again and gets the same codes.
    """
    window, codec, pool = store.windows[layer], store.codebook.layers[layer], store.pools[layer]
    if codec is None or pool is None:
        raise CacheError(f"layer {layer} keeps a rolling window: its older tokens cannot be read back")
    sinks = min(row.length, window.sinks)
    first = window.sinks + len(row.pages) * codec.page_tokens
    exact = past_window(window, row.slot, first, row.length, sinks)[0]
    sizes = [window.shape.key_dim, window.shape.value_dim]
    if not row.pages:
        keys, values = exact.split(sizes, -1)
        return keys, values
    number = torch.arange(len(row.pages), device=pool.device)
    held = pool[torch.tensor(row.pages, device=pool.device)]
    paged = codec.decode(held, number, plain=plain)  # [m, H, P, d] each
    out = []
    for window_side, page_side in zip(exact.split(sizes, -1), paged, strict=True):
        tokens = page_side.float().transpose(0, 1).flatten(1, 2)  # [H, m * P, d]
        out.append(torch.cat([window_side[:, :sinks], tokens, window_side[:, sinks:]], 1))
    return out[0], out[1]


def append_rows(store: PageStore, work: list[tuple[Row, torch.Tensor, torch.Tensor]]) -> None:
    """Append keys [H, n, d] and values [H, n, dv], n >= 1, to each row of a store of one layer, without attending."""
    batch = store.begin([(row, keys.shape[1]) for row, keys, _ in work])
    try:
        for index, (_, keys, values) in enumerate(work):
            append(batch, 0, index, keys, values)
    except BaseException:
        batch.abort()
        raise
    batch.commit()


def cut_row(store: PageStore, row: Row, length: int) -> None:
    """Take the tokens from position `length` on away from a row of a store without sliding layers.

    Whole pages stay as they are, so what is kept is what it was. Only a page that the cut goes through is decoded
    back into the window, where its remaining tokens wait, as their codes had them, until the page is full again.
    """
    if not 0 <= length <= row.length:
        raise CacheError(f"a row of {row.length} tokens cannot be cut to {length}")
    book = store.codebook
    whole = min(len(row.pages), max(0, length - book.sinks) // book.page_tokens)
    first = book.sinks + whole * book.page_tokens
    if whole < len(row.pages) and length > first:
        page = row.pages[whole]
        for window, codec, pool in zip(store.windows, book.layers, store.pools, strict=True):
            assert codec is not None and pool is not None
            number = torch.tensor([whole], device=pool.device)
            tokens = torch.cat(codec.decode(pool[page : page + 1], number, plain=True), -1)[0]
            places = [window.index(p) for p in range(first, length)]
            where = torch.tensor(places, dtype=torch.long, device=pool.device)
            window.write(row.slot, where, tokens[:, : length - first].transpose(0, 1))
    store._release(row.pages[whole:])
    del row.pages[whole:]
    row.length = length


def copy_row(store: PageStore, row: Row) -> Row:
    """A new row with the same tokens, in memory of its own. Raises OutOfPages, with nothing changed."""
    new = store.open()
    try:
        pages = store._take(len(row.pages))
    except CacheError:
        store.close(new)
        raise
    if pages:
        source, target = (torch.tensor(ids, device=store.device) for ids in (row.pages, pages))
        for pool in store.pools:
            if pool is not None:
                pool[target] = pool[source]
    for window in store.windows:
        window.copy(row.slot, new.slot)
    new.pages, new.length = pages, row.length
    return new


def select_rows(store: PageStore, rows: Sequence[Row], indices: Sequence[int]) -> list[Row]:
    """The rows at `indices`, in that order. A row's first use keeps it, each further use copies it, the rest close."""
    out: list[Row] = []
    used: set[int] = set()
    for index in indices:
        out.append(copy_row(store, rows[index]) if index in used else rows[index])
        used.add(index)
    for index, row in enumerate(rows):
        if index not in used:
            store.close(row)
    return out

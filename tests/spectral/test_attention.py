"""The store and its attention against a model's own full forward, on random models of every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spectral.attention import attend
from spectral.codec import Codebook
from spectral.errors import CacheError, OutOfPages
from spectral.hf import LoadedModel, attending
from spectral.pages import LayerShape, ModelShape, PageStore, Row
from spectral.prefill import causal_attention
from tests.spectral.helpers import FAMILIES, random_codebook, random_codec, random_model


def forward(loaded: LoadedModel, store: PageStore, work: list[tuple[Row, list[int]]]) -> list[torch.Tensor]:
    """One step; logits [count, vocab] of every row."""
    batch = store.begin([(row, len(ids)) for row, ids in work])
    positions = [p for row, ids in work for p in range(row.length, row.length + len(ids))]
    with torch.inference_mode(), attending(loaded.model, batch):
        logits = loaded.model(
            input_ids=torch.tensor([[t for _, ids in work for t in ids]]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
        ).logits[0]
    batch.commit()
    return [logits[s : s + len(ids)] for s, (_, ids) in zip(batch.starts, work, strict=True)]


def run_ragged(loaded: LoadedModel, store: PageStore, texts: list[list[int]], seed: int) -> list[torch.Tensor]:
    """Feed sequences side by side in random pieces (decode steps and chunks mixed); logits of every position."""
    rng = random.Random(seed)
    rows = [store.open() for _ in texts]
    out: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(row.length < len(ids) for row, ids in zip(rows, texts, strict=True)):
        work, who = [], []
        for i, (row, ids) in enumerate(zip(rows, texts, strict=True)):
            if row.length < len(ids) and rng.random() < 0.8:
                take = rng.choice([1, 1, 1, 2, 5, 30])
                work.append((row, ids[row.length : row.length + take]))
                who.append(i)
        if work:
            for i, logits in zip(who, forward(loaded, store, work), strict=True):
                out[i].append(logits)
            store.check()
    for row in rows:
        store.close(row)
    store.check()
    return [torch.cat(parts) for parts in out]


def sequences(count: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 96) for _ in range(n)] for n in lengths[:count]]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exact_setting_equals_the_models_own_forward(family: str) -> None:
    loaded = random_model(family)
    texts = sequences(3, [90, 41, 17])
    got = run_ragged(loaded, PageStore(loaded.shape, window_dtype=torch.float32), texts, seed=1)
    loaded.model.set_attn_implementation("eager")
    for ids, logits in zip(texts, got, strict=True):
        with torch.inference_mode():
            expected = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("units", "block"), [(1, 0), (2, 16)])
def test_attention_reads_sinks_pages_and_recent_tokens(units: int, block: int, softcap: float | None) -> None:
    """Against dense attention over what the store holds: sinks and recent tokens exact, pages as they decode."""
    heads, groups, dim, sinks, window, page = 2, 3, 8, 4, 16, 8
    shape = ModelShape((LayerShape(heads, dim, dim),), heads * groups, 32)
    codec = random_codec(heads, dim, [6, 4, 3, 2, 1, 0], page=page, units=units, block=block)
    store = PageStore(shape, Codebook("test", "", sinks, window, page, [codec]), window_dtype=torch.float32)
    rows = [store.open() for _ in range(3)]
    dense: list[list[torch.Tensor]] = [[torch.zeros(heads, 0, dim)] * 2 for _ in rows]
    steps = [(30, 3, 50), (1, 1, 1), (1, 20, 1), *[(1, 1, 1)] * 20]
    for step in steps:
        count = sum(step)
        query, key, value = (torch.randn(1, h, count, dim) for h in (heads * groups, heads, heads))
        batch = store.begin(list(zip(rows, step, strict=True)))
        past = [row.length for row in rows]
        held = [len(row.pages) for row in rows]
        out = attend(batch, 0, query, key, value, scaling=0.3, softcap=softcap)[0]
        batch.commit()
        for i, (row, n) in enumerate(zip(rows, step, strict=True)):
            span = slice(batch.starts[i], batch.starts[i] + n)
            exact = [torch.cat([old, x[0, :, span]], 1) for old, x in zip(dense[i], (key, value), strict=True)]
            read = [x.clone() for x in exact]
            visible = len(row.pages) if n == 1 else held[i]  # a chunk reads the pages that were there before it
            for number, page_id in enumerate(row.pages[:visible]):
                at = slice(sinks + number * page, sinks + (number + 1) * page)
                for x, decoded in zip(
                    read, codec.decode(store.pools[0][[page_id]], torch.tensor([number])), strict=True
                ):
                    x[:, at] = decoded[0]
            expected = dense_attention(query[0, :, span], *read, past[i], softcap)
            torch.testing.assert_close(out[span], expected, rtol=1e-3, atol=1e-3)
            dense[i] = exact
    store.check()
    assert all(len(row.pages) > 1 for row in rows)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int, softcap: float | None
) -> torch.Tensor:
    """query [Hq, n, d] over key/value [H, past + n, d], causal -> [n, Hq, d]."""
    groups = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * 0.3
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    n = query.shape[1]
    hidden = torch.arange(past + n)[None, :] > torch.arange(past, past + n)[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 0)).transpose(0, 1)


def test_encoded_pages_never_change() -> None:
    loaded = random_model("qwen3")
    store = PageStore(loaded.shape, random_codebook(loaded.shape, [3, 2, 1, 0]))
    row = store.open()
    ids = sequences(1, [120])[0]
    forward(loaded, store, [(row, ids[:60])])
    pages = list(row.pages)
    before = [pool[pages].clone() for pool in store.pools if pool is not None]
    for token in ids[60:]:
        forward(loaded, store, [(row, [token])])
    after = [pool[pages] for pool in store.pools if pool is not None]
    assert row.pages[: len(pages)] == pages
    assert len(row.pages) > len(pages)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("bits", [8, 10, 16])
def test_chunks_and_single_tokens_make_the_same_cache(bits: int) -> None:
    """Pages and windows do not depend on how the tokens came, also where the window rounds them."""
    shape = ModelShape((LayerShape(2, 8, 8),), 4, 32)
    codec = random_codec(2, 8, [4, 3, 2, 1], page=8, block=16)
    book = Codebook("test", "", 4, 16, 8, [codec], window_bits=bits)
    query, key, value = torch.randn(1, 4, 61, 8), torch.randn(1, 2, 61, 8), torch.randn(1, 2, 61, 8)
    held = []
    for sizes in ([61], [1] * 61, [3, 40, 1, 1, 16]):
        store = PageStore(shape, book)
        row, at = store.open(), 0
        for n in sizes:
            batch = store.begin([(row, n)])
            span = slice(at, at + n)
            attend(batch, 0, query[:, :, span], key[:, :, span], value[:, :, span], scaling=0.3)
            batch.commit()
            at += n
        recent = torch.tensor([store.windows[0].index(p) for p in [*range(4), *range(44, 61)]])
        held.append((store.pools[0][row.pages], store.windows[0].read(torch.tensor([row.slot]))[:, :, recent]))
    for pages, tokens in held[1:]:
        assert torch.equal(pages, held[0][0])
        assert torch.equal(tokens, held[0][1])


def test_bytes_reported_are_bytes_allocated() -> None:
    loaded = random_model("gemma2")
    store = PageStore(loaded.shape, random_codebook(loaded.shape, [4, 2], window_bits=8))
    row = store.open()
    forward(loaded, store, [(row, sequences(1, [77])[0])])
    tensors = [p for p in store.pools if p is not None] + [t for w in store.windows for t in w.tensors()]
    assert store.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert store.bytes_per_token(77) == pytest.approx(store.row_nbytes(row) / 77)
    assert store.used_nbytes <= store.nbytes
    store.close(row)
    assert store.used_nbytes == 0
    assert store.trim() > 0
    assert store.nbytes == 0
    store.check()


def test_out_of_pages_changes_nothing() -> None:
    loaded = random_model("qwen3")
    book = random_codebook(loaded.shape, [4])
    probe = PageStore(loaded.shape, book)
    probe.open()
    store = PageStore(loaded.shape, book, max_bytes=probe.nbytes + 3 * book.page_nbytes())
    row = store.open()
    with pytest.raises(OutOfPages, match="max_kv_bytes"):
        store.begin([(row, 400)])
    store.check()
    assert (row.length, row.pages) == (0, [])
    assert store.nbytes <= store.max_bytes  # type: ignore[operator]
    batch = store.begin([(row, 20 + 3 * 8)])
    batch.commit()
    assert store.nbytes <= store.max_bytes  # type: ignore[operator]


def test_misuse_is_refused() -> None:
    loaded = random_model("qwen3")
    store = PageStore(loaded.shape)
    row = store.open()
    batch = store.begin([(row, 40)])
    batch.abort()
    with pytest.raises(CacheError, match="already"):
        batch.commit()
    store.check()
    store.close(row)
    with pytest.raises(CacheError, match="closed"):
        store.close(row)
    with pytest.raises(CacheError, match="open rows"):
        store.begin([(row, 1)])


@pytest.mark.parametrize("bits", [(10, 8), (8, 8)])
def test_squeezing_a_live_store_keeps_rows_and_frees_bytes(bits: tuple[int, int]) -> None:
    """After a squeeze the store holds what its codes and windows hold at the coarser setting, and streams go on."""
    loaded = random_model("gemma2")
    fine = random_codebook(loaded.shape, [6, 4, 3], window_bits=bits[0])
    coarse = random_codebook(loaded.shape, [4, 2, 1], window_bits=bits[1])
    store = PageStore(loaded.shape, fine)
    rows = [store.open() for _ in range(2)]
    texts = sequences(2, [150, 90])
    forward(loaded, store, [(row, ids[:70]) for row, ids in zip(rows, texts, strict=True)])
    expected = [
        a.squeeze(pool[rows[0].pages], b)
        for pool, a, b in zip(store.pools, fine.layers, coarse.layers, strict=True)
        if pool is not None
    ]
    window = store.windows[1].read(torch.tensor([rows[0].slot]))
    lengths, pages = [row.length for row in rows], [list(row.pages) for row in rows]
    before = store.nbytes
    freed = store.squeeze(coarse)
    assert freed == before - store.nbytes > 0
    assert ([row.length for row in rows], [row.pages for row in rows]) == (lengths, pages)
    held = [pool[rows[0].pages] for pool in store.pools if pool is not None]
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
    again = store.windows[1].read(torch.tensor([rows[0].slot]))
    torch.testing.assert_close(again, window, rtol=0, atol=0.006 * float(window.abs().max()))
    forward(loaded, store, [(row, ids[70:90]) for row, ids in zip(rows, texts, strict=True)])
    for token in texts[0][90:]:
        forward(loaded, store, [(rows[0], [token])])
    store.check()
    with pytest.raises(CacheError, match="not coarser"):
        store.squeeze(fine)
    with pytest.raises(CacheError, match="one profile"):
        PageStore(loaded.shape).squeeze(coarse)


@pytest.mark.parametrize("preferred", [True, False])
def test_exact_attention_lets_cudnn_make_no_plans(monkeypatch: pytest.MonkeyPatch, preferred: bool) -> None:
    """Whatever the process had set, it has afterwards, also when the attention fails."""
    before, plain, seen = torch.backends.cuda.cudnn_sdp_enabled(), F.scaled_dot_product_attention, []

    def looking(*arguments: Any, **more: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*arguments, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", looking)
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    try:
        torch.backends.cuda.enable_cudnn_sdp(preferred)
        causal_attention(query, key, key, scaling=0.25)
        with pytest.raises(RuntimeError):
            causal_attention(query, key[..., :8], key, scaling=0.25)
        assert seen == [False, False] and torch.backends.cuda.cudnn_sdp_enabled() == preferred
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

"""One of our settings scored in one forward: every query sees what the page store would show it in decoding.

Feeding a store token by token is the definition and takes a forward per token. Encoding is causal by page, so the keys
and values of a whole window can be encoded layer by layer within one forward, and each query given its own view: sinks,
the pages sealed by then, and recent tokens as the window keeps them. A test holds the two to be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spectral.codec import LayerCodec
from spectral.comparison import Windows, cache_attention
from spectral.pages import exact_codebook
from spectral.scoring import Blocks, ExactPass, Tally
from spectral.windows import make_window

if TYPE_CHECKING:
    from spectral.codec import Codebook, PageCodec
    from spectral.hf import LoadedModel
    from spectral.shapes import LayerShape


STEP = 512
"""Positions whose logits are made at once."""


def score_oneshot(
    exact: ExactPass, codebook: Codebook | None, *, finer: Codebook | None = None
) -> dict[str, torch.Tensor]:
    """Per-position figures (spectral.scoring.Tally) of a setting (None: exact, bf16) on a window of tokens.

    finer: pages are encoded at this setting first and squeezed to `codebook`.
    """
    tally = Tally(exact)
    for begin, logits in oneshot_blocks(exact.loaded, codebook, exact.ids, finer=finer):
        tally.add(begin, logits)
    return tally.joined()


def oneshot_blocks(
    loaded: LoadedModel,
    codebook: Codebook | None,
    ids: Sequence[int],
    first: int = 0,
    *,
    finer: Codebook | None = None,
) -> Blocks:
    """Logits of a sequence read through a setting's cache (None: exact, bf16), from position `first` on."""
    from spectral.hf import observing
    from spectral.hf_reading import last_hidden, logits_of

    book = codebook if codebook is not None else exact_codebook(loaded.shape)
    length = len(ids)
    sealed = [max(0, (t - book.sinks - book.window) // book.page_tokens) for t in range(1, length + 1)]
    seen = torch.tensor(
        [t + 1 - (book.sinks + pages * book.page_tokens if pages else 0) for t, pages in enumerate(sealed)],
        device=loaded.device,
    )
    windows = Windows(min(book.sinks, length), seen, seen)

    def observe(
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor | None:
        codec = book.layers[layer]
        if codec is None:
            return None
        before = None if finer is None else finer.layers[layer]
        kept, restored = _views(book, codec, before, loaded.shape.layers[layer], key[0], value[0], sealed[-1])
        own = (key[0].float(), value[0].float())  # a token is exact in its own step
        return cache_attention(query, kept, restored, windows, scaling=scaling, softcap=softcap, own=own)

    with observing(observe):
        hidden = last_hidden(loaded, ids)
    for begin in range(first, length, STEP):
        yield begin, logits_of(loaded, hidden[begin : begin + STEP])


def _views(
    book: Codebook,
    codec: PageCodec,
    finer: PageCodec | None,
    shape: LayerShape,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: int,
) -> tuple[Any, Any]:
    """Keys and values [H, N, d] as the window keeps them, and as the pages do where there are any; float32."""
    tokens = torch.cat([key, value], -1)
    window = make_window(shape, book.sinks, book.page_tokens, torch.bfloat16, tokens.device, book.window_bits)
    kept = window.as_kept(tokens)
    kept[:, : book.sinks] = tokens[:, : book.sinks].to(torch.bfloat16).float()
    restored = kept.clone()
    if pages:
        span = slice(book.sinks, book.sinks + pages * book.page_tokens)
        paged = kept[:, span].unflatten(1, (pages, -1)).transpose(0, 1)
        keys, values = paged.split([shape.key_dim, shape.value_dim], -1)
        number = torch.arange(pages, device=tokens.device)
        if isinstance(finer, LayerCodec) and isinstance(codec, LayerCodec):
            packed = finer.squeeze(finer.encode(keys, values, number), codec)
        else:
            packed = codec.encode(keys, values, number)
        back = torch.cat(codec.decode(packed, number), -1)  # [pages, H, P, d + dv]
        restored[:, span] = back.transpose(0, 1).flatten(1, 2)
    sizes = [shape.key_dim, shape.value_dim]
    return kept.split(sizes, -1), restored.split(sizes, -1)

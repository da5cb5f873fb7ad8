"""One of our settings scored in one forward: every query sees what the page store would show it in decoding.

Feeding a store token by token is the definition and takes a forward per token. Encoding is causal by page, so the keys
and values of a whole window can be encoded layer by layer within one forward, and each query given its own view: sinks,
the pages sealed by then, and recent tokens as the window keeps them. A test holds the two to be the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spectral.comparison import Windows, cache_attention
from spectral.scoring import ExactPass, Tally
from spectral.windows import make_window

if TYPE_CHECKING:
    from spectral.codec import Codebook, PageCodec
    from spectral.shapes import LayerShape


def score_oneshot(exact: ExactPass, codebook: Codebook) -> dict[str, torch.Tensor]:
    """Per-position figures (spectral.scoring.Tally) of a setting on a window of tokens."""
    from spectral.hf import observing
    from spectral.hf_reading import last_hidden, logits_of

    loaded, book = exact.loaded, codebook
    length = len(exact.ids)
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
        kept, restored = _views(book, codec, loaded.shape.layers[layer], key[0], value[0], sealed[-1])
        return cache_attention(query, kept, restored, windows, scaling=scaling, softcap=softcap)

    tally = Tally(exact)
    with observing(observe):
        hidden = last_hidden(loaded, exact.ids)
    step = 512
    for begin in range(0, length, step):
        tally.add(begin, logits_of(loaded, hidden[begin : begin + step]))
    return tally.joined()


def _views(
    book: Codebook, codec: PageCodec, shape: LayerShape, key: torch.Tensor, value: torch.Tensor, pages: int
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
        back = torch.cat(codec.decode(codec.encode(keys, values, number), number), -1)  # [pages, H, P, d + dv]
        restored[:, span] = back.transpose(0, 1).flatten(1, 2)
    sizes = [shape.key_dim, shape.value_dim]
    return kept.split(sizes, -1), restored.split(sizes, -1)

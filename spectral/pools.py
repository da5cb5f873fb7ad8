"""Pools of packed pages: one tensor for all pages of a layer; and the setting whose pages are not packed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectral.aside import wait
from spectral.codec import Codebook, ExactCodec, LayerCodec, PageCodec
from spectral.layout import POOL_SLACK
from spectral.residency import give_back
from spectral.shapes import ModelShape

EXACT_PAGE_TOKENS = 16

GIVE_BACK_BYTES = 64 << 20
"""Pools of a GPU that are replaced are returned to the driver whenever so many bytes of old ones have come together."""

Pools = list["torch.Tensor | None"]
Fill = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with a layer, pages of its old pool, and as many new pages to write."""


def empty_pool(capacity: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """A pool uint8 [capacity, nbytes]; on a GPU with POOL_SLACK bytes behind it that kernels may read (less than the
    allocator's own rounding, so not counted)."""
    total = capacity * nbytes
    slack = POOL_SLACK if device.type == "cuda" else 0
    return torch.empty(total + slack, dtype=torch.uint8, device=device)[:total].view(capacity, nbytes)


class _Old:
    """Pools that new ones have taken the place of. They stay until enough of them have come together: new ones would
    be put into their places and hold on to what is left of them, and returning memory to the driver takes a while."""

    left = 0  # bytes that earlier ones left behind in the allocator

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def add(self, pool: torch.Tensor) -> None:
        """Keep one; on a CPU the allocator needs no help."""
        if pool.device.type == "cuda":
            self._kept.append(pool)

    def release(self, *, now: bool = False) -> None:
        """Return them if they are many; the caller holds none of them any more."""
        held = sum(pool.numel() for pool in self._kept)
        if self._kept and (now or held + _Old.left >= GIVE_BACK_BYTES):
            wait(self._kept[0].device)  # the driver would; so it is known what takes the time
            self._kept.clear()
            _Old.left = 0
            give_back("cuda")

    def close(self) -> None:
        """The rest waits for the next time."""
        _Old.left += sum(pool.numel() for pool in self._kept)


def copied(layer: int, pages: torch.Tensor, out: torch.Tensor) -> None:
    """A Fill that leaves pages as they are."""
    out.copy_(pages)


def remake(pools: Pools, kept: torch.Tensor | None, sizes: list[int], fill: Fill) -> None:
    """In place: every pool becomes one with the pages `kept` (ascending; None: all), each of the layer's `sizes` bytes.

    One after another, so that old and new never lie side by side as a whole: memory is short when this is wanted. Where
    the device has no memory for a new pool, its pages are rewritten where they lie.
    """
    old = _Old()
    for layer, pool in enumerate(pools):
        if pool is None:
            continue
        index = None if kept is None else kept.to(pool.device)
        try:
            pools[layer] = _remade(pool, index, sizes[layer], layer, fill)
        except torch.OutOfMemoryError:
            old.release(now=True)
            pools[layer] = _rewritten(pool, index, sizes[layer], layer, fill)
        old.add(pool)
        del pool
        old.release()
    old.close()


def _remade(pool: torch.Tensor, kept: torch.Tensor | None, nbytes: int, layer: int, fill: Fill) -> torch.Tensor:
    """In a tensor of its own."""
    source = pool if kept is None else pool.index_select(0, kept)
    out = empty_pool(source.shape[0], nbytes, pool.device)
    fill(layer, source, out)
    return out


def _rewritten(
    pool: torch.Tensor, kept: torch.Tensor | None, nbytes: int, layer: int, fill: Fill, step: int = 64
) -> torch.Tensor:
    """In the pool's own memory, some pages at a time: what is written lies before what is still to be read. Raises
    OutOfMemoryError for pages that grow, and where there is not even memory for those few."""
    if nbytes > pool.shape[1]:
        raise torch.OutOfMemoryError("pages that grow need memory of their own")
    count = pool.shape[0] if kept is None else kept.numel()
    flat = pool.view(-1)
    for first in range(0, count, step):
        span = slice(first, min(first + step, count))
        source = pool[span].clone() if kept is None else pool.index_select(0, kept[span])
        out = empty_pool(source.shape[0], nbytes, pool.device)
        fill(layer, source, out)
        flat[span.start * nbytes : span.stop * nbytes] = out.view(-1)
    return flat[: count * nbytes].view(count, nbytes)


def grow(pools: Pools, capacity: int) -> None:
    """In place: room for `capacity` pages, the present ones first. Raises OutOfMemoryError; pools are then as before
    (those that had grown already keep their memory until they are made anew)."""
    before = next((pool.shape[0] for pool in pools if pool is not None), 0)
    old = _Old()
    for layer, pool in enumerate(pools):
        if pool is None:
            continue
        try:
            new = empty_pool(capacity, pool.shape[1], pool.device)
        except torch.OutOfMemoryError:
            for done in range(layer):
                if (grown := pools[done]) is not None:
                    pools[done] = grown[:before]
            raise
        new[: pool.shape[0]] = pool
        pools[layer] = new
        old.add(pool)
        del pool, new
        old.release()
    old.close()


def squeezed(pool: torch.Tensor, old: PageCodec, new: PageCodec) -> torch.Tensor:
    """Pages [n, bytes] of a pool at another setting."""
    assert isinstance(new, LayerCodec)
    out = empty_pool(pool.shape[0], new.page_nbytes, pool.device)
    if len(pool):
        squeeze_fill([old], [new])(0, pool, out)
    return out


def squeeze_fill(old: list[PageCodec | None], new: list[PageCodec | None], step: int = 1024) -> Fill:
    """What takes pages of one setting to another: with a kernel where one serves, or `step` pages at a time. All that
    can fail for another reason than memory is done here."""
    from spectral.code_dispatch import squeezer
    from spectral.dispatch import launching

    kernels = [squeezer(a, b) if isinstance(a, LayerCodec) and isinstance(b, LayerCodec) else None
               for a, b in zip(old, new, strict=True)]  # fmt: skip

    def fill(layer: int, pages: torch.Tensor, out: torch.Tensor) -> None:
        kernel, a, b = kernels[layer], old[layer], new[layer]
        assert isinstance(a, LayerCodec) and isinstance(b, LayerCodec)
        if kernel is not None:
            with launching(pages.device):
                kernel(pages, out)
            return
        for first in range(0, pages.shape[0], step):
            out[first : first + step] = a.squeeze(pages[first : first + step], b)

    return fill


def exact_codebook(shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> Codebook:
    """The "exact" setting: bf16 pages. With float32, generation equals an uncompressed float32 cache's bit for bit."""
    layers: list[PageCodec | None] = [
        None
        if layer.sliding
        else ExactCodec(
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            page_tokens=EXACT_PAGE_TOKENS,
            dtype=dtype,
        )
        for layer in shape.layers
    ]
    return Codebook("exact", "", 0, 0, EXACT_PAGE_TOKENS, layers)

"""Packing latents into pages, and attention arithmetic on the packed pages.

A `LayerCodec` is one layer of a profile at one setting, ready on a device. It has one or more units: keys and values of
a run of KV heads share one basis, so that one code serves both; or each has its own, and scores and sums read half of
the codes. Per page of P tokens and unit: latents of every token, an orthonormal DCT over the page's tokens, one code
per coefficient (`spectral.layout.PageLayout`).

Scores and values never rebuild keys or values. With DCT coefficients y, basis B and DCT matrix M,
    q . k_t = q . mean + sum_f M[f, t] (y_f . B^T q)        sum_t w_t v_t = W mean + B sum_f (sum_t M[f, t] w_t) y_f
so a query is projected once per block of tokens (spectral.frames), codes are unpacked once for all query heads, and the
DCT is a P x P product on scores and weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectral.basis import covered_heads, holding
from spectral.errors import SettingError
from spectral.row_by_row import for_any_rows, of_any_rows, of_any_terms
from spectral.unit_codec import UnitCodec

if TYPE_CHECKING:
    from spectral.basis import Unit
    from spectral.bits import Table
    from spectral.frames import BlockFrame

EXACT = "exact"
"""The setting without codes."""


class LayerCodec(torch.nn.Module):
    """One layer at one setting: `encode` pages, `open` them for attention, `decode` for those who need tensors.

    Shapes: H KV heads, d key and dv value dimensions of a head, P tokens a page, n pages.

    Args:
        units: (unit, widths [classes, R]), those with keys in the order of their heads, covering heads 0 .. H - 1, and
            those with values likewise.
        tables: quantizers by width; frame: of the keys.
        finer: the same layer at another setting on the same device, whose matrices are taken over where they suffice.
    """

    def __init__(
        self,
        units: list[tuple[Unit, np.ndarray]],
        tables: Mapping[int, Table],
        frame: BlockFrame,
        *,
        key_dim: int,
        value_dim: int,
        page_tokens: int,
        device: torch.device | str = "cpu",
        finer: LayerCodec | None = None,
    ) -> None:
        super().__init__()
        if page_tokens < 8 or page_tokens & (page_tokens - 1):
            raise SettingError(f"page_tokens must be a power of two and at least 8, got {page_tokens}")
        self.frame, self.page_tokens, self.key_dim, self.value_dim = frame, page_tokens, key_dim, value_dim
        counts = {len(table) for unit, widths in units for table in (unit.deviation, widths)}
        if len(counts) != 1:
            raise SettingError(f"the units of a layer have {sorted(counts)} classes; all must have the same")
        self.classes: int = counts.pop()
        """Classes of a page's rows (spectral.bits.row_classes)."""
        known: list[Any] = [None] * len(units) if finer is None else list(finer.units)
        self.units: torch.nn.ModuleList = torch.nn.ModuleList(
            UnitCodec(
                unit,
                widths,
                tables,
                page_tokens=page_tokens,
                key_dim=key_dim,
                value_dim=value_dim,
                device=device,
                finer=like,
            )
            for (unit, widths), like in zip(units, known, strict=True)
        )
        held = [(unit.heads, unit.side) for unit, _ in units]
        try:
            self.kv_heads = covered_heads(held)
        except ValueError as error:
            raise SettingError(str(error)) from None
        self.key_units = holding((side for _, side in held), "key")
        """Units that hold keys, in the order of their heads."""
        self.value_units = holding((side for _, side in held), "value")
        """The same of values."""
        self.starts = [0, *accumulate(unit.layout.nbytes for unit in self.units)]
        """Where the units' bytes begin in a page, and the end."""
        self._bounds = [slice(a, b) for a, b in zip(self.starts, self.starts[1:], strict=False)]
        self.page_nbytes = self.starts[-1]

    def twin(self) -> LayerCodec:
        """The same codec as another object, for what a codec keeps in itself: with a reference back, tables on a GPU
        would stay until the garbage collector looks, hundreds of megabytes for every setting that was left."""
        return copy.copy(self)

    @torch.no_grad()
    def encode(self, keys: torch.Tensor, values: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
        """keys [n, H, P, d] post-RoPE, values [n, H, P, dv] (any float dtype), page [n] int64: each page's index in its
        sequence -> pages uint8 [n, page_nbytes]."""
        n = keys.shape[0]
        keys = self.frame.keys(keys.float(), page)
        parts = []
        for unit in self.units:
            span = slice(*unit.heads)
            sides = [x[:, span].float() for x, size in zip((keys, values), unit.numbers, strict=True) if size]
            x = torch.cat([side.transpose(1, 2).reshape(n, self.page_tokens, -1) for side in sides], -1)
            parts.append(unit.encode(x))
        return torch.cat(parts, 1)

    def open(self, pages: torch.Tensor) -> OpenPages:
        """The first m pages of B sequences, uint8 [B, m, page_nbytes], unpacked once for `scores` and `mix`."""
        batch, count = pages.shape[:2]
        flat = pages.flatten(0, 1)
        parts = [flat] if len(self.units) == 1 else [flat[:, bounds] for bounds in self._bounds]
        opened = [
            unit.opened(part).view(batch, count * self.page_tokens, -1)
            for unit, part in zip(self.units, parts, strict=True)
        ]
        return OpenPages(self, opened, count)

    def decode(
        self, pages: torch.Tensor, page: torch.Tensor, *, plain: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """pages uint8 [n, page_nbytes], page [n] index in the sequence -> post-RoPE keys [n, H, P, d] and values
        [n, H, P, dv], float32. `plain`: without the gains (spectral.gains), for what is to be encoded again."""
        n, tokens = pages.shape[0], self.page_tokens
        sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for unit, bounds in zip(self.units, self._bounds, strict=True):
            count = unit.heads[1] - unit.heads[0]
            x = unit.decode(pages[:, bounds], plain=plain).split(unit.numbers, -1)
            for side, part, size in zip(sides, x, unit.numbers, strict=True):
                if size:
                    side.append(part.reshape(n, tokens, count, -1).transpose(1, 2))
        return self.frame.keys(torch.cat(sides[0], 1), page, back=True), torch.cat(sides[1], 1)

    def squeeze(self, pages: torch.Tensor, coarser: LayerCodec) -> torch.Tensor:
        """Pages of this setting [n, page_nbytes] re-encoded at another setting of the same profile.

        Settings share bases and deviations, so codes map to codes and nothing is decoded. Against encoding at the other
        setting it costs 4 to 7 % of KL (docs/codec-research.md); a latent that this setting dropped stays dropped.
        """
        parts = []
        for unit, bounds, other in zip(self.units, self._bounds, coarser.units, strict=True):
            levels = unit.levels(pages[:, bounds])
            full = levels.new_zeros((*levels.shape[:2], unit.channels))
            full.index_copy_(2, unit.used, levels)
            parts.append(other.quantize(full.index_select(2, other.used)))
        return torch.cat(parts, 1)


@dataclass
class OpenPages:
    """m `pages` of B sequences, unpacked: `coefficients[unit]` is [B, m * P, R + 1] float32, the mean's last."""

    codec: LayerCodec
    coefficients: list[torch.Tensor]
    pages: int

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """q . k for every token of the pages.

        Args:
            query: [B, H, G, d] float32, post-RoPE, G query rows that share a KV head.

        Returns:
            [B, H, G, m * P] float32, not yet scaled.
        """
        frame, out = self.codec.frame, []
        blocks = frame.blocks(self.pages)
        whole, rest = divmod(self.pages, frame.pages) if blocks > 1 else (0, self.pages)
        framed = frame.queries(query, blocks).permute(2, 0, 1, 3, 4)  # [H, B, blocks, G, d]
        for number in self.codec.key_units:
            unit, y = self.codec.units[number], self.coefficients[number]
            q = framed if len(self.codec.key_units) == 1 else framed[slice(*unit.heads)]
            heads, batch, _, group, _ = q.shape
            latent = of_any_rows(q.flatten(1, 3), unit.key_basis)
            latent = latent.view(heads, batch, blocks, group, -1).permute(1, 2, 0, 3, 4).flatten(2, 3)
            parts = []  # by frequency, [B, h * G, tokens]
            if whole:
                cut = whole * frame.pages * unit.page_tokens
                by_block = y[:, :cut].unflatten(1, (whole, -1)).flatten(0, 1)
                score = for_any_rows(latent[:, :whole].flatten(0, 1), by_block).unflatten(0, (batch, whole))
                parts.append(score.transpose(1, 2).flatten(2))
                y = y[:, cut:]
            if rest:
                parts.append(for_any_rows(latent[:, whole], y))
            score = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
            score = of_any_rows(score.reshape(1, -1, unit.page_tokens), unit.dct[None])
            out.append(score.reshape(batch, heads, group, -1))
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def mix(self, weight: torch.Tensor) -> torch.Tensor:
        """sum_t weight_t v_t over the pages' tokens.

        Args:
            weight: [B, H, G, m * P] float32 attention weights (0 for masked tokens).

        Returns:
            [B, H, G, dv] float32.
        """
        out = []
        for number in self.codec.value_units:
            unit, y = self.codec.units[number], self.coefficients[number]
            w = weight if len(self.codec.value_units) == 1 else weight[:, slice(*unit.heads)]
            batch, heads, group, _ = w.shape
            by_frequency = of_any_rows(w.reshape(1, -1, unit.page_tokens), unit.inverse_dct[None])
            mixed = of_any_terms(by_frequency.reshape(batch, heads * group, -1), y)  # [B, h * G, R + 1]
            mixed = mixed.view(batch, heads, group, -1).transpose(0, 1).flatten(1, 2)
            found = of_any_rows(mixed, unit.value_basis).unflatten(1, (batch, group))  # [h, B, G, dv]
            out.append(found.transpose(0, 1))
        return out[0] if len(out) == 1 else torch.cat(out, 1)


class ExactCodec(torch.nn.Module):
    """The "exact" setting: pages hold keys and values in bf16, behind the same functions as `LayerCodec`."""

    def __init__(
        self, *, kv_heads: int, key_dim: int, value_dim: int, page_tokens: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.kv_heads, self.key_dim, self.value_dim, self.page_tokens = kv_heads, key_dim, value_dim, page_tokens
        self.dtype = dtype
        self._key_bytes = kv_heads * page_tokens * key_dim * dtype.itemsize
        self.page_nbytes = self._key_bytes + kv_heads * page_tokens * value_dim * dtype.itemsize

    def encode(self, keys: torch.Tensor, values: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
        """keys [n, H, P, d], values [n, H, P, dv] -> pages uint8 [n, page_nbytes]; `page` is not needed.

        What is not finite becomes a finite number: tables of other rows may name a page with a weight of 0, which would
        not hide a NaN. Its own request is told all the same, by the logits of the step that made it.
        """
        n = keys.shape[0]
        parts = [x.to(self.dtype).nan_to_num().reshape(n, -1).view(torch.uint8) for x in (keys, values)]
        return torch.cat(parts, -1)

    def decode(
        self, pages: torch.Tensor, page: torch.Tensor, *, plain: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """pages uint8 [n, page_nbytes] -> keys [n, H, P, d], values [n, H, P, dv], in the stored dtype."""
        n = pages.shape[0]
        shape = (n, self.kv_heads, self.page_tokens)
        keys = pages[:, : self._key_bytes].view(self.dtype).view(*shape, self.key_dim)
        values = pages[:, self._key_bytes :].view(self.dtype).view(*shape, self.value_dim)
        return keys, values

    def open(self, pages: torch.Tensor) -> OpenExactPages:
        """As `LayerCodec.open`."""
        batch, count = pages.shape[:2]
        sides = [x.float().unflatten(0, (batch, count)) for x in self.decode(pages.flatten(0, 1), pages.new_zeros(0))]
        return OpenExactPages(sides[0], sides[1])


@dataclass
class OpenExactPages:
    """Keys [B, m, H, P, d] and values [B, m, H, P, dv], float32, behind the functions of `OpenPages`.

    Only scores and weights, which are small, change their order. Operands lie alike whatever the number of rows and
    pages: products of matrices that lie otherwise round otherwise.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """As `OpenPages.scores`."""
        batch, pages = self.keys.shape[:2]
        asked = query[:, None].expand(-1, pages, -1, -1, -1).flatten(0, 2)  # [B * m * H, G, d]
        by_page = torch.bmm(asked, self.keys.flatten(0, 2).transpose(1, 2))
        return by_page.view(batch, pages, *query.shape[1:3], -1).permute(0, 2, 3, 1, 4).flatten(3)

    def mix(self, weight: torch.Tensor) -> torch.Tensor:
        """As `OpenPages.mix`."""
        batch, pages, heads = self.values.shape[:3]
        by_page = weight.unflatten(3, (pages, -1)).permute(0, 3, 1, 2, 4).flatten(0, 2)  # [B * m * H, G, P]
        mixed = torch.bmm(by_page.contiguous(), self.values.flatten(0, 2)).view(batch, pages, -1)
        # A product adds one page after another; the order of `sum` depends on how many there are, and so on other rows.
        whole = torch.bmm(mixed.new_ones(batch, 1, pages), mixed)
        return whole.view(batch, heads, *weight.shape[2:3], -1)


PageCodec = LayerCodec | ExactCodec


@dataclass
class Codebook:
    """A profile at one setting, on a device: one codec per layer (None for layers that stay exact in a rolling window).

    Attributes:
        setting: the setting's name; profile_hash: identity of the profile that made it.
        sinks, window, page_tokens: the exact window in tokens, and the page size in tokens.
        layers: index = layer index of the model.
        window_bits: bits of a recent token's numbers: 8 or 10 (with a scale per 32), or 16 for the window's own dtype.
    """

    setting: str
    profile_hash: str
    sinks: int
    window: int
    page_tokens: int
    layers: list[PageCodec | None]
    window_bits: int = 16

    def page_nbytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(codec.page_nbytes for codec in self.layers if codec is not None)


def coarser(old: Codebook, new: Codebook) -> bool:
    """True where a cache at `old` can be squeezed to `new`."""
    same = (old.profile_hash, old.sinks, old.window, old.page_tokens) == (
        new.profile_hash, new.sinks, new.window, new.page_tokens
    )  # fmt: skip
    compressed = EXACT not in (old.setting, new.setting)
    return compressed and same and new.page_nbytes() < old.page_nbytes() and new.window_bits <= old.window_bits

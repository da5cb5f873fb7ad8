"""Keys and values that are still codes: what a cache's `update` hands to the attention of an unmodified model.

`CodedStates` has the shape, dtype and device of the dense keys (or values) and no memory. Spectral's own attention
recognises it and works on the codes. Any other operation (sdpa, eager and so on) turns it into the dense tensor first,
decoded from the codes, so that every attention implementation gets what it expects and only the codes are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from spectral.attention import attend
from spectral.dispatch import launching
from spectral.errors import CacheError
from spectral.padding import Columns
from spectral.pages import PageStore, Row
from spectral.prefill import causal_attention, softcapped
from spectral.rows import append_rows, read_row


class Receiver(Protocol):
    """A cache's layer, as an update sees it: one row per sequence in a store of one layer."""

    store: PageStore | None
    rows: list[Row]
    columns: Columns
    pending: Update | None


class Update:
    """One layer's new tokens: keys [B, H, n, d] and values [B, H, n, dv], appended when attention first asks.

    Attributes:
        valid: bool [B, n], False for padding, which is never stored; None: all are tokens. Only a fall-back: Spectral's
            attention brings the mask itself.
    """

    def __init__(self, layer: Receiver, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        self.layer, self.keys, self.values, self.valid = layer, keys, values, valid
        self.count = keys.shape[2]
        self._read: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.keys, self.values))

    def _work(self) -> list[tuple[int, torch.Tensor]]:
        """(batch index, columns of its tokens within the chunk) of every row that gets any."""
        every = torch.arange(self.count, device=self.keys.device)
        if self.valid is None:
            return [(i, every) for i in range(len(self.layer.rows))]
        pairs = [(i, every[row.to(every.device)]) for i, row in enumerate(self.valid)]
        return [(i, columns) for i, columns in pairs if columns.numel()]

    def _done(self) -> None:
        self.layer.columns.extend(self.count, self.valid)
        self.layer.pending = None

    def append(self) -> None:
        """Append without attending."""
        layer = self.layer
        assert layer.store is not None and layer.pending is self
        work = [(layer.rows[i], self.keys[i][:, at], self.values[i][:, at]) for i, at in self._work()]
        if work:
            with launching(self.keys.device):
                append_rows(layer.store, work)
        self._done()

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys [B, H, T, d] and values [B, H, T, dv] in the model's dtype, as attention on the codes sees them:

        a longer chunk sees its past as it was before it and itself exactly, a single token is in the window already.
        """
        if self._read is None:
            layer = self.layer
            fresh = dict(self._work()) if layer.pending is self else {}
            alone = {index for index, columns in fresh.items() if columns.numel() == 1}
            begin = layer.columns.length - (0 if layer.pending is self else self.count)
            out = [x.new_zeros((*x.shape[:2], begin + self.count, x.shape[3])) for x in (self.keys, self.values)]
            for index in set(range(len(layer.rows))) - alone:
                self._place(index, out)
                if index in fresh:
                    for side, chunk in zip(out, (self.keys, self.values), strict=True):
                        side[index].index_copy_(1, begin + fresh[index], chunk[index][:, fresh[index]])
            if layer.pending is self:
                self.append()
            for index in alone:
                self._place(index, out)
                for side, chunk in zip(out, (self.keys, self.values), strict=True):  # exact in its own step
                    side[index].index_copy_(1, begin + fresh[index], chunk[index][:, fresh[index]])
            self._read = out[0], out[1]
        return self._read

    def _place(self, index: int, out: list[torch.Tensor]) -> None:
        """Decode what a row holds now into its columns of out: keys and values [B, H, T, dim]."""
        layer = self.layer
        assert layer.store is not None
        places = layer.columns.places(index, self.keys.device)
        for side, tokens in zip(out, read_row(layer.store, 0, layer.rows[index]), strict=True):
            side[index].index_copy_(1, places, tokens.to(side.dtype))

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, *, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """Append, and answer queries on the codes.

        Args:
            query: [B, Hq, n, d], one per new token; mask: bool [B, T], False for padding; None: what `valid` says.

        Returns:
            [B, n, Hq, dv] in the query's dtype, zeros for padding. Raises CacheError for masks it cannot honour.
        """
        layer = self.layer
        if layer.pending is not self:  # somebody has read the dense tensors before: append no second time
            keys, values = self.dense()
            out = dense_attention(query, keys, values, mask, scaling=scaling, softcap=softcap)
            return out.transpose(1, 2)
        try:
            if mask is not None:
                self._take_mask(mask)
            out = self._attend(query, scaling, softcap)
        except BaseException:
            layer.pending = None  # or the next update would append these tokens
            raise
        self._done()
        return out

    def _attend(self, query: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
        """One step of the store: [B, n, Hq, dv]."""
        store, rows, work = self.layer.store, self.layer.rows, self._work()
        assert store is not None
        out = query.new_zeros((query.shape[0], self.count, query.shape[1], self.values.shape[3]))
        if not work:
            return out
        flat = [torch.cat([x[i][:, at] for i, at in work], 1)[None] for x in (query, self.keys, self.values)]
        batch = store.begin([(rows[i], at.numel()) for i, at in work])
        try:
            answers = attend(batch, 0, flat[0], flat[1], flat[2], scaling=scaling, softcap=softcap)[0]
        except BaseException:
            batch.abort()
            raise
        batch.commit()
        for (i, at), answer in zip(work, answers.split([at.numel() for _, at in work]), strict=True):
            out[i, at] = answer
        return out

    def _take_mask(self, mask: torch.Tensor) -> None:
        """Honour a mask [B, T], or refuse it."""
        layer = self.layer
        if mask.ndim != 2 or tuple(mask.shape) != (len(layer.rows), layer.columns.length + self.count):
            raise CacheError(
                f"attention on codes honours padding, a mask [batch, tokens], and was given {tuple(mask.shape)}: for "
                'other masks load the model with attn_implementation="sdpa" or "eager"'
            )
        past, chunk = mask.split([layer.columns.length, self.count], 1)
        if not torch.equal(past, layer.columns.mask(len(layer.rows), mask.device)):
            raise CacheError(
                "the attention mask hides tokens that were stored, or shows padding that was not: padding must stay "
                'the same from call to call; for other masks load the model with attn_implementation="sdpa" or "eager"'
            )
        self.valid = None if bool(chunk.all()) else chunk


class CodedStates(torch.Tensor):
    """Keys or values of an `Update`, dense in shape only. Made by `coded`, never by hand."""

    update: Update
    side: int

    @staticmethod
    def __new__(cls, update: Update, side: int, shape: tuple[int, ...], like: torch.Tensor) -> CodedStates:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.update, self.side = update, side
        return self

    def __init__(self, *_: Any) -> None:
        """Everything happens in __new__; torch.Tensor would refuse the arguments."""

    def dense(self) -> torch.Tensor:
        """The tensor [B, H, T, dim] itself, decoded from the codes."""
        return self.update.dense()[self.side]

    def __repr__(self, **_: Any) -> str:
        return f"CodedStates(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(CodedStates, lambda x: x.dense(), (args, kwargs or {}))
        return function(*args, **kwargs)


def coded(update: Update, keys: torch.Tensor, values: torch.Tensor, total: int) -> tuple[CodedStates, CodedStates]:
    """Both sides of an update as handles: new keys [B, H, n, d] and values [B, H, n, dv], `total` tokens with past."""
    key_shape, value_shape = ((*x.shape[:2], total, x.shape[3]) for x in (keys, values))
    return CodedStates(update, 0, key_shape, keys), CodedStates(update, 1, value_shape, values)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding: int | None = None,
) -> torch.Tensor:
    """Exact attention on dense keys and values that may have a past and padding.

    Args:
        query: [B, Hq, n, d], the last n of T tokens; key: [B, H, T, d]; value: [B, H, T, dv].
        mask: None; bool [B, T], True for tokens that are not padding; or a whole [B or 1, Hq or 1, n, T], bool or
            additive, which is taken as it is.

    Returns:
        [B, Hq, n, dv]. Queries that see nothing (padding) get an arbitrary finite answer.
    """
    new, total = query.shape[2], key.shape[2]
    if mask is None and new == total:
        return causal_attention(query, key, value, scaling=scaling, softcap=softcap, sliding=sliding)
    if mask is None or mask.ndim == 2:
        place = torch.arange(total, device=query.device)
        distance = place[total - new :, None] - place[None, :]
        seen = distance >= 0 if sliding is None else (distance >= 0) & (distance < sliding)
        # Each query sees itself, padding or not: a row that sees nothing would be a division of zero by zero.
        whole = seen if mask is None else (seen & mask[:, None, None, :]) | (distance == 0)
    else:
        whole = mask
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=whole, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcapped(torch.matmul(query, key.transpose(2, 3)).float() * scaling, softcap)
    if whole.dtype == torch.bool:
        scores = scores.masked_fill(~whole, torch.finfo(scores.dtype).min)
    else:
        scores = scores + whole
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)

"""SpectralCache: a transformers Cache that keeps codes and an exact window, and nothing else.

    profile = SpectralProfile.load("demo-7m.safetensors")
    model.generate(**inputs, past_key_values=SpectralCache(profile, setting="8x"))

The model is unmodified. Loaded with `attn_implementation="spectral"` (importing this module registers it) its attention
runs on the codes and nothing is rebuilt. With any other attention ("sdpa", "eager") each layer's keys and values are
decoded for the moment of its forward: slower, the same answers, and still only codes are kept. Layers with sliding
attention stay exact in a rolling window of their own, in the model's dtype.

With `spectral.hf` this is the only module that knows transformers' internals: a cache has to derive from its classes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from spectral.codec import Codebook
from spectral.coded import Update, coded
from spectral.errors import CacheError
from spectral.hf import fingerprint
from spectral.own_answer import any_shape
from spectral.padding import Columns, from_positions
from spectral.pages import LayerShape, ModelShape, PageStore, Row
from spectral.rows import cut_row, select_rows
from spectral.unit_codec import Packing

if TYPE_CHECKING:
    from spectral.profile import SpectralProfile


UNCOMPILED = "the pages of a SpectralCache grow, which cannot be compiled: compile without fullgraph, or not at all"


class SpectralCache(Cache):
    """A compressed KV cache for `generate` and for your own loop. For inference only: no gradient flows through it.

    Padding may be left or right; it is not stored, and what the model answers at padding itself means nothing.

    Args:
        profile: the model's profile.
        bits: bits per element that the codes should take; the ladder's closest setting is used (16: exact).
        setting: a ladder row's name, "exact" (the model's own dtype) or "auto"; anything but "auto" is used
            instead of `bits`.
        model: the model it is for, if you want the profile checked against it (by fingerprint) at once. Without it
            only the shapes are checked, in the first forward.
        attention_mask: [B, n] of a padded prompt. Spectral's attention is shown the mask by transformers, which it also
            shows to itself under "sdpa" and "eager", but not to the cache. Without it padding is masked all the
            same, but takes up the places of the sinks. (transformers 5.24 and later: not needed with `generate`.)

    Raises:
        SettingError: the ladder has no such setting. ProfileError: the profile was made for another model.
        CacheError: for what the cache cannot do; the message says why, and what to do instead. A forward that fails
            half-way leaves the layers at unequal lengths, as in any transformers cache: reset() it.
    """

    def __init__(
        self,
        profile: SpectralProfile,
        bits: float | None = None,
        setting: str = "auto",
        *,
        model: Any = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        self.profile = profile
        self.setting = profile.choose(setting, bits)
        sliding = _sliding_windows(profile, model)
        self._mask = None if attention_mask is None else attention_mask.bool()
        self._books: dict[torch.device, Codebook] = {}
        super().__init__(
            layers=[
                SpectralLayer(self, index) if width is None else SlidingLayer(sliding_window=width)
                for index, width in enumerate(sliding)
            ]
        )

    # -- memory -------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values: pages and windows, used or not, of all rows and layers."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self._mask is None else self._mask.numel())

    @property
    def codebook_nbytes(self) -> int:
        """Bytes of the setting's bases, which do not grow with the tokens."""
        held: dict[int, int] = {}
        for book in self._books.values():
            for codec in book.layers:
                if codec is not None:
                    held |= _storages(codec)
        return sum(held.values())

    # -- transformers' interface --------------------------------------------------------------------------------------

    @torch.compiler.disable(reason=UNCOMPILED)
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys [B, H, n, d] and values [B, H, n, dv], post-RoPE; returns all of them, dense in shape only."""
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"{self._made_for()} and this one has a layer {layer_idx}: build a profile for it with "
                "`spectral profile build`"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; 0 only lets recorded past of sliding layers go.

        Raises CacheError, with nothing changed, for a positive number, for more tokens than there are, and where a
        sliding layer has forgotten the tokens it would need again.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation counts on the device
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise CacheError(
                f"crop takes the number of tokens to remove as 0 to -{self.get_seq_length()}, got {tokens_to_remove}"
            )
        for index, layer in enumerate(self.layers):
            if tokens_to_remove and isinstance(layer, SlidingLayer) and not layer.can_crop(-tokens_to_remove):
                raise CacheError(
                    f"layer {index} slides over {layer.sliding_window} tokens and has forgotten those it would need "
                    "again: call activate_past_recording() before the forward that you want to undo"
                )
        super().crop(tokens_to_remove)

    def codebook(self, device: torch.device) -> Codebook:
        """The setting's codecs on a device (made once). Not for "exact", which has none in the profile."""
        if device not in self._books:
            self._books[device] = self.profile.codebook(self.setting, device=device)
        return self._books[device]

    def given_mask(self, batch: int, begin: int, count: int) -> torch.Tensor | None:
        """What the constructor's mask says about columns begin .. begin + count - 1: bool [batch, count] or None."""
        if self._mask is None or begin >= self._mask.shape[1]:
            return None
        if batch % self._mask.shape[0]:
            raise CacheError(f"attention_mask has {self._mask.shape[0]} rows and the batch {batch}")
        part = self._mask[:, begin : begin + count].repeat_interleave(batch // self._mask.shape[0], 0)  # beams
        return torch.nn.functional.pad(part, (0, count - part.shape[1]), value=True)

    def _made_for(self) -> str:
        return f"this cache's profile was made for {self.profile.model!r}, a model of {len(self.profile.layers)} layers"

    def reset(self) -> None:
        """Forget all tokens and give their memory back. The next batch may have another size."""
        super().reset()
        self._mask = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralCache:
        """A copy with its own tokens (transformers' way to reuse a prefix); profile and bases are shared."""
        for shared in (self.profile, *(c for book in self._books.values() for c in book.layers)):
            memo[id(shared)] = shared
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new


class SpectralLayer(CacheLayerMixin):
    """One full-attention layer: a page store with one row per sequence of the batch.

    A store of its own makes the layer independent of the order in which layers are updated, which is transformers'
    contract: a model may skip one, or a loop use only one.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, cache: SpectralCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.store: PageStore | None = None
        self.rows: list[Row] = []
        self.columns = Columns()
        self.pending: Update | None = None
        self.dims: tuple[int, int, int] = (0, 0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, tokens on their way in included."""
        waiting = 0 if self.pending is None else self.pending.nbytes
        return waiting + (0 if self.store is None else self.store.nbytes)

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first update."""
        return len(self.rows) or -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the store and a row per sequence for keys [B, H, n, d] and values [B, H, n, dv]."""
        batch, heads, _, key_dim = key_states.shape
        self.dims = heads, key_dim, value_states.shape[3]
        shape = LayerShape(*self.dims)
        model = ModelShape((shape,), heads, heads * key_dim)
        device = key_states.device
        if self.cache.setting == "exact":
            self.store = PageStore(model, device=device, window_dtype=key_states.dtype)
        else:
            book = self.cache.codebook(device)
            codec = book.layers[self.index]
            made = (codec.kv_heads, codec.key_dim, codec.value_dim) if codec is not None else None
            if made != self.dims:
                raise CacheError(
                    f"{self.cache._made_for()}, where layer {self.index} has (KV heads, key size, value size) "
                    f"= {made}, and this model has {self.dims}: build a profile for it with `spectral profile build`"
                )
            self.store = PageStore(model, replace(book, layers=[codec]), device=device)
        self.rows = [self.store.open() for _ in range(batch)]
        self.store.trim()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SpectralCache.update`."""
        self.settle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, count, key_dim = key_states.shape
        if batch != len(self.rows) or (heads, key_dim, value_states.shape[3]) != self.dims:
            raise CacheError(
                f"layer {self.index} of this cache holds {len(self.rows)} sequences of (KV heads, key size, "
                f"value size) = {self.dims} and was given keys {tuple(key_states.shape)}: reset() it, or make another"
            )
        begin = self.columns.length
        valid = self.cache.given_mask(batch, begin, count)
        if valid is None and begin == 0:
            valid = from_positions((kwargs.get("kwargs") or {}).get("position_ids"), batch, count)
        self.pending = Update(self, key_states.detach(), value_states.detach(), valid)
        return coded(self.pending, key_states, value_states, begin + count)

    def settle(self) -> None:
        """Append what an update brought and no attention has read."""
        if self.pending is not None:
            self.pending.append()

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.columns.length + (0 if self.pending is None else self.pending.count)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the next forward's mask, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove columns."""
        self.settle()
        if self.store is not None and tokens_to_remove:
            self.columns.cut(self.columns.length + tokens_to_remove)
            for row, kept in zip(self.rows, self.columns.counts(len(self.rows)), strict=True):
                cut_row(self.store, row, kept)

    def select(self, indices: list[int]) -> None:
        """The batch becomes its rows at `indices`, in that order."""
        self.settle()
        if self.store is not None:
            self.rows = select_rows(self.store, self.rows, indices)
            self.columns.select(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.select([index for index in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices` (numbers or a bool mask)."""
        self.select(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def reset(self) -> None:
        """Forget all tokens and free their memory."""
        self.store, self.rows, self.pending, self.columns = None, [], None, Columns()
        self.is_initialized = False

    def offload(self) -> None:
        """Refused: codes are small, and moving them for each layer and step would cost more than it frees."""
        raise CacheError("SpectralCache has no offloading: choose a coarser setting instead")

    prefetch = offload


class SlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer: exact keys and values of the window's last tokens, in the model's dtype."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' sliding layer, which returns the window with the new tokens."""
        out = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        self._compact()
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens and what no window needs."""
        if self.is_initialized:
            super().crop(tokens_to_remove)
            self._compact()

    def reset(self) -> None:
        """Forget all tokens and free their memory (5.17 would keep it, zeroed)."""
        self.keys = self.values = None
        self.is_initialized = self.record_past = False
        super().reset()

    def can_crop(self, count: int) -> bool:
        """Whether the window is whole again with the last `count` tokens gone."""
        if not self.is_initialized or self.cumulative_length < self.sliding_window:
            return True
        held: torch.Tensor = self.values
        needed = min(self.cumulative_length - count, self.sliding_window - 1)
        return bool(self.record_past) and held.shape[-2] - count >= needed

    def _compact(self) -> None:
        """A slice would keep the whole prompt's memory alive."""
        for name in ("keys", "values"):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
                setattr(self, name, tensor.clone())

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = (self.keys, self.values) if self.is_initialized else ()
        return sum(x.untyped_storage().nbytes() for x in (*held, self._sliding_window_tensor))


def _sliding_windows(profile: SpectralProfile, model: Any) -> list[int | None]:
    """The sliding window of every layer, None where it sees all; checks the profile against a model, if given."""
    if model is not None:
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        shape = any_shape(model)
        stub = SimpleNamespace(name=name, fingerprint=fingerprint(model), shape=shape)
        profile.check_model(stub)  # type: ignore[arg-type]
        return [layer.sliding for layer in shape.layers]
    if profile.sliding:
        return profile.sliding
    if None in profile.layers:
        raise CacheError(
            f"the profile of {profile.model!r} does not say how long the windows of its sliding layers are: "
            "pass the model, SpectralCache(profile, model=model)"
        )
    return [None] * len(profile.layers)


def _storages(codec: torch.nn.Module) -> dict[int, int]:
    """Every storage that a codec holds, registered with torch or not: address -> bytes."""
    found: dict[int, int] = {}
    todo: list[Any] = [value for module in codec.modules() for value in vars(module).values()]
    while todo:
        thing = todo.pop()
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif isinstance(thing, Packing):
            todo += vars(thing).values()
    return found

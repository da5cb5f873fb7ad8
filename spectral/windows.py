"""The exact window: recent tokens of all rows in one layer, and what holds them.

`ExactWindow` keeps tokens in one dtype. `QuantizedWindow` keeps the sinks in it and recent tokens as 8- or 10-bit
integers with a scale per 32 numbers of a head: with 128 recent tokens the window would otherwise weigh as much as
thousands of packed ones. Both have `slots`, one for every row, with room for S sinks and a ring of recent tokens; a
place is an index into a slot: [0, S) are the sinks, the rest is the ring.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from spectral.shapes import LayerShape

SCALE_GROUP = 32


class ExactWindow:
    """Keys and values of one layer in a dtype: [slots, H, S + ring, d + dv]."""

    def __init__(self, shape: LayerShape, sinks: int, ring: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.sinks, self.ring = shape, sinks, ring
        self.store = torch.zeros((0, shape.kv_heads, sinks + ring, shape.head_numbers), dtype=dtype, device=device)

    def index(self, position: int) -> int:
        """Where the token at a position lies within a slot."""
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.ring

    names: tuple[str, ...] = ("store",)
    """Its tensors, all [slots, ...]."""

    def resize(self, slots: int) -> None:
        """Grow or shrink to a number of slots, keeping the first ones."""
        WindowGroup([self]).resize(slots)

    def copy(self, source: int, target: int) -> None:
        """Copy everything in one slot into another."""
        for tensor in self.tensors():
            tensor[target] = tensor[source]

    def as_kept(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers [..., d + dv] as a token that is not a sink comes back from the window, float32."""
        return x.to(self.store.dtype).float()

    def write(self, slot: torch.Tensor | int, place: torch.Tensor, tokens: torch.Tensor) -> None:
        """Store tokens [n, H, d + dv] at slot (one, or [n]) and place [n]."""
        spots = slot if isinstance(slot, torch.Tensor) else torch.full_like(place, slot)
        self.put([tensor[None] for tensor in self.tensors()], spots, place, tokens[None])

    def put(
        self,
        tensors: list[torch.Tensor],
        slot: torch.Tensor,
        place: torch.Tensor,
        tokens: torch.Tensor,
        recent: bool = False,
    ) -> None:
        """Store tokens [layers, n, H, d + dv] into the tensors [layers, slots, ...] of windows like this one. `recent`:
        the caller knows that no place is a sink's."""
        set_places(tensors[0], slot, place, tokens.to(tensors[0].dtype))

    def numbers(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """What the window's tensors [..., H, places, ...] stand for: float32 [..., H, S + ring, d + dv], new memory."""
        return tensors[0].to(torch.float32, copy=True)

    def read(self, slot: torch.Tensor) -> torch.Tensor:
        """Everything in slots [B]: float32 [B, H, S + ring, d + dv]."""
        return self.numbers([tensor.index_select(0, slot) for tensor in self.tensors()])

    def read_places(self, slot: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Tokens at slot [n] and places [n, t]: float32 [n, H, t, d + dv]."""
        return self.store[slot[:, None], :, place].transpose(1, 2).float()

    def tensors(self) -> list[torch.Tensor]:
        """What is allocated."""
        return [getattr(self, name) for name in self.names]

    def slot_tensors(self, slot: int, length: int) -> list[torch.Tensor]:
        """Views of what a row of `length` tokens has filled of its slot, [H, places, ...] each. The other places may
        hold tokens of an earlier row."""
        return [self.store[slot, :, : min(length, self.sinks + self.ring)]]

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot."""
        return sum(t[:1].numel() * t.element_size() if len(t) else _row_nbytes(t) for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class QuantizedWindow(ExactWindow):
    """Sinks in a dtype, recent tokens as integers of 8 or 10 bits.

    A number x of a group with largest magnitude a is stored as round(x / s), s = a / (2^(bits - 1) - 1) in fp16: eight
    bits in `high`, int8 [slots, H, ring, d + dv], and of ten bits the two low ones four to a byte in `low`, uint8.
    """

    def __init__(
        self, shape: LayerShape, sinks: int, ring: int, dtype: torch.dtype, device: torch.device, bits: int
    ) -> None:
        super().__init__(shape, sinks, 0, dtype, device)
        if bits not in (8, 10):
            raise ValueError(f"a window keeps 8 or 10 bits (or 16 exact ones), got {bits}")
        self.ring, self.bits = ring, bits
        self.groups = scale_group(shape.key_dim, shape.value_dim)
        numbers = shape.head_numbers
        lead = (0, shape.kv_heads, ring)
        self.high = torch.zeros((*lead, numbers), dtype=torch.int8, device=device)
        self.low = torch.zeros((*lead, numbers // 4 if bits == 10 else 0), dtype=torch.uint8, device=device)
        self.scale = torch.zeros((*lead, numbers // self.groups), dtype=torch.float16, device=device)

    names = ("store", "high", "low", "scale")

    def slot_tensors(self, slot: int, length: int) -> list[torch.Tensor]:
        """As `ExactWindow.slot_tensors`: the sinks, then the recent tokens' integers and scales."""
        recent = min(max(length - self.sinks, 0), self.ring)
        sinks = self.store[slot, :, : min(length, self.sinks)]
        return [sinks, *(t[slot, :, :recent] for t in (self.high, self.low, self.scale))]

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., d + dv] -> integers as float32 of the same shape, scale fp16 [..., groups]."""
        top = float(2 ** (self.bits - 1) - 1)
        grouped = x.float().unflatten(-1, (-1, self.groups))
        # Rounded up to what fp16 can hold, so that no number exceeds the integers' range.
        scale = (grouped.abs().amax(-1) * (1.0005 / top)).clamp_(6e-5, 6e4).to(torch.float16)
        return (grouped / scale.float().unsqueeze(-1)).round_().clamp_(-top, top).flatten(-2), scale

    def as_kept(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers [..., d + dv] as a token that is not a sink comes back from the window, float32."""
        code, scale = self._quantize(x)
        return self._dequantize(code, scale)

    def _dequantize(self, code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (code.unflatten(-1, (-1, self.groups)) * scale.float().unsqueeze(-1)).flatten(-2)

    def put(
        self,
        tensors: list[torch.Tensor],
        slot: torch.Tensor,
        place: torch.Tensor,
        tokens: torch.Tensor,
        recent: bool = False,
    ) -> None:
        """As `ExactWindow.put`. With `recent` it does not wait for the device."""
        sink = place < self.sinks
        if not recent and sink.any():
            super().put(tensors, slot[sink], place[sink], tokens[:, sink])
            slot, place, tokens = slot[~sink], place[~sink], tokens[:, ~sink]
        if not place.numel():
            return
        code, scale = self._quantize(tokens)
        code = code.to(torch.int16)
        at = place - self.sinks
        if self.bits == 10:
            low = (code & 3).to(torch.uint8).unflatten(-1, (-1, 4)) << _shifts(code.device)
            set_places(tensors[2], slot, at, low.sum(-1, dtype=torch.uint8))
            code = code >> 2
        set_places(tensors[1], slot, at, code.to(torch.int8))
        set_places(tensors[3], slot, at, scale)

    def _fill(self, out: torch.Tensor, high: torch.Tensor, low: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Write the numbers of stored integers into out [..., d + dv] float32."""
        out.copy_(high)
        if self.bits == 10:
            out.mul_(4).add_(((low.unsqueeze(-1) >> _shifts(low.device)) & 3).flatten(-2))
        out.unflatten(-1, (-1, self.groups)).mul_(scale.float().unsqueeze(-1))
        return out

    def numbers(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """What the window's tensors stand for: float32 [..., H, S + ring, d + dv], new memory."""
        kept, high = tensors[:2]
        shape = (*high.shape[:-2], self.sinks + high.shape[-2], high.shape[-1])
        out = torch.empty(shape, dtype=torch.float32, device=high.device)
        out[..., : self.sinks, :] = kept
        self._fill(out[..., self.sinks :, :], *tensors[1:])  # in place: this runs over every recent token in every step
        return out

    def read_places(self, slot: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Tokens at slot [n] and places [n, t]: float32 [n, H, t, d + dv]."""
        at = (place - self.sinks).clamp_min(0)
        high, low, scale = (t[slot[:, None], :, at] for t in (self.high, self.low, self.scale))
        out = self._fill(torch.empty(high.shape, dtype=torch.float32, device=high.device), high, low, scale)
        sink = place < self.sinks
        if self.sinks and (place.device.type != "cpu" or sink.any()):  # asking a device would mean to wait for it
            kept = self.store[slot[:, None], :, place.clamp_max(self.sinks - 1)].float()
            out = torch.where(sink[..., None, None], kept, out)
        return out.transpose(1, 2)


@cache
def _shifts(device: torch.device) -> torch.Tensor:
    """Shift of each of the four two-bit fields of a byte."""
    return torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=device)


class WindowGroup:
    """Windows of one kind in one allocation per tensor, [layers, slots, ...], so that a decoding step reads and writes
    many layers in one operation: on small models the number of operations is what a step costs."""

    def __init__(self, windows: Sequence[ExactWindow]) -> None:
        self.windows = list(windows)
        self._stacks = [torch.stack([getattr(w, name) for w in windows]) for name in windows[0].names]
        self._share()

    def _share(self) -> None:
        for name, stack in zip(self.windows[0].names, self._stacks, strict=True):
            for window, tensor in zip(self.windows, stack, strict=True):
                setattr(window, name, tensor)

    def resize(self, slots: int) -> None:
        """Grow or shrink to a number of slots, keeping the first ones."""
        for at, old in enumerate(self._stacks):
            new = old.new_zeros((old.shape[0], slots, *old.shape[2:]))
            kept = min(slots, old.shape[1])
            new[:, :kept] = old[:, :kept]
            self._stacks[at] = new
        self._share()

    def clear(self, slot: int) -> None:
        """Forget numbers and scales of a slot's last owner: places that nobody has filled are read with a weight of 0,
        which would not hide a NaN. Integers are finite whatever they are."""
        for stack in self._stacks:
            if stack.is_floating_point():
                stack[:, slot].zero_()

    def keep(self, slots: torch.Tensor) -> None:
        """Keep these slots only, in this order."""
        self._stacks = [stack.index_select(1, slots) for stack in self._stacks]
        self._share()

    def slot_tensors(self, slot: int, length: int) -> list[torch.Tensor]:
        """As `ExactWindow.slot_tensors`, for all windows at once: views [layers, H, places, ...]."""
        window = self.windows[0]
        if len(window.names) == 1:
            return [self._stacks[0][:, slot, :, : min(length, window.sinks + window.ring)]]
        recent = min(max(length - window.sinks, 0), window.ring)
        sinks = self._stacks[0][:, slot, :, : min(length, window.sinks)]
        return [sinks, *(stack[:, slot, :, :recent] for stack in self._stacks[1:])]

    def read(self, first: int, last: int, slot: torch.Tensor) -> torch.Tensor:
        """Windows first .. last - 1 at slots [B]: float32 [last - first, B, H, S + ring, d + dv]."""
        return self.windows[0].numbers([stack[first:last].index_select(1, slot) for stack in self._stacks])

    def write(
        self,
        first: int,
        slot: torch.Tensor,
        place: torch.Tensor,
        tokens: torch.Tensor,
        recent: bool = False,
        kernels: bool = False,
    ) -> None:
        """Store tokens [n, B, H, d + dv] in windows first .. first + n - 1 at slot [B] and place [B]; see `put`.
        `kernels`: those of spectral.kernels run on this device."""
        kind, last = self.windows[0], first + tokens.shape[0]
        tensors = [stack[first:last] for stack in self._stacks]
        if recent and kernels and isinstance(kind, QuantizedWindow):
            from spectral.kernels.recent import served, write_step

            if served(kind):
                write_step(kind, tensors, slot, place, tokens)
                return
        kind.put(tensors, slot, place, tokens, recent)

    def write_sinks(self, first: int, slot: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor) -> None:
        """As `write`, tokens that are sinks. Does not wait for the device."""
        kept = self._stacks[0][first : first + tokens.shape[0]]
        set_places(kept, slot, place, tokens.to(kept.dtype))


def make_window(
    shape: LayerShape, sinks: int, ring: int, dtype: torch.dtype, device: torch.device, bits: int = 16
) -> ExactWindow:
    """A window of 16 (exact), 10 or 8 bits."""
    if bits == 16:
        return ExactWindow(shape, sinks, ring, dtype, device)
    return QuantizedWindow(shape, sinks, ring, dtype, device, bits)


def scale_group(key_dim: int, value_dim: int) -> int:
    """Numbers that share a scale: the largest divisor of both head sizes that is at most `SCALE_GROUP`."""
    return next(g for g in range(SCALE_GROUP, 0, -1) if key_dim % g == 0 and value_dim % g == 0)


def slot_nbytes(shape: LayerShape, sinks: int, ring: int, bits: int, itemsize: int = 2) -> int:
    """Bytes of one slot, without allocating any (the same as the windows' own count)."""
    if bits == 16:
        return (sinks + ring) * shape.token_nbytes(itemsize)
    numbers = shape.kv_heads * shape.head_numbers
    low = shape.kv_heads * (shape.head_numbers // 4) if bits == 10 else 0
    scales = 2 * numbers // scale_group(shape.key_dim, shape.value_dim)
    return sinks * shape.token_nbytes(itemsize) + ring * (numbers + low + scales)


def set_places(stack: torch.Tensor, slot: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> None:
    """stack[layers, slots, H, places, x] at slot [n] and place [n] becomes values [layers, n, H, x]."""
    stack[:, slot, :, place] = values.transpose(0, 1)  # two separated indices put their dimension first


def _row_nbytes(t: torch.Tensor) -> int:
    count = t.element_size()
    for size in t.shape[1:]:
        count *= size
    return count


def coarser_windows(group: WindowGroup, bits: int, capacity: int, slots: Iterable[int]) -> WindowGroup:
    """A group of windows with `capacity` slots and fewer bits a number; these slots hold what the group's hold."""
    window, count = group.windows[0], len(group.windows)
    home = window.store.device
    kind = window.shape, window.sinks, window.ring, window.store.dtype, home, bits
    coarse = WindowGroup([make_window(*kind) for _ in range(count)])
    coarse.resize(capacity)
    place = torch.arange(window.sinks + window.ring, device=home)
    for slot in slots:
        places = torch.full_like(place, slot)
        tokens = group.read(0, count, places[:1])[:, 0]  # [layers, H, places, d + dv]
        coarse.write(0, places, place, tokens.transpose(1, 2))
    return coarse

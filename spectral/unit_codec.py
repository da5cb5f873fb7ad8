"""One unit at one setting: from keys and values to packed bytes, and back to coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from spectral.bits import dct_matrix, frequency_classes
from spectral.layout import PLANES, page_layout

if TYPE_CHECKING:
    from spectral.basis import Unit
    from spectral.bits import Table


def pack_fields(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers uint8 [..., count] below 2^bits -> uint8 [..., count * bits / 8], the first in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return values
    fields = values.unflatten(-1, (-1, per_byte))
    packed = fields[..., 0]
    for at in range(1, per_byte):
        packed = packed | (fields[..., at] << (bits * at))
    return packed


@cache
def byte_fields(bits: int) -> np.ndarray:
    """The fields of every byte, lowest bits first: int64 [256, 8 / bits]."""
    return (np.arange(256)[:, None] >> np.arange(0, 8, bits)) & (2**bits - 1)


def _columns(array: np.ndarray, used: torch.Tensor) -> torch.Tensor:
    """Columns of a matrix as float32 on the device of `used`. The whole matrix goes there: picking columns of float64
    on the host takes fifty times as long."""
    return torch.from_numpy(array).to(torch.float32).to(used.device).index_select(1, used)


class UnitCodec(torch.nn.Module):
    """One unit at one setting: projection, quantizer, packing. R below counts the latents with bits anywhere.

    `finer`: the same unit at another setting on the same device, whose matrices are taken over where they suffice.
    `latents`: int64 [R] of the unit's, the numbers in `used` on the host.
    """

    def __init__(
        self,
        unit: Unit,
        widths: np.ndarray,
        tables: Mapping[int, Table],
        *,
        page_tokens: int,
        key_dim: int,
        value_dim: int,
        device: torch.device | str,
        finer: UnitCodec | None = None,
    ) -> None:
        super().__init__()
        used = np.flatnonzero(np.asarray(widths).any(0))
        self.layout = page_layout(np.asarray(widths)[:, used], page_tokens)
        self.page_tokens, self.rank, self.heads = page_tokens, used.size, unit.heads
        count = unit.heads[1] - unit.heads[0]
        split = count * key_dim

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(np.ascontiguousarray(array), dtype=torch.float32, device=device)

        deviation = np.zeros((page_tokens, used.size))
        for rows, row_deviation in zip(frequency_classes(page_tokens), unit.deviation[:, used], strict=True):
            deviation[list(rows)] = np.maximum(row_deviation, 1e-12)
        self.latents, self.used = used, torch.tensor(used, device=device)
        if finer is not None and np.isin(used, finer.latents).all():  # the same numbers are on the device already
            place = torch.from_numpy(np.searchsorted(finer.latents, used)).to(device)
            project = finer.project.index_select(1, place)
            key, value = (x.index_select(2, place) for x in (finer.key_decode, finer.value_decode))
        else:
            project = _columns(unit.encode, self.used)
            decode = _columns(unit.decode, self.used)
            key, value = decode[:split].view(count, key_dim, -1), decode[split:].view(count, value_dim, -1)
        self.project: torch.Tensor = project  # [D, R]
        self.mean = tensor(unit.mean)
        self.key_decode: torch.Tensor = key  # [h, d, R]
        self.value_decode: torch.Tensor = value  # [h, dv, R]
        self.key_mean = self.mean[:split].view(count, key_dim, 1)
        self.value_mean = self.mean[split:].view(count, 1, value_dim)
        self.deviation = tensor(deviation)  # [P, R]
        self.dct = tensor(dct_matrix(page_tokens))
        self.channels = unit.decode.shape[1]
        # One step of a code in standard deviations, and the code of zero: [P, R], 0 where there are no bits.
        width = self.layout.row_widths
        steps = np.array([tables[w].step if w in tables else 0.0 for w in range(9)])
        self.steps = {w: table.step for w, table in tables.items()}
        self._step, self._zero = tensor(steps[width]), tensor((2.0**width - 1) / 2)
        self._inverse = tensor(np.where(width > 0, 1 / np.maximum(steps[width], 1e-30), 0.0))
        self._top = tensor(2.0**width - 1)
        self._index_planes(width.ravel(), device)
        self._as_levels, self._as_coefficients = self._affine(self._step), self._affine(self._step * self.deviation)

    def _index_planes(self, width: np.ndarray, device: torch.device | str) -> None:
        """Index tensors that take coefficients to the page's bytes and back."""

        def integers(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=device)

        planes = self.layout.planes
        self._plane_bits = [plane.bits for plane in planes]
        self._plane_bytes = [plane.byte.size for plane in planes]
        self._places = [integers(np.where(plane.place < 0, width.size, plane.place)) for plane in planes]
        self._shifts = [integers(plane.shift, torch.uint8) for plane in planes]
        byte = np.concatenate([plane.byte for plane in planes]) if planes else np.zeros(0, np.int64)
        position = np.full(self.layout.nbytes, byte.size)
        position[byte] = np.arange(byte.size)
        self._byte, self._position = integers(byte), integers(position)
        fields = [byte_fields(bits) for bits in self._plane_bits]
        self._fields = [torch.tensor(table, dtype=torch.float32, device=device) for table in fields]
        # Of every coefficient the field with its high bits; of those of two planes also the one with the low bits.
        place = np.concatenate([plane.place for plane in planes]) if planes else np.zeros(0, np.int64)
        shift = np.concatenate([plane.shift for plane in planes]) if planes else np.zeros(0, np.uint8)
        double = np.isin(width, [w for w, found in PLANES.items() if len(found) > 1])
        low = np.flatnonzero((place >= 0) & double[place] & (shift == 0)) if place.size else place
        high = np.flatnonzero((place >= 0) & ~np.isin(np.arange(place.size), low))
        main: np.ndarray = np.zeros(width.size, dtype=np.int64)
        main[place[high]] = high
        self._main, self._low, self._low_place = integers(main), integers(low), integers(place[low])
        scale = np.array([4.0 if len(PLANES.get(int(w), ())) > 1 else 1.0 for w in range(9)])[width]
        self._scale = torch.tensor(scale, dtype=torch.float32, device=device).view(self.page_tokens, self.rank)

    def _affine(self, unit: torch.Tensor) -> list[torch.Tensor]:
        """What `_values` needs for steps of `unit` [P, R]: an offset, a factor of high fields, one of low ones."""
        return [-self._zero * unit, self._scale * unit, unit.flatten().index_select(0, self._low_place)]

    @cached_property
    def width_places(self) -> dict[int, torch.Tensor]:
        """By width the coefficients f * R + r that have it, int64 ascending on the CPU, widest first."""
        width = self.layout.row_widths.ravel()
        return {int(w): torch.from_numpy(np.flatnonzero(width == w)) for w in np.unique(width)[::-1] if w}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, P, D] float32, keys in their frame -> packed uint8 [n, bytes]."""
        return self.quantize(torch.matmul(self.dct, (x - self.mean) @ self.project) / self.deviation)

    def quantize(self, y: torch.Tensor) -> torch.Tensor:
        """Coefficients in standard deviations [n, P, R] -> packed uint8 [n, bytes]."""
        code = (y * self._inverse).add_(self._zero + 0.5).floor_().clamp_(min=0).minimum(self._top)
        return self.pack(code.to(torch.uint8).flatten(1))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [n, P * R] -> packed uint8 [n, bytes]."""
        codes = F.pad(codes, (0, 1))  # what padding fields hold
        parts = []
        for bits, place, shift in zip(self._plane_bits, self._places, self._shifts, strict=True):
            parts.append(pack_fields((codes.index_select(1, place) >> shift) & (2**bits - 1), bits))
        return F.pad(torch.cat(parts, 1), (0, 1)).index_select(1, self._position) if parts else codes[:, :0]

    def _opened(self, packed: torch.Tensor) -> torch.Tensor:
        """All fields of packed pages, float32 [n, fields]."""
        index = packed.index_select(1, self._byte).int().split(self._plane_bytes, 1)
        # One look-up per byte yields all the fields in it: fewer operations than shifting and masking.
        return torch.cat([F.embedding(i, f).flatten(1) for i, f in zip(index, self._fields, strict=True)], 1)

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> codes uint8 [n, P * R], 0 where there are no bits."""
        if not self._plane_bits:
            return packed.new_zeros((packed.shape[0], self._main.numel()))
        fields = self._opened(packed)
        codes = fields.index_select(1, self._main).mul_(self._scale.flatten())
        codes.index_add_(1, self._low_place, fields.index_select(1, self._low))
        return codes.to(torch.uint8).mul_((self._top.flatten() > 0).to(torch.uint8))

    def levels(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> coefficients in standard deviations [n, P, R] float32."""
        return self._values(packed, *self._as_levels)

    def _values(
        self, packed: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor, low_factor: torch.Tensor
    ) -> torch.Tensor:
        """What codes stand for (see `_affine`): [n, P, R] float32."""
        if not self._plane_bits:
            return offset.new_zeros((packed.shape[0], self.page_tokens, self.rank))
        fields = self._opened(packed)
        y = fields.index_select(1, self._main).view(-1, self.page_tokens, self.rank)
        y = torch.addcmul(offset, y, factor)
        if self._low.numel():
            y.flatten(1).index_add_(1, self._low_place, fields.index_select(1, self._low).mul_(low_factor))
        return y

    def coefficients(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> DCT coefficients of the latents [n, P, R] float32."""
        return self._values(packed, *self._as_coefficients)

    def decode(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> x [n, P, D] float32, keys still in their frame."""
        latents = torch.matmul(self.dct.T, self.coefficients(packed))
        basis = torch.cat([self.key_decode.flatten(0, 1), self.value_decode.flatten(0, 1)])
        return latents @ basis.T + self.mean

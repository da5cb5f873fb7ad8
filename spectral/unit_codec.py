"""One unit at one setting: from keys and values to packed bytes, and back to coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from spectral.aside import to_device
from spectral.bits import dct_matrix, frequency_classes
from spectral.gains import decode_gains, side_energy
from spectral.layout import PLANES, PageLayout, page_layout
from spectral.remember import digest, memory

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


def take(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x [n, a] at columns [b] -> [n, b]. `index_select` takes five times as long on a CPU."""
    return x.gather(1, columns.expand(x.shape[0], -1))


@dataclass(frozen=True)
class PlaneIndex:
    """Where a page's coefficients are in its bytes, of P rows of R latents (c = f * R + r; behind the last: none).

    Attributes:
        places: of every plane int32 [fields]: its coefficient; position: int32 [bytes]: number of the byte among those
            of all planes.
        source, mask: int32, uint8 [P * (R + 1) + low parts]: of every coefficient (with the mean's, which have no
            bits, at the end of a row) the byte that holds its code, or the high part of it, and the bits there; then
            the same for the low parts of those of two planes.
        unit: float32 [P * (R + 1)]: what those bits are to be multiplied with to be the code, or its high part.
        low_place, low_unit: of the low parts: their coefficient (with the mean's between), and the same.
    """

    places: list[np.ndarray]
    position: np.ndarray
    source: np.ndarray
    mask: np.ndarray
    unit: np.ndarray
    low_place: np.ndarray
    low_unit: np.ndarray


def class_deviation(unit: Unit, used: np.ndarray) -> np.ndarray:
    """Deviations of some of a unit's latents as codecs have them: float64 [classes, R], of float32 numbers."""
    return np.maximum(unit.deviation[:, used], 1e-12).astype(np.float32).astype(np.float64)


def unit_layout(widths: np.ndarray, page_tokens: int) -> PageLayout:
    """`page_layout` of widths [classes, R], kept."""
    return memory.get(("layout", page_tokens, digest(widths)), lambda: page_layout(widths, page_tokens))


def plane_index(layout: PageLayout) -> PlaneIndex:
    """The index of a layout's planes, kept."""
    return memory.get(("planes", layout.page_tokens, digest(layout.widths)), lambda: _plane_index(layout))


def _plane_index(layout: PageLayout) -> PlaneIndex:
    planes, width = layout.planes, layout.row_widths.ravel()
    tokens, rank = layout.page_tokens, layout.channels
    byte = np.concatenate([plane.byte for plane in planes]) if planes else np.zeros(0, np.int64)
    position: np.ndarray = np.full(layout.nbytes, byte.size, dtype=np.int32)
    position[byte] = np.arange(byte.size)
    fields = layout.fields()
    double = np.isin(width, [w for w, found in PLANES.items() if len(found) > 1])
    held = fields.place >= 0
    lower = held & (fields.shift == 0) & (double[fields.place] if planes else False)
    low, high = np.flatnonzero(lower), np.flatnonzero(held & ~lower)
    grid: np.ndarray = np.arange(width.size, dtype=np.int32).reshape(tokens, rank)
    spot = (grid + np.arange(tokens, dtype=np.int32)[:, None]).ravel()  # of every coefficient, with the mean's between
    count = tokens * (rank + 1)
    source: np.ndarray = np.zeros(count, np.int32)
    mask: np.ndarray = np.zeros(count, np.uint8)
    unit: np.ndarray = np.zeros(count, np.float32)
    at = spot[fields.place[high]]
    source[at], mask[at] = fields.byte[high], fields.mask[high]
    unit[at] = np.where(double[fields.place[high]], 4.0, 1.0) / 2.0 ** fields.inside[high]
    return PlaneIndex(
        [np.where(plane.place < 0, width.size, plane.place).astype(np.int32) for plane in planes],
        position,
        np.concatenate([source, fields.byte[low].astype(np.int32)]),
        np.concatenate([mask, fields.mask[low]]),
        unit,
        spot[fields.place[low]],
        (1 / 2.0 ** fields.inside[low]).astype(np.float32),
    )


@cache
def byte_fields(bits: int) -> np.ndarray:
    """The fields of every byte, lowest bits first: int64 [256, 8 / bits]."""
    return (np.arange(256)[:, None] >> np.arange(0, 8, bits)) & (2**bits - 1)


def _columns(array: np.ndarray, used: torch.Tensor) -> torch.Tensor:
    """Columns of a matrix as float32 on the device of `used`. The whole matrix goes there: picking columns of float64
    on the host takes fifty times as long."""
    return to_device(array, used.device, torch.float32).index_select(1, used)


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
        self.layout = unit_layout(np.asarray(widths)[:, used], page_tokens)
        self.page_tokens, self.rank, self.heads = page_tokens, used.size, unit.heads
        count = unit.heads[1] - unit.heads[0]
        split = count * key_dim

        def tensor(array: np.ndarray) -> torch.Tensor:
            return to_device(array, device, torch.float32)

        self.class_deviation = class_deviation(unit, used)
        deviation = np.zeros((page_tokens, used.size))
        for rows, row_deviation in zip(frequency_classes(page_tokens), self.class_deviation, strict=True):
            deviation[list(rows)] = row_deviation
        self.latents, self.used = used, to_device(used, device)
        if finer is not None and np.isin(used, finer.latents).all():  # the same numbers are on the device already
            place = to_device(np.asarray(np.searchsorted(finer.latents, used)), device)
            project = finer.project.index_select(1, place)
            key, value = (x.index_select(2, place) for x in (finer.key_decode, finer.value_decode))
            before = finer.gains
        else:
            project = _columns(unit.encode, self.used)
            decode = _columns(unit.decode, self.used)
            key, value = decode[:split].view(count, key_dim, -1), decode[split:].view(count, value_dim, -1)
            before = 1.0, 1.0
        self.energy: np.ndarray = side_energy(unit, split) if finer is None else finer.energy
        self.gains: tuple[float, float] = decode_gains(self.energy, unit, np.asarray(widths), page_tokens)
        key, value = key * (self.gains[0] / before[0]), value * (self.gains[1] / before[1])
        self.project: torch.Tensor = project  # [D, R]
        self.mean = tensor(unit.mean)
        self.key_mean = self.mean[:split].view(count, key_dim, 1)
        self.value_mean = self.mean[split:].view(count, 1, value_dim)
        # The mean is one more latent, of which every page has the same coefficients: it costs no operation of its own.
        self.key_basis = torch.cat([key, self.key_mean], 2)  # [h, d, R + 1]
        self.value_basis = torch.cat([value.transpose(1, 2), self.value_mean], 1)  # [h, R + 1, dv]
        self.key_decode: torch.Tensor = self.key_basis[..., :-1]  # [h, d, R]
        self.value_decode: torch.Tensor = self.value_basis[:, :-1].transpose(1, 2)  # [h, dv, R]
        self.deviation = tensor(deviation)  # [P, R]
        self.dct = tensor(dct_matrix(page_tokens))
        self.inverse_dct = self.dct.T
        self.channels = unit.decode.shape[1]
        # One step of a code in standard deviations, and the code of zero: [P, R], 0 where there are no bits.
        width = self.layout.row_widths
        steps = np.array([tables[w].step if w in tables else 0.0 for w in range(9)])
        self.steps = {w: table.step for w, table in tables.items()}
        self._step, self._zero = tensor(steps[width]), tensor((2.0**width - 1) / 2)
        self._inverse = tensor(np.where(width > 0, 1 / np.maximum(steps[width], 1e-30), 0.0))
        self._top = tensor(2.0**width - 1)
        self._index_planes(device)
        self._as_levels, self._as_coefficients = self._affine(self._step), self._affine(self._step * self.deviation)

    def _index_planes(self, device: torch.device | str) -> None:
        """Index tensors that take coefficients to the page's bytes and back."""

        def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return to_device(array, device, dtype)

        found = plane_index(self.layout)
        self._plane_bits = [plane.bits for plane in self.layout.planes]
        self._places = [tensor(place, torch.int64) for place in found.places]
        self._shifts = [tensor(plane.shift, torch.uint8) for plane in self.layout.planes]
        self._position = tensor(found.position, torch.int64)
        self._source, self._mask = tensor(found.source, torch.int64), tensor(found.mask, torch.uint8)
        self._low_place = tensor(found.low_place, torch.int64)
        self._unit, self._low_unit = tensor(found.unit, torch.float32), tensor(found.low_unit, torch.float32)

    def _affine(self, size: torch.Tensor) -> list[torch.Tensor]:
        """What `_values` needs for steps of `size` [P, R]: an offset, a factor of high parts, one of low ones."""
        wide = F.pad(size, (0, 1))
        offset = F.pad(-self._zero * size, (0, 1))
        offset[0, -1] = 1 / self.dct[0, 0]  # the mean does not change within a page
        low = wide.flatten().index_select(0, self._low_place) * self._low_unit
        return [offset.flatten(), self._unit * wide.flatten(), low]

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
            parts.append(pack_fields((take(codes, place) >> shift) & (2**bits - 1), bits))
        return take(F.pad(torch.cat(parts, 1), (0, 1)), self._position) if parts else codes[:, :0]

    def _fields(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> what `_index_planes` names, uint8 [n, P * (R + 1) + low parts], each field where
        its byte has it."""
        return take(packed, self._source).bitwise_and_(self._mask)

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> codes uint8 [n, P * R], 0 where there are no bits."""
        if not self._plane_bits:
            return packed.new_zeros((packed.shape[0], self.page_tokens * self.rank))
        high, low = self._fields(packed).split_with_sizes([self._unit.numel(), self._low_unit.numel()], 1)
        codes = high * self._unit
        codes.index_add_(1, self._low_place, low * self._low_unit)
        return codes.to(torch.uint8).unflatten(1, (self.page_tokens, -1))[..., :-1].flatten(1)

    def levels(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> coefficients in standard deviations [n, P, R] float32."""
        return self._values(packed, *self._as_levels)[..., :-1]

    def _values(
        self, packed: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor, low_factor: torch.Tensor
    ) -> torch.Tensor:
        """What codes stand for (see `_affine`), and the mean's coefficients: [n, P, R + 1] float32."""
        if not self._plane_bits:
            return offset.repeat(packed.shape[0], 1).view(-1, self.page_tokens, self.rank + 1)
        high, low = self._fields(packed).split_with_sizes([factor.numel(), low_factor.numel()], 1)
        y = torch.addcmul(offset, high, factor)
        if low_factor.numel():
            y.index_add_(1, self._low_place, low * low_factor)
        return y.view(-1, self.page_tokens, self.rank + 1)

    def opened(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> what attention reads: coefficients with those of the mean, [n, P, R + 1]."""
        return self._values(packed, *self._as_coefficients)

    def coefficients(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> DCT coefficients of the latents [n, P, R] float32."""
        return self.opened(packed)[..., :-1]

    def decode(self, packed: torch.Tensor, *, plain: bool = False) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> x [n, P, D] float32, keys still in their frame. `plain`: without the gains, which
        `encode` turns into the same codes again."""
        latents = torch.matmul(self.dct.T, self.coefficients(packed))
        sides = [self.key_decode, self.value_decode]
        if plain:
            sides = [side / gain for side, gain in zip(sides, self.gains, strict=True)]
        basis = torch.cat([side.flatten(0, 1) for side in sides])
        return latents @ basis.T + self.mean

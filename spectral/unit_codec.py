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
from spectral.basis import side_numbers
from spectral.bits import page_transform, row_classes
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


def row_deviation(class_deviation: np.ndarray, page_tokens: int) -> np.ndarray:
    """Deviations of all coefficients of a page from those of classes [C, R]: float32 [P, R]."""
    deviation: np.ndarray = np.zeros((page_tokens, class_deviation.shape[1]), dtype=np.float32)
    for rows, one in zip(row_classes(page_tokens, len(class_deviation)), class_deviation, strict=True):
        deviation[list(rows)] = one
    return deviation


def row_steps(layout: PageLayout, steps: Mapping[int, float]) -> np.ndarray:
    """One step of every coefficient's code in standard deviations, from those by width: float64 [P, R], 0 where there
    are no bits."""
    found: np.ndarray = np.array([steps.get(w, 0.0) for w in range(9)])[layout.row_widths]
    return found


def inverse_steps(step: np.ndarray) -> np.ndarray:
    """One over steps float64 [...], 0 where there are no bits."""
    return np.where(step > 0, 1 / np.maximum(step, 1e-30), 0.0)


class Packing:
    """What the reference needs to take coefficients to a page's bytes and back, on a device. The kernels have tables of
    their own, so it is made when it is first asked for.

    Attributes:
        deviation, step, zero, inverse, top: float32 [P, R]: of a coefficient; one step of its code in standard
            deviations, the code of zero, one over the step (0 without bits), the largest code.
        plane_bits, places, shifts, position, source, mask, low_place, unit, low_unit: see `PlaneIndex`.
        as_levels, as_coefficients: of `affine`, in standard deviations or not.
    """

    def __init__(self, layout: PageLayout, deviation: np.ndarray, step: np.ndarray, device: torch.device) -> None:
        def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return to_device(array, device, dtype)

        width = layout.row_widths
        self.deviation, self.step, self.zero = tensor(deviation), tensor(step), tensor((2.0**width - 1) / 2)
        self.inverse = tensor(inverse_steps(step))
        self.top = tensor(2.0**width - 1)
        found = plane_index(layout)
        self.plane_bits = [plane.bits for plane in layout.planes]
        self.places = [tensor(place, torch.int64) for place in found.places]
        self.shifts = [tensor(plane.shift, torch.uint8) for plane in layout.planes]
        self.position = tensor(found.position, torch.int64)
        self.source, self.mask = tensor(found.source, torch.int64), tensor(found.mask, torch.uint8)
        self.low_place = tensor(found.low_place, torch.int64)
        self.unit, self.low_unit = tensor(found.unit), tensor(found.low_unit)
        self.classes = len(layout.widths)
        self.as_levels = self.affine(self.step, layout.page_tokens)
        self.as_coefficients = self.affine(self.step * self.deviation, layout.page_tokens)

    def affine(self, size: torch.Tensor, page_tokens: int) -> list[torch.Tensor]:
        """What codes are worth for steps of `size` [P, R]: an offset, a factor of high parts, one of low ones."""
        wide = F.pad(size, (0, 1))
        offset = F.pad(-self.zero * size, (0, 1))
        # The mean does not change within a page: it is in all rows of tokens, and in the first of frequencies.
        first = 1 / float(np.float32(page_transform(page_tokens, self.classes)[0, 0]))
        offset[: page_tokens if self.classes == 1 else 1, -1] = first
        low = wide.flatten().index_select(0, self.low_place) * self.low_unit
        return [offset.flatten(), self.unit * wide.flatten(), low]

    def fields(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Packed uint8 [n, bytes] -> codes or high parts of them, uint8 [n, P * (R + 1)], and low parts, each where
        its byte has it."""
        found = take(packed, self.source).bitwise_and_(self.mask)
        return found.split_with_sizes([self.unit.numel(), self.low_unit.numel()], 1)


class UnitCodec(torch.nn.Module):
    """One unit at one setting: projection, quantizer, packing. R below counts the latents with bits anywhere.

    `finer`: the same unit at another setting on the same device, whose matrices are taken over where they suffice.
    `latents`: int64 [R] of the unit's, the numbers in `used` on the host. `numbers`: of keys and of values, of a token.
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
        self.page_tokens, self.rank, self.heads, self.side = page_tokens, used.size, unit.heads, unit.side
        count = unit.heads[1] - unit.heads[0]
        self.numbers = split, values = side_numbers(unit.heads, unit.side, key_dim, value_dim)
        key_dim, value_dim = split // count, values // count  # 0 where the unit does not hold that side

        def tensor(array: np.ndarray) -> torch.Tensor:
            return to_device(array, device, torch.float32)

        self.class_deviation = class_deviation(unit, used)
        self.latents, self.used = used, to_device(used, device)
        at = np.asarray(np.searchsorted(finer.latents if finer is not None else used, used))
        if finer is not None and finer.rank and np.array_equal(finer.latents.take(at, mode="clip"), used):
            place = to_device(at, device)  # the same numbers are on the device already
            project = finer.project.index_select(1, place)
            key, value = (x.index_select(2, place) for x in (finer.key_decode, finer.value_decode))
            before = finer.gains
        else:
            project = _columns(unit.encode, self.used)
            decode = _columns(unit.decode, self.used)
            key = decode[:split].view(count, key_dim, used.size)
            value = decode[split:].view(count, value_dim, used.size)
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
        self.channels = unit.decode.shape[1]
        self.steps = {w: table.step for w, table in tables.items()}

    @cached_property
    def dct(self) -> torch.Tensor:
        """[P, P], rows are frequencies; the identity where the unit's pages are not transformed."""
        matrix = page_transform(self.page_tokens, len(self.class_deviation))
        return to_device(matrix, self.mean.device, torch.float32)

    @cached_property
    def inverse_dct(self) -> torch.Tensor:
        """[P, P]"""
        return self.dct.T

    @property
    def deviation(self) -> torch.Tensor:
        """Deviations of all coefficients, float32 [P, R]."""
        return self._packing.deviation

    @cached_property
    def _packing(self) -> Packing:
        deviation, step = row_deviation(self.class_deviation, self.page_tokens), row_steps(self.layout, self.steps)
        return Packing(self.layout, deviation, step, self.mean.device)

    @cached_property
    def width_places(self) -> dict[int, torch.Tensor]:
        """By width the coefficients f * R + r that have it, int64 ascending on the CPU, widest first."""
        width = self.layout.row_widths.ravel()
        return {int(w): torch.from_numpy(np.flatnonzero(width == w)) for w in np.unique(width)[::-1] if w}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, P, D] float32, keys in their frame -> packed uint8 [n, bytes]."""
        latents = (x - self.mean) @ self.project
        # Not `matmul`, which multiplies one page otherwise than two: a page is the same whatever is sealed beside it.
        return self.quantize(torch.bmm(self.dct.expand(len(x), -1, -1), latents) / self._packing.deviation)

    def quantize(self, y: torch.Tensor) -> torch.Tensor:
        """Coefficients in standard deviations [n, P, R] -> packed uint8 [n, bytes]."""
        how = self._packing
        code = (y * how.inverse).add_(how.zero + 0.5).floor_().clamp_(min=0).minimum(how.top)
        return self.pack(code.to(torch.uint8).flatten(1))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [n, P * R] -> packed uint8 [n, bytes]."""
        codes = F.pad(codes, (0, 1))  # what padding fields hold
        how, parts = self._packing, []
        for bits, place, shift in zip(how.plane_bits, how.places, how.shifts, strict=True):
            parts.append(pack_fields((take(codes, place) >> shift) & (2**bits - 1), bits))
        return take(F.pad(torch.cat(parts, 1), (0, 1)), how.position) if parts else codes[:, :0]

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> codes uint8 [n, P * R], 0 where there are no bits."""
        how = self._packing
        if not how.plane_bits:
            return packed.new_zeros((packed.shape[0], self.page_tokens * self.rank))
        high, low = how.fields(packed)
        codes = high * how.unit
        codes.index_add_(1, how.low_place, low * how.low_unit)
        return codes.to(torch.uint8).unflatten(1, (self.page_tokens, -1))[..., :-1].flatten(1)

    def levels(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> coefficients in standard deviations [n, P, R] float32."""
        return self._values(packed, *self._packing.as_levels)[..., :-1]

    def _values(
        self, packed: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor, low_factor: torch.Tensor
    ) -> torch.Tensor:
        """What codes stand for (see `Packing.affine`), and the mean's coefficients: [n, P, R + 1] float32."""
        how = self._packing
        if not how.plane_bits:
            return offset.repeat(packed.shape[0], 1).view(-1, self.page_tokens, self.rank + 1)
        high, low = how.fields(packed)
        y = torch.addcmul(offset, high, factor)
        if low_factor.numel():
            y.index_add_(1, how.low_place, low * low_factor)
        return y.view(-1, self.page_tokens, self.rank + 1)

    def opened(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> what attention reads: coefficients with those of the mean, [n, P, R + 1]."""
        return self._values(packed, *self._packing.as_coefficients)

    def coefficients(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> coefficients of the latents [n, P, R] float32."""
        return self.opened(packed)[..., :-1]

    def decode(self, packed: torch.Tensor, *, plain: bool = False) -> torch.Tensor:
        """Packed uint8 [n, bytes] -> x [n, P, D] float32, keys still in their frame. `plain`: without the gains, which
        `encode` turns into the same codes again."""
        latents = torch.matmul(self.inverse_dct, self.coefficients(packed))
        sides = [self.key_decode, self.value_decode]
        if plain:
            sides = [side / gain for side, gain in zip(sides, self.gains, strict=True)]
        basis = torch.cat([side.flatten(0, 1) for side in sides])
        return latents @ basis.T + self.mean

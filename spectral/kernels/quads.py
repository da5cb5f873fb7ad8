"""Where the codes of a layer's page lie, four at a time, as flat arrays for kernels.

A quad is four neighbouring latents 4 t .. 4 t + 3 of one row f of a page. In every plane its four fields lie together
in one aligned 32-bit word (spectral.layout): four bits of a byte, a byte, two bytes or four. So a quad is read with one
load and one shift a plane, and a width has one plane or two (3 = 1 + 2 and 6 = 4 + 2, the low plane of two bits).

The latents of all units of a layer are numbered through: S latents, `columns` says where a unit's begin. Coefficient
f * S + s is latent s at row f; quad f * S / 4 + s / 4 holds it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectral.aside import Parcel
from spectral.bits import row_classes
from spectral.layout import PLANES, PageLayout, Strip, cell_runs, quarter_nbytes
from spectral.remember import digest, memory
from spectral.unit_codec import inverse_steps, row_deviation, row_steps

if TYPE_CHECKING:
    from spectral.codec import LayerCodec

SHIFT = 20
"""Binary places of the maps from old codes to new ones."""

BYTE_PLANES = (1, 2, 4, 8)

DOUBLE = np.array([len(PLANES.get(width, ())) > 1 for width in range(9)])
"""Widths of two planes."""


@dataclass
class Quads:
    """All quads of a layer's page: arrays of [P * S / 4].

    Attributes:
        latents: S; columns: first latent of every unit and the end, int64 [units + 1].
        width: bits of the quad's codes, 0 for none.
        high: bits before the high plane's fields in the page; high_bits: of a field there.
        low: bits before the low plane's fields (2 bits each), -1 for none.
        order: int64 [quads with bits]: quads as they lie in the page, rows of a cell before its quarters, so that what
            is read together lies together and what is written together does, too.
    """

    latents: int
    columns: np.ndarray
    width: np.ndarray
    high: np.ndarray
    high_bits: np.ndarray
    low: np.ndarray
    order: np.ndarray


@dataclass
class ByteTable:
    """The bytes of a page that hold fields of one size, N = 8 / bits fields each.

    Attributes:
        bits: of a field; at: int32 [m] offset in the page.
        place: int32 [Q, m]: coefficient of the first field (of each half, Q = 2, where fields have one bit); -1: none.
        shift: int32 [Q, m]: of the fields in their codes; width: int32 [Q, m]: of the codes.
    """

    bits: int
    at: np.ndarray
    place: np.ndarray
    shift: np.ndarray
    width: np.ndarray


def unit_columns(codec: LayerCodec) -> np.ndarray:
    """First latent of every unit, and the end: int64 [units + 1]."""
    return np.cumsum([0, *(unit.rank for unit in codec.units)])


def _content(codec: LayerCodec) -> tuple[Hashable, ...]:
    """What a codec's tables depend on."""
    parts = [(digest(unit.layout.widths), digest(unit.latents), unit.channels) for unit in codec.units]
    return codec.page_tokens, tuple(sorted(codec.units[0].steps.items())), tuple(parts)


def page_quads(codec: LayerCodec) -> Quads:
    """The quads of a codec's page, found once."""
    known: Quads | None = codec.__dict__.get("_quads")
    if known is None:
        known = codec.__dict__["_quads"] = memory.get(("quads", *_content(codec)), lambda: _page_quads(codec))
    return known


def _page_quads(codec: LayerCodec) -> Quads:
    columns = unit_columns(codec)
    row = int(columns[-1]) // 4  # quads of a row
    count = codec.page_tokens * row
    width: np.ndarray = np.zeros(count, dtype=np.int32)
    high: np.ndarray = np.zeros(count, dtype=np.int32)
    high_bits: np.ndarray = np.ones(count, dtype=np.int32)
    low: np.ndarray = np.full(count, -1, dtype=np.int32)
    order: np.ndarray = np.zeros(count, dtype=np.int64)
    for unit, column, start in zip(codec.units, columns, codec.starts, strict=False):
        layout: PageLayout = unit.layout
        classes = row_classes(layout.page_tokens, len(layout.widths))
        for strip in layout.strips:
            rows = np.array(classes[strip.number])
            runs = np.array(strip.runs)
            bit = _strip_bits(strip, 8 * int(start))  # [run, quarter, row]
            quad = rows * row + ((int(column) + runs)[:, None, None] // 4 + np.arange(4)[:, None])
            own = np.broadcast_to(layout.widths[strip.number, runs].astype(np.int32)[:, None, None], bit.shape)
            is_low = DOUBLE[own] & (strip.bits == 2)
            width[quad] = own
            low[quad[is_low]] = bit[is_low]
            high[quad[~is_low]] = bit[~is_low]
            high_bits[quad[~is_low]] = strip.bits
            # Rows of a run before its quarters: [run, quarter, row] of keys.
            inside = np.arange(4)[:, None] + 4 * np.arange(len(rows))
            order[quad] = bit[:, :1, :1] // 4 * 256 + inside
    held = np.flatnonzero(width)
    return Quads(int(columns[-1]), columns, width, high, high_bits, low, held[np.argsort(order[held], kind="stable")])


def _strip_bits(strip: Strip, start: int) -> np.ndarray:
    """Bits before every quad of a strip: int64 [runs, 4, rows]; `start`: bits before the unit."""
    width, nbytes = cell_runs(strip.bits), quarter_nbytes(strip.bits)
    number = np.arange(len(strip.runs))[:, None, None]
    inside = (np.arange(4)[:, None] * strip.rows + np.arange(strip.rows)) * nbytes
    return start + 8 * (strip.start + number // width * strip.cell_nbytes + inside) + 4 * (number % width)


def byte_tables(codec: LayerCodec) -> list[ByteTable]:
    """Every byte of a codec's page, by the size of its fields; bytes that hold none are with those of two bits. Found
    once."""
    known: list[ByteTable] | None = codec.__dict__.get("_byte_tables")
    if known is None:
        known = codec.__dict__["_byte_tables"] = memory.get(
            ("bytes", *_content(codec)), lambda: _byte_tables(codec)
        )
    return known


def _byte_tables(codec: LayerCodec) -> list[ByteTable]:
    columns = unit_columns(codec)
    parts: dict[int, list[ByteTable]] = {bits: [] for bits in BYTE_PLANES}
    for unit, column, start in zip(codec.units, columns, codec.starts, strict=False):
        layout: PageLayout = unit.layout
        flat = layout.row_widths.ravel()
        unused: np.ndarray = np.ones(layout.nbytes, dtype=bool)
        for plane in layout.planes:
            halves = 2 if plane.bits == 1 else 1
            step = 8 // plane.bits // halves
            place = plane.place[::step].reshape(-1, halves).T
            row, latent = np.divmod(np.maximum(place, 0), layout.channels)
            found = np.where(place < 0, -1, row * int(columns[-1]) + int(column) + latent)
            width = np.where(place < 0, 0, flat[np.maximum(place, 0)])
            shift = plane.shift[::step].reshape(-1, halves).T
            parts[plane.bits].append(ByteTable(plane.bits, plane.byte + start, found, shift, width))
            unused[plane.byte] = False
        rest = np.flatnonzero(unused)
        if rest.size:
            none: np.ndarray = np.zeros((1, rest.size), dtype=np.int64)
            parts[2].append(ByteTable(2, rest + start, none - 1, none, none))
    return [_joined(bits, found) for bits, found in parts.items() if found]


def _joined(bits: int, parts: list[ByteTable]) -> ByteTable:
    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(p, name) for p in parts], axis=-1).astype(np.int32)

    return ByteTable(bits, column("at"), column("place"), column("shift"), column("width"))


@dataclass
class SqueezeTable:
    """How bytes of a coarser page come from words of a finer one; arrays [Q, m] where not said.

    A new code is (A * old + B) >> SHIFT, at least 0 and at most 2^width - 1; its field of `bits` is the code >> shift.

    Attributes:
        bits: of a field; double: whether an old code of these bytes has two planes; at: int32 [m] offset in the page.
        word: byte offset of the old high fields' word; bit: of the first field in the word; size: of a field.
        low_word, low_bit: of the old low fields, -1 for none.
        scale, offset: A and B; top, shift: of the new code.
    """

    bits: int
    double: bool
    at: np.ndarray
    word: np.ndarray
    bit: np.ndarray
    size: np.ndarray
    low_word: np.ndarray
    low_bit: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    top: np.ndarray
    shift: np.ndarray


def code_map(old: int, new: int, steps: dict[int, float]) -> np.ndarray:
    """What codes of width `old` become at width `new`, as the reference rounds them: int64 [2^old] (one of old 0)."""
    top = np.float32(2.0**new - 1)
    if not old:
        return np.array([2 ** (new - 1)])
    step, inverse = np.float32(steps[old]), np.float32(1.0 / steps[new])
    level = np.float32(-(2.0**old - 1) / 2) * step + np.arange(2**old).astype(np.float32) * step
    code = np.floor(level * inverse + (top / 2 + np.float32(0.5)))
    return np.clip(code, 0, top).astype(np.int64)


def linear_map(old: int, new: int, steps: dict[int, float]) -> tuple[int, int]:
    """A and B of SqueezeTable with which it equals `code_map`. Raises ValueError where none are found."""
    wanted, one = code_map(old, new, steps), 1 << SHIFT
    if not old:
        return 0, int(wanted[0]) << SHIFT
    ratio = steps[old] / steps[new]
    scale = round(ratio * one)
    middle = 2.0 ** (new - 1) - (2.0**old - 1) / 2 * ratio
    codes = np.arange(2**old, dtype=np.int64)
    for nudge in (0, 1, -1, 8, -8, 64, -64, 512, -512):  # a code may lie on the edge of two
        offset = round(middle * one) + nudge
        if np.array_equal(np.clip((codes * scale + offset) >> SHIFT, 0, 2**new - 1), wanted):
            return scale, offset
    raise ValueError(f"no line maps codes of {old} bits to {new} bits with steps {steps}")


@dataclass(frozen=True)
class Parcels:
    """What kernels are told of one layer. kinds: of every part; parcel: their arrays, one part's after another's."""

    kinds: tuple[tuple[int, bool], ...]
    parcel: Parcel


def squeeze_parcels(old: LayerCodec, new: LayerCodec) -> Parcels:
    """How the pages of `new` come from those of `old`, kept: by size of a field and whether old codes have two planes,
    at int32 [m] and table int32 [Q, 9, m] (word, bit, size, low word, low bit, scale, offset, top, shift of a
    `SqueezeTable`; words by number). Raises ValueError where runs of latents differ in extent."""
    return memory.get(("squeeze", _content(old), _content(new)), lambda: _squeeze_parcels(squeeze_tables(old, new)))


def _squeeze_parcels(tables: list[SqueezeTable]) -> Parcels:
    arrays: list[np.ndarray] = []
    for table in tables:
        low = np.where(table.low_word < 0, -1, table.low_word // 4)
        columns: tuple[np.ndarray, ...] = (
            table.word // 4, table.bit, table.size, low, table.low_bit,
            table.scale, table.offset, table.top, table.shift,
        )  # fmt: skip
        arrays += [table.at, np.stack(columns, 1).astype(np.int32)]
    return Parcels(tuple((table.bits, table.double) for table in tables), Parcel.of(arrays))


def code_parcels(codec: LayerCodec) -> Parcels:
    """What `CodeLayer` has of a codec on its device, kept. First size and gain, float32 [P * S] each; then quads of one
    plane and of two, int32 [6, m] and float32 [m] each; then the byte tables' at, int32 [m], and table, int32 [Q, 3,
    m]. kinds: of the byte tables."""
    deviation = tuple(digest(unit.class_deviation) for unit in codec.units)
    return memory.get(("code", deviation, *_content(codec)), lambda: _code_parcels(codec))


def _code_parcels(codec: LayerCodec) -> Parcels:
    units, quads, tables = list(codec.units), page_quads(codec), byte_tables(codec)
    step = np.concatenate([row_steps(unit.layout, unit.steps) for unit in units], 1)
    deviation = np.concatenate([row_deviation(unit.class_deviation, codec.page_tokens) for unit in units], 1)
    inverse: np.ndarray = inverse_steps(step).astype(np.float32)
    arrays: list[np.ndarray] = [(step.astype(np.float32) * deviation).ravel(), (inverse / deviation).ravel()]
    for double in (False, True):
        some = quads.order[(quads.low[quads.order] >= 0) == double]
        high, low = quads.high[some], quads.low[some]
        low_word = np.where(low < 0, -1, low // 32)
        table = np.stack([high // 32, high % 32, quads.high_bits[some], low_word, low % 32, some])
        arrays += [table.astype(np.int32), ((2.0 ** quads.width[some] - 1) / 2).astype(np.float32)]
    for one in tables:
        arrays += [one.at, np.stack([one.place, one.width, one.shift], 1).astype(np.int32)]
    return Parcels(tuple((table.bits, False) for table in tables), Parcel.of(arrays))


def squeeze_tables(old: LayerCodec, new: LayerCodec) -> list[SqueezeTable]:
    """How the pages of `new` come from those of `old`. Raises ValueError where runs of latents differ in extent."""
    quads = page_quads(old)
    source = _source_quads(old, new, quads)
    row = int(unit_columns(new)[-1]) // 4
    steps = old.units[0].steps
    out = []
    for table in byte_tables(new):
        held = table.place >= 0
        place = np.maximum(table.place, 0)
        quad = np.where(held, source[place // (4 * row), place % (4 * row) // 4], -1)
        # One entry more than there are quads: what -1 finds.
        before, size = np.append(quads.width, 0)[quad], np.append(quads.high_bits, 1)[quad]
        high, low = np.append(quads.high, 0)[quad] + place % 4 * size, np.append(quads.low, -1)[quad]
        high, low = np.where(before > 0, high, 0), np.where(low < 0, -1, low + place % 4 * 2)
        lines: np.ndarray = np.zeros((2, 9, 9), dtype=np.int64)
        for pair in np.flatnonzero(np.bincount(before[held] * 9 + table.width[held])):
            a, b = divmod(int(pair), 9)
            lines[:, a, b] = linear_map(a, b, steps)
        scale, offset = (np.where(held, line[before, table.width], 0) for line in lines)
        double = (low >= 0).any(0)
        for both in (False, True):
            some = np.flatnonzero(double == both)
            if not some.size:
                continue
            arrays: tuple[np.ndarray, ...] = (
                high // 32 * 4, high % 32, size, np.where(low < 0, -1, low // 32 * 4), np.maximum(low, 0) % 32,
                scale, offset, 2 ** table.width.astype(np.int64) - 1, table.shift,
            )  # fmt: skip
            parts: list[np.ndarray] = [array[:, some].astype(np.int32) for array in arrays]
            out.append(SqueezeTable(table.bits, both, table.at[some], *parts))
    return out


def _source_quads(old: LayerCodec, new: LayerCodec, quads: Quads) -> np.ndarray:
    """The old quad that holds every quad of the new page: int64 [P, S' / 4], -1 for none."""
    found = []
    for a, b, column in zip(old.units, new.units, quads.columns, strict=False):
        where: np.ndarray = np.full(a.channels + 4, -1, dtype=np.int64)
        where[a.latents] = int(column) + np.arange(a.latents.size)
        got = where[b.latents.reshape(-1, 4)]
        first = got[:, 0]
        if (got != first[:, None] + np.arange(4) * (first >= 0)[:, None]).any() or (first[first >= 0] % 4).any():
            raise ValueError("latents of four do not lie together at both settings")
        found.append(np.where(first < 0, -1, first // 4))
    one = np.concatenate(found)
    row = quads.latents // 4
    return np.where(one < 0, -1, np.arange(new.page_tokens)[:, None] * row + one)


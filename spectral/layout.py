"""Where the codes of a page lie (pure: no I/O, no clock, no logging).

A coefficient of width w is a code in [0, 2^w). Codes are stored as planes of 1, 2, 4 or 8 bits: 3 = 2 + 1 and 6 = 4 +
2, so a code is the sum over its planes of field * 2^shift. Within a class of rows (spectral.bits.row_classes) a
plane comes in cells of 16 latents (32 of one bit, so that bytes are whole). A cell has four quarters, a quarter every
row of the class, and a row of a quarter the fields of four neighbouring latents (twice four of one bit), the first in
the lowest bits:

    cell = [quarter t][row f] of 1, 1, 2 or 4 bytes: latents 4 t .. 4 t + 3 of the cell's run (or two runs) at row f.

That is the order in which lanes of a GPU's matrix instruction want their operands: lane (page, t) of a warp gets all
rows of a cell with one aligned load, and so does lane (latent, rows) when the contraction is over tokens
(spectral.kernels). Cells are ordered by size, largest first, so each is aligned to its quarter (as far as 8 bytes). A
page is padded to a multiple of 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectral.bits import CHANNEL_GROUP, WIDTHS, row_classes

PAGE_ALIGN = 8
"""A page's bytes are a multiple of this."""

POOL_SLACK = 1024
"""Bytes behind a pool's last page that kernels may read, and do not use."""

PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    8: ((8, 0),),
    6: ((4, 2), (2, 0)),
    4: ((4, 0),),
    3: ((1, 2), (2, 0)),
    2: ((2, 0),),
    1: ((1, 0),),
}
"""Planes of a width: (bits, shift), highest bits of the code first."""

PLANE_ORDER = (8, 4, 2, 1)


def cell_runs(bits: int) -> int:
    """Runs of 16 latents in a cell."""
    return 2 if bits == 1 else 1


def quarter_nbytes(bits: int) -> int:
    """Bytes of one row of a quarter of a cell."""
    return max(1, bits // 2)


@dataclass(frozen=True)
class Strip:
    """The cells of one plane in one class, one after another.

    Attributes:
        bits: of a field; number: index of the class; rows: of the class; start: offset in the page.
        runs: first latent of every run of 16 that has the plane, ascending.
    """

    bits: int
    number: int
    rows: int
    start: int
    runs: tuple[int, ...]

    @property
    def cells(self) -> int:
        return -(-len(self.runs) // cell_runs(self.bits))

    @property
    def cell_nbytes(self) -> int:
        return 4 * self.rows * quarter_nbytes(self.bits)

    @property
    def stop(self) -> int:
        return self.start + self.cells * self.cell_nbytes


@dataclass(frozen=True)
class Plane:
    """All fields of one size, in storage order (the first in the lowest bits of its byte).

    Attributes:
        bits: of a field.
        byte: int64 [bytes]: where the plane's bytes lie in the page.
        place: int64 [fields]: coefficient f * R + r of each field, -1 for padding; shift: uint8 [fields]: of the
            field in its code.
    """

    bits: int
    byte: np.ndarray
    place: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Fields:
    """Every field of a page, plane by plane, in storage order; arrays [fields].

    Attributes:
        byte: where its byte lies in the page; inside: its lowest bit there; mask: uint8, its bits there.
        place, shift: as of its plane.
    """

    byte: np.ndarray
    inside: np.ndarray
    mask: np.ndarray
    place: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class PageLayout:
    """Where every coefficient of a unit's page lies.

    Attributes:
        page_tokens: P; channels: R; widths: uint8 [classes, R].
        strips: in storage order; planes: 8 bits first, without those that have no field.
        nbytes: bytes of one page, padding included.
    """

    page_tokens: int
    channels: int
    widths: np.ndarray
    strips: tuple[Strip, ...]
    planes: tuple[Plane, ...]
    nbytes: int

    @property
    def bits(self) -> int:
        """Bits of one page's codes, without padding."""
        return int(self.row_widths.astype(np.int64).sum())

    @property
    def row_widths(self) -> np.ndarray:
        """Width of every coefficient: uint8 [P, R]."""
        counts = [len(rows) for rows in row_classes(self.page_tokens, len(self.widths))]
        return np.repeat(self.widths, counts, axis=0)

    def fields(self) -> Fields:
        """Every field of a page."""
        kinds = (np.int64, np.int64, np.uint8, np.int64, np.uint8)
        parts: list[list[np.ndarray]] = [[np.zeros(0, kind)] for kind in kinds]
        for plane in self.planes:
            inside = np.tile(np.arange(0, 8, plane.bits), plane.byte.size)
            mask = ((2**plane.bits - 1) << inside).astype(np.uint8)
            found = [np.repeat(plane.byte, 8 // plane.bits), inside, mask, plane.place, plane.shift]
            for part, array in zip(parts, found, strict=True):
                part.append(array)
        return Fields(*(np.concatenate(part) for part in parts))


def page_layout(widths: np.ndarray, page_tokens: int) -> PageLayout:
    """Layout for widths [classes, R] (int). Raises ValueError on widths that do not exist or change within a run."""
    table = np.asarray(widths)
    if table.ndim != 2:
        raise ValueError(f"widths {table.shape} must be [classes, latents]")
    classes = row_classes(page_tokens, table.shape[0])
    wrong = sorted({int(w) for w in np.unique(table)} - set(WIDTHS))
    if wrong:
        raise ValueError(f"widths {wrong} are not among {WIDTHS}")
    table = table.astype(np.uint8)
    channels = table.shape[1]
    runs = table[:, : channels // CHANNEL_GROUP * CHANNEL_GROUP].reshape(len(classes), -1, CHANNEL_GROUP)
    if table[:, runs.shape[1] * CHANNEL_GROUP :].any() or (runs != runs[..., :1]).any():
        raise ValueError(f"widths must be the same within each run of {CHANNEL_GROUP} latents")
    found = [strip for bits in PLANE_ORDER for strip in _strips(runs[..., 0], classes, bits)]
    strips: list[Strip] = []
    start = 0
    for strip in sorted(found, key=lambda s: -s.cell_nbytes):
        strips.append(Strip(strip.bits, strip.number, strip.rows, start, strip.runs))
        start = strips[-1].stop
    planes = [_plane(runs[..., 0], channels, classes, bits, strips) for bits in PLANE_ORDER]
    kept = tuple(plane for plane in planes if plane.byte.size)
    return PageLayout(page_tokens, channels, table, tuple(strips), kept, -(-start // PAGE_ALIGN) * PAGE_ALIGN)


def _strips(runs: np.ndarray, classes: tuple[tuple[int, ...], ...], bits: int) -> list[Strip]:
    """A plane's strips, not yet placed; runs: widths [classes, runs]."""
    having = np.isin(runs, [w for w, planes in PLANES.items() if any(b == bits for b, _ in planes)])
    return [
        Strip(bits, number, len(rows), 0, tuple(int(run) * CHANNEL_GROUP for run in np.flatnonzero(having[number])))
        for number, rows in enumerate(classes)
        if having[number].any()
    ]


def _plane(
    runs: np.ndarray, channels: int, classes: tuple[tuple[int, ...], ...], bits: int, strips: list[Strip]
) -> Plane:
    """A plane's bytes and fields, strip by strip."""
    byte: list[np.ndarray] = [np.zeros(0, np.int64)]
    place: list[np.ndarray] = [np.zeros(0, np.int64)]
    shift: list[np.ndarray] = [np.zeros(0, np.uint8)]
    for strip in strips:
        if strip.bits != bits:
            continue
        width = cell_runs(bits)
        first: np.ndarray = np.full(strip.cells * width, -1, dtype=np.int64)
        first[: len(strip.runs)] = strip.runs
        own: np.ndarray = np.zeros(first.size, dtype=np.uint8)
        own[: len(strip.runs)] = [dict(PLANES[int(runs[strip.number, r // CHANNEL_GROUP])])[bits] for r in strip.runs]
        # [cell, quarter, row, run of the cell, latent of four]
        shape = (strip.cells, 4, strip.rows, width, 4)
        latent = first.reshape(-1, 1, 1, width, 1) + 4 * np.arange(4).reshape(4, 1, 1, 1) + np.arange(4)
        row = np.array(classes[strip.number]).reshape(-1, 1, 1)
        where = np.where(first.reshape(-1, 1, 1, width, 1) < 0, -1, row * channels + latent)
        byte.append(np.arange(strip.start, strip.stop))
        place.append(np.broadcast_to(where, shape).ravel())
        shift.append(np.broadcast_to(own.reshape(-1, 1, 1, width, 1), shape).ravel())
    return Plane(bits, np.concatenate(byte), np.concatenate(place), np.concatenate(shift))

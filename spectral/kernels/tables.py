"""What the kernels must know of one layer at one setting, as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectral.aside import to_device
from spectral.bits import CHANNEL_GROUP
from spectral.layout import PLANE_ORDER, PLANES, PageLayout, Strip, cell_runs
from spectral.remember import digest, memory

if TYPE_CHECKING:
    from spectral.codec import LayerCodec
    from spectral.unit_codec import UnitCodec

ITEM_CELLS = {8: 4, 4: 8, 2: 8, 1: 4}
"""Cells of a plane whose sums over tokens one warp keeps in registers."""

RUN_SLACK = 8
"""Entries behind the last run, which share_kernel asks for ahead of time."""

SCORE_CHUNK = 256
"""Bytes of a page that score_kernel has in shared memory at once."""

PIECE_WARPS = 4
"""Warps between which the values of pages whose rows are tokens are shared out."""

PIECE_KINDS = ((8, 1), (4, 2), (4, 1), (2, 2), (2, 1), (1, 1))
"""Of pieces (spectral.kernels.pieces): bits of the fields, and eights of quarters."""

PIECE_COSTS = (28, 39, 25, 39, 25, 38)
"""Instructions a page of each."""

SHARES = 8
"""Programs that share the scores of eight pages where a launch would leave most of a GPU idle."""

QUAD_ORDER = (0, 2, 1, 3)
"""Of four latents, in the projected query and its factors: two that one byte has are then taken out of it at once."""

SCORE_UNIT = 16.0
"""Factors of the score kernel are this much larger than what fields stand for, so that none is subnormal."""


@dataclass
class LayerTables:
    """Of all units of a layer, C classes, R the largest rank of a unit with values, K of one with keys. Planes are
    those of PLANE_ORDER. Scores want units with keys and mixing those with values, each numbered by themselves.

    Attributes:
        cells: int32 [units, C, 4]: of every strip.
        entry: int32 [runs + RUN_SLACK, 4, 4]: for every run of every cell in the order of storage, and every quarter t
            of it: what the lowest bit of fields 4 t .. (in QUAD_ORDER) stands for, over 2^position, times SCORE_UNIT
            (four fp16; 0 for padding), 32 times the run's first latent, 1 where fields have four bits, of which
            flat_score_kernel leaves two together.
        stepped: int32 [units, entries, 4, 4]: `entry` for score_kernel: by unit, with empty ones where what a chunk of
            a page has of a strip does not fill its last step, and behind a unit's last.
        span: int32 [units, 2]: a unit's first entry, and how many it has.
        share: int32 [units, SHARES, 4 + 4 C]: a unit's cells in SHARES parts of about equal work: offset of the part's
            first cell in the unit's page, of its end, its first entry, how many entries it has, and how many cells of
            every strip, by class and plane.
        item: int32 [items, 8]: unit, class, plane, offset of its first cell, cells, first output column, 1 if its
            program stores the sums of weights of its class, 0.
        piece: int32 [units, PIECE_WARPS, pieces, 4]: of pages whose rows are tokens what a warp of pieces_kernel sums
            one after another: kind (of PIECE_KINDS), offset, first output column, quarters that
            are latents; pieces: int32 [units, PIECE_WARPS]: how many a warp has.
        piece_two, pieces_two, piece_four, pieces_four: the same for the warps of two programs, and of four.
        source: int32 [units, C, 2, R / 16]: output column of a run's (at most two) planes, -1: none.
        source_factor: float32 [units, C, 2, R]: what a unit of that column stands for.
        offset: float32 [units, C, R]: half the range of a latent's codes, what an all-zero code lies below the mean;
        key_offset: float32 [units, C, K], the same.
        outputs: output columns, a multiple of 16.
    """

    cells: np.ndarray
    entry: np.ndarray
    stepped: np.ndarray
    span: np.ndarray
    share: np.ndarray
    item: np.ndarray
    piece: np.ndarray
    pieces: np.ndarray
    piece_two: np.ndarray
    pieces_two: np.ndarray
    piece_four: np.ndarray
    pieces_four: np.ndarray
    source: np.ndarray
    source_factor: np.ndarray
    offset: np.ndarray
    key_offset: np.ndarray
    outputs: int

    def to(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The arrays as tensors on a device."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "outputs"}
        return {name: to_device(array, device) for name, array in arrays.items()}


def step_entries(classes: int) -> int:
    """Entries that score_kernel multiplies with at once, of pages with so many classes: a chunk has two cells of
    sixteen rows and four bits, and a few of fewer rows."""
    return 2 if classes == 1 else 4


def step_size(layout: PageLayout, deviation: np.ndarray, steps: dict[int, float]) -> np.ndarray:
    """What one step of a code stands for: float64 [C, R]; steps: of the uniform tables, by width."""
    step = np.array([steps.get(w, 0.0) for w in range(9)])
    return step[layout.widths] * deviation


def field_positions(bits: int) -> np.ndarray:
    """Bit at which the kernels use the fields of a cell's latents: int64 [runs, 16]."""
    latent: np.ndarray = np.arange(CHANNEL_GROUP) % 4
    if bits == 1:
        return np.stack([latent, 4 + latent])
    return (bits * latent % 8)[None]


def layer_tables(codec: LayerCodec) -> LayerTables:
    """Tables of a layer at a setting, kept."""
    parts = [
        (unit.layout.page_tokens, unit.side, digest(unit.layout.widths, unit.class_deviation)) for unit in codec.units
    ]
    return memory.get(("tables", *parts, *sorted(codec.units[0].steps.items())), lambda: _layer_tables(codec))


def _layer_tables(codec: LayerCodec) -> LayerTables:
    scored = _Scored([codec.units[number] for number in codec.key_units])
    mixed = _Mixed([(codec.units[number], codec.starts[number]) for number in codec.value_units])
    return LayerTables(
        scored.cells,
        np.pad(np.concatenate(scored.entry), ((0, RUN_SLACK), (0, 0), (0, 0))),
        _together(scored.stepped, step_entries(scored.cells.shape[1])),
        scored.span,
        np.stack(scored.share),
        np.array(mixed.item, dtype=np.int32),
        *_pieces(mixed.piece, PIECE_WARPS),
        *_pieces(mixed.piece, 2 * PIECE_WARPS),
        *_pieces(mixed.piece, 4 * PIECE_WARPS),
        mixed.source,
        mixed.source_factor,
        mixed.offset,
        scored.offset,
        max(mixed.outputs, CHANNEL_GROUP),
    )


def _offset(unit: UnitCodec, size: np.ndarray, out: np.ndarray) -> None:
    """What a unit's all-zero codes lie below the mean, into its part [C, R] of `offset`."""
    out[:, : unit.layout.channels] = size * (2.0 ** unit.layout.widths.astype(np.float64) - 1) / 2


def _rank(units: list[UnitCodec]) -> int:
    return -(-max(unit.layout.channels for unit in units) // CHANNEL_GROUP) * CHANNEL_GROUP


class _Scored:
    """What scores need of units with keys."""

    def __init__(self, units: list[UnitCodec]) -> None:
        classes = units[0].layout.widths.shape[0]
        self.cells = np.zeros((len(units), classes, len(PLANE_ORDER)), dtype=np.int32)
        self.offset = np.zeros((len(units), classes, _rank(units)), dtype=np.float32)
        self.span: np.ndarray = np.zeros((len(units), 2), dtype=np.int32)
        self.entry: list[np.ndarray] = [np.zeros((0, 4, 4), np.int32)]
        self.stepped: list[np.ndarray] = []
        self.share: list[np.ndarray] = []
        runs = 0
        for u, unit in enumerate(units):
            size = step_size(unit.layout, unit.class_deviation, unit.steps)
            _offset(unit, size, self.offset[u])
            self.share.append(_shares(unit.layout, runs))
            own: list[np.ndarray] = [np.zeros((0, 4, 4), np.int32)]
            self.span[u, 0] = runs
            for s in unit.layout.strips:
                self.cells[u, s.number, PLANE_ORDER.index(s.bits)] = s.cells
                first, value = _strip_runs(s, unit.layout, size)
                self.entry.append(_entries(first, value * SCORE_UNIT, s.bits))
                own += _in_steps(s, self.entry[-1], step_entries(classes))
                runs += first.size
            self.stepped.append(np.concatenate(own))
            self.span[u, 1] = runs - self.span[u, 0]


class _Mixed:
    """What mixing needs of units with values, given with the offset of their bytes in a page."""

    def __init__(self, units: list[tuple[UnitCodec, int]]) -> None:
        rank, classes = _rank([unit for unit, _ in units]), units[0][0].layout.widths.shape[0]
        self.source = np.full((len(units), classes, 2, rank // CHANNEL_GROUP), -1, dtype=np.int32)
        self.source_factor = np.zeros((len(units), classes, 2, rank), dtype=np.float32)
        self.offset = np.zeros((len(units), classes, rank), dtype=np.float32)
        self.item: list[list[int]] = []
        self.piece: list[list[tuple[int, int, int, int]]] = [[] for _ in units]
        self.outputs = 0
        for u, (unit, start) in enumerate(units):
            size = step_size(unit.layout, unit.class_deviation, unit.steps)
            _offset(unit, size, self.offset[u])
            for s in unit.layout.strips:
                self._add(u, s, start, *_strip_runs(s, unit.layout, size))
            if not any(entry[:2] == [u, 0] for entry in self.item):  # the sum of weights of class 0 is always needed
                self.item.append([u, 0, PLANE_ORDER.index(2), start, 0, 0, 0, 0])
        self.item.sort(key=lambda entry: -entry[1])  # the longest first
        seen = set()
        for entry in self.item:
            entry[6] = int((entry[0], entry[1]) not in seen)
            seen.add((entry[0], entry[1]))

    def _add(self, u: int, s: Strip, start: int, first: np.ndarray, value: np.ndarray) -> None:
        """A strip's items and where its sums go."""
        for k, latent in enumerate(s.runs):
            side = int(self.source[u, s.number, 0, latent // CHANNEL_GROUP] >= 0)
            self.source[u, s.number, side, latent // CHANNEL_GROUP] = self.outputs + CHANNEL_GROUP * k
            self.source_factor[u, s.number, side, latent : latent + CHANNEL_GROUP] = value[k] * 2.0**24
        for cell in range(0, s.cells, ITEM_CELLS[s.bits]):
            count = min(ITEM_CELLS[s.bits], s.cells - cell)
            column = self.outputs + CHANNEL_GROUP * cell_runs(s.bits) * cell
            place = start + s.start + cell * s.cell_nbytes
            self.item.append([u, s.number, PLANE_ORDER.index(s.bits), place, count, column, 0, 0])
        if len(self.source[u]) == 1:
            self.piece[u].append((s.bits, start + s.start, self.outputs, 4 * s.cells))
        self.outputs += CHANNEL_GROUP * first.size


def _pieces(planes: list[list[tuple[int, int, int, int]]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """`piece` and `pieces` for `count` warps, from every unit's planes: bits, offset, first output column, quarters."""
    shared = [_shared_out(own, count) for own in planes]
    most = max((len(own) for unit in shared for own in unit), default=0)
    piece: np.ndarray = np.zeros((len(planes), count, max(1, most), 4), dtype=np.int32)
    for u, w in np.ndindex(len(planes), count):
        piece[u, w, : len(shared[u][w])] = np.array(shared[u][w], dtype=np.int32).reshape(-1, 4)
    return piece, np.array([[len(own) for own in unit] for unit in shared], dtype=np.int32)


def _shared_out(planes: list[tuple[int, int, int, int]], count: int) -> list[list[tuple[int, ...]]]:
    """A unit's pieces by warp. Of those of sixteen quarters, which read their weights once for twice the work, as many
    are halved as make the longest warp's share shorter."""
    shares: list[tuple[int, list[list[tuple[int, ...]]]]] = []  # the longest warp's work, and who has what
    for halved in range(1 + sum(quarters // 9 + 1 for _, _, _, quarters in planes)):
        warps: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        load = [0] * count
        for cost, piece in sorted(_cut(planes, halved), key=lambda one: -one[0]):
            least = load.index(min(load))
            warps[least].append(piece)
            load[least] += cost
        shares.append((max(load), warps))
    return min(shares, key=lambda one: one[0])[1]


def _cut(planes: list[tuple[int, int, int, int]], halved: int) -> list[tuple[int, tuple[int, ...]]]:
    """Pieces of planes with what they cost (instructions a page), the first `halved` of sixteen quarters in two."""
    out: list[tuple[int, tuple[int, ...]]] = []
    for bits, offset, column, quarters in planes:
        at = 0
        while at < quarters:
            both = bits in (2, 4) and quarters - at > 8
            if both and halved:
                both, halved = False, halved - 1
            size = 16 if both else 8
            kind = PIECE_KINDS.index((bits, size // 8))
            place = offset + at * 16 * max(1, bits // 2)
            first = column + at * (8 if bits == 1 else 4)
            out.append((PIECE_COSTS[kind], (kind, place, first, min(size, quarters - at))))
            at += size
    return out


def _shares(layout: PageLayout, first_run: int) -> np.ndarray:
    """`share` of one unit. A cell's work: what it needs once (some 25 instructions a run), and products by row."""
    classes = layout.widths.shape[0]
    share = np.zeros((SHARES, 4 + 4 * classes), dtype=np.int32)
    work = [cell_runs(s.bits) * (25 + 4 * s.rows) for s in layout.strips for _ in range(s.cells)]
    part = (np.cumsum(work) - 1) * SHARES // max(1, sum(work))
    at, cell = first_run, 0
    for s in layout.strips:
        for k in range(s.cells):
            own = share[part[cell]]
            if not own[4:].any():
                own[0], own[2] = s.start + k * s.cell_nbytes, at
            own[1] = s.start + (k + 1) * s.cell_nbytes
            own[3] += cell_runs(s.bits)
            own[4 + 4 * s.number + PLANE_ORDER.index(s.bits)] += 1
            at += cell_runs(s.bits)
            cell += 1
    return share


def _entries(run: np.ndarray, factor: np.ndarray, bits: int) -> np.ndarray:
    """`entry` from first latents [runs] and factors [runs, 16] of fields of so many bits."""
    entry: np.ndarray = np.zeros((len(run), 4, 4), dtype=np.int32)
    entry[..., :2] = factor.astype(np.float16).reshape(-1, 4, 4)[:, :, QUAD_ORDER].copy().view(np.int32)
    entry[..., 2], entry[..., 3] = 32 * run[:, None], bits == 4
    return entry


def _in_steps(s: Strip, entry: np.ndarray, step: int) -> list[np.ndarray]:
    """A strip's entries [runs, 4, 4] as those of every chunk that it lies in, filled to whole steps."""
    width, out, cell = cell_runs(s.bits), [], 0
    while cell < s.cells:
        here = (SCORE_CHUNK - (s.start + cell * s.cell_nbytes) % SCORE_CHUNK) // s.cell_nbytes
        part = entry[cell * width : (cell + here) * width]
        out.append(np.pad(part, ((0, -len(part) % step), (0, 0), (0, 0))))
        cell += here
    return out


def _together(stepped: list[np.ndarray], step: int) -> np.ndarray:
    """`stepped` from every unit's entries, with two steps behind the last, which are asked for ahead of time."""
    most = max(map(len, stepped)) + 2 * step
    return np.stack([np.pad(own, ((0, most - len(own)), (0, 0), (0, 0))) for own in stepped])


def _strip_runs(s: Strip, layout: PageLayout, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First latents int64 [runs, padding included], and what a field's lowest bit stands for over 2^position [runs,
    16]."""
    width = cell_runs(s.bits)
    first: np.ndarray = np.zeros(s.cells * width, dtype=np.int64)
    first[: len(s.runs)] = s.runs
    value = np.zeros((first.size, CHANNEL_GROUP))
    position = np.tile(field_positions(s.bits), (s.cells, 1))
    for k, latent in enumerate(s.runs):
        shift = dict(PLANES[int(layout.widths[s.number, latent])])[s.bits]
        value[k] = size[s.number, latent : latent + CHANNEL_GROUP] * 2.0 ** (shift - position[k])
    return first, value

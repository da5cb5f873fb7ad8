"""Scores of packed pages whose rows are tokens, and weights from them: one program for blocks of pages of one sequence
and unit, as spectral.kernels.score has it for pages that are transformed.

All cells have sixteen rows, so there are few of them, and the operands of all lie in shared memory, as
spectral.kernels.operands has made them; those of the next block come while one is multiplied with. Nothing else but the
bytes of pages goes through it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import SHARED, behind, quarter_rows
from spectral.kernels.flat_weights import leave_weights
from spectral.kernels.lanes import score_rows
from spectral.kernels.score import CHUNK, OPERAND
from spectral.kernels.staging import close_stage, copy_lines, copy_operands, held_four, held_two, stage, wait_stages
from spectral.kernels.words import two_words

ENTRIES = tl.constexpr(40)
"""Entries of the table for whose operands shared memory has room. Of a block that has more they come plane by plane: a
plane has at most one for every run of latents. (Units of more runs are left to spectral.kernels.score.)"""

STAGES = tl.constexpr(3)
"""Chunks of its eight pages that a warp has in shared memory."""

PITCH = tl.constexpr(288)
"""Bytes from page to page of a chunk. Lanes of every second page read the second half of their rows first (_rows):
together that leaves few of them in the same banks."""

STAGE = tl.constexpr(8 * 288)
"""Bytes of eight pages' chunk."""


def flat_fits(latents: int, pages: int) -> bool:
    """Whether flat_score_kernel serves units of so many latents, and blocks of so many pages."""
    nbytes = pages // 8 * int(STAGES) * int(STAGE) + int(ENTRIES) * int(OPERAND)
    return latents <= 16 * int(ENTRIES) and nbytes <= SHARED


@triton.jit
def _page_ids(ids, first, last, lane):
    """Of eight pages the one that a lane multiplies, and the two that it copies a piece of."""
    own, copied = first + lane // 4, first + lane // 8
    return (
        tl.load(ids + tl.minimum(own, last)), tl.load(ids + tl.minimum(copied, last)),
        tl.load(ids + tl.minimum(copied + 4, last)),
    )  # fmt: skip


@triton.jit
def _copies(held, pages, page_ids, page_nbytes, lane):
    """Where a lane's pieces of a chunk go, where those of the first chunk lie, of its two pages, and whether there is
    one more: pages begin at multiples of eight. Eight lanes copy a line at once."""
    near = (pages + page_ids[1].to(tl.int64) * page_nbytes).to(tl.int64)
    far = (pages + page_ids[2].to(tl.int64) * page_nbytes).to(tl.int64)
    piece = lane % 8 * 16
    more = tl.where(piece == 0, 8, 0)
    return (
        held + (lane // 8 * PITCH + piece), (near & -16) + piece, (far & -16) + piece,
        near.to(tl.int32) & more, far.to(tl.int32) & more,
    )  # fmt: skip


@triton.jit
def _ask_first(copies, chunks, lane):
    """Ask for the chunks of its eight pages that a warp has before it begins; each is a stage even if there is none."""
    for chunk in tl.static_range(STAGES - 1):
        if chunk < chunks:
            copy_lines(copies[0] + chunk * STAGE, copies[1] + chunk * CHUNK, copies[2] + chunk * CHUNK, copies[3],
                       copies[4], 4 * PITCH)  # fmt: skip
        close_stage(lane)


@triton.jit
def _rows(at, g, BITS: tl.constexpr):
    """All rows of the lane's quarter of a cell in shared memory, as words; of every second page the second half
    first."""
    NBYTES: tl.constexpr = 16 * max(1, BITS // 2)
    turned = g % 2 * (NBYTES // 2)
    x = ()
    for i in tl.static_range(NBYTES // 16):
        x = x + held_two(at + turned + 8 * i)
    for i in tl.static_range(NBYTES // 16):
        x = x + held_two(at - turned + (NBYTES // 2 + 8 * i))
    return x


@triton.jit
def _cell_counts(p):
    """Of the four planes."""
    return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)


@triton.jit
def _head_place(lane_head, own, part, stride):
    """How far behind the operands of an entry those of one of sixteen heads lie; of heads that a unit lacks its last
    one's, which harm nobody. stride: from one head group to the next."""
    head = tl.minimum(part * 16 + lane_head, own - 1)
    return (head // 16 - part).to(tl.int64) * stride + head % 16 * 32


@triton.jit
def _ask_operands(to, source, apart, count, i, WARPS: tl.constexpr):
    """Ask for the operands of `count` entries; the warps of a program take turns. source: of the lane's, heads g and,
    `apart` from there, g + 8; in shared memory they lie as one instruction wants them."""
    begin = source.to(tl.int64)
    for n in range(0, count, WARPS):
        at = tl.minimum(n + i // 32, count - 1) * OPERAND
        copy_operands(to + (at + i % 32 * 16), begin + at, begin + (at + apart))


@triton.jit
def _exchange_operands(to, source, apart, count, i, WARPS: tl.constexpr):
    """Others in place of what all warps have multiplied with."""
    tl.debug_barrier()
    _ask_operands(to, source, apart, count, i, WARPS)
    close_stage(i)
    wait_stages(i, 0)
    tl.debug_barrier()


@triton.jit
def _read_operands(p, apart):
    """An entry's operands from where operand_kernel has left them, those of heads g + 8 `apart` from those of heads
    g."""
    a0, a2 = two_words(p, False)
    a1, a3 = two_words(p + apart, False)
    return a0, a1, a2, a3


@triton.jit
def _next_chunk(off, at, held, copies, chunks, lane):
    """Where the page of the chunk that begins at `off` lies; what comes next takes the place of the one before it."""
    wait_stages(lane, STAGES - 2)
    last = at
    at = tl.where(at == held + (STAGES - 1) * STAGE, held, at + STAGE)
    if (off >> 8) + STAGES - 1 < chunks:
        behind = off + (STAGES - 1) * CHUNK
        copy_lines(
            last + (copies[0] - held), copies[1] + behind, copies[2] + behind, copies[3], copies[4], 4 * PITCH
        )
    close_stage(lane)
    return at


@triton.jit
def _strip(
    c, off, at, cells, held, page, copies, chunks, made, apart, lane,
    BITS: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a plane's cells to the scores.

    off: of the first in the page; at: where the lane's page of its chunk lies, and held of the first one: numbers of
    lanes, since ptxas makes wrong instructions of addresses with a part that is the same for all; made: where the
    lane's part of its first operands lies, in shared memory or (not FAST) as a pointer, and `apart` from there that of
    heads g + 8.
    """
    U: tl.constexpr = max(1, BITS // 2)
    quarter, g = lane % 4 * (16 * U), lane // 4
    singles = cells
    if FAST and (BITS == 4 or BITS == 2):  # two at once: the second one's bytes come while the first is multiplied with
        singles = cells % 2
        for _ in range(cells // 2):
            if off & (CHUNK - 1) == 0:
                at = _next_chunk(off, at, held, copies, chunks, lane)
            here = at + (quarter + (off & (CHUNK - 1)))
            a, x = held_four(made), _rows(here, g, BITS)
            b, y = held_four(made + OPERAND), _rows(here + 64 * U, g, BITS)
            c = score_rows(c, x, a, BITS, 16, WARPS, True, BITS == 4)
            c = score_rows(c, y, b, BITS, 16, WARPS, True, BITS == 4)
            made += 2 * OPERAND
            off += 128 * U
    for _ in range(singles):
        if FAST:
            if off & (CHUNK - 1) == 0:
                at = _next_chunk(off, at, held, copies, chunks, lane)
            a = held_four(made)
            made += OPERAND
            if BITS == 1:
                a = a + held_four(made)
                made += OPERAND
            x = _rows(at + (quarter + (off & (CHUNK - 1))), g, BITS)
        else:
            a = _read_operands(made, apart)
            made += OPERAND
            if BITS == 1:
                a = a + _read_operands(made, apart)
                made += OPERAND
            x = quarter_rows(page, page + (off + quarter), BITS, 16, False)
        c = score_rows(c, x, a, BITS, 16, WARPS, FAST, BITS == 4)
        off += 64 * U
    return c, off, at, made


@triton.jit
def _all_strips(
    cells, entries, held, page, copies, chunks, made, apart, ring, source, i, WARPS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Sums of fields and operands, 4 numbers a token (heads g and g + 8, pages 2 t and 2 t + 1). ring, source: where
    operands lie in shared memory, and where they come from, of those that are more than fit."""
    c = (tl.zeros([32 * WARPS], tl.float32),) * 64
    off = tl.full([], 0, tl.int32)
    at = held
    if FAST:
        at = held + (STAGES - 1) * STAGE
    first, entry = made, tl.full([], 0, tl.int32)
    for s in tl.static_range(4):
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if entries > ENTRIES:
                own = cells[s] * (2 if s == 3 else 1)
                _exchange_operands(ring, source + entry * OPERAND, apart, own, i, WARPS)
                made = first
                entry += own
        c, off, at, made = _strip(
            c, off, at, cells[s], held, page, copies, chunks, made, apart, i % 32, 8 >> s, WARPS, FAST
        )
    return c


@triton.jit
def _shared_scores(
    cells, own, entries, number, more, held, page, copies, chunks, apart, ring, source, i, WARPS: tl.constexpr
):  # fmt: skip
    """The sums of a block, the program's `number`-th, whose operands and first bytes have been asked for. Of few
    entries (own) there is room for two blocks': those of the next one are asked for where there are `more`."""
    lane = i % 32
    two = tl.where(own <= ENTRIES // 2, 1, 0)
    side = (number & two) * (ENTRIES // 2 * OPERAND)
    wait_stages(lane, STAGES - 2)
    tl.debug_barrier()
    if (two > 0) & more:
        _ask_operands(ring + (ENTRIES // 2 * OPERAND - side), source + entries * OPERAND, apart, own, i, WARPS)
    return _all_strips(
        cells, own, held + lane // 4 * PITCH + behind(page), page, copies, chunks, ring + (lane * 16 + side), apart,
        ring, source, i, WARPS, True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "table_stride", "page_nbytes", "blocks", "pages_max", "units", "heads", "entries", "each",
    ]
)  # fmt: skip
def flat_score_kernel(
    operand_ptr, shift_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, cells_ptr, span_ptr, weight_ptr,
    max_ptr, total_ptr,
    table_stride, page_nbytes, blocks, pages_max, units, heads, entries, each,
    GROUPS: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Some blocks (8 pages a warp) of one sequence, unit and 16 of its query heads, one after another.

    Arguments as spectral.kernels.score has them, but operand_ptr, shift_ptr: as spectral.kernels.operands leaves them,
    of `entries` entries a block; span_ptr: LayerTables.span. Weights are relative to the largest score of a warp's
    eight pages: max_ptr, and total_ptr, sums of their weights: fp32 [sequence, unit, head groups, blocks * WARPS, 16].
    each: blocks of a program.
    """
    PB: tl.constexpr = 8 * WARPS
    BYTES: tl.constexpr = WARPS * STAGES * STAGE
    unit, part, seq = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held, ring = i, i
    if FAST:
        ring = stage(i, BYTES + ENTRIES * OPERAND)
        held = ring + i // 32 * (STAGES * STAGE)
        ring += BYTES
    count = tl.load(count_ptr + seq)
    b0 = tl.program_id(1) * each
    b1 = tl.minimum(b0 + each, (count + PB - 1) // PB)
    if b0 < b1:
        g, t = lane // 4, lane % 4
        own = tl.load(span_ptr + unit * 2 + 1)
        where = (seq * units + unit) * GROUPS + part
        heads_own, stride = tl.load(unit_ptr + unit * 4 + 1), blocks.to(tl.int64) * (entries * OPERAND)
        near = _head_place(g, heads_own, part, stride)
        apart = _head_place(g + 8, heads_own, part, stride) - near
        operands = operand_ptr.to(tl.pointer_type(tl.int8)) + where * stride + (near + t * 8)
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if own <= ENTRIES:
                _ask_operands(ring, operands + b0 * entries * OPERAND, apart, own, i, WARPS)
        chunks = (tl.load(unit_ptr + unit * 4 + 3) + CHUNK - 1) // CHUNK
        pages, cells = pages_ptr + tl.load(unit_ptr + unit * 4 + 2), _cell_counts(cells_ptr + unit * 4)
        last = heads_own - 1 - part * 16
        shifts = shift_ptr + (seq * blocks * heads + tl.load(unit_ptr + unit * 4) + part * 16).to(tl.int64)
        place = (weight_ptr + where.to(tl.int64) * pages_max * 256).to(tl.pointer_type(tl.int32))
        ids, mine = table_ptr + seq * table_stride, i // 32 * 8
        page_ids = _page_ids(ids, b0 * PB + mine, count - 1, lane)
        if FAST:
            _ask_first(_copies(held, pages, page_ids, page_nbytes, lane), chunks, lane)
        for blk in range(b0, b1):
            after = _page_ids(ids, (blk + 1) * PB + mine, count - 1, lane)
            shift0 = tl.load(shifts + (blk * heads + tl.minimum(g, last)))
            shift1 = tl.load(shifts + (blk * heads + tl.minimum(g + 8, last)))
            source, more = operands + (entries * blk).to(tl.int64) * OPERAND, blk + 1 < b1
            page = pages + page_ids[0].to(tl.int64) * page_nbytes
            if FAST:
                copies = _copies(held, pages, page_ids, page_nbytes, lane)
                c = _shared_scores(
                    cells, own, entries, blk - b0, more, held, page, copies, chunks, apart, ring, source, i, WARPS
                )
            else:
                c = _all_strips(cells, own, held, page, held, chunks, source, apart, ring, source, i, WARPS, False)
            if more:
                page_ids = after
                if FAST:
                    if (own > ENTRIES // 2) & (own <= ENTRIES):
                        tl.debug_barrier()
                        _ask_operands(ring, source + entries * OPERAND, apart, own, i, WARPS)
                    _ask_first(_copies(held, pages, page_ids, page_nbytes, lane), chunks, lane)
            leave_weights(
                c, shift0, shift1, mine + 2 * t, count - blk * PB, blk, place, max_ptr, total_ptr, where * blocks + blk,
                i, SOFTCAP, WARPS, FAST,
            )  # fmt: skip

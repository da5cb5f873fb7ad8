"""Scores of packed pages, with the query's operands made once a block: one program for a block of pages of one
sequence and unit, as in spectral.kernels.score, of which this has the beginning and the end.

What a run of 16 latents costs besides its products (the query's part out of shared memory, four products with what its
fields stand for) is the same for all pages of a block. So the warps of a program share it: entries of the table come in
steps of a few, each warp makes its part of a step's operands and leaves them in a ring of two steps in shared memory,
and all warps multiply their eight pages with all of them. One barrier a step: while a step is multiplied with, the next
one is made, from factors and the query's words that were asked for a step or two before.

A segment is what a chunk of a page (CHUNK bytes) has of a strip; cells are taken two at once (one of 1 bit, which has
two runs), and the table has an empty entry where a segment's cells are odd (LayerTables.joint). The ring goes on
through segments, strips and classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import class_rows, first_row, size_log2, strip_bits, strip_class, strip_plane
from spectral.kernels.lanes import score_rows
from spectral.kernels.score import (
    behind,
    hold_query,
    leave_weights,
    page_start,
    part_of,
    quarter_rows,
    query_row,
    query_words,
    scaled,
    with_part,
)
from spectral.kernels.staging import close_stage, copy_part, held_four, hold_four, stage, wait_stages
from spectral.kernels.tables import JOINT_CHUNK, JOINT_STEP
from spectral.kernels.words import four_words, table_words, word

CHUNK = tl.constexpr(JOINT_CHUNK)
PITCH = tl.constexpr(272)
STAGE = tl.constexpr(8 * 272)
"""Bytes of a warp's eight pages in one of its two stages."""

STEP = tl.constexpr(JOINT_STEP)
"""Entries whose operands the warps of a program make at once."""

OPERAND = tl.constexpr(512)
"""Bytes of an entry's operands: sixteen a lane."""

SHARED = 47 * 1024


def joint_runs(runs: int, octets: int) -> int:
    """As spectral.kernels.score.held_runs, beside two stages of bytes of so many times eight pages and two steps of
    operands."""
    room = (SHARED - octets * 2 * int(STAGE) - 2 * int(STEP) * int(OPERAND)) // 512
    return next((size for size in (room,) if runs <= size <= room), 0)


@triton.jit
def _copied(held, ids, pages, first, count, page_nbytes, lane, TILES: tl.constexpr):
    """For every eight of a warp's pages where a lane's pieces of a chunk go and where the first chunk's lie; and
    whether a last piece is the lane's (pages begin at multiples of eight, so one more of sixteen bytes goes with every
    chunk). Four lanes have a page."""
    own, quarter = lane // 4, lane % 4 * 16
    out = ()
    for j in tl.static_range(TILES):
        base = (pages + page_start(ids, first + 8 * j + own, count, page_nbytes)).to(tl.int64) & -16
        out = out + ((held + (2 * STAGE * j + own * PITCH + quarter), base + quarter),)
    return out, (quarter == 0).to(tl.int32)


@triton.jit
def _ask_chunk(copies, chunk, lane):
    """Ask for one chunk of all the warp's pages."""
    for j in tl.static_range(len(copies[0])):
        to, source = copies[0][j]
        copy_part(to + (chunk & 1) * STAGE, source + chunk * CHUNK, copies[1], CHUNK // 64)
    close_stage(lane)


@triton.jit
def _next_chunk(copies, chunk, chunks, lane):
    """Wait for a chunk, and ask for the next one, which takes the place of the last."""
    wait_stages(lane, 0)
    if chunk + 1 < chunks:
        _ask_chunk(copies, chunk + 1, lane)


@triton.jit
def _begin(
    made, ops, held_q, q0, q1, i, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What goes from step to step: where the step's operands lie in the ring, its number, where the query's words of
    the next step's entries lie, and the warp's first entry. The first step's operands are left in the ring."""
    EACH: tl.constexpr = max(1, STEP // WARPS)
    if FAST:
        p = ops + i // 32 % STEP * (16 * EACH)  # of eight warps two make the same
        where = ()
        for k in tl.static_range(EACH):
            e = four_words(p + 16 * k, FAST)
            a = scaled(query_words(held_q, q0, q1, e[2], HOLD, FAST), e, FAST)
            hold_four(made + k * OPERAND, a[0], a[1], a[2], a[3])
            where = where + (word(p + (16 * STEP + 16 * k + 2), 4, FAST),)
        return tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), where, p
    else:
        return (ops,)


@triton.jit
def _coming(state, held_q, q0, q1, EACH: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr):
    """Of a warp's entries of the next step the query's words and the factors, and where the words of the one after it
    lie: what a step needs is asked for one before."""
    out = ()
    for k in tl.static_range(EACH):
        q = query_words(held_q, q0, q1, state[2][k], HOLD, FAST)
        out = out + ((q, table_words(state[3], state[1], 16 * STEP, 16 * STEP + 16 * k, FAST)),)
    return out


@triton.jit
def _make(state, coming, made, EACH: tl.constexpr, FAST: tl.constexpr):
    """Leave the next step's operands in the ring."""
    slot = state[0] ^ (STEP * OPERAND)
    where = ()
    for k in tl.static_range(EACH):
        q, e = coming[k]
        a = scaled(q, e, FAST)
        hold_four(made + (slot + k * OPERAND), a[0], a[1], a[2], a[3])
        where = where + (e[2],)
    return slot, state[1] + 1, where, state[3]


@triton.jit
def _operands(state, ring, held_q, q0, q1, K: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr):
    """Operands of entry K of a step, which begins at state[0]: in the ring, or (in plain Triton) in the table."""
    if FAST:
        return held_four(ring + (state[0] + K * OPERAND))
    else:
        e = four_words(state[0] + 16 * K, FAST)
        return scaled(query_words(held_q, q0, q1, e[2], HOLD, FAST), e, FAST)


@triton.jit
def _step(
    c, at, page, state, ring, made, held_q, q0, q1,
    BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add the cells of a step to the scores of their rows."""
    SIZE: tl.constexpr = 4 * ROWS * max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    EACH: tl.constexpr = max(1, STEP // WARPS)
    coming = ()
    if FAST:
        tl.debug_barrier()  # all warps have made this step, and multiplied with the one whose place the next one takes
        coming = _coming(state, held_q, q0, q1, EACH, HOLD, FAST)
    x = ()
    a = ()
    for k in tl.static_range(STEP // RUNS):
        for j in tl.static_range(len(c)):
            x = x + (quarter_rows(at[j] + k * SIZE, page[j] + k * SIZE, BITS, ROWS, FAST),)
        own = ()
        for run in tl.static_range(RUNS):
            own = own + _operands(state, ring, held_q, q0, q1, k * RUNS + run, HOLD, FAST)
        a = a + (own,)
    for k in tl.static_range(STEP // RUNS):
        d = ()
        for j in tl.static_range(len(c)):
            d = d + (score_rows(c[j], x[k * len(c) + j], a[k], BITS, ROWS, WARPS, FAST),)
        c = d
    if FAST:
        return c, _make(state, coming, made, EACH, FAST)
    else:
        return c, (state[0] + 16 * STEP,)


@triton.jit
def _each(x, more):
    """`more` added to all of a tuple."""
    out = ()
    for j in tl.static_range(len(x)):
        out = out + (x[j] + more,)
    return out


@triton.jit
def _strip(
    c, off, cells, held, page, copies, chunks, state, ring, made, held_q, q0, q1, lane,
    BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a class's plane to the scores of its rows, segment after segment. off: of its first cell in the page."""
    U: tl.constexpr = max(1, BITS // 2)
    SIZE: tl.constexpr = 4 * ROWS * U
    CELLS: tl.constexpr = STEP // 2 if BITS == 1 else STEP  # in a step
    quarter = lane % 4 * (ROWS * U)
    end = off + cells * SIZE
    for _ in range(((off & (CHUNK - 1)) + cells * SIZE + CHUNK - 1 >> 8) * tl.minimum(cells, 1)):
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if off & (CHUNK - 1) == 0:
                _next_chunk(copies, off >> 8, chunks, lane)
        here = tl.minimum(end, (off | (CHUNK - 1)) + 1) - off >> size_log2(BITS, ROWS)
        at = _each(held, quarter + ((off >> 8 & 1) * STAGE + (off & (CHUNK - 1))))
        p = _each(page, off + quarter)
        for _ in range(0, here, CELLS):  # (by ones, the assembler would unroll it: four times as much code)
            c, state = _step(c, at, p, state, ring, made, held_q, q0, q1, BITS, ROWS, WARPS, HOLD, FAST)
            at = _each(at, CELLS * SIZE)
            p = _each(p, CELLS * SIZE)
        off += here * SIZE
    return c, off, state


@triton.jit
def _all_strips(
    cells_ptr, held, page, copies, chunks, ring, made, held_q, q0, q1, ops, i,
    CLASSES: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums of fields and operands of every eight pages of a warp: 4 numbers a row of a page (heads g and g + 8, pages
    2 t and 2 t + 1)."""
    c = ((tl.zeros([32 * WARPS], tl.float32),) * (4 * P),) * len(page)
    off = tl.full([], 0, tl.int32)
    state = _begin(made, ops, held_q, q0, q1, i, WARPS, HOLD, FAST)
    coming = tl.load(cells_ptr + (strip_class(CLASSES, 0) * 4 + strip_plane(CLASSES, 0)) * 4)
    for s in tl.static_range(4 * CLASSES):
        cells = coming
        if s + 1 < 4 * CLASSES:  # a strip before it is needed
            coming = tl.load(cells_ptr + (strip_class(CLASSES, s + 1) * 4 + strip_plane(CLASSES, s + 1)) * 4)
        d = ()
        for j in tl.static_range(len(c)):
            d = d + (part_of(c[j], first_row(strip_class(CLASSES, s)), class_rows(strip_class(CLASSES, s))),)
        d, off, state = _strip(
            d, off, cells, held, page, copies, chunks, state, ring, made, held_q, q0, q1, i % 32,
            strip_bits(CLASSES, s), class_rows(strip_class(CLASSES, s)), WARPS, HOLD, FAST,
        )  # fmt: skip
        e = ()
        for j in tl.static_range(len(c)):
            e = e + (with_part(c[j], d[j], first_row(strip_class(CLASSES, s)), class_rows(strip_class(CLASSES, s)), P),)
        c = e
    return c


@triton.jit(
    do_not_specialize=["table_stride", "page_nbytes", "runs", "blocks", "pages_max", "units", "heads", "joint_stride"]
)
def joint_score_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, strip_ptr, joint_ptr, weight_ptr, max_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, pages_max, units, heads, joint_stride,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr,
    HOLD: tl.constexpr, SOFTCAP: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One block (8 TILES pages a warp) of one sequence, unit and 16 of its query heads. Arguments as
    spectral.kernels.score.score_kernel has them, but joint_ptr: LayerTables.joint."""
    PB: tl.constexpr = 8 * TILES * WARPS
    EACH: tl.constexpr = max(1, STEP // WARPS)
    QUERY: tl.constexpr = 512 * HOLD
    RING: tl.constexpr = 2 * STEP * OPERAND
    BYTES: tl.constexpr = WARPS * TILES * 2 * STAGE
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    blk, seq = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held, ring, held_q = i, i, i
    if FAST:  # bytes first: what an incomplete step reads behind a chunk is still ours
        held = stage(i, BYTES + RING + QUERY) + i // 32 * (2 * TILES * STAGE)
        ring = held - i // 32 * (2 * TILES * STAGE) + BYTES
        held_q = ring + RING
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        g, t = lane // 4, lane % 4
        chunks = (tl.load(unit_ptr + unit * 5 + 3) + CHUNK - 1) // CHUNK
        head = tl.load(unit_ptr + unit * 5)
        own = tl.load(unit_ptr + unit * 5 + 1)
        row = (seq * blocks + blk) * GROUP
        ids = table_ptr + seq * table_stride + blk * PB
        pages = pages_ptr + tl.load(unit_ptr + unit * 5 + 2)
        mine = i // 32 * (8 * TILES)
        copies = _copied(held, ids, pages, mine, count, page_nbytes, lane, TILES)
        if FAST:
            if HOLD > 0:
                held_head = head + tl.minimum(part * 16 + lane // 2, own - 1)
                q = query_row(q_ptr, held_head, row, q_head_stride, runs, GROUP) + lane % 2 * 8
                hold_query(held_q, q, i, runs, WARPS)
            _ask_chunk(copies, 0, lane)
        page = ()  # whose codes this lane multiplies
        at = ()
        for j in tl.static_range(TILES):
            page = page + (pages + page_start(ids, mine + 8 * j + g, count, page_nbytes),)
            at = at + (held + (2 * STAGE * j + g * PITCH) + behind(page[j]),)
        head0, head1 = head + tl.minimum(part * 16 + g, own - 1), head + tl.minimum(part * 16 + g + 8, own - 1)
        q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
        q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
        const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
        if FAST and HOLD > 0:
            wait_stages(lane, 1)
            tl.debug_barrier()
        c = _all_strips(
            strip_ptr + unit * (CLASSES * 16) + 1, at, page, copies, chunks,
            ring + lane * 16, ring + lane * 16 + i // 32 % STEP * (EACH * OPERAND), held_q + g * 32 + t * 8, q0, q1,
            joint_ptr + unit * joint_stride + t * 4,
            i, CLASSES, P, WARPS, HOLD, FAST,
        )  # fmt: skip
        where = (seq * units + unit) * GROUPS + part
        leave_weights(
            c, const + head0 * 8, const + head1 * 8, mine + 2 * t, count, blk * PB, pages_max,
            weight_ptr + where.to(tl.int64) * pages_max * (16 * P), max_ptr + (where * blocks + blk) * 16, i,
            CLASSES, P, SOFTCAP, WARPS, FAST,
        )  # fmt: skip

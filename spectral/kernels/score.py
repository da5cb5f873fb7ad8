"""Scores of packed pages, and weights from them: one program for a block of pages of one sequence and unit.

Codes are read for all query heads of a unit. The scores of a page's frequencies become scores of its tokens, and
those weights relative to the block's largest, as frequencies again: what spectral.kernels.mix sums the codes with, in
the order in which it takes them.

A warp has eight pages. What a run of 16 latents costs besides its products (the query's part out of shared memory, four
products with what its fields stand for) is the same for all pages of a block, so the warps of a program share it:
entries of the table come in steps of a few, each warp makes its part of a step's operands and leaves them in a ring of
two steps in shared memory, and all warps multiply their pages with all of them. One barrier a step: while a step is
multiplied with, the next one is made, from factors and the query's words that were asked for a step or two before.

A segment is what a chunk of a page (CHUNK bytes, in shared memory) has of a strip; the table has empty entries where
its cells do not fill their last step (LayerTables.stepped). The ring goes on through segments, strips and classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import (
    FIELD_UNIT,
    behind,
    held_runs,
    hold_query,
    page_start,
    part_of,
    quarter_rows,
    query_row,
    query_words,
    scaled,
    with_part,
)
from spectral.kernels.classes import (
    class_rows,
    first_row,
    score_step,
    size_log2,
    strip_bits,
    strip_class,
    strip_first,
    strip_plane,
    strip_rows,
)
from spectral.kernels.lanes import score_rows
from spectral.kernels.staging import close_stage, copy_part, held_four, hold_four, stage, wait_stages
from spectral.kernels.tables import SCORE_CHUNK, step_entries
from spectral.kernels.weights import block_weights, largest, over_lanes, store_weights, tokens
from spectral.kernels.words import four_words, table_words, word

CHUNK = tl.constexpr(SCORE_CHUNK)
PITCH = tl.constexpr(272)
"""Bytes from page to page in a stage: eight pages' quarters then lie in different banks."""

STAGE = tl.constexpr(8 * 272)
"""Bytes of a warp's eight pages in one of its two stages."""

OPERAND = tl.constexpr(512)
"""Bytes of an entry's operands: sixteen a lane."""


def block_runs(runs: int, warps: int, classes: int) -> int:
    """held_runs beside the stages of so many warps and two steps of operands."""
    return held_runs(runs, warps * 2 * int(STAGE) + 2 * step_entries(classes) * int(OPERAND))


@triton.jit
def _copied(held, ids, pages, first, count, page_nbytes, lane):
    """Where a lane's pieces of a chunk go, where the first chunk's lie, and whether a last piece is the lane's: pages
    begin at multiples of eight, so one more of sixteen bytes goes with every chunk. Four lanes have a page."""
    quarter = lane % 4 * 16
    base = (pages + page_start(ids, first + lane // 4, count, page_nbytes)).to(tl.int64) & -16
    return held + (lane // 4 * PITCH + quarter), base + quarter, (quarter == 0).to(tl.int32)


@triton.jit
def _ask_chunk(copies, chunk, lane):
    """Ask for one chunk of the warp's eight pages. They pass the first-level cache by and leave it to the tables."""
    copy_part(copies[0] + (chunk & 1) * STAGE, copies[1] + chunk * CHUNK, copies[2], CHUNK // 64)
    close_stage(lane)


@triton.jit
def _next_chunk(copies, chunk, chunks, lane):
    """Wait for a chunk, and ask for the next one, which takes the place of the last."""
    wait_stages(lane, 0)
    if chunk + 1 < chunks:
        _ask_chunk(copies, chunk + 1, lane)


@triton.jit
def _begin(
    made, ops, held_q, q0, q1, i,
    STEP: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What goes from step to step: where the step's operands lie in the ring, its number, where the query's words of
    the next step's entries lie, and the warp's first entry. The first step's operands are left in the ring. (In plain
    Triton: the next entry.)"""
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
def _coming(state, held_q, q0, q1, STEP: tl.constexpr, EACH: tl.constexpr, HOLD: tl.constexpr):
    """Of a warp's entries of the next step the query's words and the factors, and where the words of the one after it
    lie: what a step needs is asked for one before."""
    out = ()
    for k in tl.static_range(EACH):
        q = query_words(held_q, q0, q1, state[2][k], HOLD, True)
        out = out + ((q, table_words(state[3], state[1], 16 * STEP, 16 * STEP + 16 * k, True)),)
    return out


@triton.jit
def _make(state, coming, made, STEP: tl.constexpr, EACH: tl.constexpr):
    """Leave the next step's operands in the ring."""
    slot = state[0] ^ (STEP * OPERAND)
    where = ()
    for k in tl.static_range(EACH):
        q, e = coming[k]
        a = scaled(q, e, True)
        hold_four(made + (slot + k * OPERAND), a[0], a[1], a[2], a[3])
        where = where + (e[2],)
    return slot, state[1] + 1, where, state[3]


@triton.jit
def _step(
    c, at, page, state, ring, made, held_q, q0, q1,
    BITS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Add the cells of a step to the scores of their rows; those behind a segment's last have empty entries."""
    SIZE: tl.constexpr = 4 * ROWS * max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    EACH: tl.constexpr = max(1, STEP // WARPS)
    tl.debug_barrier()  # all warps have made this step, and multiplied with the one whose place the next one takes
    coming = _coming(state, held_q, q0, q1, STEP, EACH, HOLD)
    # Cells of sixteen rows fill the registers one by one; of smaller ones all are asked for before any is multiplied.
    ONCE: tl.constexpr = 1 if ROWS == 16 else STEP // RUNS
    for first in tl.static_range(0, STEP // RUNS, ONCE):
        x = ()
        a = ()
        for k in tl.static_range(first, first + ONCE):
            x = x + (quarter_rows(at + k * SIZE, page, BITS, ROWS, True),)
            own = ()
            for run in tl.static_range(RUNS):
                own = own + held_four(ring + (state[0] + (k * RUNS + run) * OPERAND))
            a = a + (own,)
        for k in tl.static_range(ONCE):
            c = score_rows(c, x[k], a[k], BITS, ROWS, WARPS, True)
    return c, _make(state, coming, made, STEP, EACH)


@triton.jit
def _plain_cell(c, page, entry, q0, q1, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Add one cell to the scores of its rows, in plain Triton."""
    a = ()
    for run in tl.static_range(2 if BITS == 1 else 1):
        e = four_words(entry + 16 * run, False)
        a = a + scaled(query_words(q0, q0, q1, e[2], 0, False), e, False)
    return score_rows(c, quarter_rows(page, page, BITS, ROWS, False), a, BITS, ROWS, WARPS, False)


@triton.jit
def _strip(
    c, off, cells, held, page, copies, chunks, state, ring, made, held_q, q0, q1, lane,
    BITS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr,
    FAST: tl.constexpr,
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
        if FAST:
            at = held + (quarter + ((off >> 8 & 1) * STAGE + (off & (CHUNK - 1))))
            for _ in range(0, here, CELLS):  # (by ones, the assembler would unroll it: four times as much code)
                c, state = _step(c, at, page, state, ring, made, held_q, q0, q1, BITS, ROWS, STEP, WARPS, HOLD)
                at += CELLS * SIZE
        else:
            for k in range(here):
                entry = state[0] + k * (16 * STEP // CELLS)
                c = _plain_cell(c, page + (off + quarter + k * SIZE), entry, q0, q1, BITS, ROWS, WARPS)
            state = (state[0] + (here + CELLS - 1) // CELLS * (16 * STEP),)
        off += here * SIZE
    return c, off, state


@triton.jit
def _all_strips(
    cells_ptr, held, page, copies, chunks, ring, made, held_q, q0, q1, ops, i,
    CLASSES: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums of fields and operands: 4 numbers a row of a page (heads g and g + 8, pages 2 t and 2 t + 1).

    cells_ptr: how many cells of every strip, by class and plane.
    """
    c = (tl.zeros([32 * WARPS], tl.float32),) * (4 * P)
    off = tl.full([], 0, tl.int32)
    STEP: tl.constexpr = score_step(CLASSES)
    state = _begin(made, ops, held_q, q0, q1, i, STEP, WARPS, HOLD, FAST)
    coming = tl.load(cells_ptr + strip_class(CLASSES, 0) * 4 + strip_plane(CLASSES, 0))
    for s in tl.static_range(4 * CLASSES):
        cells = coming
        if s + 1 < 4 * CLASSES:  # a strip before it is needed
            coming = tl.load(cells_ptr + strip_class(CLASSES, s + 1) * 4 + strip_plane(CLASSES, s + 1))
        d, off, state = _strip(
            part_of(c, strip_first(CLASSES, s), strip_rows(CLASSES, P, s)),
            off, cells, held, page, copies, chunks, state, ring, made, held_q, q0, q1, i % 32,
            strip_bits(CLASSES, s), strip_rows(CLASSES, P, s), STEP, WARPS, HOLD, FAST,
        )  # fmt: skip
        c = with_part(c, d, strip_first(CLASSES, s), strip_rows(CLASSES, P, s), P)
    return c


@triton.jit
def _above_mean(c, const0, const1, CLASSES: tl.constexpr, P: tl.constexpr):
    """Scores of all rows without the means' part: what all codes are too high by taken off."""
    out = ()
    for number in tl.static_range(CLASSES):
        k0 = tl.load(const0 + number)
        k1 = tl.load(const1 + number)
        for r in tl.static_range(class_rows(number, CLASSES, P)):
            out = out + (
                c[4 * (first_row(number, CLASSES) + r)] * FIELD_UNIT - k0,
                c[4 * (first_row(number, CLASSES) + r) + 1] * FIELD_UNIT - k0,
                c[4 * (first_row(number, CLASSES) + r) + 2] * FIELD_UNIT - k1,
                c[4 * (first_row(number, CLASSES) + r) + 3] * FIELD_UNIT - k1,
            )
    return out


@triton.jit
def _leave_weights(
    c, const0, const1, number, count, first, pages_max, weights, tops, i,
    CLASSES: tl.constexpr, P: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A block's weights from the sums of its rows.

    number: of the first of the two pages whose scores the lane holds, in the block; count: of the block's pages; first:
    the block's first page; weights, tops: where the row's weights and the block's largest scores are left.
    """
    FLAT: tl.constexpr = CLASSES == 1
    s = _above_mean(c, const0, const1, CLASSES, P)
    mean0, mean1 = tl.load(const0 + 7), tl.load(const1 + 7)
    here, next = number < count, number + 1 < count
    x0, x1 = tokens(s, 0, mean0, here, P, FLAT, SOFTCAP, FAST), tokens(s, 1, mean0, next, P, FLAT, SOFTCAP, FAST)
    y0, y1 = tokens(s, 2, mean1, here, P, FLAT, SOFTCAP, FAST), tokens(s, 3, mean1, next, P, FLAT, SOFTCAP, FAST)
    top0 = over_lanes(tl.maximum(largest(x0, P), largest(x1, P)), WARPS)
    top1 = over_lanes(tl.maximum(largest(y0, P), largest(y1, P)), WARPS)
    u0, u1 = block_weights(x0, top0, P, FLAT, FAST), block_weights(x1, top0, P, FLAT, FAST)
    v0, v1 = block_weights(y0, top1, P, FLAT, FAST), block_weights(y1, top1, P, FLAT, FAST)
    g, t = i % 32 // 4, i % 4
    place = weights.to(tl.pointer_type(tl.int32))
    store_weights(place, pages_max, first + number, g, t, u0, u1, v0, v1, P, FLAT, FAST)
    tl.store(tops + g, top0, mask=t + i // 32 == 0)
    tl.store(tops + g + 8, top1, mask=t + i // 32 == 0)


@triton.jit(
    do_not_specialize=["table_stride", "page_nbytes", "runs", "blocks", "pages_max", "units", "heads", "step_stride"]
)
def score_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, cells_ptr, step_ptr, weight_ptr, max_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, pages_max, units, heads, step_stride,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr,
    HOLD: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One block (8 pages a warp) of one sequence, unit and 16 of its query heads.

    q_ptr: fp16 [KV heads][sequence, block, query head of the group][16 runs latents in QUAD_ORDER]; const_ptr: fp32
    [sequence, block, query heads, 8]: by class what all codes are too high by; at 7 the mean's score. unit_ptr: int32
    [units, 4]: first query head of a unit, how many, offset of its bytes in the page, how many. cells_ptr, step_ptr:
    LayerTables.cells and .stepped. GROUPS: of 16 query heads, in the largest unit. HOLD: runs that shared memory has
    room for (block_runs), 0: the query is read from where it lies.
    weight_ptr: fp16 [sequence, unit, head groups, pages_max * P * 16] in the order of store_weights; max_ptr: fp32
    [sequence, unit, head groups, blocks, 16].
    """
    PB: tl.constexpr = 8 * WARPS
    STEP: tl.constexpr = score_step(CLASSES)
    EACH: tl.constexpr = max(1, STEP // WARPS)
    BYTES: tl.constexpr = WARPS * 2 * STAGE
    RING: tl.constexpr = 2 * STEP * OPERAND
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    blk, seq = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held, ring, held_q = i, i, i
    if FAST:  # bytes first: what an incomplete step reads behind a chunk is still ours
        held = stage(i, BYTES + RING + 512 * HOLD) + i // 32 * (2 * STAGE)
        ring = held - i // 32 * (2 * STAGE) + BYTES
        held_q = ring + RING
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        g, t = lane // 4, lane % 4
        chunks = (tl.load(unit_ptr + unit * 4 + 3) + CHUNK - 1) // CHUNK
        head = tl.load(unit_ptr + unit * 4)
        own = tl.load(unit_ptr + unit * 4 + 1)
        row = (seq * blocks + blk) * GROUP
        ids = table_ptr + seq * table_stride + blk * PB
        pages = pages_ptr + tl.load(unit_ptr + unit * 4 + 2)
        mine = i // 32 * 8
        copies = _copied(held, ids, pages, mine, count, page_nbytes, lane)
        if FAST:
            if HOLD > 0:
                held_head = head + tl.minimum(part * 16 + lane // 2, own - 1)
                q = query_row(q_ptr, held_head, row, q_head_stride, runs, GROUP) + lane % 2 * 8
                hold_query(held_q, q, i, runs, WARPS)
            _ask_chunk(copies, 0, lane)
        page = pages + page_start(ids, mine + g, count, page_nbytes)  # whose codes this lane multiplies
        head0, head1 = head + tl.minimum(part * 16 + g, own - 1), head + tl.minimum(part * 16 + g + 8, own - 1)
        q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
        q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
        const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
        if FAST and HOLD > 0:
            wait_stages(lane, 1)
            tl.debug_barrier()
        c = _all_strips(
            cells_ptr + unit * (CLASSES * 4), held + g * PITCH + behind(page), page, copies, chunks,
            ring + lane * 16, ring + lane * 16 + i // 32 % STEP * (EACH * OPERAND), held_q + g * 32 + t * 8, q0, q1,
            step_ptr + unit * step_stride + t * 4, i, CLASSES, P, WARPS, HOLD, FAST,
        )  # fmt: skip
        where = (seq * units + unit) * GROUPS + part
        _leave_weights(
            c, const + head0 * 8, const + head1 * 8, mine + 2 * t, count, blk * PB, pages_max,
            weight_ptr + where.to(tl.int64) * pages_max * (16 * P), max_ptr + (where * blocks + blk) * 16, i,
            CLASSES, P, SOFTCAP, WARPS, FAST,
        )  # fmt: skip

"""Scores of packed pages, and weights from them: one program for a block of pages of one sequence and unit.

Codes are read for all query heads of a unit. The scores of a page's frequencies become scores of its tokens, and
those weights relative to the block's largest, as frequencies again: what spectral.kernels.mix sums the codes with, in
the order in which it takes them.

A warp has eight pages. Their bytes pass through its ring of stages (spectral.kernels.staging), CHUNK bytes of every
page at a time; a cell never crosses the end of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.classes import class_rows, first_row, size_log2, strip_bits, strip_class, strip_plane
from spectral.kernels.lanes import product, score_rows
from spectral.kernels.staging import close_stage, copy_pieces, held_two, held_word, stage, wait_stages
from spectral.kernels.weights import block_weights, largest, over_lanes, store_weights, tokens
from spectral.kernels.words import four_words, two_words, word

FIELD_UNIT = tl.constexpr(2.0**20)
"""2^24, which fields lack, over SCORE_UNIT, which their factors have too much."""

CHUNK = tl.constexpr(128)
"""2^7: offsets are divided by shifts, which are shorter than division of signed numbers."""

STAGES = tl.constexpr(3)
PITCH = tl.constexpr(160)
"""Bytes from page to page in a stage: eight pages' quarters then lie in different banks."""

STAGE = tl.constexpr(8 * 160)
SHARED = 47 * 1024
"""Bytes of shared memory that a kernel may declare, of the 48 KiB; Triton needs some itself."""


def held_runs(runs: int, warps: int) -> int:
    """Room, in runs of 16 latents, that a program keeps in shared memory for a block's projected query beside its
    stages; 0 where `runs` do not fit. The same for all settings of a model, if possible: each size is compiled, and a
    squeeze must not wait for a compiler."""
    room = (SHARED - warps * int(STAGES) * int(STAGE)) // 512
    return next((size for size in (64, room) if runs <= size <= room), 0)


@triton.jit
def quarter_rows(at, page, BITS: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr):
    """All rows of the lane's quarter of a cell, as words; at: its address in shared memory; page: its pointer."""
    NBYTES: tl.constexpr = ROWS * max(1, BITS // 2)
    if FAST:
        if NBYTES <= 4:
            return (held_word(at, NBYTES),)
        else:
            x = ()
            for i in tl.static_range(NBYTES // 8):  # eight at once: a page may lie eight bytes beside sixteen
                x = x + held_two(at + 8 * i)
            return x
    elif NBYTES <= 4:
        return (word(page, NBYTES, FAST),)
    else:
        x = ()
        for i in tl.static_range(NBYTES // 8):
            x = x + two_words(page + 8 * i, FAST)
        return x


@triton.jit
def query_words(at, q0, q1, offset, HOLD: tl.constexpr, FAST: tl.constexpr):
    """The query's latents 4 t .. of a run, heads g and g + 8: from shared memory, or by the lane's pointers.

    offset: 32 times the run's first latent.
    """
    if FAST and HOLD > 0:
        a0, a2 = held_two(at + offset)
        a1, a3 = held_two(at + offset + 256)
    else:
        a0, a2 = two_words(q0 + offset // 32, FAST)
        a1, a3 = two_words(q1 + offset // 32, FAST)
    return a0, a1, a2, a3


@triton.jit
def scaled(a, entry, FAST: tl.constexpr):
    """A run's operands times what its fields stand for."""
    return (
        product(a[0], entry[0], FAST),
        product(a[1], entry[0], FAST),
        product(a[2], entry[1], FAST),
        product(a[3], entry[1], FAST),
    )


@triton.jit
def behind(page):
    """How far a page's bytes lie behind the sixteen that the first of them is in."""
    return (page.to(tl.int64) & 8).to(tl.int32)


@triton.jit
def copied(held, ids, pages, first, count, page_nbytes, lane):
    """What a lane copies of a chunk: pieces of sixteen bytes, which pass the first-level cache by and leave it to the
    tables. Four lanes have a page; pages begin at multiples of eight, so a ninth piece goes with every eight.

    held: the warp's stages; first: the number, in a block, of the warp's first page. Returns the destination and the
    source of a lane's first piece (the second is 64 bytes further), and those of the page's ninth.
    """
    own, quarter = lane // 4, lane % 4 * 16
    base = (pages + page_start(ids, first + own, count, page_nbytes)).to(tl.int64) & -16
    to = held + own * PITCH
    return to + quarter, base + quarter, to + CHUNK, base + CHUNK


@triton.jit
def copy_chunk(copies, chunk):
    """Ask for one chunk of the warp's eight pages."""
    stage = (chunk % STAGES) * STAGE
    at = chunk * CHUNK
    copy_pieces(copies[0] + stage, (copies[1] + at,), 2, 16, 64, 64, 0)
    copy_pieces(copies[2] + stage, (copies[3] + at,), 1, 16, 0, 0, 0)


@triton.jit
def next_chunk(copies, chunk, chunks, lane):
    """Wait for a chunk, and ask for the one that takes the place of the last."""
    wait_stages(lane, STAGES - 2)
    if chunk + STAGES - 1 < chunks:
        copy_chunk(copies, chunk + STAGES - 1)
    close_stage(lane)


@triton.jit
def _cells(
    c, at, page, held_q, q0, q1, ops, e,
    COUNT: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Add COUNT cells to the scores. All that they need is asked for before anything is multiplied.

    ops: where the table's next entries lie, of which `e` are the first four.
    """
    SIZE: tl.constexpr = 4 * ROWS * max(1, BITS // 2)
    RUNS: tl.constexpr = 2 if BITS == 1 else 1
    x = ()
    q = ()
    for k in tl.static_range(COUNT):
        x = x + (quarter_rows(at + k * SIZE, page + k * SIZE, BITS, ROWS, FAST),)
    for k in tl.static_range(COUNT * RUNS):
        q = q + (query_words(held_q, q0, q1, e[k][2], HOLD, FAST),)
    ops += 16 * COUNT * RUNS
    new = ()
    a = ()
    for k in tl.static_range(COUNT * RUNS):
        a = a + (scaled(q[k], e[k], FAST),)
    for k in tl.static_range(4):
        if k + COUNT * RUNS < 4:
            new = new + (e[k + COUNT * RUNS],)
        else:
            new = new + (four_words(ops + 16 * k, FAST),)
    for k in tl.static_range(COUNT):
        if BITS == 1:
            c = score_rows(c, x[k], a[2 * k] + a[2 * k + 1], BITS, ROWS, WARPS, FAST)
        else:
            c = score_rows(c, x[k], a[k], BITS, ROWS, WARPS, FAST)
    return c, ops, new


@triton.jit
def _strip(
    c, off, cells, held, page, copies, chunks, held_q, q0, q1, ops, e, lane,
    BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a class's plane to the scores of its rows, chunk after chunk.

    off: of its first cell in the page.
    """
    U: tl.constexpr = max(1, BITS // 2)
    SIZE: tl.constexpr = 4 * ROWS * U
    MANY: tl.constexpr = 1 if BITS == 1 else 2  # cells at once
    quarter = lane % 4 * (ROWS * U)
    end = off + cells * SIZE
    for _ in range(((off & (CHUNK - 1)) + cells * SIZE + CHUNK - 1 >> 7) * tl.minimum(cells, 1)):
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if off & (CHUNK - 1) == 0:
                next_chunk(copies, off >> 7, chunks, lane)
        here = tl.minimum(end, (off | (CHUNK - 1)) + 1) - off >> size_log2(BITS, ROWS)
        at = held + quarter + ((off >> 7) % STAGES * STAGE + (off & (CHUNK - 1)))
        p = page + (off + quarter)
        for _ in range(here >> (MANY - 1)):
            c, ops, e = _cells(c, at, p, held_q, q0, q1, ops, e, MANY, BITS, ROWS, WARPS, HOLD, FAST)
            at += MANY * SIZE
            p += MANY * SIZE
        if MANY > 1:  # noqa: SIM102 (a constant and a tensor)
            if here & 1 == 1:
                c, ops, e = _cells(c, at, p, held_q, q0, q1, ops, e, 1, BITS, ROWS, WARPS, HOLD, FAST)
        off += here * SIZE
    return c, off, ops, e


@triton.jit
def part_of(c, FIRST: tl.constexpr, ROWS: tl.constexpr):
    out = ()
    for i in tl.static_range(4 * ROWS):
        out = out + (c[4 * FIRST + i],)
    return out


@triton.jit
def with_part(c, part, FIRST: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr):
    out = ()
    for i in tl.static_range(4 * P):
        if i < 4 * FIRST or i >= 4 * (FIRST + ROWS):
            out = out + (c[i],)
        else:
            out = out + (part[i - 4 * FIRST],)
    return out


@triton.jit
def all_strips(
    cells_ptr, off, held, page, copies, chunks, held_q, q0, q1, ops, lane,
    STRIDE: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr,
    HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums of fields and operands: 4 numbers a row of a page (heads g and g + 8, pages 2 t and 2 t + 1).

    cells_ptr: how many cells of every strip, by class and plane, STRIDE apart; off: of the first of them in the page.
    """
    c = (tl.zeros([32 * WARPS], tl.float32),) * (4 * P)
    e = (four_words(ops, FAST), four_words(ops + 16, FAST), four_words(ops + 32, FAST), four_words(ops + 48, FAST))
    for s in tl.static_range(4 * CLASSES):
        cells = tl.load(cells_ptr + (strip_class(CLASSES, s) * 4 + strip_plane(CLASSES, s)) * STRIDE)
        d, off, ops, e = _strip(
            part_of(c, first_row(strip_class(CLASSES, s)), class_rows(strip_class(CLASSES, s))),
            off, cells, held, page, copies, chunks, held_q, q0, q1, ops, e, lane,
            strip_bits(CLASSES, s), class_rows(strip_class(CLASSES, s)), WARPS, HOLD, FAST,
        )  # fmt: skip
        c = with_part(c, d, first_row(strip_class(CLASSES, s)), class_rows(strip_class(CLASSES, s)), P)
    return c


@triton.jit
def _above_mean(c, const0, const1, CLASSES: tl.constexpr, P: tl.constexpr):
    """Scores of all rows without the means' part: what all codes are too high by taken off."""
    out = ()
    for number in tl.static_range(CLASSES):
        k0 = tl.load(const0 + number)
        k1 = tl.load(const1 + number)
        for r in tl.static_range(class_rows(number)):
            out = out + (
                c[4 * (first_row(number) + r)] * FIELD_UNIT - k0,
                c[4 * (first_row(number) + r) + 1] * FIELD_UNIT - k0,
                c[4 * (first_row(number) + r) + 2] * FIELD_UNIT - k1,
                c[4 * (first_row(number) + r) + 3] * FIELD_UNIT - k1,
            )
    return out


@triton.jit
def page_start(ids, number, count, page_nbytes):
    """Where page `number` of a block begins in the pool; the last one for those behind it."""
    return tl.load(ids + tl.minimum(number, count - 1)).to(tl.int64) * page_nbytes


@triton.jit
def query_row(q_ptr, head, row, head_stride, runs, GROUP: tl.constexpr):
    """A head's projected query for one block; row: of the first query head of its KV head."""
    return q_ptr + (head // GROUP).to(tl.int64) * head_stride + (row + head % GROUP).to(tl.int64) * (16 * runs)


@triton.jit
def hold_query(held_q, q_lane, i, runs, WARPS: tl.constexpr):
    """Ask for a block's projected query: a lane has half a run of one head; warps take turns with runs."""
    source = q_lane.to(tl.int64)
    for k in range((runs + WARPS - 1) // WARPS):
        run = tl.minimum(k * WARPS + i // 32, runs - 1)
        copy_pieces(held_q + (run * 512 + i % 32 * 16), (source + run * 32,), 1, 16, 0, 0, 0)
    close_stage(i)


@triton.jit
def _token_scores(c, const0, const1, number, count, CLASSES: tl.constexpr, P: tl.constexpr, SOFTCAP: tl.constexpr,
                  FAST: tl.constexpr):  # fmt: skip
    """Scores of the tokens of pages `number` and number + 1, for two heads."""
    s = _above_mean(c, const0, const1, CLASSES, P)
    mean0, mean1 = tl.load(const0 + 7), tl.load(const1 + 7)
    here, next = number < count, number + 1 < count
    return (
        tokens(s, 0, mean0, here, P, SOFTCAP, FAST),
        tokens(s, 1, mean0, next, P, SOFTCAP, FAST),
        tokens(s, 2, mean1, here, P, SOFTCAP, FAST),
        tokens(s, 3, mean1, next, P, SOFTCAP, FAST),
    )


@triton.jit
def leave_weights(
    c, const0, const1, number, count, first, pages_max, weights, tops, i,
    CLASSES: tl.constexpr, P: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A block's weights from the sums of its rows.

    c: sums of every eight pages of a warp, a tuple; number: of the first of the two pages whose scores the lane holds
    of the first eight; count: of the block's pages; first: the block's first page; weights, tops: where the row's
    weights and the block's largest scores are left.
    """
    x = ()
    for tile in tl.static_range(len(c)):
        x = x + (_token_scores(c[tile], const0, const1, number + 8 * tile, count, CLASSES, P, SOFTCAP, FAST),)
    top0 = tl.maximum(largest(x[0][0], P), largest(x[0][1], P))
    top1 = tl.maximum(largest(x[0][2], P), largest(x[0][3], P))
    for tile in tl.static_range(1, len(c)):
        top0 = tl.maximum(top0, tl.maximum(largest(x[tile][0], P), largest(x[tile][1], P)))
        top1 = tl.maximum(top1, tl.maximum(largest(x[tile][2], P), largest(x[tile][3], P)))
    top0, top1 = over_lanes(top0, WARPS), over_lanes(top1, WARPS)
    g, t = i % 32 // 4, i % 4
    place = weights.to(tl.pointer_type(tl.int32))
    for tile in tl.static_range(len(c)):
        u0, u1 = block_weights(x[tile][0], top0, P, FAST), block_weights(x[tile][1], top0, P, FAST)
        v0, v1 = block_weights(x[tile][2], top1, P, FAST), block_weights(x[tile][3], top1, P, FAST)
        store_weights(place, pages_max, first + number + 8 * tile, g, t, u0, u1, v0, v1, P, FAST)
    tl.store(tops + g, top0, mask=t + i // 32 == 0)
    tl.store(tops + g + 8, top1, mask=t + i // 32 == 0)


@triton.jit(do_not_specialize=["table_stride", "page_nbytes", "runs", "blocks", "pages_max", "units", "heads"])
def score_kernel(
    q_ptr, const_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, strip_ptr, entry_ptr, weight_ptr, max_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, pages_max, units, heads,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr,
    HOLD: tl.constexpr, SOFTCAP: tl.constexpr, WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One block (8 pages a warp) of one sequence, unit and 16 of its query heads.

    q_ptr: fp16 [KV heads][sequence, block, query head of the group][16 runs latents]; const_ptr: fp32 [sequence,
    block, query heads, 8]: by class what all codes are too high by; at 7 the mean's score. unit_ptr: int32 [units,
    5]: first query head of a unit, how many, offset of its bytes in the page, how many, its first run. GROUPS: of 16
    query heads, in the largest unit. HOLD: runs that shared memory has
    room for (held_runs), 0: the query is read from where it lies.
    weight_ptr: fp16 [sequence, unit, head groups, pages_max * P * 16] in the order of store_weights; max_ptr: fp32
    [sequence, unit, head groups, blocks, 16].
    """
    PB: tl.constexpr = 8 * WARPS
    QUERY: tl.constexpr = 512 * HOLD
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    blk, seq = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 32 * WARPS)
    lane = i % 32
    held_q = i
    held = i
    if FAST:
        held_q = stage(i, QUERY + WARPS * STAGES * STAGE)
        held = held_q + QUERY + i // 32 * (STAGES * STAGE)
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        g, t = lane // 4, lane % 4
        chunks = (tl.load(unit_ptr + unit * 5 + 3) + CHUNK - 1) // CHUNK
        head = tl.load(unit_ptr + unit * 5)
        own = tl.load(unit_ptr + unit * 5 + 1)
        row = (seq * blocks + blk) * GROUP
        ids = table_ptr + seq * table_stride + blk * PB
        pages = pages_ptr + tl.load(unit_ptr + unit * 5 + 2)
        mine = i // 32 * 8
        copies = copied(held, ids, pages, mine, count, page_nbytes, lane)
        if FAST:
            if HOLD > 0:
                held_head = head + tl.minimum(part * 16 + lane // 2, own - 1)
                q = query_row(q_ptr, held_head, row, q_head_stride, runs, GROUP) + lane % 2 * 8
                hold_query(held_q, q, i, runs, WARPS)
            for chunk in tl.static_range(STAGES - 1):
                if chunk < chunks:
                    copy_chunk(copies, chunk)
                close_stage(lane)
        page = pages + page_start(ids, mine + g, count, page_nbytes)  # whose codes this lane multiplies
        head0, head1 = head + tl.minimum(part * 16 + g, own - 1), head + tl.minimum(part * 16 + g + 8, own - 1)
        q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
        q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
        const = const_ptr + (seq * blocks + blk).to(tl.int64) * (heads * 8)
        if FAST and HOLD > 0:
            wait_stages(lane, STAGES - 1)
            tl.debug_barrier()
        c = all_strips(
            strip_ptr + unit * (CLASSES * 16) + 1, tl.full([], 0, tl.int32), held + g * PITCH + behind(page), page,
            copies, chunks, held_q + g * 32 + t * 8, q0, q1, entry_ptr + tl.load(unit_ptr + unit * 5 + 4) * 16 + t * 4,
            lane, 4, CLASSES, P, WARPS, HOLD, FAST,
        )  # fmt: skip
        where = (seq * units + unit) * GROUPS + part
        leave_weights(
            (c,), const + head0 * 8, const + head1 * 8, i // 32 * 8 + 2 * t, count, blk * PB, pages_max,
            weight_ptr + where.to(tl.int64) * pages_max * (16 * P), max_ptr + (where * blocks + blk) * 16, i,
            CLASSES, P, SOFTCAP, WARPS, FAST,
        )  # fmt: skip

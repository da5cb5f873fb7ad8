"""Scores where few pages would leave most of a GPU idle: the cells of eight pages in shares, and weights from their
sums. Two launches do what spectral.kernels.score does in one, in a fraction of its time.

A share's warp makes its operands by itself. The bytes of its pages pass through a ring of stages, a chunk of every
page at a time; a cell never crosses the end of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral.kernels.cells import (
    FIELD_UNIT,
    behind,
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
    size_log2,
    strip_bits,
    strip_class,
    strip_first,
    strip_plane,
    strip_rows,
)
from spectral.kernels.lanes import score_rows
from spectral.kernels.staging import close_stage, copy_pieces, prefetch, stage, wait_stages
from spectral.kernels.weights import block_weights, largest, store_column, token_scores
from spectral.kernels.words import four_words

STAGES = tl.constexpr(3)


@triton.constexpr_function
def chunk_log2(classes):
    """Of a chunk's bytes, which are no fewer than a cell's. (Offsets are divided by shifts, which are shorter than
    division of signed numbers.)"""
    return 8 if int(classes) == 1 else 7


@triton.constexpr_function
def page_pitch(classes):
    """Bytes from page to page in a stage: eight pages' quarters then lie in different banks."""
    return (1 << chunk_log2(classes)) + (16 if int(classes) == 1 else 32)


@triton.constexpr_function
def stage_nbytes(classes):
    """Of eight pages in one stage."""
    return 8 * page_pitch(classes)


@triton.jit
def _copied(held, ids, pages, first, count, page_nbytes, lane, CLASSES: tl.constexpr):
    """What a lane copies of a chunk: pieces of sixteen bytes, which pass the first-level cache by and leave it to the
    tables. Four lanes have a page; pages begin at multiples of eight, so a ninth piece goes with every eight.

    held: the warp's stages; first: the number, in a block, of the warp's first page. Returns the destination and the
    source of a lane's first piece (the second is 64 bytes further), and those of the page's ninth.
    """
    own, quarter = lane // 4, lane % 4 * 16
    base = (pages + page_start(ids, first + own, count, page_nbytes)).to(tl.int64) & -16
    to = held + own * page_pitch(CLASSES)
    return to + quarter, base + quarter, to + 2 ** chunk_log2(CLASSES), base + 2 ** chunk_log2(CLASSES)


@triton.jit
def _copy_chunk(copies, chunk, CLASSES: tl.constexpr):
    """Ask for one chunk of the warp's eight pages."""
    stage = (chunk % STAGES) * stage_nbytes(CLASSES)
    at = chunk << chunk_log2(CLASSES)
    copy_pieces(copies[0] + stage, copies[1] + at, 2 ** chunk_log2(CLASSES) // 64)
    copy_pieces(copies[2] + stage, copies[3] + at, 1)


@triton.jit
def _next_chunk(copies, chunk, chunks, lane, CLASSES: tl.constexpr):
    """Wait for a chunk, and ask for the one that takes the place of the last."""
    wait_stages(lane, STAGES - 2)
    if chunk + STAGES - 1 < chunks:
        _copy_chunk(copies, chunk + STAGES - 1, CLASSES)
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
    BITS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Add a class's plane to the scores of its rows, chunk after chunk.

    off: of its first cell in the page.
    """
    U: tl.constexpr = max(1, BITS // 2)
    SIZE: tl.constexpr = 4 * ROWS * U
    MANY: tl.constexpr = 1 if BITS == 1 or ROWS == 16 else 2  # cells at once
    LOG: tl.constexpr = chunk_log2(CLASSES)
    REST: tl.constexpr = 2**LOG - 1
    quarter = lane % 4 * (ROWS * U)
    end = off + cells * SIZE
    for _ in range(((off & REST) + cells * SIZE + REST >> LOG) * tl.minimum(cells, 1)):
        if FAST:  # noqa: SIM102 (a constant and a tensor)
            if off & REST == 0:
                _next_chunk(copies, off >> LOG, chunks, lane, CLASSES)
        here = tl.minimum(end, (off | REST) + 1) - off >> size_log2(BITS, ROWS)
        at = held + quarter + ((off >> LOG) % STAGES * stage_nbytes(CLASSES) + (off & REST))
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
def _all_strips(
    cells_ptr, off, held, page, copies, chunks, held_q, q0, q1, ops, lane,
    CLASSES: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums of fields and operands: 4 numbers a row of a page (heads g and g + 8, pages 2 t and 2 t + 1).

    cells_ptr: how many cells of every strip, by class and plane; off: of the first of them in the page.
    """
    c = (tl.zeros([32 * WARPS], tl.float32),) * (4 * P)
    e = (four_words(ops, FAST), four_words(ops + 16, FAST), four_words(ops + 32, FAST), four_words(ops + 48, FAST))
    for s in tl.static_range(4 * CLASSES):
        cells = tl.load(cells_ptr + strip_class(CLASSES, s) * 4 + strip_plane(CLASSES, s))
        d, off, ops, e = _strip(
            part_of(c, strip_first(CLASSES, s), strip_rows(CLASSES, P, s)),
            off, cells, held, page, copies, chunks, held_q, q0, q1, ops, e, lane,
            strip_bits(CLASSES, s), strip_rows(CLASSES, P, s), CLASSES, WARPS, HOLD, FAST,
        )  # fmt: skip
        c = with_part(c, d, strip_first(CLASSES, s), strip_rows(CLASSES, P, s), P)
    return c


@triton.jit(do_not_specialize=["table_stride", "page_nbytes", "runs", "blocks", "units", "octets"])
def share_kernel(
    q_ptr, pages_ptr, table_ptr, count_ptr, unit_ptr, share_ptr, entry_ptr, sum_ptr,
    table_stride, page_nbytes, q_head_stride, runs, blocks, units, octets,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    SHARES: tl.constexpr, HOLD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One share of a unit's cells in eight pages of a sequence, for 16 query heads; one warp. Arguments as
    spectral.kernels.score has them.

    share_ptr: LayerTables.share; sum_ptr: fp32 [sequence, unit, head groups, octets, SHARES, 4 P, 32]: what each lane
    has summed.
    """
    share, part = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES % GROUPS
    unit = tl.program_id(0) // (SHARES * GROUPS)
    octet, seq = tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, 32)
    held_q = lane
    held = lane
    if FAST:
        held_q = stage(lane, 512 * HOLD + STAGES * stage_nbytes(CLASSES))
        held = held_q + 512 * HOLD
    count = tl.load(count_ptr + seq) - octet * 8
    if count > 0:
        g, t = lane // 4, lane % 4
        own = share_ptr + (unit * SHARES + share) * (4 + 4 * CLASSES)
        off, end, entry = tl.load(own), tl.load(own + 1), entry_ptr + tl.load(own + 2) * 16
        chunks = (end + 2 ** chunk_log2(CLASSES) - 1) >> chunk_log2(CLASSES)
        if FAST:  # two entries a line
            prefetch(entry + tl.minimum(2 * lane, tl.maximum(tl.load(own + 3) - 1, 0)) * 16)
        head = tl.load(unit_ptr + unit * 4)
        heads = tl.load(unit_ptr + unit * 4 + 1)
        row = (seq * blocks + octet * 8 // PB) * GROUP
        ids = table_ptr + seq * table_stride + octet * 8
        pages = pages_ptr + tl.load(unit_ptr + unit * 4 + 2)
        copies = _copied(held, ids, pages, 0, count, page_nbytes, lane, CLASSES)
        if FAST:
            if HOLD > 0:
                held_head = head + tl.minimum(part * 16 + lane // 2, heads - 1)
                q = query_row(q_ptr, held_head, row, q_head_stride, runs, GROUP) + lane % 2 * 8
                hold_query(held_q, q, lane, runs, 1)
            for ahead in tl.static_range(STAGES - 1):
                if (off >> chunk_log2(CLASSES)) + ahead < chunks:
                    _copy_chunk(copies, (off >> chunk_log2(CLASSES)) + ahead, CLASSES)
                close_stage(lane)
        page = pages + page_start(ids, g, count, page_nbytes)
        head0, head1 = head + tl.minimum(part * 16 + g, heads - 1), head + tl.minimum(part * 16 + g + 8, heads - 1)
        q0 = query_row(q_ptr, head0, row, q_head_stride, runs, GROUP) + 4 * t
        q1 = query_row(q_ptr, head1, row, q_head_stride, runs, GROUP) + 4 * t
        if FAST:
            if HOLD > 0:
                wait_stages(lane, STAGES - 1)
            if off & (2 ** chunk_log2(CLASSES) - 1) != 0:  # a chunk that another share begins
                _next_chunk(copies, off >> chunk_log2(CLASSES), chunks, lane, CLASSES)
        c = _all_strips(
            own + 4, off, held + g * page_pitch(CLASSES) + behind(page), page, copies, chunks, held_q + g * 32 + t * 8,
            q0, q1, entry + t * 4, lane, CLASSES, P, 1, HOLD, FAST,
        )  # fmt: skip
        where = (((seq * units + unit) * GROUPS + part) * octets + octet) * SHARES + share
        out = sum_ptr + where.to(tl.int64) * (128 * P) + lane
        for k in tl.static_range(4 * P):
            tl.store(out + 32 * k, c[k])


@triton.jit
def _summed(sums, here, SHARES: tl.constexpr, P: tl.constexpr):
    """One number of every row, over shares; sums: the lane's place in the first share's, of row 0."""
    s = ()
    for row in tl.static_range(P):
        x = tl.load(sums + 128 * row, mask=here, other=0.0)
        for share in tl.static_range(1, SHARES):
            x += tl.load(sums + share * (128 * P) + 128 * row, mask=here, other=0.0)
        s = s + (x,)
    return s


@triton.jit
def _above_mean(s, const, CLASSES: tl.constexpr, P: tl.constexpr):
    """Scores of all rows without the mean's part; const: of the lane's head, what all codes of a class are too high
    by."""
    out = ()
    for number in tl.static_range(CLASSES):
        k = tl.load(const + number)
        for r in tl.static_range(class_rows(number, CLASSES, P)):
            out = out + (s[first_row(number, CLASSES) + r] * FIELD_UNIT - k,)
    return out


@triton.jit(do_not_specialize=["blocks", "pages_max", "units", "octets", "heads"])
def gather_kernel(
    sum_ptr, const_ptr, count_ptr, unit_ptr, weight_ptr, max_ptr,
    blocks, pages_max, units, octets, heads,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, SHARES: tl.constexpr,
    SOFTCAP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Weights of one block from what the shares have summed, as spectral.kernels.score leaves them.

    Eight pages have four warps, one for each of the four numbers that a lane of share_kernel has of a row: heads g
    and g + 8, pages 2 t and 2 t + 1.
    """
    OCTETS: tl.constexpr = PB // 8
    N: tl.constexpr = 128 * OCTETS
    unit, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    blk, seq = tl.program_id(1), tl.program_id(2)
    count = tl.load(count_ptr + seq) - blk * PB
    if count > 0:
        i = tl.arange(0, N)
        lane, side, odd = i % 32, i // 64 % 2, i // 32 % 2
        g, t = lane // 4, lane % 4
        number = i // 128 * 8 + 2 * t + odd
        here = number < count
        where = (seq * units + unit) * GROUPS + part
        octet = (where * octets + blk * OCTETS + i // 128).to(tl.int64)
        sums = sum_ptr + octet * (SHARES * 128 * P) + (2 * side + odd) * 32 + lane
        own = tl.load(unit_ptr + unit * 4 + 1)
        head = tl.load(unit_ptr + unit * 4) + tl.minimum(part * 16 + g + 8 * side, own - 1)
        const = const_ptr + ((seq * blocks + blk).to(tl.int64) * heads + head) * 8
        s = _above_mean(_summed(sums, here, SHARES, P), const, CLASSES, P)
        x = token_scores(s, tl.load(const + 7), here, P, CLASSES == 1, SOFTCAP, FAST)
        top = tl.max(tl.max(tl.reshape(largest(x, P), [OCTETS, 2, 2, 8, 4]), 4), 2)  # [octet, side, g]
        top = tl.max(top, 0)[None, :, None, :, None]
        top = tl.reshape(tl.broadcast_to(top, [OCTETS, 2, 2, 8, 4]), [N])
        u = block_weights(x, top, P, CLASSES == 1, FAST)
        place = (weight_ptr + where.to(tl.int64) * pages_max * (16 * P)).to(tl.pointer_type(tl.int32))
        store_column(place, pages_max, blk * PB + number, g, side, u, P, CLASSES == 1, FAST)
        tl.store(max_ptr + (where * blocks + blk) * 16 + g + 8 * side, top, mask=(t + odd + i // 128) == 0)

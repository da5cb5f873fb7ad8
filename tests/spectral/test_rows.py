"""Reading, cutting, copying and choosing rows of a store; and which columns of a batch are padding."""

from __future__ import annotations

import pytest
import torch

from spectral.errors import CacheError, OutOfPages
from spectral.padding import Columns, from_positions
from spectral.pages import LayerShape, ModelShape, PageStore, Row
from spectral.rows import append_rows, copy_row, cut_row, read_row, select_rows
from tests.spectral.helpers import random_codebook

SHAPE = ModelShape((LayerShape(2, 16, 16),), 4, 64)


def filled(store: PageStore, length: int, seed: int = 0) -> tuple[Row, torch.Tensor, torch.Tensor]:
    """A row of random tokens, appended in uneven parts."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, length, 16, generator=generator) for _ in range(2))
    row = store.open()
    for begin, end in ((0, 3), (3, 4), (4, length)):
        append_rows(store, [(row, keys[:, begin:end], values[:, begin:end])])
    return row, keys, values


def test_an_exact_row_reads_back_as_written() -> None:
    store = PageStore(SHAPE, window_dtype=torch.float32)
    row, keys, values = filled(store, 61)
    read = read_row(store, 0, row)
    assert torch.equal(read[0], keys) and torch.equal(read[1], values)
    store.check()


def test_a_compressed_row_reads_back_its_codes() -> None:
    store = PageStore(SHAPE, random_codebook(SHAPE, [4, 2]), window_dtype=torch.float32)
    row, keys, values = filled(store, 61)
    codec, pool = store.codebook.layers[0], store.pools[0]
    assert codec is not None and pool is not None and len(row.pages) == 5
    paged = codec.decode(pool[torch.tensor(row.pages)], torch.arange(len(row.pages)))[0].transpose(0, 1).flatten(1, 2)
    read = read_row(store, 0, row)[0]
    assert torch.equal(read[:, 4:44], paged) and not torch.allclose(read[:, 4:44], keys[:, 4:44], atol=1e-2)
    assert torch.equal(read[:, :4], keys[:, :4]) and torch.equal(read[:, 44:], keys[:, 44:])


@pytest.mark.parametrize("length", [0, 2, 4, 5, 12, 13, 43, 44, 60, 61])
def test_a_cut_row_keeps_what_it_had_and_seals_the_same_codes_again(length: int) -> None:
    store = PageStore(SHAPE, random_codebook(SHAPE, [4, 2]), window_dtype=torch.float32)
    row, keys, values = filled(store, 61)
    before, pages = read_row(store, 0, row, plain=True), list(row.pages)
    pool = store.pools[0]
    assert pool is not None
    codes = pool[torch.tensor(pages)].clone()
    cut_row(store, row, length)
    store.check()
    assert torch.equal(read_row(store, 0, row, plain=True)[0], before[0][:, :length])
    rest = [x[:, length:] for x in before]
    if length < 61:
        append_rows(store, [(row, rest[0], rest[1])])
    store.check()
    pool = store.pools[0]
    assert pool is not None
    # What was read back and appended again gets the codes it had: decoding and encoding is a fixed point.
    assert torch.equal(pool[torch.tensor(row.pages[:5])], codes)
    with pytest.raises(CacheError, match="cannot be cut"):
        cut_row(store, row, 62)


def test_a_cut_rows_spare_pages_are_not_another_rows() -> None:
    store = PageStore(SHAPE, random_codebook(SHAPE, [4, 2]))
    (first, _, _), (second, keys, values) = filled(store, 61), filled(store, 20, seed=1)
    cut_row(store, first, 46)
    assert len(first.pages) == 5 and store.pages_at(47) == 3
    append_rows(store, [(row, keys[:, :n], values[:, :n]) for row, n in ((first, 1), (second, 16))])
    assert (len(first.pages), len(second.pages)) == (5, 2)
    store.check()


def test_copies_have_memory_of_their_own() -> None:
    store = PageStore(SHAPE, random_codebook(SHAPE, [4, 2]))
    first, _, _ = filled(store, 61)
    second, _, _ = filled(store, 30, seed=1)
    held = [read_row(store, 0, row)[0] for row in (first, second)]
    rows = select_rows(store, [first, second], [1, 1, 0])
    store.check()
    assert rows[0] is second and rows[2] is first
    append_rows(store, [(rows[1], torch.ones(2, 40, 16), torch.ones(2, 40, 16))])
    for row, expected in zip((rows[0], rows[2]), (held[1], held[0]), strict=True):
        assert torch.equal(read_row(store, 0, row)[0], expected)
    assert select_rows(store, rows, [2]) == [first] and store.rows == 1
    store.check()


def test_a_copy_that_does_not_fit_changes_nothing() -> None:
    store = PageStore(SHAPE, random_codebook(SHAPE, [4, 2]))
    row, _, _ = filled(store, 64 * 8 + 20)
    store.open()
    store.max_bytes = store.nbytes
    store.close(next(r for r in store._rows.values() if r is not row))
    with pytest.raises(OutOfPages):
        copy_row(store, row)
    assert store.rows == 1
    store.check()


def test_columns_remember_padding_as_spans() -> None:
    columns = Columns()
    columns.extend(3, None)
    assert columns.spans is None and columns.counts(2) == [3, 3]
    columns.extend(4, torch.tensor([[False, True, True, False], [True, True, True, True]]))
    columns.extend(2, None)
    assert columns.spans == [[(0, 3), (4, 6), (7, 9)], [(0, 9)]] and columns.counts(2) == [7, 9]
    assert columns.mask(2, torch.device("cpu")).sum(1).tolist() == [7, 9]
    columns.select([1, 0, 0])
    columns.cut(5)
    assert columns.counts(3) == [5, 4, 4] and columns.places(1, torch.device("cpu")).tolist() == [0, 1, 2, 4]
    columns.cut(0)
    assert columns.counts(3) == [0, 0, 0] and columns.places(1, torch.device("cpu")).numel() == 0


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([[0, 0, 0, 1, 2]], [[0, 0, 1, 1, 1]]),
        ([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        ([[0, 1, 2, 0, 0]], [[1, 1, 1, 0, 0]]),
        ([[0, 1, 2, 1, 1]], [[1, 1, 1, 0, 0]]),
        ([[0, 1, 2, 3, 4]], None),
        ([[0, 0, 0, 0, 0]], None),  # a single token, or none: cannot be told
        ([[5, 6, 6, 7, 7]], None),  # a tree of drafts
        ([[3, 4, 5, 6, 7]], None),
    ],
)
def test_padding_is_told_from_positions(positions: list[list[int]], expected: list[list[int]] | None) -> None:
    found = from_positions(torch.tensor(positions), len(positions), 5)
    assert (None if found is None else found.int().tolist()) == expected
    assert from_positions(None, 1, 5) is None and from_positions(torch.zeros(1, 5), 2, 5) is None

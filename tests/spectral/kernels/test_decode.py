"""The decode kernels in Triton's interpreter (or on a GPU, where there is one) against the torch reference."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from spectral import dispatch
from spectral.attention import attend
from spectral.bits import gaussian_tables
from spectral.codec import Codebook, LayerCodec
from spectral.errors import SettingError
from spectral.frames import BlockFrame
from spectral.kernels.check import TOLERANCE, Case, relative_error
from spectral.kernels.choices import forced
from spectral.kernels.decode import LayerKernels, StepTables, decode_attention, unsupported
from spectral.pages import LayerShape, ModelShape, PageStore, Row
from tests.spectral.helpers import cycling_widths, random_codebook, random_unit
from tests.spectral.kernels.chunks import random_sides, run_chunk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [8, 6, 4, 3, 2, 1, 0]


def store_of(
    kv_heads: int,
    dim: int,
    group: int,
    widths: list[int],
    window_bits: int,
    block: int = 256,
    *,
    units: int = 1,
    apart: bool = False,
    flat: bool = False,
    page: int = 16,
) -> PageStore:
    shape = ModelShape((LayerShape(kv_heads, dim, dim),), kv_heads * group, kv_heads * group * dim)
    book = random_codebook(
        shape, widths, page=page, window=32, block=block, window_bits=window_bits, units=units, apart=apart, flat=flat
    )
    return PageStore(shape, book, device=DEVICE, window_dtype=torch.float32)


def step(
    store: PageStore, rows: list[Row], group: int, seed: int, softcap: float | None, *, commit: bool
) -> torch.Tensor:
    """One token for every row: [B, Hq, dv]."""
    shape = store.shape.layers[0]
    batch = store.begin([(row, 1) for row in rows])
    sides = random_sides(store, len(rows), group, seed)
    out = attend(batch, 0, *sides, scaling=shape.key_dim**-0.5, softcap=softcap)[0]
    if commit:
        batch.commit()
    else:
        batch.abort()
    return out


def errors(
    monkeypatch: pytest.MonkeyPatch,
    store: PageStore,
    lengths: list[int],
    group: int,
    softcap: float | None,
    *choices: dict[str, int],
) -> list[float]:
    """Of a step of rows of these lengths by the kernels, launched with each of the choices, against the reference's."""
    rows = [store.open() for _ in lengths]
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    for i, (row, tokens) in enumerate(zip(rows, lengths, strict=True)):
        run_chunk(store, row, tokens, group, i)
    expected = step(store, rows, group, 99, softcap, commit=False)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    found = []
    for choice in choices:
        with forced(**choice):
            got = step(store, rows, group, 99, softcap, commit=False)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        found.append(float((got - expected).float().norm() / expected.float().norm()))
    return found


DECODED = [
    (1, 32, 4, MIXED, 16, None, [2, 51], True, 1, False),
    (1, 32, 4, MIXED, 16, None, [2, 51], False, 1, False),
    (2, 16, 2, [4, 2, 1], 10, None, [300], True, 1, False),
    (2, 16, 2, [4, 2, 1], 10, None, [300], False, 1, False),
    (1, 40, 20, [3, 6, 0], 8, 5.0, [100], False, 1, False),
    (4, 16, 3, MIXED, 8, None, [2, 100], True, 2, True),
    (4, 16, 3, MIXED, 8, None, [2, 100], False, 2, True),
]
"""Shapes, windows, rows and launches of steps whose pages are transformed, or are not."""

TRANSFORMED = [
    (1, 16, 20, [8], 16, 5.0, [53], True, 1, False),
    (2, 48, 2, [6, 3, 0, 0, 0], 16, 5.0, [100], False, 2, True),
]
TOKENS = [
    (2, 64, 2, [8, 4, 4, 2, 1, 1, 0], 10, None, [300], False, 1, True),
    (2, 64, 2, [8, 4, 4, 2, 1, 1, 0], 10, None, [200], True, 1, True),
    (2, 160, 2, [6, 3, 6], 16, None, [100], False, 1, True),
    (1, 32, 20, [3, 6, 0], 8, 5.0, [100], False, 1, False),
]
TOKENS_OTHER_PAGES = [
    (2, 32, 2, MIXED, 8, None, [2, 100], True, 2, True, 8),
    (2, 32, 2, MIXED, 8, None, [2, 100], False, 2, True, 8),
    (1, 32, 2, MIXED, 8, None, [2, 100], False, 1, True, 64),
]


@pytest.mark.parametrize(
    (
        "kv_heads", "dim", "group", "widths", "window_bits", "softcap", "lengths", "shared", "units", "apart", "page",
        "flat",
    ),
    [
        *((*case, 16, False) for case in DECODED + TRANSFORMED),
        *((*case, 16, True) for case in DECODED + TOKENS),
        *((*case, True) for case in TOKENS_OTHER_PAGES),
    ],
)  # fmt: skip
def test_decoding_on_codes_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int,
    dim: int,
    group: int,
    widths: list[int],
    window_bits: int,
    softcap: float | None,
    lengths: list[int],
    shared: bool,
    units: int,
    apart: bool,
    page: int,
    flat: bool,
) -> None:
    """Ragged rows, some without a page, one that seals a page in this very step; every width; groups over 16 heads;
    scores in shares, and by one program a block; keys and values in one unit, or in several of their own; pages that
    are transformed, and pages whose rows are tokens (one class, and cells of all rows). page 64: blocks of as many of
    16."""
    block, page = {8: 128, 16: 256, 64: 1024}[page], min(page, 16)
    store = store_of(kv_heads, dim, group, widths, window_bits, block, units=units, apart=apart, flat=flat, page=page)
    (error,) = errors(monkeypatch, store, lengths, group, softcap, {"shared_blocks": 1 << 20 if shared else 0})
    assert error < 4e-3  # fp16 operands: 3e-4 to 2.4e-3 here, where random bases make large scores


@pytest.mark.parametrize("flat", [False, True])
def test_answers_do_not_depend_on_what_launches_choose(monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    """Several blocks a program and one; windows in parts, and whole; parts of rows put together by four, by eight and
    by 32; rows of one, two and three blocks, the last one not full."""
    store = store_of(2, 16, 2, [4, 2, 1, 0], 8, 256, apart=True, flat=flat)
    few = {"mix_programs": 1, "piece_programs": 1, "score_programs": 1, "window_programs": 1, "split_blocks": 1}
    many = dict.fromkeys(few, 1 << 20) | {"split_blocks": 1}
    together = {"few_splits": 0, "most_splits": 1, "many_queries": 0}
    two = many | {"piece_programs": 64}  # programs to a unit's pieces, where others have one or four
    choices = (few, two, many, many | together, many | together | {"most_splits": 1 << 20})
    found = errors(monkeypatch, store, [90, 420, 600], 2, None, *({"shared_blocks": 0} | one for one in choices))
    assert len(found) == len(choices) and max(found) < 4e-3


def test_a_stream_is_the_same_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the kernels' path appended are there for the reference, pages included."""
    found = []
    for choice in ("reference", "triton"):
        store = store_of(1, 16, 2, [4, 3], 8)
        row = store.open()
        monkeypatch.setenv("SPECTRAL_ATTENTION", choice)
        run_chunk(store, row, 51, 2, 0)
        outs = [step(store, [row], 2, 10 + i, None, commit=True) for i in range(2)]
        assert row.length == 53 and len(row.pages) == 1
        found.append((torch.cat(outs), store.read_pages(0, row)))
    codec = store.codebook.layers[0]
    assert isinstance(codec, LayerCodec)
    codes = [codec.units[0].codes(pages).int() for _, pages in found]
    assert (codes[0] - codes[1]).abs().float().mean() < 0.01  # but for values on the edge of two codes
    assert (found[0][0] - found[1][0]).norm() / found[0][0].norm() < 2e-2


def test_pages_may_lie_anywhere_in_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(1, 16, 2, [4, 1], 8)
    rows = [store.open() for _ in range(3)]
    order = random.Random(1)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    for turn in range(6):  # rows grow in turns, so their pages lie between each other's
        for i in order.sample(range(3), 3):
            run_chunk(store, rows[i], 40, 2, 10 * turn + i)
    store.close(rows.pop(1))
    expected = step(store, rows, 2, 5, None, commit=False)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    got = step(store, rows, 2, 5, None, commit=False)
    assert (got - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize(
    ("bits", "softcap", "lengths", "counts"),
    [
        (8, None, (20, 7), (18, 2)), (16, 5.0, (20, 7), (18, 2)), (10, None, (60,), (2,)), (8, None, (60,), (18,)),
        (16, None, (60,), (18,)),
    ],
)
def test_tokens_of_a_chunk_see_those_before_them(
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    softcap: float | None,
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
) -> None:
    """Chunks as rows of one step, some of more tokens than a tile has, without pages and with one, where windows are
    read in parts; and a spare row, which reads none."""
    store = store_of(1, 16, 2, [4, 1], bits)
    rows = [store.open() for _ in counts]
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    for i, (row, tokens) in enumerate(zip(rows, lengths, strict=True)):
        run_chunk(store, row, tokens, 2, i)
    sides = random_sides(store, sum(counts), 2, 9)
    each = [(row, before) for row, count in zip(rows, counts, strict=True) for before in range(count)]
    width = max(len(row.pages) for row in rows)

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor([*values, values[0]], dtype=torch.int32, device=DEVICE)

    pages = [row.pages + [0] * (width - len(row.pages)) for row, _ in each]
    step = StepTables(
        torch.tensor([*pages, pages[0]], dtype=torch.int32, device=DEVICE).view(len(each) + 1, width),
        column([len(row.pages) for row, _ in each]),
        column([row.slot for row, _ in each]),
        column([row.length for row, _ in each]),
        column([4 + 16 * len(row.pages) for row, _ in each]),
        column([before for _, before in each]),
    )
    step.count[-1], step.first[-1] = 0, 4
    codec, pool = store.codebook.layers[0], store.pools[0]
    assert isinstance(codec, LayerCodec) and pool is not None and width == (max(lengths) > 52)
    query, key, value = (torch.cat([x[0], x[0, :, :1]], 1).transpose(0, 1) for x in sides)
    got = decode_attention(
        LayerKernels(codec), pool, store.windows[0], step, query, key, value, scaling=0.25, softcap=softcap
    )
    batch = store.begin(list(zip(rows, counts, strict=True)))
    expected = attend(batch, 0, *sides, scaling=0.25, softcap=softcap)[0]
    batch.abort()
    assert got.isfinite().all()
    assert (got[:-1] - expected).norm() / expected.norm() < 4e-3


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, of the row that is broken
@pytest.mark.parametrize(("choice", "bits"), [("reference", 8), ("reference", 16), ("triton", 10), ("triton", 16)])
def test_what_is_not_finite_stays_with_its_row(monkeypatch: pytest.MonkeyPatch, choice: str, bits: int) -> None:
    """Weights of 0 do not hide a NaN: neither a neighbour in the batch nor the next owner of a slot and of pages may
    meet one. The heir's first tokens are fewer than the sinks."""

    def outcome(broken: float) -> list[torch.Tensor]:
        monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
        store = store_of(1, 16, 2, [4], bits)
        bad, good = store.open(), store.open()
        sides = random_sides(store, 53, 2, 0)
        for side in sides[1:]:
            side[:, :, 2:] *= broken
        batch = store.begin([(bad, 53)])
        attend(batch, 0, *sides, scaling=0.25)
        batch.commit()
        run_chunk(store, good, 52, 2, 1)
        monkeypatch.setenv("SPECTRAL_ATTENTION", choice)
        found = [step(store, [bad, good], 2, 5, None, commit=True)[1]]
        store.close(bad)
        heir = store.open()
        found.append(run_chunk(store, heir, 2, 2, 7))
        found.append(step(store, [heir, good], 2, 6, None, commit=False))
        return found

    for sound, got in zip(outcome(1.0), outcome(float("nan")), strict=True):
        assert got.isfinite().all() and (got - sound).norm() / sound.norm() < 1e-6


def test_the_switch_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(1, 16, 2, [4], 8, block=128)
    row = store.open()
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    run_chunk(store, row, 60, 2, 0)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    with pytest.raises(SettingError, match="blocks of 8 pages"):
        step(store, [row], 2, 1, None, commit=False)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "fastest")
    with pytest.raises(SettingError, match="reference or triton"):
        step(store, [row], 2, 1, None, commit=False)


def test_sides_in_units_of_different_heads_are_read_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in one unit, values in two: a codec may, the kernels do not."""
    frame = BlockFrame(0.5 ** np.arange(8), block_tokens=256, page_tokens=16, sinks=4, device=DEVICE)
    held = [((0, 2), "key"), ((0, 1), "value"), ((1, 2), "value")]
    units = [random_unit(heads, 16, number, 16, side) for number, (heads, side) in enumerate(held)]
    codec = LayerCodec(
        [(unit, cycling_widths([4, 2], unit.variance.size, 16)) for unit in units],
        gaussian_tables(), frame, key_dim=16, value_dim=16, page_tokens=16, device=DEVICE,
    )  # fmt: skip
    assert unsupported(codec, 32) == "keys and values in units of different heads"
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    with pytest.raises(SettingError, match="cannot serve keys and values in units of different heads"):
        dispatch.kernels_for(codec, 32, 2, torch.float32)
    monkeypatch.delenv("SPECTRAL_ATTENTION")
    monkeypatch.setattr(dispatch, "able", lambda device: True)
    assert dispatch.kernels_for(codec, 32, 2, torch.float32) is None
    shape = ModelShape((LayerShape(2, 16, 16),), 4, 64)
    store = PageStore(shape, Codebook("test", "hash", 4, 32, 16, [codec]), device=DEVICE, window_dtype=torch.float32)
    row = store.open()
    run_chunk(store, row, 100, 2, 0)
    monkeypatch.setattr(dispatch, "able", lambda device: False)
    assert step(store, [row], 2, 1, None, commit=True).isfinite().all() and row.length == 101


def test_a_device_is_trusted_after_a_comparison_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing in the environment: right kernels serve; wrong ones, or none that run, leave it to the reference."""
    codec = store_of(1, 16, 2, [4], 8).codebook.layers[0]
    monkeypatch.delenv("SPECTRAL_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "able", lambda device: True)
    for outcome, word in ((0.001, None), (0.3, "wrong by 0.3"), (RuntimeError("out of resource"), "out of resource")):

        def answer(*_: object, outcome: float | RuntimeError = outcome) -> float:
            if isinstance(outcome, RuntimeError):
                raise outcome
            return outcome

        monkeypatch.setattr(dispatch, "_trusted", {})
        monkeypatch.setattr("spectral.kernels.check.relative_error", answer)
        caplog.clear()
        for _ in range(2):  # the second time the answer is known
            found = dispatch.kernels_for(codec, 32, 2, torch.float32)
            assert (found is None) == (word is not None)
        assert word is None or word in caplog.text


def test_kernels_for_tokens_are_compared_by_themselves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where they are wrong, those for transformed pages serve; settings of many entries are compared on their own."""
    flat, transformed, large = (
        store_of(2, dim, 2, widths, 8, apart=True, flat=flat).codebook.layers[0]
        for dim, widths, flat in ((16, [4], True), (16, [4], False), (160, [6, 3, 6], True))
    )
    monkeypatch.delenv("SPECTRAL_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "able", lambda device: True)
    monkeypatch.setattr(dispatch, "_trusted", {})
    asked = []

    def answer(kernels: LayerKernels, *_: object) -> float:
        asked.append((kernels.flat, kernels.many))
        return 0.3 if kernels.flat and not kernels.many else 0.001

    monkeypatch.setattr("spectral.kernels.check.relative_error", answer)
    for _ in range(2):  # the second time the answers are known
        found = dispatch.kernels_for(flat, 32, 2, torch.float32)
        assert found is not None and not found.flat
        assert dispatch.kernels_for(transformed, 32, 2, torch.float32) is not None
        other = dispatch.kernels_for(large, 32, 2, torch.float32)
        assert other is not None and other.flat and other.many
    assert asked == [(True, False), (False, False), (True, True)]
    assert "read untransformed pages are not used" in caplog.text and "transformed ones serve" in caplog.text


def test_the_comparison_is_with_the_same_codes() -> None:
    codec = store_of(1, 16, 2, [3, 1], 8).codebook.layers[0]
    assert isinstance(codec, LayerCodec)
    kernels = LayerKernels(codec)
    assert relative_error(kernels, 2, torch.float32) < TOLERANCE
    kernels.value_basis.neg_()
    assert Case(kernels, 1, 150, 2, torch.float32).error() > TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_rows_are_told_lies_where_kernels_are_compiled_for(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Other addresses than multiples of 16 bytes are another kernel to Triton: compiled within somebody's request."""
    store, seen = store_of(1, 16, 2, [4, 1], 8), []
    rows = [store.open() for _ in range(count)]
    for i, row in enumerate(rows):
        run_chunk(store, row, 5, 2, i)

    def kept(layer: LayerKernels, pool: Any, window: Any, step: StepTables, query: Any, *rest: Any, **more: Any) -> Any:
        seen.extend([step.pages, step.count, step.slot, step.length, step.first, step.before])
        return query

    monkeypatch.setattr("spectral.kernels.decode.decode_attention", kept)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    step(store, rows, 2, 7, None, commit=False)
    assert len(seen) == 6 and [x.shape[0] for x in seen] == [count] * 6
    assert all(x.data_ptr() % 16 == 0 for x in seen)

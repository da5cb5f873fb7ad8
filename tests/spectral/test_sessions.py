"""Saved sessions: a restored row continues with the same logits, and nothing else is ever restored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from spectral.errors import CacheError, OutOfPages, SessionError
from spectral.hf import LoadedModel, attending
from spectral.link_fit import fit_links
from spectral.pages import PageStore, Row
from spectral.rows import cut_row
from spectral.sessions import load_row, save_row
from tests.spectral.helpers import random_codebook, random_model

# Shorter than the sinks; within the window; with pages; with a ring that has gone round several times.
LENGTHS = [0, 3, 17, 45, 131]
WIDTHS = [8, 6, 4, 3, 2, 1, 0]
IDS = [(7 * i * i + 3 * i) % 96 for i in range(200)]


def feed(loaded: LoadedModel, store: PageStore, row: Row, ids: Sequence[int]) -> torch.Tensor:
    """One forward: logits [len(ids), vocabulary]."""
    begin = row.length
    batch = store.begin([(row, len(ids))])
    with torch.inference_mode(), attending(loaded.model, batch):
        logits = loaded.model(
            input_ids=torch.tensor([list(ids)]),
            position_ids=torch.arange(begin, begin + len(ids))[None],
            use_cache=False,
        ).logits[0]
    batch.commit()
    return logits


def generate(loaded: LoadedModel, store: PageStore, row: Row, first: int, steps: int = 40) -> torch.Tensor:
    """Greedy steps from a token: logits [steps, vocabulary]."""
    out = []
    token = first
    for _ in range(steps):
        logits = feed(loaded, store, row, [token])
        token = int(logits[-1].argmax())
        out.append(logits[-1])
    return torch.stack(out)


def make_store(loaded: LoadedModel, kind: str, **options: object) -> PageStore:
    if kind == "exact":
        return PageStore(loaded.shape, None, window_dtype=torch.float32, **options)
    bits, _, how = kind.partition(" ")
    apart = how in ("apart", "flat")
    sizes = {"window_bits": int(bits), "units": 1 + apart}
    book = random_codebook(loaded.shape, WIDTHS, **sizes, apart=apart, flat=how == "flat")
    return PageStore(loaded.shape, book, **options)


def used_row(loaded: LoadedModel, store: PageStore, length: int) -> Row:
    """A row of `length` tokens in a slot and pages that another row has used before."""
    other, keeper = store.open(), store.open()
    feed(loaded, store, other, IDS[50:190])
    feed(loaded, store, keeper, IDS[90:150])
    store.close(other)
    row = store.open()
    for begin in range(0, length, 30):
        feed(loaded, store, row, IDS[begin : min(begin + 30, length)])
    return row


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3", "8"),
        ("llama", "exact"),
        ("gemma3", "10"),
        ("gemma3", "16"),
        ("gemma3", "8 apart"),
        ("gemma3", "8 flat"),
    ],
)
def test_a_restored_row_continues_bit_for_bit(family: str, kind: str, length: int, tmp_path: Path) -> None:
    loaded = random_model(family)
    store = make_store(loaded, kind)
    row = used_row(loaded, store, length)
    path = save_row(store, row, IDS[: length + 1], tmp_path / "a.session", model=loaded.fingerprint)
    expected = generate(loaded, store, row, IDS[length])

    fresh = make_store(loaded, kind)
    fresh.open()  # another slot, other pages
    back, tokens = load_row(fresh, path, model=loaded.fingerprint)
    fresh.check()
    assert tokens == IDS[: length + 1]
    assert back.length == length
    assert torch.equal(generate(loaded, fresh, back, IDS[length]), expected)
    # And beside its original, in the store that it came from.
    again, _ = load_row(store, path, model=loaded.fingerprint)
    store.check()
    assert torch.equal(generate(loaded, store, again, IDS[length]), expected)


@pytest.mark.parametrize("length", [128, 100, 21])
def test_a_row_that_was_cut_continues_bit_for_bit(length: int, tmp_path: Path) -> None:
    """It may keep more pages than a row of its length has, and hold stale tokens in its ring."""
    loaded = random_model("qwen3")
    store = make_store(loaded, "8")
    row = used_row(loaded, store, 131)
    cut_row(store, row, length)
    path = save_row(store, row, IDS[:length], tmp_path / "a.session", model="m")
    fresh = make_store(loaded, "8")
    back, _ = load_row(fresh, path, model="m")
    fresh.check()
    assert torch.equal(generate(loaded, fresh, back, 5), generate(loaded, store, row, 5))


def test_the_same_row_gives_the_same_file_wherever_it_lies(tmp_path: Path) -> None:
    """So nothing of another sequence, whose slot or pages these were, is in it."""
    loaded = random_model("gemma3")
    files = []
    for name, used in (("clean", False), ("used", True)):
        store = make_store(loaded, "8")
        row = used_row(loaded, store, 45) if used else store.open()
        if not used:
            for begin in (0, 30):
                feed(loaded, store, row, IDS[begin : min(begin + 30, 45)])
        files.append(save_row(store, row, IDS[:45], tmp_path / name, model="m").read_bytes())
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    loaded = random_model("qwen3")
    store = make_store(loaded, "8")
    path = tmp_path_factory.mktemp("sessions") / "a.session"
    return loaded, save_row(store, used_row(loaded, store, 131), IDS[:131], path, model="m")


def test_other_models_profiles_settings_and_geometries_are_refused_by_name(saved: tuple[LoadedModel, Path]) -> None:
    loaded, path = saved

    def renamed(**changes: str) -> PageStore:
        book = random_codebook(loaded.shape, WIDTHS, window_bits=8)
        return PageStore(loaded.shape, dataclasses.replace(book, **changes))

    cases = [
        (make_store(loaded, "8"), "another", "another model: 'm', and this store has 'another'"),
        (renamed(profile_hash="other"), "m", "another profile"),
        (renamed(setting="other"), "m", "another setting"),
        (make_store(loaded, "10"), "m", "another window"),
        (make_store(loaded, "8", window_dtype=torch.float32), "m", "another window"),
        (make_store(random_model("gemma3"), "8"), "m", "another set of layers"),
        (make_store(loaded, "exact"), "m", "another profile"),
    ]
    for store, model, message in cases:
        with pytest.raises(SessionError, match=message):
            load_row(store, path, model=model)
        assert store.rows == 0
        store.check()


def test_a_damaged_file_is_refused_and_leaves_the_store_as_it_was(
    saved: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    loaded, path = saved
    data = path.read_bytes()
    store = make_store(loaded, "8")
    bad = tmp_path / "bad"
    for at in [*range(0, len(data), 997), *range(40), *range(len(data) - 40, len(data))]:
        bad.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(SessionError):
            load_row(store, bad, model="m")
        bad.write_bytes(data[:at])
        with pytest.raises(SessionError):
            load_row(store, bad, model="m")
    bad.write_bytes(data[:8] + struct.pack("<I", 7) + data[12:])
    with pytest.raises(SessionError, match="version 7"):
        load_row(store, bad, model="m")
    assert store.rows == 0
    store.check()


@pytest.mark.parametrize(
    "change",
    [
        {"length": 1 << 25, "tokens": 1 << 25},
        {"length": 1 << 25, "tokens": 1 << 25, "pages": 1 << 21},
        {"length": 14},
        {"length": 132, "tokens": 132},
        {"pages": 12},
        {"pages": 14},
        {"pages": 15},
        {"pages": 16},
        {"length": -1},
        {"length": True},
        {"length": 30, "tokens": 131},
        {"tokens": 131.0},
        {"layers": []},
    ],
)
def test_a_forged_header_with_a_right_checksum_is_refused(
    saved: tuple[LoadedModel, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    loaded, path = saved
    data = path.read_bytes()
    size = struct.unpack_from("<I", data, 12)[0]
    document = json.dumps({**json.loads(data[16 : 16 + size]), **change}).encode()
    body = data[:12] + struct.pack("<I", len(document)) + document + data[16 + size : -32]
    forged = tmp_path / "forged"
    forged.write_bytes(body + hashlib.blake2b(body, digest_size=32).digest())
    store = make_store(loaded, "8")
    with pytest.raises(SessionError):
        load_row(store, forged, model="m")
    assert store.rows == 0
    assert store.nbytes < 1 << 24
    store.check()


def test_a_row_that_does_not_fit_leaves_the_store_as_it_was(saved: tuple[LoadedModel, Path]) -> None:
    loaded, path = saved
    probe = make_store(loaded, "8")
    probe.open()
    store = make_store(loaded, "8", max_bytes=probe.nbytes + 1000)
    with pytest.raises(OutOfPages):
        load_row(store, path, model="m")
    assert store.rows == 0
    store.check()


def test_an_interrupted_save_leaves_the_older_file(
    saved: tuple[LoadedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, path = saved
    target = tmp_path / "a.session"
    target.write_bytes(path.read_bytes())
    store = make_store(loaded, "8")
    row, tokens = load_row(store, target, model="m")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_row(store, row, tokens, target, model="m")
    assert [p.name for p in tmp_path.iterdir()] == ["a.session"]
    assert target.read_bytes() == path.read_bytes()


def test_saving_asks_for_an_open_row_and_all_of_its_tokens(tmp_path: Path) -> None:
    loaded = random_model("qwen3")
    store = make_store(loaded, "8")
    row = used_row(loaded, store, 17)
    with pytest.raises(CacheError, match="17 tokens and 16 ids"):
        save_row(store, row, IDS[:16], tmp_path / "x", model="m")
    store.close(row)
    with pytest.raises(CacheError, match="closed"):
        save_row(store, row, IDS[:17], tmp_path / "x", model="m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "kind"), [("gemma3", "8"), ("qwen3", "8 apart"), ("qwen3", "8 flat")])
def test_with_links_a_row_continues_bit_for_bit_and_only_with_them(family: str, kind: str, tmp_path: Path) -> None:
    loaded = random_model(family)
    store = make_store(loaded, kind)
    row = used_row(loaded, store, 131)
    rows = [row, used_row(loaded, store, 199)]  # tokens enough for maps of two layers
    pages = [
        None if p is None else torch.cat([store.read_pages(i, each) for each in rows])
        for i, p in enumerate(store.pools)
    ]
    links = fit_links(store.codebook, pages)
    path = save_row(store, row, IDS[:131], tmp_path / "a.session", model="m", links=links)
    expected = generate(loaded, store, row, IDS[131])
    fresh = make_store(loaded, kind)
    back, _ = load_row(fresh, path, model="m", links=links)
    assert torch.equal(generate(loaded, fresh, back, IDS[131]), expected)
    with pytest.raises(SessionError, match="none were given"):
        load_row(fresh, path, model="m")
    plain = save_row(store, row, IDS[:171], tmp_path / "b.session", model="m")
    load_row(fresh, plain, model="m", links=links)
    fresh.check()

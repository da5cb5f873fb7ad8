"""A bit that flips in host memory: found by its checksum, computed again, and never read as if it were right."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from server.worker import child_memory, main
from spectral import residency
from spectral.checks import checksum
from spectral.errors import SessionError
from spectral.parking import snapshot_tensors
from tests.spectral.engine.engine_helpers import answer, ask, drive, request, tiny_engine
from tests.spectral.engine.test_prefix import KINDS, prompt


def flip(tensor: torch.Tensor, place: int = -1) -> None:
    """Flip one bit of a tensor's bytes."""
    tensor.view(-1).view(torch.uint8)[place] ^= 0x10


@pytest.mark.parametrize(("family", "setting"), KINDS)
@pytest.mark.parametrize("part", ["pages", "windows"])
def test_a_parked_row_that_was_damaged_is_computed_again(family: str, setting: str, part: str) -> None:
    tokens = prompt(90)
    wanted = ask(tiny_engine(family, setting=setting), request("x", tokens, 30))["x"]
    engine = tiny_engine(family, setting=setting, prefix_bytes=0)
    engine.submit(request("x", tokens, 30))
    damaged = []

    def each(step: int) -> None:
        if step == 9:
            assert engine.park("x") == 1
            parked = engine.scheduler.waiting[0].parked
            tensors = [p for p in parked.pages if p is not None and p.numel()]
            if part == "windows" or not tensors:  # with short prompts everything is in the window
                tensors = snapshot_tensors(parked.windows)
            flip(tensors[0])
            damaged.append(parked)

    found = answer(drive(engine, each), "x")
    assert damaged and engine.stats().parked_bytes == 0
    if setting == "exact":  # compressed, what was decoded and what is prefilled see slightly different numbers
        assert found == wanted
    assert len(found) == len(wanted)


def test_a_damaged_prefix_is_given_up_and_the_answer_is_the_same() -> None:
    engine = tiny_engine(setting="exact")
    tokens = prompt(150)
    wanted = ask(engine, request("a", tokens, 12))["a"]
    assert len(engine.lanes.current.prefix) > 0
    for entry in engine.lanes.current.prefix._entries.values():
        flip(snapshot_tensors(entry.windows)[0], 5)
    before = engine.lanes.reuse[1]
    assert ask(engine, request("b", tokens, 12))["b"] == wanted
    assert engine.lanes.reuse[1] == before, "nothing was taken over"
    assert ask(engine, request("c", tokens, 12))["c"] == wanted
    assert engine.lanes.reuse[1] > before, "and what was computed again is shared again"
    engine.check()


def test_a_damaged_session_is_not_saved(tmp_path: Path) -> None:
    engine = tiny_engine(setting="exact")
    ask(engine, request("a", prompt(60), 8, session="talk"))
    parked = engine.sessions._shelf["", "talk"].parked
    flip(snapshot_tensors(parked.windows)[-1], 0)
    with pytest.raises(SessionError, match="damaged"):
        engine.save_session("talk", tmp_path / "talk")
    assert not (tmp_path / "talk").exists() and ("", "talk") not in engine.sessions


@pytest.mark.parametrize("size", [0, 1, 4096 * 8, 4096 * 8 + 3, 5 * 4096 * 8])
def test_every_bit_counts_and_so_does_the_order(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    data = torch.randint(0, 256, [size], dtype=torch.uint8, generator=generator)
    before = checksum([data])
    for place in {0, size // 2, size - 1} - {-1}:
        if size:
            flip(data, place)
            assert checksum([data]) != before
            flip(data, place)
    assert checksum([data]) == before != checksum([data, data])
    half = 4096 * 8
    if size >= 2 * half:
        swapped = torch.cat([data[half : 2 * half], data[:half], data[2 * half :]])
        assert checksum([swapped]) != before


def test_weights_that_were_damaged_while_they_slept_are_noticed_after_the_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residency, "PIECE", 4096)
    model, noticed = torch.nn.Linear(100, 100), threading.Event()
    sleeper = residency.Sleeper(model, "cpu", noticed.set)

    def once(change: bool, *, known: bool = True) -> bool:
        sleeper.sleep()
        assert sleeper._sum is not None and sleeper._host is not None
        if known:
            sleeper._sum._thread.join()
        else:
            sleeper._sum.stop()  # its thread has ended: it cannot write its sum after the next line
            sleeper._sum._found = None
        if change:
            sleeper._host[20_000] ^= 1
        sleeper.wake()
        for thread in threading.enumerate():
            if thread.name == "host memory":
                thread.join(20)
        return noticed.is_set()

    before = model.weight.detach().clone()
    assert not once(change=False) and torch.equal(model.weight, before)
    assert not once(change=True, known=False), "woken before the checksum was taken"
    assert once(change=True)


def test_a_checksum_that_nobody_wants_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "PIECE", 8)
    summed = residency.Summed(torch.zeros(8 << 20, dtype=torch.uint8))
    assert summed.stop() is None and not summed._thread.is_alive()


def test_a_worker_with_damaged_weights_ends_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    child_memory._damaged()
    assert ended == [child_memory.EXIT_DAMAGED]
    assert f"{child_memory.EXIT_DAMAGED} if its weights were damaged" in (main.__doc__ or "")

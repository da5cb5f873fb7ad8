"""Parking: sequences leave the device and come back as they were."""

from __future__ import annotations

from typing import Any

import pytest

from spectral.parking import park, unpark
from tests.spectral.engine.engine_helpers import answer, ask, drive, request, tiny_engine
from tests.spectral.engine.test_prefix import KINDS, prompt
from tests.spectral.helpers import random_codebook


@pytest.mark.parametrize(("family", "setting"), KINDS)
def test_a_parked_sequence_goes_on_as_if_nothing_had_happened(family: str, setting: str) -> None:
    tokens = prompt(90)
    wanted = ask(tiny_engine(family, setting=setting), request("x", tokens, 60))["x"]
    engine = tiny_engine(family, setting=setting, prefix_bytes=0)
    engine.submit(request("x", tokens, 60))
    computed: list[int] = []
    run = engine.runner.run

    def counting(part: Any) -> Any:
        computed.extend(count for _, count in part.work)
        return run(part)

    engine.runner.run = counting  # type: ignore[method-assign]

    def each(step: int) -> None:
        if step in (2, 9, 10, 30):
            assert engine.park("x") == 1 and engine.store.rows == 0
            assert engine.stats().parked == 1 and engine.stats().parked_bytes > 0
            engine.trim()
            assert engine.store.nbytes == 0

    assert answer(drive(engine, each), "x") == wanted
    assert sum(computed) == len(tokens) + 59  # nothing was computed twice
    assert engine.stats().parked == 0 and engine.stats().parked_bytes == 0


@pytest.mark.parametrize("host", [None, 0])
def test_under_pressure_all_answers_come_with_and_without_host_memory(host: int | None) -> None:
    free = tiny_engine("llama", setting="exact")
    asked = [request(f"r{i}", prompt(40, i), 60, priority=i % 2) for i in range(4)]
    wanted = ask(free, *asked)
    room = int(free.store.bytes_per_token(100) * 100 * 2.2)
    engine = tiny_engine("llama", setting="exact", max_kv_bytes=room, max_host_bytes=host)
    assert ask(engine, *asked) == wanted
    assert engine.stats().preemptions > 0 and (engine.lanes.parks > 0) == (host is None)


def test_the_urgent_one_runs_first_and_the_others_wait_in_host_memory() -> None:
    engine = tiny_engine(max_concurrency=1)
    engine.submit(request("slow", prompt(60), 40))
    ends: list[str] = []

    def each(step: int) -> None:
        if step == 10:
            engine.submit(request("urgent", prompt(50, 1), 10, priority=10))
        if step == 12:
            assert engine.stats().parked == 1
        ends.extend(name for name in ("slow", "urgent") if name not in engine.live and step > 10 and name not in ends)

    events = drive(engine, each)
    assert ends[0] == "urgent"
    assert answer(events, "slow") == ask(tiny_engine(), request("x", prompt(60), 40))["x"]


@pytest.mark.parametrize("bits", [16, 10, 8])
def test_a_row_that_comes_back_to_a_squeezed_store_is_what_a_squeeze_would_have_made(bits: int) -> None:
    engine = tiny_engine(window_bits=bits)
    store = engine.store
    engine.submit(request("x", prompt(120), 20))
    for _ in range(8):
        engine.step()
    row = next(iter(store._rows.values()))
    parked = park(store, row)
    coarse = random_codebook(engine.loaded.shape, [4, 2, 1, 0], sinks=4, window=16, page=8, window_bits=min(bits, 8))
    coarse.setting = "coarse"
    store.squeeze(coarse)
    back = unpark(store, parked)
    assert back.length == row.length
    for layer in range(3):
        assert store.read_pages(layer, back).equal(store.read_pages(layer, row))
        window = store.windows[layer]
        pairs = zip(window.slot_tensors(back.slot, 120), window.slot_tensors(row.slot, 120), strict=True)
        assert all(a.equal(b) for a, b in pairs)
    store.close(back)


def test_cancelling_a_parked_sequence_frees_its_host_memory() -> None:
    engine = tiny_engine(max_concurrency=1)
    engine.submit(request("a", prompt(60), 40))
    engine.step()
    engine.submit(request("b", prompt(60, 1), 40, priority=3))
    engine.step()
    assert engine.stats().parked_bytes > 0
    engine.cancel("a")
    assert engine.stats().parked_bytes == 0
    engine.check()
    assert len(answer(drive(engine), "b")) == 40

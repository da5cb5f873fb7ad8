"""Out of memory is an event: the step is tried again, then the newest request fails alone; a lost device ends all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral.engine.engine import Engine
from spectral.engine.faults import DeviceLost, is_out_of_memory, is_sticky
from spectral.engine.lease import set_lease
from spectral.engine.types import Event, Failed, Finished
from spectral.errors import OutOfPages
from tests.spectral.engine.engine_helpers import answer, ask, request, tiny_engine

PROMPT = [5 + i % 80 for i in range(60)]


class Failing:
    """Stands before a model's forward: at the calls given it raises."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch, error: Exception, *calls: int) -> None:
        self.calls, self.error, self.at = 0, error, calls
        self.forward = engine.loaded.model.forward
        patch.setattr(engine.loaded.model, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls in self.at:
            raise self.error
        return self.forward(*args, **kwargs)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


def test_a_step_out_of_memory_is_tried_again_and_nobody_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ask(tiny_engine(), request("a", PROMPT), request("b", PROMPT[:30]))
    engine = tiny_engine()
    relieved: list[int] = []
    engine.faults.relief = lambda: relieved.append(1) or 100  # type: ignore[func-returns-value]
    Failing(engine, monkeypatch, out_of_memory(), 2, 9, 15)
    for each in (request("a", PROMPT), request("b", PROMPT[:30])):
        engine.submit(each)
    events = run(engine)
    assert {name: answer(events, name) for name in "ab"} == plain
    assert engine.faults.count == len(relieved) == 3


class FailingInside:
    """Stands before an attention: at the calls given it raises, after earlier layers have written their tokens."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch, *calls: int) -> None:
        self.calls, self.at = 0, calls
        attention = engine.loaded.model.model.layers[-1].self_attn
        self.forward = attention.forward
        patch.setattr(attention, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls in self.at:
            raise out_of_memory()
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize("calls", [(1,), (2,), (3,), (2, 5), (6, 9, 12)])
def test_a_chunk_that_broke_off_in_the_middle_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...]
) -> None:
    """Layers before the error have written the chunk over the oldest tokens of their windows."""
    long = [5 + i * 7 % 80 for i in range(200)]
    plain = ask(tiny_engine(), request("a", long), request("b", PROMPT))
    engine = tiny_engine()
    inside = FailingInside(engine, monkeypatch, *calls)
    for each in (request("a", long), request("b", PROMPT)):
        engine.submit(each)
    events = run(engine)
    assert engine.faults.count == len(calls) < inside.calls
    assert {name: answer(events, name) for name in "ab"} == plain
    engine.check()


def test_the_second_time_in_a_row_only_the_newest_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    Failing(engine, monkeypatch, out_of_memory(), 6, 7)
    for name in ("old", "middle", "new"):
        engine.submit(request(name, PROMPT[:20]))
    events = run(engine)
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["new"]
    assert {event.request_id for event in events if isinstance(event, Finished)} == {"old", "middle"}
    assert len(answer(events, "old")) == 20
    engine.check()


def test_a_device_that_is_lost_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    Failing(engine, monkeypatch, error, 1)
    engine.submit(request("a", PROMPT))
    with pytest.raises(DeviceLost, match="illegal memory access"):
        run(engine)
    assert is_sticky(error) and not is_sticky(out_of_memory()) and is_out_of_memory(out_of_memory())
    assert not is_sticky(ValueError("CUDA error")) and not is_sticky(RuntimeError("shapes do not match"))


def test_a_store_that_cannot_grow_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    store = engine.store
    before = (store.page_capacity, store.nbytes)
    with monkeypatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> torch.Tensor:
            raise out_of_memory()

        patch.setattr("spectral.pools.empty_pool", refuse)
        with pytest.raises(OutOfPages):
            store._grow_pages(10)
    assert (store.page_capacity, store.nbytes) == before
    store.check()
    assert len(ask(engine, request("a", PROMPT))["a"]) == 20


def test_a_smaller_lease_parks_sequences_which_then_go_on() -> None:
    plain = ask(tiny_engine(max_host_bytes=None), request("a", PROMPT, 60), request("b", PROMPT[10:], 60))
    engine = tiny_engine(max_host_bytes=None)
    for each in (request("a", PROMPT, 60), request("b", PROMPT[10:], 60)):
        engine.submit(each)
    events: list[Event] = []
    for _ in range(20):
        events += engine.step()
    held = engine.lanes.nbytes
    lease = max(engine.store.row_nbytes(s.row) for s in engine.scheduler.running) * 2
    assert set_lease(engine, round(lease)) >= 0 and engine.lanes.nbytes <= lease < held
    events += run(engine)
    assert {name: answer(events, name) for name in "ab"} == plain
    assert engine.stats().parked == 0

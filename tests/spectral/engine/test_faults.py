"""Out of memory is an event: the step is tried again, then the newest request fails alone; a lost device ends all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral.engine import sampler
from spectral.engine.engine import Engine
from spectral.engine.faults import DeviceLost, is_out_of_memory, is_sticky
from spectral.engine.lease import set_lease
from spectral.engine.scheduler import Part
from spectral.engine.types import EngineLimits, Event, Failed, Finished
from spectral.errors import OutOfPages
from tests.spectral.engine.engine_helpers import answer, ask, request, tiny_engine
from tests.spectral.engine.test_engine_stateful import LOADED, Ladder

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


def later_parts_have_pages(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """The first of a step's parts fails, once, where a later one has been granted pages; how many."""
    own, schedule = engine.runner.step, engine.scheduler.schedule
    parts: list[Part] = []
    granted: list[int] = []

    def scheduled() -> list[Part]:
        parts[:] = schedule()
        return [*parts]

    def step(part: Part) -> Any:
        pages = sum(len(new) for later in parts[1:] for new in later.batch.new_pages)
        if part is parts[0] and pages and not granted:
            granted.append(pages)
            raise error
        return own(part)

    monkeypatch.setattr(engine.scheduler, "schedule", scheduled)
    monkeypatch.setattr(engine.runner, "step", step)
    return granted


def test_memory_that_is_packed_between_two_parts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are granted to a part which has not run yet get other numbers as any others do."""
    asked = request("x", PROMPT[:30], 60), request("y", [7 + i * 3 % 70 for i in range(130)], 60)

    def run(*failing: Exception) -> dict[str, list[int]]:
        engine = tiny_engine(decode="static")
        ask(engine, *[request(f"p{i}", PROMPT[i:], 9) for i in range(3)])
        granted = [later_parts_have_pages(engine, monkeypatch, error) for error in failing]
        found = ask(engine, *asked)
        assert all(granted) and engine.faults.count == len(failing)
        return found

    assert run(out_of_memory()) == run()


def test_a_store_that_ends_between_two_parts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both choices of a request at a setting that is no longer the current one, in two parts; the first part fails."""
    engine = Engine(LOADED, codebook=Ladder().codebook("coarse"), setting="coarse", profile=Ladder(), checked=True,
                    decode="static", limits=EngineLimits(prefill_chunk=32, token_budget=64, max_concurrency=4))  # type: ignore[arg-type]  # fmt: skip
    engine.submit(request("w", PROMPT[:10], 60))
    engine.submit(request("r", [5 + i * 7 % 80 for i in range(100)], 30, sampling={"n": 2}))
    engine.step()
    engine.cancel("w")
    engine.set_setting("fine")
    granted = later_parts_have_pages(engine, monkeypatch, ValueError("the model failed"))
    events = run(engine)
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["r"] and granted
    assert len(engine.lanes.all) == 1
    assert len(ask(engine, request("a", PROMPT))["a"]) == 20


@pytest.mark.parametrize("sampling", [{"temperature": 1.0, "seed": 3}, {"frequency_penalty": 1.9}])
def test_a_step_that_breaks_off_among_log_probabilities_is_made_once_more(
    sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers and penalties then are what they were."""
    asked = request("x", PROMPT[:30], 40, sampling={**sampling, "logprobs": 1})
    wanted, own, calls = ask(tiny_engine(), asked), sampler._logprob, 0

    def logprob(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 9):
            raise out_of_memory()
        return own(*args)

    monkeypatch.setattr(sampler, "_logprob", logprob)
    engine = tiny_engine()
    assert ask(engine, asked) == wanted and engine.faults.count == 2


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

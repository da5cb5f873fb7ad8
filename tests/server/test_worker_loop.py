"""The worker's loop in this process: messages are put into its inbox, and what it says is read from a list."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from server.worker import child_wire
from server.worker import messages as wire
from server.worker.child_engines import Engines
from server.worker.main import Inbox, Worker
from spectral.engine import types
from spectral.engine.build import Built
from spectral.engine.engine import Engine
from spectral.errors import ContextLengthExceeded, DeadlineExceeded, OutOfPages, QueueFull, RequestError
from spectral.hf import LoadedModel, load_model


class Said:
    """Stands for the writer."""

    def __init__(self) -> None:
        self.messages: list[wire.ToParent] = []

    def send(self, *messages: wire.ToParent) -> None:
        self.messages += messages

    def of(self, request_id: str) -> list[Any]:
        return [m for m in self.messages if getattr(m, "request_id", None) == request_id]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo-7m", device="cpu")


def ask(name: str, prompt: str | list[int] = "Once upon a time", **sampling: Any) -> wire.Submit:
    values = {"max_tokens": 5, "temperature": 0.0, **sampling}
    return wire.Submit(name, "completion", wire.Sampling(**values), prompt=prompt)


def work(engine: Engine, *messages: wire.ToWorker, end: wire.Shutdown | None = None) -> Said:
    """Run a worker on these messages until it has drained."""
    inbox: Inbox = queue.SimpleQueue()
    for message in (*messages, end or wire.Shutdown(60.0)):
        inbox.put(message)
    said = Said()
    Worker(Engines(Built(engine, None, None)), inbox, said).run()  # type: ignore[arg-type]
    engine.store.check()
    assert engine.store.rows == 0 and not engine.live
    return said


def test_a_failing_step_ends_its_requests_and_the_worker_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = loaded.model.forward, []

    def once_broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a kernel broke")
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", once_broken)
    engine = Engine(loaded, limits=types.EngineLimits(max_concurrency=2))
    said = work(engine, ask("a"), ask("b"), ask("c"))
    for name in "ab":
        assert isinstance(said.of(name)[-1], wire.Failed)
        assert "a kernel broke" in said.of(name)[-1].message and said.of(name)[-1].code == "internal_error"
    assert isinstance(said.of("c")[-1], wire.Finished) and said.of("c")[-1].usage.completion_tokens == 5
    last = said.messages[-1]
    assert isinstance(last, wire.Stats) and last.finished == {"failed": 2, "length": 1} and last.kv_bytes_used == 0


def test_every_request_is_answered_once_and_accepted_first(loaded: LoadedModel) -> None:
    engine = Engine(loaded, limits=types.EngineLimits(max_concurrency=1, max_queue=1))
    bad = wire.Submit("kind", "riddle", wire.Sampling(), prompt="x")
    said = work(engine, ask("a"), ask("b"), ask("full"), ask("a"), ask("t", temperature=-1.0), bad)
    assert [type(m) for m in said.of("a")][0] is wire.Accepted
    assert isinstance(said.of("full")[0], wire.Rejected) and said.of("full")[0].status == 429
    refused = {m.request_id: (m.status, m.param) for m in said.messages if isinstance(m, wire.Rejected)}
    assert refused["t"] == (400, "temperature") and refused["kind"] == (400, "kind")
    assert refused["a"] == (400, "request_id")  # the second "a"; the first is answered all the same
    assert isinstance(said.of("b")[-1], wire.Finished)


def test_a_tokenizer_that_breaks_rejects_one_request(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded)
    encode = Engine.encode

    def broken(self: Engine, request: types.GenerateRequest) -> list[int]:
        if request.request_id == "bad":
            raise ZeroDivisionError("odd text")
        return encode(self, request)

    monkeypatch.setattr(Engine, "encode", broken)
    said = work(engine, ask("bad"), ask("good"), ask("good2"))
    assert [(m.status, m.code) for m in said.of("bad")] == [(500, "internal_error")]
    assert isinstance(said.of("good")[-1], wire.Finished) and isinstance(said.of("good2")[-1], wire.Finished)


def test_at_the_deadline_what_is_left_fails(loaded: LoadedModel) -> None:
    engine = Engine(loaded)
    long = ask("long", " government" * 4000, max_tokens=4000)
    said = work(engine, ask("a", max_tokens=4000, logit_bias={2: -100.0}), long, end=wire.Shutdown(0.0))
    assert [(type(m), m.code) for m in said.of("a")[1:]] == [(wire.Failed, "shutting_down")]
    assert [(type(m), m.status) for m in said.of("long")] == [(wire.Rejected, 503)]


def test_cancel_before_the_first_step(loaded: LoadedModel) -> None:
    said = work(Engine(loaded), ask("a"), wire.Cancel("a"), wire.Cancel("nobody"))
    assert [type(m) for m in said.of("a")] == [wire.Accepted, wire.Finished]
    assert said.of("a")[1].reason == "cancelled"


def test_sampling_fields_all_arrive() -> None:
    sampling = wire.Sampling(
        max_tokens=7, temperature=0.5, top_p=0.4, top_k=3, min_p=0.1, seed=11, stop=("x",), n=2, presence_penalty=0.1,
        frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={5: 1.0}, logprobs=4,
    )  # fmt: skip
    params = child_wire.to_request(wire.Submit("a", "completion", sampling, prompt="p")).params
    for name in wire.Sampling.__struct_fields__:
        assert getattr(params, name) == getattr(sampling, name), name


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(3), 429, "queue_full"),
        (ContextLengthExceeded(10, 5), 400, "context_length_exceeded"),
        (RequestError("no", param="seed"), 400, "invalid_request"),
        (ValueError("x"), 500, "internal_error"),
    ],
)
def test_refusals_have_their_status(error: Exception, status: int, code: str) -> None:
    message = child_wire.rejected("a", error)
    assert (message.status, message.code) == (status, code) and str(error) in message.message


def test_failures_have_their_code() -> None:
    assert child_wire.failed("a", OutOfPages(10, 5)).code == "kv_cache_full"
    assert child_wire.failed("a", DeadlineExceeded(3)).code == "deadline_exceeded"


def test_a_grammar_that_another_engine_compiled_is_compiled_beside_the_steps_too(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loaded)
    encode, known, threads = engine.encode, [False, False, True], []

    def watched(request: types.GenerateRequest) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(request)

    monkeypatch.setattr(engine, "knows", lambda grammar: known.pop(0))
    monkeypatch.setattr(engine, "encode", watched)
    said = work(engine, ask("a", grammar=wire.Grammar("regex", "[0-9]{2}")))
    assert threads == ["encoder", "encoder"] and not known
    assert [type(m) for m in said.of("a")][-1] is wire.Finished

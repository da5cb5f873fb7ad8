"""Decode steps over buffers that stay where they are, against the ordinary ones."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from spectral.engine import sampler, static_step
from spectral.engine.device_sampler import Memory, choose, kind_of, numbers_of
from spectral.engine.engine import Engine
from spectral.engine.graphs import DecodeGraphs, decode_choice
from spectral.engine.replay import Replayer
from spectral.engine.sampler import SamplerState, sample
from spectral.engine.static_step import INTEGERS, Numbers, bucket, table_width
from spectral.engine.types import SamplingParams
from spectral.errors import SettingError
from tests.spectral.engine.engine_helpers import answer, ask, drive, request, tiny_engine
from tests.spectral.helpers import FAMILIES

LENGTHS = (5, 41, 70, 23, 4)
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.1, "seed": 3},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3},
    {"temperature": 1.2, "min_p": 0.05, "seed": 5, "frequency_penalty": 0.7, "presence_penalty": 0.2},
    {"logit_bias": {5: -3.0, 7: 2.0}},
]


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def graphs(engine: Engine) -> DecodeGraphs:
    assert engine.runner.graphs is not None
    return engine.runner.graphs


def both(family: str, sampling: list[dict[str, Any]], count: int = 40, **more: Any) -> tuple[Any, Any, Engine]:
    requests = [request(f"r{i}", prompt(n, i), count, sampling=sampling[i]) for i, n in enumerate(LENGTHS)]
    plain, static = tiny_engine(family, decode="eager", **more), tiny_engine(family, decode="static", **more)
    return ask(plain, *requests), ask(static, *requests), static


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("setting", ["test", "exact"])
def test_static_steps_give_the_same_tokens(family: str, setting: str) -> None:
    plain, static, engine = both(family, [{}] * 5, setting=setting)
    assert static == plain
    assert graphs(engine).steps > 40


@pytest.mark.parametrize("window_bits", [8, 10, 16])
def test_samplers_mixed_in_a_batch_choose_the_same_tokens(window_bits: int) -> None:
    plain, static, engine = both("qwen3", SAMPLING, window_bits=window_bits, max_concurrency=5)
    assert static == plain
    assert graphs(engine).steps > 30


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd_and_with_other_ways_to_sample_beside_it() -> None:
    one = request("one", prompt(30, 1), 30, sampling={"temperature": 1.0, "top_p": 0.95, "seed": 9})
    alone = ask(tiny_engine(decode="static"), one)["one"]
    others = [
        request("greedy", prompt(9, 2), 12),
        request("logprobs", prompt(50, 3), 9, sampling={"temperature": 1.0, "logprobs": 2}),
        request("typical", prompt(12, 4), 7, sampling={"temperature": 1.0, "typical_p": 0.5}),
    ]
    assert ask(tiny_engine(decode="static"), others[0], one, *others[1:])["one"] == alone


def test_parking_and_pages_that_move_are_followed() -> None:
    def run(decode: str) -> list[list[int]]:
        engine = tiny_engine(decode=decode, max_concurrency=3)
        for i in range(3):
            engine.submit(request(f"r{i}", prompt(20 + 13 * i, i), 60))

        def disturb(step: int) -> None:
            if step == 15:
                engine.park("r1")
            if step == 25:
                engine.trim()
            if step == 35:
                engine.park("r0")

        events = drive(engine, disturb)
        return [answer(events, f"r{i}") for i in range(3)]

    assert run("static") == run("eager")


def test_steps_of_a_store_that_moved_are_forgotten() -> None:
    engine = tiny_engine(decode="static")
    ask(engine, request("a", prompt(40, 1), 20))
    kept = graphs(engine)
    assert kept._steps
    engine.trim()
    kept.prune()
    assert not kept._steps and not kept._seals


def test_what_comes_from_the_host_is_there_before_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture may copy nothing from the host: kernels of a setting that was made anew have their table of units."""
    asked: list[int] = []

    class Found:
        def units(self, group: int) -> None:
            asked.append(group)

    with monkeypatch.context() as patch:
        patch.setattr(static_step, "kernels_for", lambda *_: Found())
        engine = tiny_engine("qwen3", decode="static")
        store = engine.store
        static_step.StaticStep(engine.loaded, store, 2, 4, Numbers(2, store.device))
    assert asked == [2] * 3, "query heads to a KV head, for each of three layers"


@pytest.mark.parametrize(("setting", "failing"), [("test", (1, 4, 8)), ("exact", (2, 3, 4, 5, 6, 7, 8, 9))])
def test_an_error_behind_the_forward_changes_no_answer(
    setting: str, failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed, where no page was granted, and in a chunk; exact, whose restarted rows are computed to the same
    numbers, always."""
    wanted = ask(tiny_engine(setting=setting, decode="static"), request("a", prompt(40, 1), 30))["a"]
    engine = tiny_engine(setting=setting, decode="static")
    engine.faults.victims = lambda error, work: []  # type: ignore[method-assign, assignment]
    own, calls = graphs(engine).replayer.run, []

    def fails(what: str, key: Any, launch: Any, *more: Any) -> None:
        calls.append(what)
        if what == "sampling" and calls.count("sampling") in failing:
            raise RuntimeError("injected")
        own(what, key, launch, *more)

    monkeypatch.setattr(graphs(engine).replayer, "run", fails)
    assert ask(engine, request("a", prompt(40, 1), 30))["a"] == wanted


@pytest.mark.parametrize("shortlist", [1024, 6])
def test_the_devices_sampler_chooses_as_the_other(shortlist: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SHORTLIST", shortlist)
    rng = torch.Generator().manual_seed(2)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=1.3, top_k=5, seed=2),
        SamplingParams(temperature=1.0, top_p=0.7, seed=3, presence_penalty=0.5),
        SamplingParams(temperature=1.0, min_p=0.2, seed=4, repetition_penalty=1.2),
        SamplingParams(temperature=0.0, frequency_penalty=1.0, logit_bias={3: 4.0}),
    ]
    first, second = ([SamplerState(p, [1, 2, 3]) for p in params] for _ in range(2))
    numbers, out = Numbers(8, torch.device("cpu")), torch.zeros((2, 8), dtype=torch.int64)
    memory, fallbacks = Memory(8, 40, torch.device("cpu")), 0
    for _ in range(60):
        numbers.logits = torch.randn(8, 40, generator=rng) * 2
        wanted, _ = sample(numbers.logits[:6].clone(), first)
        kind = kind_of(second)
        assert kind is not None and kind.free and kind.filtered and kind.penalised
        rows = [numbers_of(state) for state in second]
        rows += [rows[0]] * 2
        numbers.send([(*[0] * (len(INTEGERS) - 2), *whole) for whole, _ in rows], [tuple(real) for _, real in rows])
        memory.follow(dict(enumerate(second)))
        choose(numbers, kind, memory, out)
        tokens, right = out[:, :6].tolist()
        if not all(right):
            fallbacks += 1
            memory.forget()
            tokens, _ = sample(numbers.logits[:6].clone(), second)
        else:
            for state, token in zip(second, tokens, strict=True):
                state.record(token)
        assert tokens == wanted
    assert bool(fallbacks) == (shortlist == 6)


def test_what_the_devices_sampler_leaves_to_the_other() -> None:
    assert kind_of([SamplerState(SamplingParams(logprobs=0), [])]) is None
    assert kind_of([SamplerState(SamplingParams(top_k=5000), [])]) is None
    assert kind_of([SamplerState(SamplingParams(typical_p=0.5), [])]) is None
    greedy = kind_of([SamplerState(SamplingParams(temperature=0, top_k=5000), [])])
    assert greedy is not None and not (greedy.free or greedy.filtered or greedy.penalised)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16])
def test_what_kernels_are_told_lies_alike_for_any_number_of_rows(rows: int) -> None:
    """Other addresses are other kernels, compiled within somebody's request."""
    numbers = Numbers(rows, torch.device("cpu"))
    numbers.send([[100 * row + n for n in range(len(INTEGERS))] for row in range(rows)], [[0.0] * 7] * rows)
    small = numbers.small()
    for name, field in small._asdict().items():
        assert field.data_ptr() % 16 == 0 and field.dtype == torch.int32
        assert field.tolist() == numbers.field[name].tolist() and field[-1] == 100 * rows - 100 + INTEGERS.index(name)


def test_buckets_and_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 16, 17, 33)] == [1, 2, 4, 8, 16, 32, 48]
    assert [table_width(n) for n in (0, 1, 32, 33, 65, 513)] == [0, 32, 32, 64, 128, 1024]
    assert [table_width(n, 4) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
    cpu = torch.device("cpu")
    assert decode_choice(cpu) == "eager" and decode_choice(torch.device("cuda")) == "graph"
    monkeypatch.setenv("SPECTRAL_DECODE", "static")
    assert decode_choice(cpu) == "static"
    for name in ("graph", "fast"):
        with pytest.raises(SettingError, match="SPECTRAL_DECODE"):
            decode_choice(cpu, name)


class Captures:
    """torch's captures without a GPU; where `broken`, the end of one that failed fails too, as CUDA's does when streams
    have not met, and the pool goes on being recorded for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording: set[int] = set()
        self.released: list[int] = []
        self.stream, self.broken, self.pools = "usual", False, 0
        captures = self

        class Graph:
            def replay(self) -> None: ...

        class Capturing:
            def __init__(self, graph: Graph, pool: int, **_: Any) -> None:
                self.pool, self.before = pool, captures.stream

            def __enter__(self) -> None:
                if self.pool in captures.recording:
                    raise RuntimeError("already recording to mempool_id")
                captures.recording.add(self.pool)
                captures.stream = "capture"

            def __exit__(self, kind: Any, *_: object) -> None:
                if kind is not None and captures.broken:
                    raise RuntimeError("capturing stream has unjoined work")
                captures.recording.remove(self.pool)
                captures.stream = self.before

        def end(device: int, pool: int) -> None:
            if pool not in captures.recording:
                raise RuntimeError("not recording to mempool_id")
            captures.recording.remove(pool)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.new_pool)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        release = lambda device, pool: self.released.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools


def test_what_cannot_be_captured_is_launched_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captures = Captures(monkeypatch)
    replayer, done = Replayer(torch.device("cpu"), capture=True), []
    for _ in range(4):  # launched, captured and replayed, replayed, replayed
        replayer.run("step", (1, 2), lambda: done.append(1))
    assert (len(done), replayer.captures, replayer.replays) == (2, 1, 3)
    replayer.drop(lambda key: key[0] == 1)
    replayer.run("step", (1, 2), lambda: done.append(1))
    assert len(done) == 3 and replayer.replays == 4  # captured at once: what it launches was launched before

    calls = []

    def waits() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    for _ in range(4):
        replayer.run("odd", (1,), waits)
    assert len(calls) == 5 and replayer.captures == 2
    replayer.drop(lambda key: True)

    def compiles() -> None:
        done.append(1)
        if len(done) == 5:  # in the capture that was tried at once
            raise RuntimeError("a kernel that was not there")

    for _ in range(2):
        replayer.run("step", (3, 2), compiles)
    assert "step" not in replayer.refused and replayer.captures == 3
    assert [r.message.count("cannot be captured") for r in caplog.records] == [1]
    assert not captures.recording and not captures.released and captures.stream == "usual"


def test_what_launches_known_kernels_is_captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Captures(monkeypatch)
    replayer, done = Replayer(torch.device("cpu"), capture=True), []
    for width in (3, 4):
        replayer.run("step", (1, 2, width), lambda: done.append(1), alike=(2,))
    assert (len(done), replayer.captures, replayer.replays) == (2, 1, 1)
    replayer.run("step", (1, 5, 4), lambda: done.append(1), alike=(5,))
    assert (len(done), replayer.captures, replayer.replays) == (3, 1, 1)


def test_a_capture_whose_end_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch then goes on recording for the pool: no capture could use it, and no memory would be given back."""
    captures = Captures(monkeypatch)
    captures.broken = True
    replayer, calls = Replayer(torch.device("cpu"), capture=True), []
    for _ in range(3):
        replayer.run("step", (1, 2), lambda: calls.append(1))
    assert (len(calls), replayer.captures) == (2, 1)

    def fails_once() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("a kernel that was not there")

    for _ in range(2):
        replayer.run("odd", (1, 2), fails_once)
    assert replayer.refused == {"odd": "ValueError: a kernel that was not there"}  # and not what the end said
    assert not captures.recording and captures.released == [1] and captures.stream == "usual"
    for _ in range(3):  # graphs of that pool are made anew, in another one
        replayer.run("step", (1, 2), lambda: calls.append(1))
    assert replayer.captures == 2 and captures.pools == 2 and "step" not in replayer.refused


def test_a_pause_between_requests_keeps_the_memory_under_captured_steps() -> None:
    """With the memory the captures would go, and every request after a pause would have to make them again."""
    engine = tiny_engine(decode="static")
    ask(engine, request("one", prompt(41, 1), 12))
    store = engine.lanes.current.store
    generation, unused = store.generation, engine.lanes.unused_nbytes
    assert unused > 0
    assert engine.trim(keep_bytes=unused) == 0 and store.generation == generation
    again = ask(engine, request("two", prompt(41, 1), 12))
    assert store.generation == generation  # what was there was enough
    assert engine.trim(keep_bytes=unused - 1) > 0 and store.generation > generation
    assert ask(engine, request("two", prompt(41, 1), 12)) == again
    eager = tiny_engine(decode="eager")
    ask(eager, request("one", prompt(41, 1), 12))
    assert eager.trim(keep_bytes=1 << 30) > 0  # nothing is captured there


def test_a_pool_ends_with_its_last_graph() -> None:
    """torch asserts where a capture goes into a pool whose graphs are all gone: nothing would be captured any more."""
    replayer = Replayer(torch.device("cpu"), True)
    replayer.graphs = {("step", (1, 8)): 1, ("sampling", (0, 8)): 2}
    replayer._warm = {*replayer.graphs}
    replayer._pool = (0, 7)
    replayer.drop(lambda key: key[0] == 1)
    assert list(replayer.graphs) == [("sampling", (0, 8))] and replayer._pool == (0, 7)
    replayer.drop(lambda key: True)
    assert not replayer.graphs and replayer._pool is None

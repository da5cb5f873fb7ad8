"""Short chunks of prompts as rows of a decode step, against the ordinary forward and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from spectral.codec import Codebook, ExactCodec
from spectral.engine import lanes
from spectral.engine.chunk_step import Bounds, chunk_rows, wide_blocks
from spectral.engine.engine import Engine
from spectral.engine.graphs import CHUNK, FIRST, ORDINARY, DecodeGraphs
from spectral.engine.types import EngineLimits, Event, Failed, Finished
from spectral.hf import LoadedModel
from spectral.kernels.choices import Shape
from spectral.pages import PageStore
from tests.spectral.engine.engine_helpers import Letters, answer, ask, drive, request, tiny_engine
from tests.spectral.helpers import FAMILIES, SMALL, random_codebook, random_model

PREFIX = 128
TAILS = (2, 3, 7, 8, 9, 31, 32, 33, 64)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def lossless(loaded: LoadedModel) -> Codebook:
    """Uncompressed pages behind an exact window: numbers are those of a plain cache."""
    layers = [
        None
        if layer.sliding
        else ExactCodec(
            kv_heads=layer.kv_heads, key_dim=layer.key_dim, value_dim=layer.value_dim, page_tokens=8,
            dtype=torch.float32,
        )
        for layer in loaded.shape.layers
    ]  # fmt: skip
    return Codebook("lossless", "", 4, 64, 8, layers)


def engine_of(family: str = "qwen3", *, bits: int | None = 8, decode: str = "static", **limits: Any) -> Engine:
    """An engine with a window of 64 tokens, checked after every step; `bits` of its window, None for `lossless`."""
    loaded = random_model(family)
    loaded.eos_token_ids, loaded.tokenizer = set(), Letters()
    if bits is None:
        book = lossless(loaded)
    else:
        book = random_codebook(loaded.shape, [6, 4, 2, 0], sinks=4, window=64, page=8, window_bits=bits)
    values = {"prefill_chunk": 128, "token_budget": 256, "max_concurrency": 8, **limits}
    return Engine(
        loaded, codebook=book, setting=book.setting, limits=EngineLimits(**values), checked=True, decode=decode
    )


@pytest.fixture
def float_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of an engine's stores keep float32."""
    original = PageStore
    monkeypatch.setattr(lanes, "PageStore", lambda *a, **k: original(*a, **{**k, "window_dtype": torch.float32}))


def graphs(engine: Engine) -> DecodeGraphs:
    assert engine.runner.graphs is not None
    return engine.runner.graphs


def generated(loaded: LoadedModel, tokens: list[int], count: int) -> list[int]:
    out = loaded.model.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found: list[int] = out[0, len(tokens) :].tolist()
    return found


@pytest.mark.usefixtures("float_windows")
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_without_loss_it_is_what_transformers_generates(family: str) -> None:
    """Gemma's sliding layers see 24 tokens: longer chunks are not for a decode step there."""
    engine = engine_of(family, bits=None)
    short = [tail for tail in TAILS if family == "qwen3" or tail <= 24]
    prefix = prompt(PREFIX, 0)
    ask(engine, request("first", [*prefix, 5], 2))
    for number, tail in enumerate(short, start=1):
        tokens = [*prefix, *prompt(tail, tail)]
        assert ask(engine, request("a", tokens, 12))["a"] == generated(engine.loaded, tokens, 12), tail
        assert graphs(engine).chunk_steps == number
    assert engine.stats().prefix_reused == PREFIX * len(short)


@pytest.mark.usefixtures("float_windows")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral-sliding"])
def test_short_prompts_are_what_transformers_generates(family: str) -> None:
    """From their beginning, alone and several in a step: sinks are kept as sinks."""
    engine = engine_of(family, bits=None)
    prompts = [prompt(count, count) for count in TAILS if 4 < count <= (64 if family == "qwen3" else 24)]
    expected = [generated(engine.loaded, tokens, 90) for tokens in prompts]
    for number, (tokens, answer_) in enumerate(zip(prompts, expected, strict=True), start=1):
        assert ask(engine, request("a", tokens, 90))["a"] == answer_, len(tokens)
        assert graphs(engine).chunk_steps == number
    together = ask(engine, *(request(f"r{i}", tokens, 90) for i, tokens in enumerate(prompts)))
    assert [together[f"r{i}"] for i in range(len(prompts))] == expected
    assert len(prompts) < graphs(engine).chunk_steps < 2 * len(prompts)


def first_logits(engine: Engine, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The logits that the prompt's first answer token is chosen from."""
    found: list[torch.Tensor] = []
    if engine.runner.graphs is None:
        run = engine.runner.run

        def ordinary(part: Any) -> Any:
            sampling, logits = run(part)
            found.extend(logits.clone())
            return sampling, logits

        monkeypatch.setattr(engine.runner, "run", ordinary)
    else:
        choose = engine.runner.graphs._choose

        def static(numbers: Any, places: Any, sequences: Any, kind: Any) -> Any:
            found.extend(numbers.logits[: len(sequences)].clone())
            return choose(numbers, places, sequences, kind)

        monkeypatch.setattr(engine.runner.graphs, "_choose", static)
    ask(engine, request("probe", tokens, 1))
    return found[0]


@pytest.mark.parametrize("bits", [8, 10, 16])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_logits_are_those_of_an_ordinary_forward(family: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sealed within the chunk: rows see what they would see there."""
    for before, tail in ((PREFIX, 5), (PREFIX, 23), (0, 5), (0, 24)):
        tokens = [*prompt(before, 0), *prompt(tail, tail)]
        plain = first_logits(engine_of(family, bits=bits, decode="eager"), tokens, monkeypatch)
        engine = engine_of(family, bits=bits)
        assert torch.allclose(first_logits(engine, tokens, monkeypatch), plain, atol=2e-4, rtol=2e-4)
        assert graphs(engine).chunk_steps == 1


@pytest.mark.usefixtures("float_windows")
def test_logits_are_those_of_decoding_where_no_page_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens leave three until then, and what the window keeps here is what the model made."""
    tokens = [*prompt(PREFIX, 0), *prompt(3, 9)]
    engine = engine_of(bits=16)
    chunk = first_logits(engine, tokens, monkeypatch)
    assert graphs(engine).chunk_steps == 1
    engine, single = engine_of(bits=16, decode="eager"), []
    usual = engine.scheduler._take

    def one_by_one(work: Any, sequence: Any, budget: int, must: bool) -> int:
        if sequence.row.length < PREFIX:
            return usual(work, sequence, budget, must)
        work.append((sequence, 1))
        single.append(sequence.row.length)
        return budget - 1

    monkeypatch.setattr(engine.scheduler, "_take", one_by_one)
    assert torch.allclose(first_logits(engine, tokens, monkeypatch), chunk, atol=2e-4, rtol=2e-4)
    assert len(single) == 2  # the last one is a decode step by itself


def test_through_the_kernels_logits_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that has a page and seals another one within the chunk; one layer, since interpreters are slow."""
    found = []
    monkeypatch.setattr("spectral.engine.chunk_step.FEW_ROWS", 2)
    monkeypatch.setattr("spectral.engine.static_step.BLOCK_PAGES", 16)
    monkeypatch.setitem(FAMILIES, "one", LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    for choice in ("reference", "triton"):
        monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
        loaded = random_model("one")
        loaded.eos_token_ids, loaded.tokenizer = set(), Letters()
        book = random_codebook(loaded.shape, [4], sinks=2, window=16, page=8, block=128, window_bits=8)
        limits = EngineLimits(prefill_chunk=32, token_budget=64, max_concurrency=4)
        engine = Engine(loaded, codebook=book, setting="test", limits=limits, checked=True, decode="static")
        run = engine.runner.run

        def ordinary(part: Any, run: Any = run, choice: str = choice) -> Any:
            done = run(part)
            monkeypatch.setenv("SPECTRAL_ATTENTION", choice)
            return done

        monkeypatch.setattr(engine.runner, "run", ordinary)
        found.append(first_logits(engine, prompt(34, 2), monkeypatch))
        assert graphs(engine).chunk_steps == 1
    assert (found[1] - found[0]).norm() < 3e-3 * found[0].norm()  # 5e-4 here; what one stale place adds is 8e-3


def test_a_short_prompt_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits, and those of the token behind it, which reads what the step has written."""
    found = []
    monkeypatch.setitem(FAMILIES, "one", LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    for choice in ("reference", "triton"):
        monkeypatch.setenv("SPECTRAL_ATTENTION", choice)
        loaded = random_model("one")
        loaded.eos_token_ids, loaded.tokenizer = set(), Letters()
        book = random_codebook(loaded.shape, [4], sinks=2, window=16, page=8, block=128, window_bits=8)
        limits = EngineLimits(prefill_chunk=32, token_budget=64, max_concurrency=4)
        engine = Engine(loaded, codebook=book, setting="test", limits=limits, checked=True, decode="static")
        logits: list[torch.Tensor] = []
        choose = graphs(engine)._choose

        def kept(numbers: Any, *others: Any, logits: list[torch.Tensor] = logits, choose: Any = choose) -> Any:
            logits.append(numbers.logits[0].clone())
            return choose(numbers, *others)

        monkeypatch.setattr(graphs(engine), "_choose", kept)
        ask(engine, request("probe", prompt(13, 2), 2))
        assert (graphs(engine).chunk_steps, graphs(engine).steps) == (1, 1)
        found.append(torch.stack(logits))
    assert (found[1] - found[0]).norm() < 1e-3 * found[0].norm()


@pytest.mark.usefixtures("float_windows")
def test_several_at_once_share_steps_and_answer_as_alone() -> None:
    engine = engine_of("llama", bits=None)
    prefix, tails = prompt(PREFIX, 0), (3, 20, 33, 64, 9, 1)
    ask(engine, request("first", [*prefix, 5], 2))
    requests = [request(f"r{tail}", [*prefix, *prompt(tail, tail)], 15) for tail in tails]
    got = ask(engine, *requests)
    assert got == {each.request_id: generated(engine.loaded, list(each.prompt), 15) for each in requests}  # type: ignore[arg-type]
    assert graphs(engine).chunk_steps == 3  # 3, 20 and 33 together; 64; 9. One token is a decode step


@pytest.mark.parametrize(("length", "kv_limit"), [(40, None), (300, 1.5)])
def test_steps_that_break_off_and_requests_that_end_lose_nothing(
    length: int, kv_limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 16 tokens, so that all but the first are of this kind; errors before, within and behind a forward."""
    texts = [prompt(length + 7 * i, i) for i in range(4)]
    wanted = [ask(tiny_engine(decode="eager", prefill_chunk=16), request("x", text, 20))["x"] for text in texts]
    limit = {}
    if kv_limit is not None:
        free = tiny_engine()
        limit = {"max_kv_bytes": int(free.store.bytes_per_token(length) * length * kv_limit), "prefix_bytes": 1 << 30}
    engine = tiny_engine(decode="static", prefill_chunk=16, **limit)
    engine.faults.victims = lambda error, work: []  # type: ignore[method-assign, assignment]
    own, calls = graphs(engine).replayer.run, []

    def fails(what: str, key: Any, launch: Any, *more: Any) -> None:
        calls.append(what)
        if what == "chunk step" and calls.count(what) in (2, 5):
            raise RuntimeError("injected before")
        own(what, key, launch, *more)
        if what == "chunk step" and calls.count(what) in (3, 6):
            raise RuntimeError("injected behind")

    monkeypatch.setattr(graphs(engine).replayer, "run", fails)
    for i, text in enumerate(texts):
        engine.submit(request(f"r{i}", text, 20))
    engine.submit(request("gone", prompt(length, 9), 20))

    def disturb(step: int) -> None:
        if step == 4:
            engine.cancel("gone")
        if step in (6, 9):
            for name in engine.live:
                engine.park(name)

    events = drive(engine, disturb)
    assert [answer(events, f"r{i}") for i in range(4)] == wanted
    assert calls.count("chunk step") > 6
    assert engine.stats().preemptions
    engine.check()
    assert engine.store.rows == 0


@pytest.mark.parametrize("setting", ["test", "lossless"])
def test_ways_to_sample_choose_what_an_ordinary_forward_is_followed_by(setting: str) -> None:
    sampling: list[dict[str, Any]] = [
        {},
        {"temperature": 1.1, "seed": 3},
        {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3},
        {"temperature": 1.0, "typical_p": 0.5, "seed": 5, "logprobs": 2},
        {"logit_bias": {5: -3.0, 7: 2.0}, "frequency_penalty": 0.7},
    ]
    found = []
    for decode in ("eager", "static"):
        engine = engine_of(bits=8 if setting == "test" else None, decode=decode)
        prefix = prompt(PREFIX, 1)
        requests = [
            request(f"r{i}", [*prefix, *prompt(4 + 9 * i, i)], 12, sampling=each) for i, each in enumerate(sampling)
        ]
        found.append([ask(engine, request("first", [*prefix, 5], 1)), ask(engine, *requests)])
        if decode == "static":
            assert graphs(engine).chunk_steps == 3  # 4, 13 and 22; 31; 40: a step has 64 tokens at most
    assert found[0] == found[1]


def test_what_is_not_finite_stays_with_its_sequence() -> None:
    """In a step with another one, in a chunk that ends its prompt and in one that does not."""
    bad, good = 91, [5 + i * 7 % 80 for i in range(PREFIX)]
    for place in (PREFIX + 3, 40):
        engine = engine_of(prefill_chunk=32)
        with torch.no_grad():
            embedding = engine.loaded.model.get_input_embeddings()
            engine.loaded.model.lm_head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
            embedding.weight[bad] = float("nan")
        text = [*good, *prompt(9, 3)]
        right = ask(engine, request("right", text, 12))["right"]
        broken = [*text[:place], bad, *text[place + 1 :], 7]
        for name, tokens in (("a", broken), ("b", text), ("c", text)):
            engine.submit(request(name, tokens, 12))
        events: list[Event] = []
        while engine.has_work:
            events += engine.step()
        assert [event.request_id for event in events if isinstance(event, Failed)] == ["a"]
        assert answer(events, "b") == answer(events, "c") == right
        assert {event.request_id for event in events if isinstance(event, Finished)} == {"b", "c"}


class Recorded:
    """In place of a CUDA graph: a capture runs nothing, a replay runs what was captured."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.replay = launch


def test_behind_a_reused_prefix_everything_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that grows between prefixes ends what was captured; the first request captures it anew, and the second
    with the same prefix captures nothing."""
    prefixes, tails = [prompt(PREFIX, 20 + i) for i in range(3)], [prompt(20, i) for i in range(2)]
    texts = [[*prefix, *tail] for prefix in prefixes for tail in tails]
    plain = engine_of()
    wanted = [ask(plain, request("a", text, 4))["a"] for text in texts]
    engine = engine_of()
    replayer, captured = graphs(engine).replayer, []

    def capture(what: str, key: Any, launch: Any, launched: bool) -> Recorded:
        captured.append(what)
        replayer.graphs[what, key] = Recorded(launch)
        return replayer.graphs[what, key]

    monkeypatch.setattr(replayer, "_capture", True)
    monkeypatch.setattr(replayer, "_try", capture)
    each = []
    for number, (text, expected) in enumerate(zip(texts, wanted, strict=True)):
        if number in (2, 4):
            engine.store._grow_pages(1)
        captured.clear()
        assert ask(engine, request("a", text, 4))["a"] == expected
        each.append(captured.count("chunk step"))
    assert each == [0, 1, 1, 0, 1, 0] and captured == []
    assert graphs(engine).chunk_steps == 6


def test_which_chunks_run_like_this() -> None:
    """By the sequence and the model: those behind the sinks, no longer than window, step and sliding layers, over no
    more pages than reading by rows is good for; none that are scored, none without an exact window."""

    def ways(engine: Engine, length: int, *counts: int) -> list[str]:
        engine.submit(request("a", prompt(length + 100, 1)))
        engine.step()
        (sequence,) = engine.scheduler.running
        sequence.row.length = length
        found = [graphs(engine).way(sequence, count) for count in counts]
        engine.scheduler.remove(sequence)
        return found

    assert ways(engine_of(), 128, 1, 2, 64, 65) == [CHUNK, CHUNK, CHUNK, ORDINARY]
    assert ways(tiny_engine(decode="static"), 32, 16, 17) == [CHUNK, ORDINARY]  # the window
    assert ways(engine_of("mistral-sliding"), 128, 2) == [CHUNK]  # all layers slide
    assert ways(engine_of("gemma2"), 128, 24, 25) == [CHUNK, ORDINARY]
    assert ways(engine_of(), 3, 20) == [ORDINARY]  # some of its tokens are sinks
    assert ways(engine_of(), 0, 4, 5, 64, 65) == [ORDINARY, FIRST, FIRST, ORDINARY]  # and here some are none
    assert ways(tiny_engine(setting="exact", decode="static"), 32, 8) == [ORDINARY]


def test_bounds_on_what_rows_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    engine.submit(request("a", prompt(140, 1)))
    engine.step()
    (sequence,) = engine.scheduler.running
    work = [(sequence, 12)]
    assert chunk_rows(work) == (16, 1) and chunk_rows(work * 2) == (64, 8)
    bounds = Bounds(engine.loaded, engine.store)
    assert bounds.hold(work) and bounds.hold(work * 5) and not bounds.hold(work * 6)
    assert not bounds.hold([(sequence, 2)] * 9)
    monkeypatch.setattr("spectral.engine.chunk_step.MOST_READ", 16 * 32)
    assert bounds.hold(work) and not bounds.hold([(sequence, 17)])
    monkeypatch.setattr("spectral.engine.chunk_step.MOST_COPIED", 1 << 20)
    assert not bounds.hold(work)
    drive(engine)


def test_few_rows_have_wide_page_tables_where_several_programs_share_a_block() -> None:
    """Two units of 16 query heads, a model whose blocks are many programs, and one whose pages the reference reads."""
    assert [wide_blocks(rows, 2, 48) for rows in (1, 2, 4, 8, 16, 32)] == [8, 8, 4, 2, 1, 1]
    assert [wide_blocks(rows, 12, 48) for rows in (1, 2, 8)] == [4, 2, 1]
    assert [wide_blocks(rows, 2, 16) for rows in (1, 2, 4)] == [8, 4, 2]
    assert wide_blocks(1, 0, 48) == 1 and wide_blocks(1, 2, 0) == 1
    engine = tiny_engine(decode="static")
    bounds = Bounds(engine.loaded, engine.store)
    assert bounds.width(1, 0) == 0 and bounds.width(1, 1) == bounds.width(16, 1)  # on a CPU
    bounds._programs = 2
    bounds._most = torch.device("cpu"), Shape(4, 2, 8, 8, 16, 32)
    assert bounds.width(1, 1) == 8 * bounds.width(16, 1) and bounds.width(1, 0) == 0

"""Compiling a grammar takes as long as its patterns multiply to: it is bounded, and nobody else waits for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from spectral import hf
from spectral.engine import child_process
from spectral.engine import grammar as module
from spectral.engine.child_process import ChildFailed
from spectral.engine.engine import Engine
from spectral.engine.grammar import SECONDS, TOO_COMPLEX, GrammarCompiler
from spectral.engine.types import Failed, Finished, GenerateRequest, Grammar, SamplingParams
from spectral.errors import RequestError

LIMIT = 1.0
LETTERS = "abcdefghijklmnopqrstuvwx"
PATTERNS = [f"[a-z]*{letter}[a-z]{{{length}}}" for length, letter in enumerate(LETTERS, start=1)]
HOSTILE = Grammar("json_schema", json.dumps({"allOf": [{"type": "string", "pattern": p} for p in PATTERNS]}))
JOINED = " & ".join(rf"/(.|\n)*{pattern}(.|\n)*/" for pattern in PATTERNS[:16])
HOSTILE_LARK = Grammar("lark", f'start: A\nA: "z" | ("y" B)\nB: {JOINED}')
ORDINARY = Grammar("json_schema", '{"type": "object", "properties": {"a": {"enum": ["b", "c"]}}}')


@pytest.fixture(scope="module")
def demo() -> Iterator[hf.LoadedModel]:
    yield hf.load_model("demo-7m", device="cpu")


@pytest.fixture
def compiler(demo: hf.LoadedModel) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(demo.tokenizer, 8192, demo.eos_token_ids, seconds=LIMIT)
    yield made
    made._child.close()


def refused(compiler: GrammarCompiler, grammar: Grammar) -> RequestError:
    with pytest.raises(RequestError) as caught:
        compiler.start(grammar)
    return caught.value


@pytest.mark.parametrize(("grammar", "remedy"), [(HOSTILE, "joined by allOf"), (HOSTILE_LARK, "joined by &")])
def test_patterns_that_multiply_are_refused_in_time_and_remembered(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, grammar: Grammar, remedy: str
) -> None:
    compiler.prepare(ORDINARY)  # the process is there
    began = time.monotonic()
    error = refused(compiler, grammar)
    assert time.monotonic() - began < 10 * LIMIT
    assert (error.param, error.code) == ("grammar", TOO_COMPLEX)
    assert f"takes more than {LIMIT:g} s to compile" in str(error) and remedy in str(error)

    assert compiler.known(grammar) and not compiler.known(Grammar("regex", "new"))
    with monkeypatch.context() as patch:
        patch.setattr(compiler._child, "ask", lambda asked: pytest.fail("it was looked at again"))
        assert str(refused(compiler, grammar)) == str(error)
        compiler.start(ORDINARY)
    compiler.prepare(Grammar("regex", "new"))  # in a new process
    assert compiler.known(Grammar("regex", "new"))


def test_the_engine_refuses_them_and_goes_on(demo: hf.LoadedModel) -> None:
    engine = Engine(demo)
    with pytest.raises(RequestError, match=f"more than {SECONDS:g} s") as caught:
        engine.submit(GenerateRequest("a", "Hi", SamplingParams(grammar=HOSTILE_LARK)))
    assert caught.value.code == TOO_COMPLEX and not engine.has_work
    engine.submit(GenerateRequest("b", "Hi", SamplingParams(grammar=ORDINARY, max_tokens=20)))
    while engine.has_work:
        engine.step()
    assert engine.finished["failed"] == 0 and sum(engine.finished.values()) == 1


def test_a_refusal_is_looked_at_again_after_a_while(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Grammar("regex", "[a")
    refused(compiler, bad)
    assert compiler.known(bad)
    monkeypatch.setattr(module, "REFUSED_SECONDS", 0.0)
    refused(compiler, Grammar("regex", "[b"))
    assert not compiler.known(Grammar("regex", "[b")) and compiler.known(bad)


def test_what_is_kept_is_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    for text in ("a", "[1", "b", "[2", "c", "[3"):
        (refused if "[" in text else GrammarCompiler.start)(compiler, Grammar("regex", text))
    known = [text for text in ("a", "b", "c", "[1", "[2", "[3") if compiler.known(Grammar("regex", text))]
    assert known == ["b", "c", "[2", "[3"]


def test_a_process_that_ends_is_the_grammars_memory(compiler: GrammarCompiler) -> None:
    compiler.prepare(ORDINARY)
    assert compiler._child._process is not None
    threading.Timer(0.2, compiler._child._process.kill).start()
    assert "more than 512 MiB of memory" in str(refused(compiler, HOSTILE))


def test_a_process_that_does_not_start_is_not_the_grammars_fault(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(child_process, "START_SECONDS", 0.0)
        with pytest.raises(ChildFailed, match="did not start within 0 s"):
            compiler.start(ORDINARY)
    assert not compiler.known(ORDINARY)
    compiler.start(ORDINARY)
    assert compiler.known(ORDINARY)


def test_the_process_ends_with_its_compiler(demo: hf.LoadedModel) -> None:
    compiler = GrammarCompiler(demo.tokenizer, 8192, demo.eos_token_ids)
    compiler.prepare(ORDINARY)
    process = compiler._child._process
    assert process is not None and process.poll() is None
    del compiler
    assert process.poll() is not None


def test_a_mask_that_takes_too_much_ends_the_answer(demo: hf.LoadedModel, compiler: GrammarCompiler) -> None:
    """What the compiler does not come to see: patterns that are joined behind forty characters."""
    late = [{"type": "string", "pattern": f"^(z|y{{40}}{pattern}.*)$"} for pattern in PATTERNS[:12]]
    state = compiler.start(Grammar("json_schema", json.dumps({"allOf": late})))
    for token in demo.tokenizer('"' + "y" * 60, add_special_tokens=False)["input_ids"]:
        began = time.monotonic()
        state.forbid(torch.zeros(8192))
        assert time.monotonic() - began < 10 * LIMIT
        if state.error is not None:
            break
        state.accept(token)
    assert state.error is not None and (state.error.param, state.error.code) == ("grammar", TOO_COMPLEX)
    assert "make it simpler" in str(state.error)


AMBIGUOUS = Grammar("lark", r"start: s" "\n" r"s: s s | s s s | /(.|\n)/")


def test_masks_that_are_slow_again_and_again_end_the_answer(demo: hf.LoadedModel) -> None:
    engine = Engine(demo)
    slow = SamplingParams(max_tokens=2000, ignore_eos=True, grammar=AMBIGUOUS)
    engine.submit(GenerateRequest("slow", "Hi", slow))
    engine.submit(GenerateRequest("free", "Hi", SamplingParams(max_tokens=5, ignore_eos=True)))
    events = []
    while engine.has_work:
        events += engine.step()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert isinstance(failed.error, RequestError) and failed.error.code == TOO_COMPLEX
    assert "its steps take too long" in str(failed.error)
    assert failed.request_id == "slow" and [e.request_id for e in events if isinstance(e, Finished)] == ["free"]


def test_an_answer_has_time_for_its_masks_by_the_token(
    demo: hf.LoadedModel, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.5, 0.5, 0.5, 1.0, 1.1, 1.1, 1.2, 2.0, 2.3, 2.3, 2.4])  # 0.5 s, then 0.2, then 0.4
    monkeypatch.setattr(module.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(module, "MASK_SECONDS", 0.02)
    state, errors = compiler.start(Grammar("regex", "a+")), []
    (token,) = demo.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    for _ in range(3):
        state.forbid(torch.zeros(8192))
        state.accept(token)
        errors.append(state.error)
    assert errors[:2] == [None, None] and "its steps take too long" in str(errors[2])


@pytest.mark.parametrize(
    ("kind", "text", "begun"),
    [
        ("lark", 'start: "n" Y "y"\nY: /y+/', "n"),
        ("lark", '%llguidance {"no_forcing": false}\nstart: "n" Y "y"\nY: /y+/', "n"),
        ("lark", "start: A (B A)*\nA: /y/\nB: /[a-z]y+/", "yn"),
        ("gbnf", 'root ::= a (b a)*\na ::= "y"\nb ::= [a-z] "y"+', "yn"),
    ],
)
def test_a_terminal_that_takes_all_that_could_follow_does_not_hang(
    compiler: GrammarCompiler, kind: str, text: str, begun: str
) -> None:
    state = compiler.start(Grammar(kind, text))
    for token in state._vocabulary.greedy_tokenize(begun):
        state.accept(token)
    for _ in range(5):
        logits = torch.zeros(8192)
        state.forbid(logits)
        assert state.error is None
        state.accept(int(torch.nonzero(logits == 0)[-1]))


@pytest.mark.parametrize("text", ["%llguidance {\n}\nstart: /a/", '%llguidance {}\n%llguidance {}\nstart: "a"'])
def test_options_of_lark_stand_on_one_line(compiler: GrammarCompiler, text: str) -> None:
    error = refused(compiler, Grammar("lark", text))
    assert error.param == "grammar" and "cannot be read" in str(error)

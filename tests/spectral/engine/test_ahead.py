"""Decode steps that are launched before the tokens of the one before are read, against those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.engine import graphs as graphs_module
from spectral.engine import sampler
from spectral.engine.ahead import Ahead
from spectral.engine.engine import Engine
from spectral.engine.types import GenerateRequest
from spectral.page_ids import PageIds
from tests.spectral.engine.engine_helpers import answer, ask, drive, request, squeeze_twice, tiny_engine
from tests.spectral.engine.test_engine_stateful import LOADED, Ladder
from tests.spectral.engine.test_static_step import SAMPLING, graphs, prompt
from tests.spectral.helpers import FAMILIES

LENGTHS = (5, 41, 70, 23, 4)


def requests(counts: tuple[int, ...], sampling: list[dict[str, Any]] | None = None) -> list[GenerateRequest]:
    sampling = sampling or [{}] * len(counts)
    return [request(f"r{i}", prompt(LENGTHS[i], i), n, sampling=sampling[i]) for i, n in enumerate(counts)]


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the engine's replayer runs from now on, by what it is called."""
    replayer, seen = graphs(engine).replayer, Counter[str]()
    own = replayer.run

    def run(what: str, key: Any, launch: Callable[[], None], *more: Any) -> None:
        seen[what] += 1
        own(what, key, launch, *more)

    monkeypatch.setattr(replayer, "run", run)
    return seen


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("setting", ["test", "exact"])
def test_the_same_tokens(family: str, setting: str) -> None:
    wanted = ask(tiny_engine(family, setting=setting, decode="static"), *requests((40,) * 5))
    engine = tiny_engine(family, setting=setting, ahead=True)
    assert ask(engine, *requests((40,) * 5)) == wanted
    assert graphs(engine).steps_ahead > 25


@pytest.mark.parametrize("window_bits", [8, 16])
def test_the_same_tokens_however_they_are_chosen_and_whenever_rows_end(window_bits: int) -> None:
    counts, how = (40, 13, 29, 52, 7), {"window_bits": window_bits, "max_concurrency": 5}
    wanted = ask(tiny_engine(decode="static", **how), *requests(counts, SAMPLING))
    engine = tiny_engine(ahead=True, **how)
    assert ask(engine, *requests(counts, SAMPLING)) == wanted
    assert graphs(engine).steps_ahead > 30


@pytest.mark.parametrize(("shortlist", "calm"), [(78, 0), (79, 8), (6, 16)])
def test_a_shortlist_that_was_too_short(shortlist: int, calm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then tokens are chosen from the step's logits, which the one that runs ahead has written over, and it is void:
    where that happens often, steps do not run ahead."""
    monkeypatch.setattr(sampler, "SHORTLIST", shortlist)
    monkeypatch.setattr(graphs_module, "CALM_STEPS", calm)
    sampling = [{"temperature": 1.1, "top_p": 0.9, "seed": i, "presence_penalty": 0.4 * i} for i in range(3)]
    wanted = ask(tiny_engine(decode="static"), *requests((40, 30, 35), sampling))
    engine = tiny_engine(ahead=True)
    seen = counted(engine, monkeypatch)
    assert ask(engine, *requests((40, 30, 35), sampling)) == wanted
    void = seen["decode step"] - graphs(engine).steps
    assert void > 10 if not calm else void <= 39 // calm
    assert graphs(engine).steps_ahead > 5 or shortlist == 6


def test_what_the_host_chooses_is_not_run_ahead() -> None:
    engine = tiny_engine(ahead=True)
    ask(engine, *requests((20,), [{"logprobs": 2}]))
    assert graphs(engine).steps > 15 and not graphs(engine).steps_ahead


def test_no_step_is_lost_where_lengths_say_when_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(ahead=True)
    seen = counted(engine, monkeypatch)
    ask(engine, *requests((40, 13, 29, 52)))
    assert seen["decode step"] == graphs(engine).steps and graphs(engine).steps_ahead > 40


def test_rows_that_go_on_take_what_was_computed_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop strings end rows when nobody can know; pages that they had are free then, and the others get those that
    were foreseen for them."""
    counts = (60, 60, 60, 60)
    texts = ask(tiny_engine(decode="static"), *requests(counts))
    ends: list[dict[str, Any]] = [{"stop": ["".join(chr(97 + t % 26) for t in texts[f"r{i}"][9 * i : 9 * i + 4])]}
                                  for i in range(3)]  # fmt: skip
    wanted = ask(tiny_engine(decode="static"), *requests(counts, [*ends, {}]))
    assert sorted(len(tokens) for tokens in wanted.values())[2] < 60
    engine = tiny_engine(ahead=True)
    seen = counted(engine, monkeypatch)
    assert ask(engine, *requests(counts, [*ends, {}])) == wanted
    assert seen["decode step"] == graphs(engine).steps


def disturbed(engine: Engine) -> dict[str, list[int]]:
    """Answers while rows are parked, memory is trimmed, a request is cancelled and others come."""
    for i in range(3):
        engine.submit(request(f"r{i}", prompt(20 + 13 * i, i), 60))

    def disturb(step: int) -> None:
        if step in (15, 31):
            engine.park("r1")
        if step == 22:
            engine.submit(request("later", prompt(50, 9), 20))
        if step in (25, 26):
            engine.trim(prefixes=step == 26)
        if step == 28:
            engine.cancel("r2")
        if step == 35:
            engine.park("r0")

    events = drive(engine, disturb)
    return {name: answer(events, name) for name in ("r0", "r1", "r2", "later")}


def test_rows_that_leave_and_come_back() -> None:
    engine = tiny_engine(ahead=True, max_concurrency=3)
    assert disturbed(engine) == disturbed(tiny_engine(decode="static", max_concurrency=3))
    assert graphs(engine).steps_ahead > 20


@pytest.mark.parametrize("setting", ["test", "exact"])
def test_steps_that_ran_ahead_for_nothing_do_no_harm(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they wrote into windows and free pages is written again or read by nobody, in chats that go on as well."""

    def chat(engine: Engine) -> list[list[int]]:
        first = ask(engine, request("a", prompt(45, 1), 37, session="chat"))["a"]
        again = [*prompt(45, 1), *first, *prompt(30, 2)]
        return [first, ask(engine, request("b", again, 30, session="chat"))["b"]]

    wanted = chat(tiny_engine(setting=setting, decode="static"))
    monkeypatch.setattr(Ahead, "places", lambda *_: None)
    engine = tiny_engine(setting=setting, ahead=True)
    seen = counted(engine, monkeypatch)
    assert chat(engine) == wanted
    assert seen["decode step"] > 1.7 * graphs(engine).steps


def test_other_settings_wait_for_what_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(LOADED, codebook=Ladder().codebook("fine"), setting="fine", profile=Ladder(), checked=True,
                    decode="static")  # type: ignore[arg-type]  # fmt: skip
    found = graphs(engine)
    found.runs_ahead = True
    for i in range(3):
        engine.submit(request(f"r{i}", prompt(20 + 13 * i, i), 60))
    own, running = engine.lanes.set_setting, []

    def set_setting(*args: Any) -> int:
        running.append(found._ahead)
        return own(*args)

    monkeypatch.setattr(engine.lanes, "set_setting", set_setting)
    squeeze_twice(engine, "middle", "coarse")
    assert running == [None, None] and found.steps_ahead > 30


def held_pages(engine: Engine, name: str) -> list[torch.Tensor]:
    store, row = engine.store, engine._live[name][0].row
    return [store.read_pages(layer, row) for layer, pool in enumerate(store.pools) if pool is not None]


@pytest.mark.parametrize("what", ["save", "resume", "edit"])
def test_pages_that_somebody_had_in_between_are_made_anew(what: str, tmp_path: Path) -> None:
    """A page that was sealed ahead is free until its row is given it: whoever opens and closes a row before that may
    have written into it."""

    def run(engine: Engine) -> tuple[list[int], list[torch.Tensor]]:
        ask(engine, *[request(f"p{i}", prompt(60, i + 2), 9) for i in range(4)])
        first = ask(engine, request("a", prompt(60, 1), 40, session="chat"))["a"]
        file = engine.save_session("chat", tmp_path / "chat.bin")
        engine.submit(request("x", prompt(30, 7), 60))
        found: list[torch.Tensor] = []

        def each(step: int) -> None:
            if what == "edit" and step in (14, 22, 30):
                again = [*prompt(60, 1), *first][:70] + prompt(5, step)
                engine.submit(request(f"b{step}", again, 3, session="chat"))
            elif what == "save" and 5 < step < 45:
                engine.save_session("chat", tmp_path / "again.bin")
            elif what == "resume" and 5 < step < 45:
                engine.resume_session("other", file)
            if step == 45:
                found.extend(held_pages(engine, "x"))

        return answer(drive(engine, each), "x"), found

    wanted, pages = run(tiny_engine(decode="static"))
    engine = tiny_engine(ahead=True)
    text, found = run(engine)
    assert text == wanted and len(found) == len(pages) > 1 and graphs(engine).steps_ahead > 25
    assert all(torch.equal(*both) for both in zip(found, pages, strict=True))


@pytest.mark.parametrize("family", ["gemma3", "mistral-sliding", "qwen3"])
@pytest.mark.parametrize("call", [2, 4])
def test_a_step_that_breaks_off_behind_the_launch_of_the_next(
    family: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of sliding layers then have a token beyond their row's: such a row begins anew."""
    monkeypatch.setattr(sampler, "SHORTLIST", 78)
    monkeypatch.setattr(graphs_module, "CALM_STEPS", 0)
    own, calls, limit = graphs_module.sample, 0, 10**6

    def sample(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise torch.OutOfMemoryError("no memory to sort the vocabulary")
        return own(*args)

    monkeypatch.setattr(graphs_module, "sample", sample)
    asked = requests((60, 60, 60), [{"temperature": 1.1, "top_p": 0.9, "seed": i} for i in range(3)])
    wanted = ask(tiny_engine(family, setting="exact", decode="static"), *asked)
    assert calls > call, "the shortlist must be too short often enough"
    engine, calls, limit = tiny_engine(family, setting="exact", ahead=True), 0, call
    assert ask(engine, *asked) == wanted
    assert engine.faults.count == 1 and graphs(engine).steps_ahead > 5


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("where", ["_seal", "_go_ahead"])
def test_no_memory_for_what_runs_ahead_is_no_failure(
    sampling: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ask(tiny_engine(decode="static"), request("x", prompt(30, 7), 90, sampling=sampling))
    engine = tiny_engine(ahead=True)
    found, failed = graphs(engine), 0
    own = getattr(found, where)

    def refuse(*args: Any, **more: Any) -> Any:
        nonlocal failed
        if (more or where == "_go_ahead") and failed < 2:
            failed += 1
            raise torch.OutOfMemoryError("no memory for what would only have run ahead")
        return own(*args, **more)

    monkeypatch.setattr(found, where, refuse)
    assert ask(engine, request("x", prompt(30, 7), 90, sampling=sampling)) == wanted
    assert failed == 2 and engine.faults.count == 0 and found.steps_ahead > 20


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.integers(0, 3),
    st.booleans(),
)
def test_foreseen_ids_are_granted_where_they_are_free(
    foreseen: list[int], needs: list[int], between: int, given_back: bool
) -> None:
    ids = PageIds()
    ids.grow(20)
    first = ids.take(4)
    wanted = ids.foresee(dict(enumerate(foreseen)))
    assert wanted is not None and ids.free == 16, "what is foreseen stays free"
    before = {page: ids.times_taken([page])[0] for pages in wanted.values() for page in pages}
    had = taken = ids.take(between)
    if given_back:
        ids.release(taken)
        taken = []
    ids.release(first[:2])
    granted = ids.grant(dict(enumerate(needs)))
    assert [len(pages) for pages in granted.values()] == needs
    for key, pages in granted.items():
        hoped = wanted.get(key, [])
        if len(hoped) == needs[key] and not set(hoped) & set(taken):
            assert pages == hoped
        if pages == hoped:
            mine = ids.times_taken(pages) == [before[page] + 1 for page in pages]
            assert mine == (not set(pages) & set(had)), "whether anybody else had them meanwhile"
    ids.check([*first[2:], *taken, *(page for pages in granted.values() for page in pages)])
    assert ids.foresee({0: 21}) is None

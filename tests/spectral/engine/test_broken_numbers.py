"""A model whose numbers break (weights that overflow, a damaged row of an embedding) costs the request that met it, and
nothing that it left in a window or in pages reaches another one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from spectral.engine.engine import Engine
from spectral.engine.types import Event, Failed, Finished
from spectral.errors import BrokenNumbers
from tests.spectral.engine.engine_helpers import answer, ask, request, tiny_engine

BAD = 91
WARM = {"temperature": 0.8, "seed": 1}
GOOD = [5 + i * 7 % 80 for i in range(70)]


def engine_with_a_bad_token(number: float, **options: Any) -> Engine:
    """Its embedding of token BAD is not finite; no other token is touched by that."""
    engine = tiny_engine(**options)
    with torch.no_grad():
        embedding = engine.loaded.model.get_input_embeddings()
        engine.loaded.model.lm_head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        embedding.weight[BAD] = number
    return engine


@cache
def right_answer(setting: str, decode: str | None, sampling: tuple[tuple[str, Any], ...]) -> list[int]:
    """To GOOD, by an engine all of whose numbers are finite."""
    engine = engine_with_a_bad_token(0.0, setting=setting, decode=decode)
    answer_ = ask(engine, request("b", GOOD, sampling=dict(sampling)))["b"]
    assert BAD not in answer_, "take another seed"
    return answer_


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.mark.parametrize("at", [0, 45])
@pytest.mark.parametrize("decode", [None, "static"])
@pytest.mark.parametrize("setting", ["test", "exact"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, WARM, {**WARM, "top_p": 0.7}, {**WARM, "frequency_penalty": 0.5}])
def test_it_costs_one_request_and_touches_no_other(
    number: float, setting: str, decode: str | None, at: int, sampling: dict[str, Any]
) -> None:
    bad = [*GOOD[:at], BAD, *GOOD[at:]]
    right = right_answer(setting, decode, tuple(sampling.items()))
    engine = engine_with_a_bad_token(number, setting=setting, decode=decode, max_concurrency=2)
    for name, prompt in (("a", bad), ("b", GOOD)):
        engine.submit(request(name, prompt, sampling=sampling))
    events = run(engine)
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.request_id for event in failed] == ["a"] and isinstance(failed[0].error, BrokenNumbers)
    assert "not finite" in str(failed[0].error)
    assert answer(events, "b") == right
    again = []  # in the places and pages of the one that broke
    for name in ("c", "d"):
        engine.submit(request(name, GOOD, sampling=sampling))
    again = run(engine)
    assert answer(again, "c") == answer(again, "d") == right
    assert {event.request_id for event in again if isinstance(event, Finished)} == {"c", "d"}
    engine.check()


@pytest.mark.parametrize("setting", ["test", "exact"])
def test_nothing_begins_from_a_prefix_that_led_to_it(setting: str) -> None:
    """The same prompt is computed anew when the numbers are right again, the part before the bad token excepted."""
    bad = [*GOOD[:40], BAD, *GOOD[:25]]  # a chunk that is fine, one that is not, and one token
    engine = engine_with_a_bad_token(float("nan"), setting=setting)
    engine.submit(request("a", bad))
    assert any(isinstance(event, Failed) for event in run(engine))
    with torch.no_grad():
        engine.loaded.model.get_input_embeddings().weight[BAD] = 0.5
    before = engine.stats().prefix_reused
    healed = ask(engine, request("b", bad))
    assert engine.stats().prefix_reused - before == 32
    assert ask(engine_with_a_bad_token(0.5, setting=setting), request("b", bad)) == healed


@pytest.mark.parametrize("setting", ["test", "exact"])
def test_a_last_chunk_of_one_token_knows_of_the_chunks_before_it(setting: str) -> None:
    engine = engine_with_a_bad_token(float("nan"), setting=setting, decode="static")
    engine.submit(request("a", [BAD, *GOOD[:64]]))
    assert any(isinstance(event, Failed) for event in run(engine))

"""The text side of a choice: which tokens are the answer's, and where each stands in its text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from spectral.engine.answer import Answer
from spectral.engine.engine import Engine
from spectral.engine.types import Delta, Finished, GenerateRequest, Logprob, SamplingParams
from spectral.hf import load_model

PIECES = ["a", "b", "ab", " J", "st", " fif", "t", "é".encode()[:1], "é".encode()[1:], ""]
"""Tokens; two of them are halves of a character, and the last is not shown."""


def decode(ids: list[int]) -> str:
    found = (PIECES[i] for i in ids)
    return b"".join(p if isinstance(p, bytes) else p.encode() for p in found).decode(errors="replace")


def collect(tokens: list[int], **how: Any) -> tuple[str, list[tuple[int, int]], list[Delta], str | None]:
    """The text, (token, offset) of what has log probabilities, the deltas, and the reason of the end."""
    answer = Answer(decode, limit=how.pop("limit", 100), logprobs=True, **how)
    deltas, reason = [], None
    for token in tokens:
        reason = answer.push(token, Logprob(token, -1.0))
        if (delta := answer.take("r", 0, last=reason is not None)) is not None:
            deltas.append(delta)
        if reason is not None:
            break
    told = [(item.token_id, item.offset) for delta in deltas for item in delta.logprobs or ()]
    assert answer.count == sum(len(delta.token_ids) for delta in deltas)
    return "".join(delta.text for delta in deltas), told, deltas, reason


def test_tokens_behind_a_stop_string_are_not_the_answers() -> None:
    text, told, deltas, reason = collect([0, 3, 4, 5, 6], stops=["st fif"])
    assert (text, told, reason) == ("a J", [(0, 0), (3, 1)], "stop")
    assert sum(len(delta.token_ids) for delta in deltas) == 4  # what was generated is counted all the same
    text, told, _, _ = collect([0, 2, 6, 4], stops=["bt"])
    assert (text, told) == ("aa", [(0, 0), (2, 1)])  # a token that the cut goes through stays


def test_a_held_token_is_not_told_before_its_text() -> None:
    text, told, deltas, _ = collect([0, 0, 0, 1], stops=["aab"])
    assert (text, told) == ("a", [(0, 0)]) and deltas[0].logprobs is not None and len(deltas[0].logprobs) == 1


def test_the_token_that_ends_an_answer_is_not_listed_and_one_without_text_is() -> None:
    assert collect([0, 9, 1, 9], ends={8}, limit=4)[1] == [(0, 0), (9, 1), (1, 1), (9, 2)]
    text, told, deltas, reason = collect([0, 9, 6], ends={6})
    assert (text, told, reason) == ("a", [(0, 0), (9, 1)], "stop") and deltas[-1].token_ids == (9, 6)
    assert collect([0, 6], ends={6}, with_end=True)[1] == [(0, 0), (6, 1)]  # where the prompt is scored as well


def test_parts_of_a_character_begin_where_it_begins() -> None:
    assert collect([0, 7, 8, 1], limit=4)[:2] == ("aéb", [(0, 0), (7, 1), (8, 1), (1, 2)])


@pytest.mark.parametrize("seed", range(40))
def test_what_deltas_tell_is_what_the_whole_text_says(seed: int) -> None:
    draw = random.Random(seed)
    tokens = [draw.randrange(len(PIECES)) for _ in range(12)]
    stops = draw.sample(["st", "ab", "ba", "é", "aab", " J", "t f"], 2)
    text, told, deltas, reason = collect(tokens, stops=stops, limit=len(tokens))
    assert reason is not None and not any(stop in text for stop in stops)
    used = tokens[: sum(len(delta.token_ids) for delta in deltas)]
    assert [token for token, _ in told] == used[: len(told)]  # a beginning of what was generated, in its order
    assert [offset for _, offset in told] == sorted(offset for _, offset in told)
    whole = reason == "length"
    starts = [len(decode(used[:i]).rstrip("\ufffd")) for i in range(len(used))]
    assert len(told) == (len(used) if whole else sum(start < len(text) for start in starts))
    given = ""
    for delta in deltas[:-1]:
        given += delta.text
        assert all(item.offset < len(given) for item in delta.logprobs or ())


def test_offsets_of_the_demo_model_are_places_in_its_text() -> None:
    demo = load_model("demo-7m", device="cpu")
    engine = Engine(demo)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, logprobs=1, ignore_eos=True, logit_bias={1: 8.0})
    engine.submit(GenerateRequest("hidden", "The history of the harbour town", params))
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, logprobs=1)
    engine.submit(GenerateRequest("plain", "The history of the harbour town", params))
    texts, found, ends = {"hidden": "", "plain": ""}, {"hidden": [], "plain": []}, {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Delta):
                texts[event.request_id] += event.text
                found[event.request_id] += event.logprobs or ()
            elif isinstance(event, Finished):
                ends[event.request_id] = event
    special = {ident for ident, token in demo.tokenizer.added_tokens_decoder.items() if token.special}
    hidden = [item.token_id in special for item in found["hidden"]]
    assert len(hidden) == 20 and any(hidden[:-1]) and not all(hidden)
    for name, text in texts.items():
        for item in found[name]:
            piece = "" if item.token_id in special else demo.tokenizer.decode([item.token_id])
            assert text[item.offset :].startswith(piece), (name, item)
    stopped = ends["plain"].reason == "stop"
    assert ends["plain"].usage.completion_tokens == len(found["plain"]) + stopped

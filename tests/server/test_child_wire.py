"""The worker's translations: what a Submit says reaches the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.answers.completion import _Part
from server.schemas import CompletionRequest
from server.worker import child_wire
from server.worker import messages as wire
from server.worker.child_clock import RequestClock
from spectral.engine import types


def test_a_submit_reaches_the_engine_whole() -> None:
    sampling = wire.Sampling(
        max_tokens=7, temperature=0.5, typical_p=0.9, stop=("x",), grammar=wire.Grammar("regex", "[a-z]+")
    )
    sent = wire.Submit(
        "r1", "completion", sampling, prompt="Hello", timeout_s=3.5, priority=2, tenant="t", cache_salt="s",
        max_kl=0.25, setting="4x", session="chat",
    )  # fmt: skip
    received = wire.decode_to_worker(wire.encode(sent)[4:])
    assert isinstance(received, wire.Submit)
    request = child_wire.to_request(received)
    assert request.params == types.SamplingParams(
        max_tokens=7, temperature=0.5, typical_p=0.9, stop=("x",), grammar=types.Grammar("regex", "[a-z]+")
    )
    assert (request.prompt, request.timeout_s, request.priority) == ("Hello", 3.5, 2)
    assert (request.tenant, request.cache_salt, request.max_kl) == ("t", "s", 0.25)
    assert (request.setting, request.session) == ("4x", "chat")


def test_an_end_says_where_the_time_went() -> None:
    now = [10.0]
    clock = RequestClock(lambda: now[0])
    clock.submitted("r", 2)
    now[0] += 1.0
    clock.started("r")
    now[0] += 2.0
    clock.token("r", 0)
    now[0] += 1.0
    clock.token("r", 1)
    clock.token("r", 0)
    now[0] += 4.0
    assert clock.finished("r", 0) == (1.0, 2.0, 5.0)
    assert clock.finished("r", 1) == (1.0, 3.0, 4.0)
    assert len(clock) == 0 and clock.finished("r", 1) == (0.0, 0.0, 0.0)


def test_what_never_began_has_only_waited() -> None:
    now = [0.0]
    clock = RequestClock(lambda: now[0])
    clock.submitted("r", 1)
    now[0] = 3.0
    assert clock.finished("r", 0) == (3.0, 0.0, 0.0)
    clock.submitted("s", 1)
    clock.forget("s")
    assert len(clock) == 0


class Marked:
    """Token 0 is a mark that begins texts, 1 and 2 are halves of a character, others are letters."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return ["<s>", "\u00c3", "\u00a9"][token] if token < 3 else chr(94 + token)

    def decode(self, ids: list[int]) -> str:
        found = [[b"<s>", b"\xc3", b"\xa9"][i] if i < 3 else bytes([94 + i]) for i in ids]
        return b"".join(found).decode(errors="replace")


def test_prompt_tokens_say_where_they_stand_in_the_text() -> None:
    translate = child_wire.EventTranslator(Marked())
    for ids, text, offsets in [([0, 3, 4], "<s>ab", [3, 4]), ([0, 1, 2, 3], "<s>éa", [3, 3, 4])]:
        told = tuple(types.Logprob(token, -1.0) for token in ids[1:])
        message = translate(types.PromptLogprobs("r", ids[0], told))
        assert isinstance(message, wire.PromptTokens)
        assert (message.text, [token.offset for token in message.logprobs]) == (text, offsets)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [("<s>ab", [0, 3, 4]), ("ab", [0, 0, 1]), ("a", [0, 0, 1]), ("other", [0, 3, 4]), ("xy", [0, 2, 2])],
)
def test_offsets_of_an_echo_are_places_in_what_is_shown(shown: str, expected: list[int]) -> None:
    tokens = [wire.TokenLogprob("a", -1.0, offset=3), wire.TokenLogprob("b", -1.0, offset=4)]
    body = CompletionRequest(model="m", prompt=shown, echo=True, logprobs=0)
    generation: Any = SimpleNamespace(prompt=wire.PromptTokens("r", "<s>ab", "<s>", tokens))
    part = _Part(generation, body, 0)
    found = part._choice(0, shown + "c", [wire.TokenLogprob("c", -1.0)], "stop", echo=True)["logprobs"]
    assert found["text_offset"] == [*expected, len(shown)] and found["tokens"] == ["<s>", "a", "b", "c"]

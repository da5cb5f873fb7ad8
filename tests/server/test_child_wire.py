"""The worker's translations: what a Submit says reaches the engine."""

from __future__ import annotations

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

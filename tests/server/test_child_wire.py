"""The worker's translations: what a Submit says reaches the engine."""

from __future__ import annotations

from server.worker import child_wire
from server.worker import messages as wire
from spectral.engine import types


def test_a_submit_reaches_the_engine_whole() -> None:
    sampling = wire.Sampling(
        max_tokens=7, temperature=0.5, typical_p=0.9, stop=("x",), grammar=wire.Grammar("regex", "[a-z]+")
    )
    sent = wire.Submit(
        "r1", "completion", sampling, prompt="Hello", timeout_s=3.5, priority=2, tenant="t", cache_salt="s", max_kl=0.25
    )
    received = wire.decode_to_worker(wire.encode(sent)[4:])
    assert isinstance(received, wire.Submit)
    request = child_wire.to_request(received)
    assert request.params == types.SamplingParams(
        max_tokens=7, temperature=0.5, typical_p=0.9, stop=("x",), grammar=types.Grammar("regex", "[a-z]+")
    )
    assert (request.prompt, request.timeout_s, request.priority) == ("Hello", 3.5, 2)
    assert (request.tenant, request.cache_salt, request.max_kl) == ("t", "s", 0.25)

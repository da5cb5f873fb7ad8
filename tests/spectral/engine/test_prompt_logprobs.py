"""The prompt's tokens under the model: the figures of a plain forward, whatever the chunks and whoever runs beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral.engine.engine import Engine
from spectral.engine.types import Delta, Event, PromptLogprobs
from tests.spectral.engine.engine_helpers import ask, drive, request, tiny_engine

PROMPT = [(7 * i * i + 3 * i) % 90 + 4 for i in range(50)]


def told(events: list[Event], name: str) -> PromptLogprobs:
    (found,) = [e for e in events if isinstance(e, PromptLogprobs) and e.request_id == name]
    first = next(i for i, e in enumerate(events) if isinstance(e, Delta) and e.request_id == name)
    assert events.index(found) < first
    return found


def reference(engine: Engine) -> torch.Tensor:
    """[tokens - 1, V] log probabilities of the model without this engine's cache."""
    plain = engine.loaded.model
    before = plain.config._attn_implementation
    plain.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return plain(torch.tensor([PROMPT])).logits[0].log_softmax(-1)[:-1]
    finally:
        plain.set_attn_implementation(before)


@pytest.mark.parametrize("chunk", [7, 32, 64])
def test_figures_are_those_of_a_plain_forward(chunk: int) -> None:
    engine = tiny_engine(setting="exact", prefill_chunk=chunk)
    scored: dict[str, Any] = {"sampling": {"prompt_logprobs": 2}}
    for each in (request("a", PROMPT, 5, **scored), request("b", PROMPT[:20], 5), request("c", PROMPT, 5)):
        engine.submit(each)
    found = told(drive(engine), "a")
    wanted = reference(engine)
    assert found.first == PROMPT[0] and [item.token_id for item in found.logprobs] == PROMPT[1:]
    own = wanted[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])]
    assert torch.allclose(torch.tensor([item.logprob for item in found.logprobs]), own, atol=1e-4)
    best = wanted.topk(2)
    assert [[t for t, _ in item.top] for item in found.logprobs] == best.indices.tolist()
    assert torch.allclose(torch.tensor([[v for _, v in item.top] for item in found.logprobs]), best.values, atol=1e-4)


def test_scoring_changes_no_answer_and_is_not_cut_short_by_a_known_prefix() -> None:
    engine = tiny_engine()
    plain = ask(engine, request("a", PROMPT))
    events: list[Event] = []
    for name in ("b", "c"):
        engine.submit(request(name, PROMPT, sampling={"prompt_logprobs": 0}))
        events += drive(engine)
    for name in ("b", "c"):
        found = told(events, name)
        assert len(found.logprobs) == len(PROMPT) - 1 and not any(item.top for item in found.logprobs)
        tokens = [t for e in events if isinstance(e, Delta) and e.request_id == name for t in e.token_ids]
        assert tokens == plain["a"]


def test_a_prompt_of_one_token_and_several_choices() -> None:
    engine = tiny_engine()
    engine.submit(request("a", [5], 3, sampling={"prompt_logprobs": 1, "n": 2}))
    found = told(drive(engine), "a")
    assert (found.first, found.logprobs) == (5, ())

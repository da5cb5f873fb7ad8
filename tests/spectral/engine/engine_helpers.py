"""Driving an engine to its end, and what it said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spectral.engine.engine import Engine
from spectral.engine.types import Delta, EngineLimits, Event, Failed, GenerateRequest, SamplingParams
from spectral.hf import LoadedModel, wrap_model
from tests.spectral.helpers import NoTokenizer, random_codebook, random_model

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class Letters:
    """A tokenizer whose token i is one letter."""

    eos_token_id = bos_token_id = 2
    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def tiny_engine(
    family: str = "qwen3",
    *,
    setting: str = "test",
    window_bits: int = 8,
    decode: str | None = None,
    ahead: bool = False,
    **limits: Any,
) -> Engine:
    """A random model of three layers, checked after every step. At the setting "test" its cache is compressed, at
    "apart" as well, with keys and values in units of their own, and at "flat" its pages are not transformed besides.
    `ahead`: its static steps run ahead, as captured ones do."""
    loaded = random_model(family)
    loaded.eos_token_ids, loaded.tokenizer = set(), Letters()
    book = None
    if setting in ("test", "apart", "flat"):
        how = {"window_bits": window_bits, "apart": setting != "test", "flat": setting == "flat"}
        book = random_codebook(loaded.shape, [6, 4, 2, 0], sinks=4, window=16, page=8, **how)
        book.setting = setting
    values = {"prefill_chunk": 32, "token_budget": 64, "max_concurrency": 4, **limits}
    decode = "static" if ahead else decode
    engine = Engine(loaded, codebook=book, setting=setting, limits=EngineLimits(**values), checked=True, decode=decode)
    if ahead:
        assert engine.runner.graphs is not None and not engine.runner.graphs.runs_ahead
        engine.runner.graphs.runs_ahead = True
    return engine


def request(name: str, prompt: list[int], count: int = 20, *, sampling: Any = None, **more: Any) -> GenerateRequest:
    params = SamplingParams(max_tokens=count, **{**GREEDY, **(sampling or {})})
    return GenerateRequest(name, prompt, params, **more)


def drive(engine: Engine, each: Callable[[int], None] | None = None, steps: int = 3000) -> list[Event]:
    """Step until nothing is left; `each(step)` may do something before a step. No request may fail."""
    events: list[Event] = []
    for step in range(steps):
        if each is not None:
            each(step)
        elif not engine.has_work:
            return events
        if each is not None and step and not engine.has_work:
            return events
        events += engine.step()
        assert not any(isinstance(e, Failed) for e in events), events[-1]
    raise AssertionError("the engine does not come to an end")


def answer(events: list[Event], name: str, index: int = 0) -> list[int]:
    """Token ids of a choice."""
    deltas = [e for e in events if isinstance(e, Delta) and (e.request_id, e.index) == (name, index)]
    return [token for delta in deltas for token in delta.token_ids]


def ask(engine: Engine, *requests: GenerateRequest) -> dict[str, list[int]]:
    """Submit requests together and run them to their end: first choices' tokens."""
    for each in requests:
        engine.submit(each)
    events = drive(engine)
    return {each.request_id: answer(events, each.request_id) for each in requests}


def both_ways(model: Any, length: int, count: int) -> tuple[list[int], list[int], LoadedModel]:
    """Greedy tokens of a model by `generate`, and by an engine at the exact setting; and the model as it was served."""
    prompt = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    loaded = wrap_model(model.config.model_type, model, NoTokenizer())
    loaded.eos_token_ids, loaded.tokenizer = set(), Letters()
    limits = EngineLimits(prefill_chunk=16, token_budget=64, max_concurrency=2)
    engine = Engine(loaded, setting="exact", limits=limits, checked=True)
    return wanted[0, length:].tolist(), ask(engine, request("x", prompt[0].tolist(), count))["x"], loaded


def squeeze_twice(engine: Engine, first: str, second: str) -> None:
    """Drive requests r0 to r2 of 60 tokens to their end, of which r0 is parked before the first of two squeezes: each
    frees the bytes that it says, and all go on."""
    freed: list[int] = []

    def each(step: int) -> None:
        if step == 12:
            engine.park("r0")  # comes back to a store that is coarser than what it left
        if step in (13, 20):
            before = engine.lanes.nbytes
            freed.append(engine.set_setting(first if step == 13 else second))
            assert engine.lanes.nbytes == before - freed[-1] and len(engine.lanes.all) == 1

    events = drive(engine, each)
    assert all(len(answer(events, f"r{i}")) == 60 for i in range(3))
    assert len(freed) == 2 and min(freed) > 0 and engine.stats().squeezes == 2

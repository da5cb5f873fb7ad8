"""Weights leave their storages and come back bit for bit, tied and hidden ones too; leases bound a live cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral.engine.build import Built, build_engine, find_profile
from spectral.engine.engine import Engine
from spectral.engine.lease import set_lease, sleep
from spectral.engine.types import EngineLimits, GenerateRequest, SamplingParams
from spectral.errors import CacheError
from spectral.hf import load_model
from spectral.residency import Sleeper, storages_of


class State:
    """As bitsandbytes has it: tensors in an object of a parameter, one of them shared with another object."""

    def __init__(self, inner: State | None = None) -> None:
        self.absmax = torch.rand(7)
        self.inner = inner


class Quantized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 3)
        self.tied = torch.nn.Linear(5, 3)
        self.tied.weight = self.first.weight
        self.weight = torch.nn.Parameter(torch.randint(0, 255, (12,), dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = State(State())  # type: ignore[attr-defined]
        self.plain = torch.arange(4)
        self.register_buffer("view", self.plain[1:3])


def test_every_storage_moves_once_and_comes_back() -> None:
    model = Quantized()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state: Any = model.weight.quant_state  # type: ignore[attr-defined]
    hidden = state.inner.absmax.clone()
    found = list(storages_of(model, "cpu"))
    total = (15 + 3 + 3) * 4 + 12 + 2 * 7 * 4 + 4 * 8
    assert sum(storage.nbytes() for storage in found) == total
    sleeper = Sleeper(model, "cpu")
    assert sleeper.sleep() == total == sleeper.host_nbytes
    assert sleeper.asleep and all(storage.nbytes() == 0 for storage in found)
    assert sleeper.sleep() == 0, "asleep already"
    assert sleeper.wake() == total and not sleeper.asleep and sleeper.host_nbytes == 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(state.inner.absmax, hidden)
    assert model.tied.weight.data_ptr() == model.first.weight.data_ptr()
    assert torch.equal(model.plain[1:3], model.get_buffer("view")) and sleeper.wake() == 0


def test_a_walk_goes_on_where_another_thread_makes_what_was_not_there() -> None:
    module = torch.nn.Module()
    module.first, module.second = torch.ones(5), torch.ones(6)
    walk = storages_of(module, "cpu")
    found = [next(walk)]
    module.later = torch.ones(7)
    found += walk
    assert [storage.nbytes() for storage in found] == [20, 24]


def test_a_wake_up_that_fails_leaves_the_model_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Quantized()
    weight = model.first.weight.detach().clone()
    sleeper = Sleeper(model, "cpu")
    sleeper.sleep()
    with monkeypatch.context() as patch:
        patch.setattr("spectral.residency.synchronize", lambda _: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            sleeper.wake()
    assert sleeper.asleep
    sleeper.wake()
    assert torch.equal(model.first.weight, weight)


def test_a_model_on_another_kind_of_device_has_nothing_to_move() -> None:
    assert Sleeper(Quantized(), "cuda").sleep() == 0


@pytest.fixture(scope="module")
def built(demo_path: Path) -> Built:
    loaded = load_model(str(demo_path), device="cpu")
    return build_engine(loaded, find_profile(loaded), setting="4x", limits=EngineLimits(max_concurrency=3))


def generate(engine: Engine, name: str, tokens: int) -> list[int]:
    """Greedy tokens of one request."""
    request = GenerateRequest(name, "The little dog", SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    engine.submit(request, engine.encode(request))
    out: list[int] = []
    while engine.has_work:
        for event in engine.step():
            out += list(getattr(event, "token_ids", ()))
    return out


def test_a_model_that_slept_answers_as_before(built: Built) -> None:
    before = generate(built.engine, "a", 8)
    sleeper = Sleeper(built.engine.loaded.model, "cpu")
    assert sleeper.sleep() >= built.engine.loaded.weights_nbytes
    sleeper.wake()
    assert generate(built.engine, "b", 8) == before


def test_a_lease_bounds_the_cache_and_the_context(built: Built) -> None:
    engine = built.engine
    whole = engine.context_length
    one = engine.store.bytes_per_token(1000) * 1000
    set_lease(engine, round(one))
    assert 900 <= engine.context_length <= 1100 < whole
    assert len(generate(engine, "c", 20)) == 20 and engine.store.nbytes <= one
    engine.store.trim()
    with pytest.raises(CacheError):
        set_lease(engine, 10)
    assert engine.store.max_bytes == round(one), "a lease that is refused changes nothing"
    set_lease(engine, None)
    assert engine.context_length == whole and engine.store.max_bytes is None


def test_a_chat_goes_on_after_a_sleep_with_its_compressed_prefix(demo_path: Path) -> None:
    loaded = load_model(str(demo_path), device="cpu")
    limits = EngineLimits(max_concurrency=3, prefill_chunk=64)
    engine = build_engine(loaded, find_profile(loaded), setting="4x", limits=limits).engine
    prompt = list(range(10, 410))

    def again(name: str) -> list[int]:
        engine.submit(GenerateRequest(name, "", SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)), prompt)
        out: list[int] = []
        while engine.has_work:
            for event in engine.step():
                out += list(getattr(event, "token_ids", ()))
        return out

    first, sleeper = again("a"), Sleeper(loaded.model, "cpu")
    kept = engine.lanes.idle_nbytes
    assert kept > 0
    assert sleep([engine], sleeper, 10**9) > loaded.weights_nbytes
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in engine.store.tensors() if tensor.numel())
    assert sleeper.host_nbytes > loaded.weights_nbytes + engine.lanes.nbytes > loaded.weights_nbytes
    sleeper.wake()
    engine.check()
    reused = engine.stats().prefix_reused
    assert again("b") == first and engine.stats().prefix_reused - reused >= 256
    sleep([engine], sleeper, 0)  # no host memory for it: only weights and tables stay
    assert engine.lanes.nbytes == 0 and sleeper.asleep
    sleeper.wake()
    assert again("c") == first


def test_what_sleeps_and_what_rests_do_not_touch_each_other(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of the setting in use sleep with the model; while they do, nobody copies them or takes them away."""
    monkeypatch.setattr("spectral.shelf.LEAST_BYTES", 1)
    loaded = load_model(str(demo_path), device="cpu")
    engine = build_engine(loaded, find_profile(loaded), setting="4x", limits=EngineLimits(max_concurrency=3)).engine
    sleeper = Sleeper(loaded.model, "cpu")
    first, answers = generate(engine, "a", 8), {}
    list(engine.lanes.keep())
    engine.set_setting("8x")
    answers["8x"] = generate(engine, "b", 8)
    copying = engine.lanes.keep()
    next(copying)
    sleep([engine], sleeper, 0)
    assert list(copying) == [] and engine.lanes.shelf.known() == [] and engine.lanes.shelf.nbytes == 0
    sleeper.wake()
    assert generate(engine, "c", 8) == answers["8x"]
    for setting in ("4x", "8x", "4x"):
        list(engine.lanes.keep())
        engine.set_setting(setting)
        assert generate(engine, f"d {setting}", 8) == answers.setdefault(setting, first)
    assert "8x" in engine.lanes.shelf.known() and answers["4x"] == first

"""On a CPU a request's numbers are the same, bit for bit, whoever else is served: alone, and among others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spectral.engine import runner
from spectral.engine.engine import Engine
from spectral.engine.types import EngineLimits, GenerateRequest
from spectral.hf import load_model
from spectral.lean_cpu import turned
from spectral.profile import SpectralProfile
from spectral.row_by_row import ALIGNED, linear, of_any_rows, of_any_terms, rounds_alike, row_by_row, single_alike
from tests.spectral.engine.engine_helpers import drive, request, tiny_engine
from tests.spectral.engine.test_static_step import prompt
from tests.spectral.helpers import FAMILIES

Logits = dict[str, list[torch.Tensor]]
alike = pytest.mark.skipif(not rounds_alike(), reason="this machine's library rounds these shapes otherwise")


@pytest.fixture
def logits_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Logits]:
    """What an engine's forwards leave for requests submitted together: by request and choice, token by token."""
    own, found = runner.sample, dict[int, list[torch.Tensor]]()

    def sample(logits: torch.Tensor, states: list[Any]) -> Any:
        for row, state in zip(logits, states, strict=True):
            found.setdefault(id(state), []).append(row.clone())
        return own(logits, states)

    def run(engine: Engine, *requests: GenerateRequest) -> Logits:
        found.clear()
        for each in requests:
            engine.submit(each)
        names = {id(s.sampler): f"{s.request_id}.{s.index}" for s in engine.live_sequences}
        drive(engine)
        return {name: found[state] for state, name in names.items()}

    monkeypatch.setattr(runner, "sample", sample)
    return run


def check_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    differ = [at for at, both in enumerate(zip(one, other, strict=True)) if not torch.equal(*both)]
    assert not differ and len(one) > 5, f"tokens {differ[:5]} of {len(one)} differ"


@alike
@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("setting", ["test", "apart", "flat", "exact"])
def test_alone_and_among_others(family: str, setting: str, logits_of: Callable[..., Logits]) -> None:
    lengths = (70, 3, 33, 90, 1, 141)
    asked = [
        request(f"r{i}", prompt(length, i), 30 - 3 * i, sampling={"temperature": 1.0, "seed": i})
        for i, length in enumerate(lengths)
    ]
    among = logits_of(tiny_engine(family, setting=setting, max_concurrency=6), *asked)
    for one in asked:
        alone = logits_of(tiny_engine(family, setting=setting, max_concurrency=6), one)
        check_same(alone[f"{one.request_id}.0"], among[f"{one.request_id}.0"])


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> tuple[Any, SpectralProfile]:
    return load_model(str(demo_path)), SpectralProfile.load(demo_path.parents[1] / "profiles" / "demo-7m.safetensors")


@alike
@pytest.mark.parametrize("setting", ["8x", "exact"])
def test_a_trained_model_over_several_blocks(
    setting: str, demo: tuple[Any, SpectralProfile], logits_of: Callable[..., Logits]
) -> None:
    """Lengths on both sides of those at which products are rounded otherwise, and of a block's."""
    loaded, profile = demo
    lengths = (1300, 9, 150, 260, 333, 420, 560, 700)
    asked = [
        request(f"r{i}", [11 + (i * 7 + t * t) % 8000 for t in range(n)], 12, sampling={"temperature": 1.0, "seed": i})
        for i, n in enumerate(lengths)
    ]

    def engine() -> Engine:
        book = None if setting == "exact" else profile.codebook(setting)
        return Engine(loaded, codebook=book, setting=setting, profile=profile, limits=EngineLimits(max_concurrency=8))

    among = logits_of(engine(), *asked)
    for one in asked:
        check_same(logits_of(engine(), one)[f"{one.request_id}.0"], among[f"{one.request_id}.0"])


@alike
def test_choices_are_those_of_fewer(logits_of: Callable[..., Logits]) -> None:
    how = {"temperature": 1.0, "seed": 5}
    many = logits_of(tiny_engine(max_concurrency=5), request("r", prompt(60, 1), 30, sampling={**how, "n": 5}))
    for n in (1, 2, 3):
        few = logits_of(tiny_engine(max_concurrency=5), request("r", prompt(60, 1), 30, sampling={**how, "n": n}))
        for at in range(n):
            check_same(few[f"r.{at}"], many[f"r.{at}"])


@pytest.mark.parametrize("layout", [turned, torch.Tensor.contiguous])
@pytest.mark.parametrize(("size", "outputs"), [(32, 7), (48, 96), (256, 8192), (768, 256), (100, 333), (3000, 1100)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_by_itself(layout: Callable[[torch.Tensor], torch.Tensor], size: int, outputs: int, biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = layout(torch.randn(outputs, size)), torch.randn(outputs) if biased else None
    x = torch.randn(2, 9, size)
    with torch.inference_mode():
        single = single_alike(weight, bias)
        wanted = F.linear(x, weight, bias)
        assert torch.equal(linear(x, weight, bias, single), wanted), "outside nothing is different"
        with row_by_row():
            found = linear(x, weight, bias, single)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
            for count in (1, 2, 3, 5, 8):
                for first in (0, 4):
                    part = linear(x[1, first : first + count][None], weight, bias, single)[0]
                    assert torch.equal(part, found[1, first : first + count])
    assert ALIGNED * weight.element_size() == 64


@alike
@pytest.mark.parametrize("terms", [16, 176, 192, 208, 304, 383, 384, 400, 800])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11])
def test_shapes_that_a_library_treats_alike(terms: int, rows: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, rows, terms), torch.randn(2, terms, 65)
    more = torch.randn(2, 13, terms)
    more[:, :rows] = x
    assert torch.equal(of_any_rows(more, y)[:, :rows], of_any_rows(x, y))
    for longer in (terms + 16, 2 * terms, 1600):
        wide, deep = torch.zeros(2, rows, longer), torch.randn(2, longer, 65)
        wide[..., :terms], deep[:, :terms] = x, y
        assert torch.equal(of_any_terms(wide, deep), of_any_terms(x, y))

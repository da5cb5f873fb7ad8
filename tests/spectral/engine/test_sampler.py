from __future__ import annotations

from collections import Counter

import pytest
import torch

from spectral.engine import sampler as module
from spectral.engine.sampler import SamplerState, sample
from spectral.engine.types import SamplingParams
from spectral.errors import RequestError


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [V] that a row must be drawn from, temperature, top-k, top-p, min-p, typical."""
    p = (logits.double() / params.temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = order.tolist()[: params.top_k or None]
    mass = sum(float(p[i]) for i in kept)
    chosen, before = [], 0.0
    for i in kept:
        if before / mass >= params.top_p and chosen:
            break
        chosen.append(i)
        before += float(p[i])
    chosen = [i for i in chosen if p[i] >= params.min_p * p.max()]
    if params.typical_p < 1:
        q = p[chosen] / p[chosen].sum()
        entropy = -(q * q.log()).sum()
        by_distance = (-q.log() - entropy).abs().argsort().tolist()
        enough = next(n for n in range(1, len(q) + 1) if n == len(q) or q[by_distance[:n]].sum() >= params.typical_p)
        chosen = [chosen[i] for i in by_distance[:enough]]
    out = torch.zeros_like(p)
    out[chosen] = p[chosen]
    return out / out.sum()


@pytest.mark.parametrize(
    ("params", "enough"),
    [
        ({"top_p": 0.75}, True),
        ({"top_p": 0.95}, False),
        ({"min_p": 0.7}, True),
        ({"min_p": 0.2}, False),
        ({"top_p": 0.95, "min_p": 0.7}, True),
        ({"top_k": 2}, True),
        ({"top_k": 2, "top_p": 0.99}, True),
        ({"top_k": 3}, False),
        ({}, False),
    ],
)
def test_a_shortlist_is_enough_where_all_that_may_be_drawn_is_on_it(params: dict[str, float], enough: bool) -> None:
    """Two of four tokens, of .5 and .3: sorting a whole vocabulary in every step costs more than all the rest."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    values, total = logits.topk(2).values, logits.logsumexp(-1, keepdim=True)
    top_k, top_p, min_p = (
        torch.tensor([[params.get(name, default)]]) for name, default in (("top_k", 4), ("top_p", 1.0), ("min_p", 0.0))
    )
    kept, found = module.nucleus(values, total, 4, top_k, top_p, min_p)
    assert found.item() is enough
    assert not enough or kept[0, 0] > 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_p=0.8, seed=2),
        SamplingParams(temperature=1.5, top_k=3, seed=3),
        SamplingParams(temperature=1.2, top_k=8, top_p=0.7, seed=4),
        SamplingParams(temperature=1.0, min_p=0.3, seed=5),
        SamplingParams(temperature=1.0, top_p=0.9, min_p=0.1, top_k=10, seed=6),
        SamplingParams(temperature=1.0, typical_p=0.5, seed=7),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, typical_p=0.6, seed=8),
    ],
)
@pytest.mark.parametrize("shortlist", [1024, 4])
def test_draws_follow_the_reference_distribution(
    params: SamplingParams, shortlist: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTLIST", shortlist)
    logits = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 1.5
    expected = reference(logits, params)
    state, draws = SamplerState(params, []), 2000
    counts = Counter(sample(logits[None], [state])[0][0] for _ in range(draws))
    assert all(expected[token] > 0 for token in counts)
    got = torch.zeros(24, dtype=torch.float64)
    for token, count in counts.items():
        got[token] = count / draws
    assert float((got - expected).abs().sum()) / 2 < 0.06  # total variation; about 0.03 is chance


def test_greedy_takes_the_largest_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    greedy = SamplingParams(temperature=0.0)
    alone, _ = sample(logits, [SamplerState(greedy, []) for _ in range(3)])
    assert alone == logits.argmax(-1).tolist()
    kinds = [greedy, SamplingParams(seed=1), greedy]
    mixed, _ = sample(logits, [SamplerState(params, []) for params in kinds])
    assert [mixed[0], mixed[2]] == [alone[0], alone[2]]


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    steps = [torch.randn(3, 200, generator=generator) for _ in range(20)]
    kinds = [SamplingParams(seed=9), SamplingParams(seed=9, top_p=0.9), SamplingParams(seed=3, presence_penalty=1.0)]
    together = [SamplerState(p, []) for p in kinds]
    batched = [sample(x, together)[0] for x in steps]
    for row, params in enumerate(kinds):
        alone = SamplerState(params, [])
        assert [sample(x[row : row + 1], [alone])[0][0] for x in steps] == [b[row] for b in batched]
    other = SamplerState(SamplingParams(seed=10), [])
    assert [sample(x[:1], [other])[0][0] for x in steps] != [b[0] for b in batched]


def test_choices_of_one_seed_differ() -> None:
    logits = torch.zeros(1, 1000)
    first, second = (SamplerState(SamplingParams(seed=5), [], index) for index in (0, 1))
    assert [sample(logits, [first])[0] for _ in range(5)] != [sample(logits, [second])[0] for _ in range(5)]


def test_penalties_and_bias_equal_their_definitions() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0]])
    params = SamplingParams(
        temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={4: 10.0}
    )
    state = SamplerState(params, [1])
    assert sample(logits, [state])[0] == [4]
    assert sample(logits, [state])[0] == [4]
    work = logits[0].clone()
    state.adjust(work)
    assert work.tolist() == pytest.approx([2.0, -2.0, 0.5, 3.0, 0.0 - 2 * 0.5 - 0.25 + 10.0])
    assert logits.tolist() == [[2.0, -1.0, 0.5, 3.0, 0.0]]  # the caller's logits stay


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4))
    state = SamplerState(SamplingParams(temperature=0.0, logprobs=3, logit_bias={7: 100.0}), [])
    tokens, logprobs = sample(logits, [state])
    expected = logits[0].log_softmax(-1)
    assert tokens == [7] and logprobs[0] is not None
    assert logprobs[0].logprob == pytest.approx(float(expected[7]))
    assert [t for t, _ in logprobs[0].top] == expected.topk(3).indices.tolist()
    assert [v for _, v in logprobs[0].top] == pytest.approx(expected.topk(3).values.tolist())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("stop", ("",)),
        ("n", 0),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("logit_bias", {1: 101.0}),
        ("logprobs", 21),
        ("seed", "x"),
    ],
)
def test_bad_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field

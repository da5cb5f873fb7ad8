"""What attention reads decides: AATC's metric, ranks by the weights' Fisher information or by an error budget."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from spectral.baselines.aatc import Aatc
from spectral.baselines.eigen_attention import EigenBudget
from spectral.baselines.palu import Palu, PaluFisher, searched_ranks
from spectral.baselines.spectra import Spectra
from spectral.baselines.transforms import rope, unrope
from tests.spectral.baselines.synthetic import SHAPE, World, fitted, relative_error

Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def test_ranks_follow_fisher_information_within_what_was_asked() -> None:
    assert searched_ranks([1.0, 1.0, 1.0, 1.0], 0.5, 128) == [64] * 4
    assert searched_ranks([1.0, 3.0], 0.5, 128) == [32, 96]
    # 128 is all a group has: what it cannot take goes to the others, evenly.
    assert searched_ranks([20.0, 1.0, 1.0], 2 / 3, 128) == [128, 64, 64]
    assert searched_ranks([1.0, 0.0], 0.5, 128) == [128, 32], "no group is left without a block"
    assert searched_ranks([0.0, 0.0], 0.5, 24) == [12, 12] or searched_ranks([0.0, 0.0], 0.5, 24) == [24, 24]
    fisher = torch.rand(24, generator=torch.Generator().manual_seed(0)).tolist()
    ranks = searched_ranks(fisher, 0.5, 256)
    assert all(rank % 32 == 0 and 32 <= rank <= 256 for rank in ranks)
    assert abs(sum(ranks) - 24 * 128) <= 24 * 16
    order = sorted(range(24), key=lambda i: fisher[i])
    assert [ranks[i] for i in order] == sorted(ranks)


def test_palu_with_equal_fisher_information_is_palu(world: World, prompt: Prompt) -> None:
    equal = torch.ones(SHAPE.kv_heads)
    layers = [dataclasses.replace(layer, key_fisher=equal, value_fisher=equal) for layer in world.stats.layers]
    searched, plain = PaluFisher(share=0.5, bits=3), fitted(Palu(share=0.5, bits=3), world)
    searched.fit(dataclasses.replace(world.stats, layers=layers), SHAPE)
    for x, y in zip(searched.roundtrip_all(*prompt), plain.roundtrip_all(*prompt), strict=True):
        assert torch.equal(x, y)
    assert searched.nbytes(500, SHAPE) == plain.nbytes(500, SHAPE)
    assert searched.basis_nbytes(SHAPE) == plain.basis_nbytes(SHAPE)


def test_the_rank_search_spends_where_the_weights_matter(world: World, prompt: Prompt) -> None:
    """The world's first layers have the most: they get whole ranks, the last ones half."""
    method, plain = fitted(PaluFisher(share=0.75, bits=8), world), fitted(Palu(share=0.75, bits=8), world)
    widths = [[basis.shape[1] for basis in method._bases[layer, "value"]] for layer in range(SHAPE.layers)]  # type: ignore[attr-defined]
    assert widths[0] == [64] and widths[-1] == [32]
    values = prompt[1]
    errors = [
        [relative_error(values[layer], m.roundtrip_all(*prompt)[1][layer]) for layer in (0, 4)] for m in (method, plain)
    ]
    assert errors[0][0] < errors[1][0] and errors[0][1] > errors[1][1]


def test_eigen_attention_searches_the_lowest_ranks_within_the_budget(world: World, prompt: Prompt) -> None:
    """Against a search written out: every layer's own, one more step would be too much."""
    method = EigenBudget(budget=0.02)
    method.fit(world.stats, SHAPE)
    assert len(set(method.ranks)) > 2, "layers differ"
    for layer, ranks in enumerate(method.ranks):
        sample = world.stats.layers[layer]
        bare = unrope(sample.keys, world.stats.positions, world.cos, world.sin)
        key_axes, key_sizes, _ = torch.linalg.svd(bare.flatten(0, 1).T.double(), full_matrices=False)
        parts = [torch.linalg.svd(sample.values[:, head].T.double(), full_matrices=False)[:2] for head in (0, 1)]

        def restore(
            keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, cut: tuple[int, int]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            axes = key_axes[:, : cut[0]].float()  # noqa: B023 (used at once)
            back = rope(unrope(keys, positions, world.cos, world.sin) @ axes @ axes.T, positions, world.cos, world.sin)
            axes = torch.stack([u[:, : cut[1]] @ u[:, : cut[1]].T for u, _ in parts]).float()  # noqa: B023
            return back, torch.einsum("thd,hde->the", values, axes)

        steps = []
        for step in range(1, 50):
            share = 1 - 0.02 * step
            key = int((key_sizes.cumsum(0) / key_sizes.sum() < share).sum()) + 1
            value = max(int((s.cumsum(0) / s.sum() < share).sum()) + 1 for _, s in parts)
            assert sample.output_error is not None
            error = sample.output_error(partial(restore, cut=(key, value)))
            steps.append(((key, value), error, min(key, value) > 0.45 * SHAPE.head_dim))
        good = [cut for cut, error, wide in steps if error < 0.02 and wide]
        first_bad = next(i for i, (_, error, wide) in enumerate(steps) if error >= 0.02 or not wide)
        assert ranks == (steps[first_bad - 1][0] if first_bad else (SHAPE.head_dim, SHAPE.head_dim)), layer
        assert not first_bad or ranks in good
    back = method.roundtrip_all(*prompt)
    kept = sum(key + value for key, value in method.ranks)
    assert method.measured_nbytes == method.payload_nbytes(len(prompt[2]), SHAPE) == 2 * 2 * len(prompt[2]) * kept
    assert relative_error(prompt[1], back[1]) < 0.05


def test_eigen_attention_without_a_budget_saves_nothing(world: World) -> None:
    method, loose = EigenBudget(budget=0.0), EigenBudget(budget=1.0)
    for one in (method, loose):
        one.fit(world.stats, SHAPE)
    assert method.ranks == [(32, 32)] * SHAPE.layers
    # As low as the floor lets them: ranks are 15 of 32 at least, and one more step would go below that on some side.
    assert all(min(ranks) > 0.45 * 32 for ranks in loose.ranks) and min(map(min, loose.ranks)) < 18
    assert loose.basis_nbytes(SHAPE) == 2 * 32 * sum(key + 2 * value for key, value in loose.ranks)


def read_errors(world: World, prompt: Prompt, method: Spectra | Aatc) -> tuple[float, float]:
    """Squared error of scores of later queries, and of what W_O makes of values, over all layers."""
    fitted(method, world)
    keys, values, positions = prompt
    back_keys, back_values = method.roundtrip_all(keys, values, positions)
    scores = outputs = 0.0
    for layer in range(SHAPE.layers):
        sample = world.stats.layers[layer]
        late = world.stats.positions >= len(positions)
        queries = sample.queries[late].unflatten(1, (SHAPE.kv_heads, -1))
        scores += float(torch.einsum("nhgd,thd->nhgt", queries, (keys - back_keys)[layer]).pow(2).sum())
        wrong = (values - back_values)[layer]
        read = world.output.unflatten(0, (SHAPE.kv_heads, -1))
        outputs += float(torch.einsum("thd,hgdi->thgi", wrong, read).pow(2).sum())
    return scores, outputs


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0])
def test_aatc_spends_its_bits_on_what_attention_reads(world: World, prompt: Prompt, bits: float) -> None:
    ours, plain = read_errors(world, prompt, Aatc(bits=bits)), read_errors(world, prompt, Spectra(bits=bits))
    assert ours[0] < plain[0] and ours[1] < 0.8 * plain[1]
    assert Aatc(bits=bits).nbytes(4096, SHAPE) == Spectra(bits=bits).nbytes(4096, SHAPE)


def test_aatc_with_enough_bits_loses_nothing(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    back = fitted(Aatc(bits=8.0), world).roundtrip_all(keys, values, positions)
    assert relative_error(values, back[1]) < 1e-3
    bare = [unrope(x[0], positions, world.cos, world.sin) for x in (keys, back[0])]
    assert relative_error(bare[0], bare[1]) < 1e-3
    assert torch.allclose(rope(bare[0], positions, world.cos, world.sin), keys[0], atol=1e-4)

"""Identities that belong to one method."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import pytest
import torch

from spectral.baselines import CalibrationStats, LayerStats, Shape
from spectral.baselines.blockmax import BlockMax
from spectral.baselines.eigen_attention import EigenAttention
from spectral.baselines.fp8 import Fp8
from spectral.baselines.jarviskv import JarvisPublished, JarvisRepaired
from spectral.baselines.kivi import Kivi
from spectral.baselines.kvquant import KvQuant, fitted_levels
from spectral.baselines.oscar import CLIP, Oscar, score_weighted_moment
from spectral.baselines.palu import Palu
from spectral.baselines.pertoken import HadamardInt, PerToken
from spectral.baselines.spectra import Spectra
from spectral.baselines.svdq import Svdq
from spectral.baselines.think import Think
from spectral.baselines.transforms import hadamard, rope, unrope
from spectral.baselines.turboquant import TurboQuant, qjl_decode, qjl_encode
from spectral.baselines.window import WindowOnly
from spectral.baselines.xkv import Xkv
from tests.spectral.baselines.synthetic import SHAPE, TOKENS, World, fitted, relative_error

Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def test_fp8_is_the_cast(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    back = fitted(Fp8(), world).roundtrip_all(keys, values, positions)
    assert torch.equal(back[0], keys.to(torch.float8_e4m3fn).float())
    assert torch.equal(back[1], values.to(torch.float8_e4m3fn).float())
    huge = fitted(Fp8(), world).roundtrip_all(keys * 1e6, values, positions)[0]
    assert float(huge.abs().max()) == 448.0


def test_kivi_reproduces_group_extremes_and_groups_as_published(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/4 from -8 to 7: extremes, and any scale (max - min) / 3, survive fp16 when the range is fixed.
    x = torch.randint(-32, 29, (64, 2, 32), generator=generator).float() / 4
    x[::32], x[1::32] = -8.0, 7.0
    method = fitted(Kivi(), world)
    keys, _ = method.roundtrip(0, x, x, torch.arange(64))
    for group in (slice(0, 32), slice(32, 64)):
        assert torch.equal(keys[group].amin(0), x[group].amin(0)) and torch.equal(keys[group].amax(0), x[group].amax(0))
        assert all(len(keys[group][:, h, c].unique()) <= 4 for h in range(2) for c in range(32))
    flipped = x.flatten(1).T[:, :64].reshape(64, 2, 32)
    _, values = method.roundtrip(0, flipped, flipped, torch.arange(64))
    assert all(len(values[t, h].unique()) <= 4 for t in range(64) for h in range(2))
    outlier = x.clone()
    outlier[:, 0, 3] += 100.0  # an outlying key channel costs the other channels nothing
    again, _ = method.roundtrip(0, outlier, x, torch.arange(64))
    assert torch.equal(again[:, 1], keys[:, 1]) and torch.equal(again[:, 0, 4:], keys[:, 0, 4:])


def test_kivi_keeps_a_filling_residual_of_keys_and_a_sliding_one_of_values() -> None:
    method = Kivi()
    keys = [method.exact_of("key", n).recent for n in (1, 127, 128, 129, 256, 257, 1000)]
    assert keys == [1, 127, 128, 1, 128, 1, 1000 - 7 * 128]
    assert all((n - method.exact_of("key", n).recent) % 128 == 0 for n in range(1, 1000))
    assert [method.exact_of("value", n).recent for n in (1, 128, 129, 1000)] == [1, 128, 128, 128]
    # On average over a residual's life 64 keys and 128 values are bf16.
    exact = SHAPE.exact_nbytes(1) // 2 * (64 + 128)
    assert method.nbytes(1000, SHAPE) == exact + method._key_nbytes(936, SHAPE) + method._value_nbytes(872, SHAPE)


def test_quantized_cache_quantizes_its_residual_at_once() -> None:
    method = PerToken()
    assert [method.exact(n).recent for n in (1, 127, 128, 129, 256, 300)] == [1, 127, 128, 1, 128, 44]
    assert method.held(1000).recent == 64 and HadamardInt().held(1000).recent == HadamardInt().exact(1001).recent == 32


def test_quantized_cache_is_that_of_transformers(world: World, prompt: Prompt) -> None:
    """Its residual as transformers runs it, token by token: what each step returns for the tokens before."""
    from transformers.cache_utils import QuantizedLayer

    class Marked(QuantizedLayer):
        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor.round()  # a stand-in: whole numbers were quantized

        def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    layer = Marked(residual_length=16)
    keys = torch.rand(1, 1, 60, 4) * 0.4 + 0.05
    layer.update(keys[:, :, :16], keys[:, :, :16])  # a prompt is quantized as a whole
    method = PerToken(recent=16)
    for n in range(17, 61):
        seen = layer.update(keys[:, :, n - 1 : n], keys[:, :, n - 1 : n])[0]
        exact = (seen[0, 0, :, 0] != seen[0, 0, :, 0].round()).sum()
        assert int(exact) == method.exact(n).recent, n


def test_llamacpp_blocks(world: World) -> None:
    method = fitted(BlockMax(bits=4), world)
    x = torch.randn(20, 2, 32, generator=torch.Generator().manual_seed(0))
    stored = method.encode(0, "key", x, torch.arange(20))
    turned = x @ hadamard(32)
    peak = turned.gather(-1, turned.abs().argmax(-1, keepdim=True))[..., 0]
    assert torch.allclose(stored.floats["scale"].float()[..., 0], -peak / 8, rtol=1e-3)
    assert int(stored.codes["codes"][0].min()) == 0, "the largest element is the lowest code"
    assert method.nbytes(32, SHAPE) * 16 == SHAPE.exact_nbytes(32) * 4.5
    assert fitted(BlockMax(bits=8), world).nbytes(32, SHAPE) * 16 == SHAPE.exact_nbytes(32) * 8.5


def test_turboquant_gives_loud_channels_a_quantizer_of_their_own(world: World, prompt: Prompt) -> None:
    method = cast(TurboQuant, fitted(TurboQuant(bits=2, outliers=0.25), world))
    assert method.name == "turboquant-2.25bit" and [len(p.rotation) for p in method._parts] == [8, 24]
    energy = world.stats.layers[1].values.pow(2).mean(0)
    loud = method._order[1, "value"][:, :8]
    assert float(energy.gather(1, loud).min(1).values[0]) >= float(energy[0].sort().values[-8]) - 1e-6
    spiky = prompt[0].clone()
    spiky[..., :4] *= 20
    stats = dataclasses.replace(world.stats, layers=[_louder(layer) for layer in world.stats.layers])
    errors = []
    for candidate in (TurboQuant(bits=2, outliers=0.25), TurboQuant(bits=2)):
        candidate.fit(stats, SHAPE)
        back = candidate.roundtrip_all(spiky, prompt[1], prompt[2])[0]
        errors.append(relative_error(spiky[..., 4:], back[..., 4:]))
    assert errors[0] < errors[1] / 3


def _louder(layer: LayerStats) -> LayerStats:
    keys = layer.keys.clone()
    keys[..., :4] *= 20
    return dataclasses.replace(layer, keys=keys)


def test_kvquant_keeps_outliers_as_they_are_and_channels_apart(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    method = cast(KvQuant, fitted(KvQuant(bits=3), world))
    spiky = unrope(keys[0], positions, world.cos, world.sin)
    spiky[7, 1, 5] = 500.0
    turned = rope(spiky, positions, world.cos, world.sin)
    stored = method.encode(0, "key", turned, positions)
    assert 500.0 in stored.floats["outliers"].tolist() and int(stored.floats["counts"][7]) >= 1
    back = unrope(method.decode(0, "key", stored, positions), positions, world.cos, world.sin)
    assert float(back[7, 1, 5]) == pytest.approx(500.0, rel=1e-3)
    others = torch.ones(TOKENS, 2, 32, dtype=torch.bool)
    others[7, 1, 5] = False
    assert relative_error(spiky[others], back[others]) < 0.05
    kept = method.encode(0, "value", values[0], positions)
    assert kept.floats["counts"].tolist() == [2] * TOKENS, "one at either end of every token"
    assert relative_error(values, method.roundtrip_all(keys, values, positions)[1]) < relative_error(
        values, fitted(PerToken(bits=3), world).roundtrip_all(keys, values, positions)[1]
    )


def test_fitted_levels_are_a_weighted_k_means() -> None:
    x = torch.tensor([9.1, 0.0, 0.1, 1.0, 1.1, 5.0, 5.1, 9.0])
    levels = fitted_levels(x, torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), 2)
    assert torch.allclose(levels, torch.tensor([0.025, 1.05, 5.05, 9.05]), atol=1e-6)


def test_palu_adds_a_projections_bias_after_the_latent(world: World, prompt: Prompt) -> None:
    """A key bias must cost nothing: the published method folds only the weight."""
    keys, values, positions = prompt
    bias = 30 * torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    shifted = rope(unrope(keys[0], positions, world.cos, world.sin) + bias, positions, world.cos, world.sin)
    layers = [dataclasses.replace(layer, key_bias=bias) for layer in world.stats.layers]
    method = Palu(share=0.5, bits=8)
    method.fit(dataclasses.replace(world.stats, layers=layers), SHAPE)
    plain = fitted(Palu(share=0.5, bits=8), world).roundtrip(0, keys[0], values[0], positions)[0]
    back = method.roundtrip(0, shifted, values[0], positions)[0]
    turned = rope(bias.expand_as(keys[0]), positions, world.cos, world.sin)
    assert torch.allclose(back - turned, plain, atol=1e-3)


def test_hadamard_tames_an_outlying_channel(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    spiky = keys.clone()
    spiky[..., 5] += 60.0
    plain = fitted(PerToken(bits=4, group=1 << 30), world).roundtrip_all(spiky, values, positions)[0]
    turned = fitted(HadamardInt(bits=4), world).roundtrip_all(spiky, values, positions)[0]
    assert relative_error(spiky, turned) < relative_error(spiky, plain)
    assert fitted(HadamardInt(bits=4), world).exact(1000).tokens == 36


def test_qjl_estimates_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, generator=generator), torch.randn(32, generator=generator)
    draws = []
    for _ in range(3000):
        sketch = torch.randn(32, 32, generator=generator)
        draws.append(float(qjl_decode(qjl_encode(x, sketch), x.norm(), sketch) @ y))
    estimate = torch.tensor(draws)
    spread = float(estimate.std()) / math.sqrt(len(draws))
    assert abs(float(estimate.mean() - x @ y)) < 4 * spread
    assert float(estimate.var()) < 1.1 * math.pi / 2 / 32 * float(x.pow(2).sum() * y.pow(2).sum())


def test_turboquant_with_qjl_is_unbiased_and_without_it_is_not(world: World) -> None:
    """One key against itself: the MSE quantizer shrinks it, the sketch restores the mean over rotations."""
    one = World(Shape(1, 1, 32, 1))
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    ratios = {}
    for qjl in (False, True):
        scores = []
        for seed in range(400):
            method = TurboQuant(bits=2, qjl=qjl, seed=2 * seed)
            method.fit(one.stats, one.shape)
            back, _ = method.roundtrip(0, x, x, torch.zeros(1, dtype=torch.int64))
            scores.append(float((back * x).sum() / x.pow(2).sum()))
        ratios[qjl] = torch.tensor(scores)
    assert float(ratios[False].mean()) == pytest.approx(1 - 0.117, abs=0.01)
    assert abs(float(ratios[True].mean()) - 1) < 4 * float(ratios[True].std()) / 20


def test_turboquant_reaches_lloyd_max_error_for_any_input(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    for bits, error in [(1, 0.363), (2, 0.117), (3, 0.0345), (4, 0.0095)]:
        back = fitted(TurboQuant(bits=bits), world).roundtrip_all(keys, values, positions)[0]
        assert relative_error(keys, back) == pytest.approx(error, rel=0.15)
    with pytest.raises(ValueError, match="bits must be 2 to 8"):
        TurboQuant(bits=1, qjl=True)


def test_jarvis_as_published_has_its_flaws(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    method = fitted(JarvisPublished(rank=16, bits=4), world)
    stored = method.encode(0, "key", keys[0], positions)
    assert stored.codes["codes"][1] == 8, "a whole byte for a code of four bits"
    assert len(stored.codes["codes"][0].unique()) <= 6, "of 16 levels"
    assert torch.allclose(method.roundtrip_all(keys, values, positions)[1], values, rtol=1e-3, atol=1e-3)
    shape = Shape(layers=1, kv_heads=1, head_dim=128, query_heads=1)
    for rank, ratio in [(16, 11.6), (32, 6.4)]:
        keys_only = JarvisPublished(rank=rank).nbytes(4096, shape) - 4096 * 256
        assert 4096 * 256 / keys_only == pytest.approx(ratio, abs=0.05)
    # The sign correction does not scale with the token: shrink the keys and it swamps them.
    small = method.roundtrip(0, keys[0] / 50, values[0], positions)[0]
    assert relative_error(keys[0] / 50, small) > 2 * relative_error(
        keys[0], method.roundtrip(0, keys[0], values[0], positions)[0]
    )


def test_jarvis_repaired_is_better_at_fewer_bytes(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    published, repaired = fitted(JarvisPublished(rank=16), world), fitted(JarvisRepaired(share=0.5), world)
    assert repaired.nbytes(4096, SHAPE) < published.nbytes(4096, SHAPE) / 2
    error = [relative_error(keys, m.roundtrip_all(keys, values, positions)[0]) for m in (published, repaired)]
    assert error[1] < error[0]
    scaled = repaired.roundtrip(0, (keys[0] - keys[0].mean(0)) * 1.0, values[0], positions)
    assert bool(scaled[0].isfinite().all())


def test_oscar_rotations_are_orthogonal_and_diagonalise_the_moments(world: World, prompt: Prompt) -> None:
    method = cast(Oscar, fitted(Oscar(bits=8), world))
    for rotation in method._rotation.values():
        assert torch.allclose(rotation @ rotation.mT, torch.eye(32).expand(2, -1, -1), atol=1e-4)
    # Hadamard after the eigenvectors: every rotated channel sees the same query energy.
    turned = method._rotation[0, "key"].mT @ world.stats.layers[0].query_moment() @ method._rotation[0, "key"]
    diagonal = turned.diagonal(dim1=-2, dim2=-1)
    assert float((diagonal.amax(-1) / diagonal.amin(-1)).max()) == pytest.approx(1.0, abs=1e-3)
    stored = method.encode(0, "key", prompt[0][0], prompt[2])
    assert CLIP["key"] < 1 and int(stored.codes["codes"][0].max()) == 255
    tuned = fitted(Oscar(bits=2, tuned=True), world).roundtrip_all(*prompt)
    plain = fitted(Oscar(bits=2), world).roundtrip_all(*prompt)
    for x, a, b in zip(prompt, tuned, plain, strict=False):
        assert relative_error(x, a) < relative_error(x, b)
    shared = cast(Oscar, fitted(Oscar(per_head=False), world))
    assert torch.equal(shared._rotation[0, "key"][0], shared._rotation[0, "key"][1])
    assert shared.basis_nbytes(SHAPE) * 2 == method.basis_nbytes(SHAPE)


def test_oscar_weights_values_by_the_scores_they_draw(world: World) -> None:
    layer = world.stats.layers[0]
    got = score_weighted_moment(layer)
    weight = torch.stack([(layer.keys[:, 1] @ layer.query_moment()[1] * layer.keys[:, 1]).sum(1)])[0]
    want = (layer.values[:, 1].T * (weight / weight.mean())) @ layer.values[:, 1]
    assert relative_error(want, got[1].float()) < 1e-6


def test_spectra_leaves_weak_channels_without_bits(world: World, prompt: Prompt) -> None:
    method = cast(Spectra, fitted(Spectra(bits=1.5), world))
    plan = method._plans[0, "key"]
    spent = sum(int(method._plans[layer, "key"].bits.sum()) for layer in range(SHAPE.layers))
    assert spent == SHAPE.layers * int(1.5 * SHAPE.width) and plan.bits.tolist()[-1] == 0
    assert torch.allclose(plan.down.T @ plan.down, torch.eye(SHAPE.width), atol=1e-4)
    joint = fitted(Spectra(bits=2.0), world).roundtrip_all(*prompt)[0]
    per_head = fitted(Spectra(bits=2.0, per_head=True), world).roundtrip_all(*prompt)[0]
    assert relative_error(prompt[0], joint) < relative_error(prompt[0], per_head)


def test_palu_uses_groups_of_heads(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    one, two = (fitted(Palu(share=0.5, bits=8, group_heads=g), world) for g in (1, 2))
    shapes = [[x.shape for x, _ in m.encode(0, "key", keys[0], positions).codes.values()] for m in (one, two)]
    assert shapes == [[(TOKENS, 16), (TOKENS, 16)], [(TOKENS, 32)]]
    error = [relative_error(values, m.roundtrip_all(keys, values, positions)[1]) for m in (one, two)]
    assert error[1] < error[0]


def test_eigen_attention_at_full_rank_is_bf16(world: World, prompt: Prompt) -> None:
    back = fitted(EigenAttention(share=1.0), world).roundtrip_all(*prompt)
    assert all(relative_error(x, y) < 2e-5 for x, y in zip(prompt, back, strict=False))


def test_svdq_on_keys_of_low_rank_needs_only_its_first_channels(world: World, prompt: Prompt) -> None:
    method = cast(Svdq, fitted(Svdq(schedule=(8, 0, 0, 0, 0, 0, 0, 0), value_bits=16), world))
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(TOKENS, 8, generator=generator) @ torch.randn(8, 64, generator=generator) + 3.0
    keys = rope(flat.view(TOKENS, 2, 32), prompt[2], world.cos, world.sin)
    back, values = method.roundtrip(0, keys, prompt[1][0], prompt[2])
    assert (
        relative_error(keys, back)
        < 1e-4
        < relative_error(prompt[0][0], method.roundtrip(0, prompt[0][0], prompt[1][0], prompt[2])[0])
    )
    assert torch.equal(values, prompt[1][0].bfloat16().float())
    stored = method.encode(0, "key", keys, prompt[2])
    assert stored.floats["basis"].shape == (64, 8), "the prompt's own basis is part of what is stored"


def test_xkv_finds_what_layers_share(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(TOKENS, 8, generator=generator)
    positions = torch.arange(TOKENS)
    keys = torch.stack([(shared @ torch.randn(8, 64, generator=generator)).view(TOKENS, 2, 32) for _ in range(5)])
    turned = torch.stack([rope(k, positions, world.cos, world.sin) for k in keys])
    method = fitted(Xkv(key_share=1 / 32, value_share=1 / 32), world)  # rank 8 for four layers of width 64
    back_keys, back_values = method.roundtrip_all(turned, keys, positions)
    assert relative_error(turned[:4], back_keys[:4]) < 1e-4 and relative_error(keys[:4], back_values[:4]) < 1e-4
    assert relative_error(keys[4], back_values[4]) > 0.1, "the fifth layer is a group of its own, of rank 2"
    assert method.name == "xkv-4-r0.0312"


def test_think_prunes_what_queries_hardly_meet(world: World, prompt: Prompt) -> None:
    keys, values, positions = prompt
    method = cast(Think, fitted(Think(prune=0.25), world))
    back, kept = method.roundtrip(0, keys[0], values[0], positions)
    energy = keys[0].pow(2).mean(0) * world.stats.layers[0].query_moment().diagonal(dim1=-2, dim2=-1)
    for head in range(2):
        gone = (back[:, head] == 0).all(0)
        assert int(gone.sum()) == 8 and energy[head][gone].max() <= energy[head][~gone].min()
        assert torch.equal(back[:, head, ~gone], keys[0][:, head, ~gone].bfloat16().float())
    assert torch.equal(kept, values[0].bfloat16().float())


def test_the_window_row_keeps_nothing_else(world: World, prompt: Prompt) -> None:
    method = fitted(WindowOnly(), world)
    assert method.drops_tokens and not any(bool(x.any()) for x in method.roundtrip_all(*prompt))
    assert method.nbytes(5000, SHAPE) == SHAPE.exact_nbytes(68)
    eighth = WindowOnly(ratio=8.0)
    assert eighth.nbytes(4096, SHAPE) * 8 == SHAPE.exact_nbytes(4096)


def test_methods_before_rope_are_indifferent_to_the_position(world: World, prompt: Prompt) -> None:
    """The same content later in the text: what is restored, RoPE undone, is the same too."""
    stats: CalibrationStats = world.stats
    keys, values, positions = prompt
    later = positions + 500
    bare = torch.stack([unrope(k, positions, stats.cos, stats.sin) for k in keys])
    moved = torch.stack([rope(k, later, stats.cos, stats.sin) for k in bare])
    for method in (Spectra(bits=3.0), EigenAttention(), Palu(bits=8)):
        fitted(method, world)
        here = unrope(method.roundtrip(1, keys[1], values[1], positions)[0], positions, stats.cos, stats.sin)
        there = unrope(method.roundtrip(1, moved[1], values[1], later)[0], later, stats.cos, stats.sin)
        assert relative_error(here, there) < 1e-3

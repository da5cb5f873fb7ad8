"""What holds for every registered method: bytes, determinism, shapes, errors."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from spectral import baselines
from spectral.baselines import Baseline, LayerStats, Shape
from spectral.baselines.base import HOUSE_RECENT, HOUSE_SINKS
from spectral.baselines.store import Stored
from spectral.errors import SpectralError
from tests.spectral.baselines.synthetic import SHAPE, TOKENS, World, fitted, relative_error

Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NAMES = list(baselines.all())


def make(name: str) -> Baseline:
    return baselines.all()[name]()


@pytest.fixture(scope="module")
def methods(world: World) -> dict[str, Baseline]:
    return {name: fitted(make(name), world) for name in NAMES}


def record(method: Baseline, monkeypatch: pytest.MonkeyPatch) -> list[Stored]:
    """Everything the method stores from now on."""
    out: list[Stored] = []
    real = method.encode

    def encode(*args: Any) -> Stored:
        out.append(real(*args))
        return out[-1]

    monkeypatch.setattr(method, "encode", encode)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_packed_representation(
    name: str, methods: dict[str, Baseline], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = methods[name]
    for tokens in (TOKENS, 37):
        stored = record(method, monkeypatch)
        method.roundtrip_all(prompt[0][:, :tokens], prompt[1][:, :tokens], prompt[2][:tokens])
        packed = sum(part.numel() for one in stored for part in one.packed())
        assert packed == sum(one.nbytes for one in stored)
        assert method.payload_nbytes(tokens, SHAPE) == method.measured_nbytes
        if not name.startswith("kvtc"):  # which deflates them: test_kvtc.py
            assert packed == method.measured_nbytes
        monkeypatch.undo()
    context = 1000
    window = method.held(context)
    all_in = window.tokens * 4 * SHAPE.layers * SHAPE.width + method.payload_nbytes(context - window.tokens, SHAPE)
    # KIVI holds more values than keys: counted side by side, and group by group on each.
    assert method.nbytes(context, SHAPE) == (pytest.approx(all_in, rel=0.01) if name.startswith("kivi") else all_in)
    assert method.payload_nbytes(0, SHAPE) == 0


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_are_deterministic_finite_and_of_the_same_shape(
    name: str, methods: dict[str, Baseline], world: World, prompt: Prompt
) -> None:
    keys, values, positions = prompt
    before = keys.clone()
    first = methods[name].roundtrip_all(keys, values, positions)
    again = fitted(make(name), world).roundtrip_all(keys, values, positions)
    assert torch.equal(keys, before)
    for x, back, same in zip((keys, values), first, again, strict=True):
        assert back.shape == x.shape and back.dtype == torch.float32 and bool(back.isfinite().all())
        assert torch.equal(back, same)


@pytest.mark.parametrize("name", NAMES)
def test_layers_one_by_one_give_the_same(name: str, methods: dict[str, Baseline], prompt: Prompt) -> None:
    method, (keys, values, positions) = methods[name], prompt
    if method.across_layers:
        with pytest.raises(TypeError, match="roundtrip_all"):
            method.roundtrip(0, keys[0], values[0], positions)
        return
    every = method.roundtrip_all(keys, values, positions)
    one = method.roundtrip(2, keys[2], values[2], positions)
    assert torch.equal(one[0], every[0][2]) and torch.equal(one[1], every[1][2])
    with pytest.raises(ValueError, match="layer 5"):
        method.roundtrip(5, keys[0], values[0], positions)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused(name: str, methods: dict[str, Baseline], world: World, prompt: Prompt) -> None:
    method, (keys, values, positions) = methods[name], prompt
    with pytest.raises(ValueError, match="keys are"):
        method.roundtrip_all(keys[:2], values, positions)
    with pytest.raises(ValueError, match="values are"):
        method.roundtrip_all(keys, values[..., :8], positions)
    with pytest.raises(ValueError, match="want float32"):
        method.roundtrip_all(keys, values.double(), positions)
    with pytest.raises(ValueError, match="at least one token"):
        method.roundtrip_all(keys[:, :0], values[:, :0], positions[:0])
    with pytest.raises(RuntimeError, match="call fit"):
        make(name).roundtrip_all(keys, values, positions)
    with pytest.raises(ValueError, match="5 layers, the shape has 6"):
        make(name).fit(world.stats, dataclasses.replace(SHAPE, layers=6))


@pytest.mark.parametrize("name", NAMES)
def test_names_sources_and_windows(name: str, methods: dict[str, Baseline]) -> None:
    method = methods[name]
    assert method.name == name and re.search(r"\b20\d\d\)", method.source)
    assert isinstance(method.in_attention, bool) and method.basis_nbytes(SHAPE) >= 0
    for context in (0, 1, 3, 50, 4096):
        window = method.exact(context)
        assert window.sinks >= 0 and window.recent >= 0 and window.tokens <= context
    assert method.nbytes(4096, SHAPE) < SHAPE.exact_nbytes(4096)
    wider = dataclasses.replace(method, recent=method.recent + 64)
    if not getattr(method, "ratio", None) or not method.drops_tokens:
        assert max(wider.exact(n).recent for n in range(4000, 4300)) == 64 + max(
            method.exact(n).recent for n in range(4000, 4300)
        )


LADDERS = [
    ["turboquant-1bit", "turboquant-2bit", "turboquant-3bit", "turboquant-4bit", "fp8-e4m3"],
    ["turboquant-qjl-2bit", "turboquant-qjl-3bit", "turboquant-qjl-4bit"],
    ["turboquant-2.25bit", "turboquant-3.25bit"],
    ["kivi-2bit", "kivi-3bit", "kivi-4bit"],
    ["kvquant-nuq2", "kvquant-nuq3", "kvquant-nuq4"],
    ["pertoken-int2", "pertoken-int3", "pertoken-int4"],
    ["llamacpp-q4_0", "llamacpp-q8_0"],
    ["hadamard-int2", "hadamard-int3", "hadamard-int4"],
    ["oscar-int2", "oscar-int3", "oscar-int4"],
    ["palu-r0.5-2bit", "palu-r0.5-3bit", "palu-r0.5-4bit"],
    ["palu-fisher-r0.5-2bit", "palu-fisher-r0.5-3bit", "palu-fisher-r0.5-4bit"],
    ["aatc-1bit", "aatc-1.5bit", "aatc-2bit", "aatc-2.75bit", "aatc-4bit"],
    ["spectra-1bit", "spectra-1.5bit", "spectra-2bit", "spectra-3bit", "spectra-4bit"],
    ["spectra-perhead-1bit", "spectra-perhead-2bit", "spectra-perhead-4bit"],
    ["svdq-1.25bit-v2", "svdq-2.25bit-v4", "svdq-2.25bit-v16"],
    ["kvtc-32x", "kvtc-16x", "kvtc-8x", "kvtc-4x"],
    ["jarviskv-repaired-r0.25-b3", "jarviskv-repaired-r0.5-b3", "jarviskv-repaired-r0.75-b3"],
    ["eigen-attention-0.125", "eigen-attention-0.25", "eigen-attention-0.6"],
    ["eigen-attention-budget-0.1", "eigen-attention-budget-0.05", "eigen-attention-budget-0.025"],
    ["xkv-4-r0.117", "xkv-4-r0.156"],
    ["think-0.5", "think-0.4"],
]


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder[0].rsplit("-", 1)[0])
def test_more_bytes_mean_less_error(ladder: list[str], methods: dict[str, Baseline], prompt: Prompt) -> None:
    keys, values, positions = prompt
    errors, nbytes = [], []
    for name in ladder:
        back = methods[name].roundtrip_all(keys, values, positions)
        errors.append(relative_error(keys, back[0]) + relative_error(values, back[1]))
        nbytes.append(methods[name].payload_nbytes(TOKENS, SHAPE))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    assert nbytes == sorted(nbytes) and nbytes[-1] > nbytes[0]


def test_published_windows() -> None:
    got = {name: (m.exact(128_000).sinks, m.exact(128_000).recent) for name in NAMES for m in [make(name)]}
    # A whole number of residuals of 128: KIVI's keys and QuantizedCache are about to be quantized.
    assert got["kivi-2bit"] == got["pertoken-int4"] == (0, 128)
    assert got["oscar-int2"] == (64, 256) and got["kvtc-16x"] == (4, 128)
    assert got["think-0.4"] == (0, 32) and got["fp8-e4m3"] == (0, 0)
    assert got["window-only"] == (4, 64) and got["window-only-8x"] == (4, 15_996)
    assert got["turboquant-2bit"] == got["spectra-2bit"] == (HOUSE_SINKS, HOUSE_RECENT)


def test_ratios_of_a_larger_model_are_the_published_ones() -> None:
    shape, context = Shape(layers=32, kv_heads=8, head_dim=128, query_heads=32), 131_072
    ratio = {name: shape.exact_nbytes(context) / make(name).nbytes(context, shape) for name in NAMES}
    assert ratio["oscar-int2"] == pytest.approx(7.0, abs=0.05)
    assert ratio["kivi-2bit"] == pytest.approx(16 / 3, abs=0.03)
    assert ratio["hadamard-int4"] == pytest.approx(16 / 4.25, abs=0.01)
    assert ratio["fp8-e4m3"] == 2.0
    assert ratio["kvquant-nuq3"] == pytest.approx(16 / 3.33, abs=0.05)
    assert ratio["think-0.4"] == pytest.approx(1.25, abs=0.01) and ratio["think-0.5"] == pytest.approx(4 / 3, abs=0.01)
    assert ratio["eigen-attention-0.6"] == pytest.approx(1.67, abs=0.02)
    assert ratio["xkv-4-r0.117"] == pytest.approx(8.5, rel=0.05)
    assert ratio["turboquant-4bit"] == pytest.approx(16 / 4.125, abs=0.01)
    assert ratio["jarviskv-published-r4-b4"] == pytest.approx(1.94, abs=0.01)


def test_get_takes_names_lists_and_all() -> None:
    assert [m.name for m in baselines.get("kivi-2bit, fp8-e4m3")] == ["kivi-2bit", "fp8-e4m3"]
    assert [m.name for m in baselines.get(["oscar-int2"])] == ["oscar-int2"]
    assert [m.name for m in baselines.get("all")] == NAMES
    assert baselines.get("kivi-2bit")[0] is not baselines.get("kivi-2bit")[0]
    with pytest.raises(SpectralError, match="no comparison 'kivi2bit'; did you mean kivi-2bit"):
        baselines.get("kivi2bit")
    with pytest.raises(SpectralError, match="no comparison was named"):
        baselines.get(" , ")


def test_shapes_and_samples_are_checked(world: World) -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        Shape(layers=1, kv_heads=2, head_dim=8, query_heads=3)
    stats = world.stats
    layer = stats.layers[0]
    narrow = dataclasses.replace(layer, values=layer.values[..., :4])
    with pytest.raises(ValueError, match="layer 0: values are"):
        dataclasses.replace(stats, layers=[narrow, *stats.layers[1:]]).check(SHAPE)
    with pytest.raises(ValueError, match="cos"):
        dataclasses.replace(stats, cos=stats.cos[:5]).check(SHAPE)


def test_a_method_says_what_calibration_lacks(world: World) -> None:
    class Needy(type(make("fp8-e4m3"))):  # type: ignore[misc]
        needs = frozenset({"output_weight"})

    layers = [dataclasses.replace(layer, output_weight=None) for layer in world.stats.layers]
    with pytest.raises(ValueError, match="needs output_weight and layer 0 has none"):
        Needy().fit(dataclasses.replace(world.stats, layers=layers), SHAPE)


def test_the_query_moment_sums_the_heads_that_read_a_key(world: World) -> None:
    layer: LayerStats = world.stats.layers[0]
    moment = layer.query_moment()
    want = sum(layer.queries[:, h].T @ layer.queries[:, h] for h in (2, 3))
    assert moment.shape == (2, 32, 32) and torch.allclose(moment[1], torch.as_tensor(want), rtol=1e-4, atol=1e-2)

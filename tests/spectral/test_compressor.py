"""One head's compressor, and profiles from tensors alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spectral import SpectralKVCompressor, SpectralProfile, profile_from_tensors
from spectral.compressor import Projection
from spectral.errors import CacheError, ProfileError, SettingError
from spectral.fit import default_by_energy


def states(heads: int, tokens: int, dim: int, seed: int, decay: float = 0.8) -> torch.Tensor:
    """[H, N, d] with a decaying spectrum and a mean."""
    rng = np.random.default_rng(seed)
    mixing = np.stack([rng.normal(size=(dim, dim)) * decay ** np.arange(dim)[:, None] for _ in range(heads)])
    return torch.tensor(rng.normal(size=(heads, tokens, dim)) @ mixing + rng.normal(size=(heads, 1, dim)))


LAYERS = [(states(2, 600, 32, i), states(2, 600, 32, 10 + i)) for i in range(2)]


@pytest.fixture(scope="module")
def profile() -> SpectralProfile:
    return profile_from_tensors(LAYERS)


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_projection_is_the_heads_own_statistics(profile: SpectralProfile, side: str) -> None:
    projection = profile.get_projection(1, 1, side)
    data = LAYERS[1][side == "value"][1].numpy()
    assert np.allclose(projection.mean, data.mean(0))
    assert np.allclose(projection.covariance, np.cov(data.T, bias=True), atol=1e-6 * projection.covariance.max())
    assert projection.metric.shape == (32, 32) and np.allclose(projection.metric, projection.metric[0, 0] * np.eye(32))


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_compressing_is_packed_and_close(profile: SpectralProfile, bits: int) -> None:
    compressor = SpectralKVCompressor(profile.get_projection(layer=0, head=1), bits=bits)
    keys = LAYERS[0][0][1, :100].float()
    compressed = compressor.compress(keys)
    assert compressed.codes.dtype == torch.uint8 and compressed.tokens == 100
    assert compressed.nbytes == compressed.codes.numel() <= 104 * 32 * bits / 8
    back = compressor.decompress(compressed)
    error = float((back - keys).square().mean() / (keys - keys.mean(0)).square().mean())
    assert error < {1: 0.15, 2: 0.03, 4: 0.002, 6: 2e-4}[bits]
    query = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    scores = compressor.approximate_attention(compressed, query)
    assert torch.allclose(scores, query @ back.T, atol=1e-3)
    exact = query @ keys.T
    assert float(torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1]) > 0.9


def test_the_ratio_counts_everything(profile: SpectralProfile) -> None:
    compressor = SpectralKVCompressor(profile.get_projection(0, 0), bits=4)
    for tokens in (1, 100, 4096):
        kept = compressor.compress(torch.zeros(tokens, 32)).nbytes + compressor.nbytes
        assert compressor.compression_ratio(tokens) == pytest.approx(tokens * 32 * 2 / kept)
    assert compressor.compression_ratio(1) < 1 < compressor.compression_ratio() < 4
    assert compressor.compression_ratio(10**7) == pytest.approx(4, rel=0.02)
    assert compressor.vram_saved_mb(100) == pytest.approx(100 - 100 / compressor.compression_ratio())


def test_the_metric_decides_where_bits_go() -> None:
    covariance, metric = np.eye(16), np.eye(16) * 1e-3
    metric[5, 5] = 1.0
    compressor = SpectralKVCompressor(Projection(0, 0, np.zeros(16), metric, covariance), bits=0.5)
    keys = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    error = (compressor.decompress(compressor.compress(keys)) - keys).square().mean(0)
    assert error[5] < 0.01 and compressor.rank < 4


def test_wrong_arguments_are_refused(profile: SpectralProfile) -> None:
    for arguments in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(ProfileError, match="2 layers and 2 KV heads"):
            profile.get_projection(*arguments)
    with pytest.raises(ProfileError, match="side"):
        profile.get_projection(0, 0, "query")
    with pytest.raises(SettingError, match="bits"):
        SpectralKVCompressor(profile.get_projection(0, 0), bits=9)
    compressor = SpectralKVCompressor(profile.get_projection(0, 0))
    compressed = compressor.compress(torch.zeros(5, 32))
    for wrong in (torch.zeros(5, 16), torch.zeros(2, 5, 32)):
        with pytest.raises(CacheError, match="32"):
            compressor.compress(wrong)
        with pytest.raises(CacheError, match="32"):
            compressor.approximate_attention(compressed, wrong)


def test_a_profile_from_tensors_is_saved_and_loaded(profile: SpectralProfile, tmp_path: Path) -> None:
    loaded = SpectralProfile.load(profile.save(tmp_path / "made"))
    assert loaded.default == profile.default and "SpectralProfile: tensors" in loaded.summary()
    assert [row.name for row in loaded.ladder] == [row.name for row in profile.ladder]
    again, made = (p.get_projection(0, 1).covariance for p in (loaded, profile))
    assert np.allclose(again, made, rtol=5e-3, atol=5e-3)  # the file rounds its bases to float16
    codebook = loaded.codebook()
    codec = codebook.layers[0]
    assert codec is not None
    keys, values = (x[None, :, :16].float() for x in LAYERS[0])
    first = torch.zeros(1, dtype=torch.long)
    assert torch.allclose(codec.decode(codec.encode(keys, values, first), first)[0], keys, atol=4 * float(keys.std()))


def test_target_energy_chooses_the_coarsest_that_keeps_it(profile: SpectralProfile) -> None:
    shares = [row.energy for row in profile.ladder]
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False)) and 0 < shares[-1] < shares[0] <= 1
    enough = [row.name for row, share in zip(profile.ladder, shares, strict=True) if share >= shares[3]]
    assert default_by_energy(profile.ladder, shares[3]) == enough[-1]
    assert default_by_energy(profile.ladder, shares[-1]) == profile.ladder[-1].name
    assert default_by_energy(profile.ladder, 1.0) == profile.ladder[0].name


def test_queries_weigh_the_keys() -> None:
    looking = torch.zeros(4, 50, 32)
    looking[:, :, 3] = 1.0
    weighted = profile_from_tensors(LAYERS, queries=[looking, looking])
    plain = profile_from_tensors(LAYERS)
    keys = LAYERS[0][0][0].float()
    errors = []
    for made in (weighted, plain):
        compressor = SpectralKVCompressor(made.get_projection(0, 0), bits=1)
        errors.append(float((compressor.decompress(compressor.compress(keys)) - keys)[:, 3].square().mean()))
    assert errors[0] < errors[1] / 4


def test_one_tensor_per_layer_batches_and_sliding_layers() -> None:
    stacked = [torch.stack(LAYERS[0]), None]
    made = profile_from_tensors(stacked, sliding=[None, 24])
    assert made.layers[1] is None and made.sliding == [None, 24]
    with pytest.raises(ProfileError, match="sliding"):
        made.get_projection(1, 0)
    batched = profile_from_tensors([tuple(x.reshape(2, 3, 200, 32).transpose(0, 1) for x in LAYERS[0])])
    assert np.allclose(batched.get_projection(0, 1).mean, made.get_projection(0, 1).mean)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ([], {}, "at least one layer"),
        ([(torch.zeros(2, 9, 4), torch.zeros(2, 8, 4))], {}, "do not fit"),
        ([(torch.randn(2, 9, 4), torch.randn(2, 9, 4))], {}, "page of 16"),
        ([(torch.zeros(2, 9, 4),)], {}, "keys and values"),
        ([(torch.zeros(9, 4), torch.zeros(9, 4))], {}, "heads, tokens, size"),
        ([(torch.full((2, 9, 4), torch.nan), torch.zeros(2, 9, 4))], {}, "not finite"),
        (LAYERS, {"sliding": [None, 8]}, "sliding window"),
        (LAYERS, {"sliding": [None]}, "one entry per layer"),
        (LAYERS, {"queries": [torch.zeros(3, 5, 32), None]}, "queries"),
        (LAYERS, {"target_energy": 2.0}, "target_energy"),
        (LAYERS, {"target_energy": 0.0}, "target_energy"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: list, options: dict, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profile_from_tensors(tensors, **options)

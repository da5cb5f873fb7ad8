"""The small API in one go, as its first README showed it: profile, compress, attend on codes, cache, engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral import (
    InferenceEngine,
    SpectralCache,
    SpectralKVCompressor,
    SpectralProfile,
    profile_from_tensors,
)
from spectral.codec import LayerCodec, OpenPages
from tests.spectral.cache_helpers import ARGUMENT, DynamicCache, fingerprint, logits, model, tokens

PROMPT = "Once upon a time there was a small house by the sea, and in it lived a man who knew the capital of France. "


def test_profile_compress_attend_and_cache(tmp_path: Path) -> None:
    # 1. Profile a model once; keep the file.
    made = model("llama", "sdpa")
    past = DynamicCache()
    ids = tokens(1, 400)
    logits(made, ids, past)
    pairs = [(layer.keys[0], layer.values[0]) for layer in past.layers]
    measured = profile_from_tensors(pairs, target_energy=0.95, model="tiny-llama", fingerprint=fingerprint(made))
    measured.save(tmp_path / "tiny")
    profile = SpectralProfile.load(tmp_path / "tiny")
    assert "tiny-llama" in profile.summary()

    # 2. Compress one head's keys.
    projection = profile.get_projection(layer=0, head=0)
    compressor = SpectralKVCompressor(projection=projection, bits=4)
    key_states = pairs[0][0][0]
    compressed = compressor.compress(key_states)
    assert compressed.nbytes < key_states.numel() * 2 / 3
    assert compressor.compression_ratio(100_000) > 3.5
    assert 50 < compressor.vram_saved_mb(100) < 75

    # 3. Attention scores on the codes.
    query = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    scores = compressor.approximate_attention(compressed, query)
    exact = query @ key_states.T
    assert float(torch.corrcoef(torch.cat([scores, exact]))[0, 1]) > 0.95

    # 5. A cache in transformers, and in a loop of one's own.
    cache = SpectralCache(profile, bits=4)
    answer = made.generate(ids, max_new_tokens=8, do_sample=False, **{ARGUMENT: cache})
    assert answer.shape == (1, 408) and cache.get_seq_length() == 407
    cache = SpectralCache(profile, bits=4)
    full_keys, full_values = cache.update(pairs[0][0][None], pairs[0][1][None], layer_idx=0)
    assert full_keys.shape == (1, 2, 400, 16) and torch.equal(full_values + 0, pairs[0][1][None])


def test_the_engine_generates_from_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the answers came from anything but a compressed cache."""
    calls = {"pages": 0, "mix": 0}
    encode, mix = LayerCodec.encode, OpenPages.mix

    def counting_encode(self: LayerCodec, keys: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls["pages"] += keys.shape[0]
        return encode(self, keys, *rest)

    def counting_mix(self: OpenPages, *arguments: Any) -> torch.Tensor:
        calls["mix"] += 1
        return mix(self, *arguments)

    monkeypatch.setattr(LayerCodec, "encode", counting_encode)
    monkeypatch.setattr(OpenPages, "mix", counting_mix)
    with InferenceEngine(model_name="demo-7m", quantize=None, bits=4) as engine:
        profile, store = engine.profile, engine._ready.engine.store
        assert profile is not None and engine.active_setting == profile.choose(bits=4)
        assert all(pool is not None and pool.dtype == torch.uint8 for pool in store.pools)
        stream = engine.stream(PROMPT * 8, max_tokens=40, temperature=0, ignore_eos=True)
        text = next(stream)
        row = next(iter(store._rows.values()))
        text += "".join(stream)
        layers = len(store.pools)
        # Every token that left the exact window became codes, in every layer, once.
        assert calls["pages"] >= layers * store.pages_at(row.length) > 0
        assert calls["mix"] >= layers * 35

        monkeypatch.setattr(OpenPages, "mix", lambda self, *a: torch.zeros_like(mix(self, *a)))
        assert engine.generate(PROMPT * 8, max_tokens=40, temperature=0, ignore_eos=True) != text


def test_the_engine_loads_on_request_and_answers() -> None:
    engine = InferenceEngine(model_name="demo-7m", bits=4)
    engine.load()
    assert isinstance(engine.generate("Explain the sea in simple terms.", max_tokens=5), str)
    engine.unload()

"""SpectralCache under transformers' generate, on unmodified models of every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spectral import SpectralCache
from spectral.codec import LayerCodec
from spectral.coded import CodedStates
from spectral.errors import CacheError, ProfileError, SettingError
from spectral.rows import read_row
from tests.spectral.cache_helpers import (
    CACHE_FAMILIES,
    generate,
    logits,
    model,
    profile,
    reachable_nbytes,
    tokens,
)

IMPLEMENTATIONS = ("eager", "sdpa", "spectral")
EXACT, FINE, COARSE = "exact", 0, 1
"""Settings: "exact", or a row of the test profiles' ladder."""


def spectral_cache(family: str, setting: str | int = COARSE, **options: Any) -> SpectralCache:
    made = profile(family)
    return SpectralCache(made, setting=made.ladder[setting].name if isinstance(setting, int) else setting, **options)


def dynamic_cache(made: Any) -> DynamicCache:
    return DynamicCache(config=made.config)


def check(cache: SpectralCache) -> None:
    for layer in cache.layers:
        if getattr(layer, "store", None) is not None:
            layer.store.check()
    sizes = {layer.get_mask_sizes(1) for layer in cache.layers if not layer.is_sliding}
    assert len(sizes) <= 1


@pytest.fixture(params=[(f, a) for f in CACHE_FAMILIES for a in IMPLEMENTATIONS if (f, a) != ("gemma2", "sdpa")])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Each family under each attention. (Gemma 2 caps its scores, which transformers' sdpa refuses.)"""
    family, attention = request.param
    yield family, model(family, attention)


def test_exact_answers_are_those_of_a_dynamic_cache(case: tuple[str, Any]) -> None:
    family, made = case
    ids = tokens(2, 61)
    expected = generate(made, ids, dynamic_cache(made))
    assert len(expected.unique()) > 8  # or the comparison would say nothing
    cache = spectral_cache(family, EXACT, model=made)
    assert torch.equal(generate(made, ids, cache), expected)
    assert cache.get_seq_length() == 61 + 24 - 1
    check(cache)


def test_codes_give_the_same_logits_under_every_attention(case: tuple[str, Any]) -> None:
    family, made = case
    ids = tokens(2, 67)  # one more token seals a page
    cache = spectral_cache(family)
    logits(model(family, "eager"), ids, cache)
    # From the very same codes: two encoders may round a tie differently, which is no error of the attention.
    for new in (ids[:, :1], ids[:, 1:14]):
        expected = logits(model(family, "eager"), new, copy.deepcopy(cache))
        assert torch.allclose(logits(made, new, copy.deepcopy(cache)), expected, atol=2e-4, rtol=1e-4)
        exact = spectral_cache(family, EXACT)
        logits(made, ids, exact)
        assert not torch.allclose(logits(made, new, exact), expected, atol=1e-3)  # the codes do take part


def test_attention_on_codes_rebuilds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("keys or values were rebuilt")

    monkeypatch.setattr(LayerCodec, "decode", refuse)
    monkeypatch.setattr(CodedStates, "dense", refuse)
    generate(model("llama", "spectral"), tokens(2, 61), spectral_cache("llama"))
    with pytest.raises(AssertionError, match="rebuilt"):
        generate(model("llama", "sdpa"), tokens(2, 61), spectral_cache("llama"))


@pytest.mark.parametrize("setting", [EXACT, COARSE])
def test_left_padded_rows_are_as_if_alone(case: tuple[str, Any], setting: str | int) -> None:
    family, made = case
    long, short = tokens(1, 57, 3), tokens(1, 40, 4)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 17, dtype=torch.long), short], 1)])
    mask = (ids != 0).long()
    # Spectral's attention is shown the mask by transformers; for the others the cache has to be.
    shown = None if made.config._attn_implementation == "spectral" else mask
    few = {"max_new_tokens": 12}  # either row seals a page among them
    cache = spectral_cache(family, setting, attention_mask=shown)
    answers = generate(made, ids, cache, attention_mask=mask, **few)
    check(cache)
    for row, alone in enumerate((long, short)):
        assert torch.equal(answers[row : row + 1], generate(made, alone, spectral_cache(family, setting), **few))
    if setting == EXACT:
        assert torch.equal(answers, generate(made, ids, dynamic_cache(made), attention_mask=mask, **few))
        unknown = spectral_cache(family, EXACT)
        assert torch.equal(answers, generate(made, ids, unknown, attention_mask=mask, **few))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_spectral_attention_takes_other_caches_and_padding(family: str) -> None:
    ids = tokens(2, 40)
    ids[1, :9] = 0
    answers = [
        generate(model(family, attention), ids, None, attention_mask=(ids != 0).long(), **options)
        for attention, options in (("eager", {}), ("spectral", {}), ("spectral", {"cache_implementation": "static"}))
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_right_padding_at_prefill(attention: str) -> None:
    made = model("qwen3", attention)
    ids = torch.cat([tokens(1, 40, 3), torch.cat([tokens(1, 33, 4), torch.zeros(1, 7, dtype=torch.long)], 1)])
    mask = (ids != 0).long()
    cache = spectral_cache("qwen3", attention_mask=mask)
    first = logits(made, ids, cache, mask)
    grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    second = logits(made, ids[:, :1], cache, grown)
    check(cache)
    alone = spectral_cache("qwen3")
    assert torch.allclose(first[1, :33], logits(made, ids[1:, :33], alone)[0], atol=1e-4)
    assert torch.allclose(second[1], logits(made, ids[1:, :1], alone)[0], atol=2e-2)


def test_generate_shows_the_padding_by_positions() -> None:
    """Only with a transformers that hands positions to the cache; without them the result is still masked."""
    made = model("llama", "sdpa")
    ids = torch.cat([tokens(1, 57, 3), torch.cat([torch.zeros(1, 17, dtype=torch.long), tokens(1, 40, 4)], 1)])
    cache = spectral_cache("llama")
    generate(made, ids, cache, attention_mask=(ids != 0).long(), max_new_tokens=2)
    assert cache.layers[0].columns.counts(2) in ([58, 41], [58, 58])


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("llama", "spectral"), ("gemma2", "spectral")])
class TestGenerate:
    """The ways of generating that move the cache's rows and tokens about."""

    def same(self, family: str, attention: str, ids: torch.Tensor, **options: Any) -> SpectralCache:
        """The exact setting answers as a DynamicCache does, a coarse one answers. Returns the coarse one's cache."""
        made = model(family, attention)
        answers = []
        for cache in (spectral_cache(family, EXACT), dynamic_cache(made)):
            torch.manual_seed(11)
            answers.append(generate(made, ids, cache, **options))
        assert torch.equal(*answers)
        cache = spectral_cache(family)
        assert generate(made, ids, cache, **options).shape == answers[0].shape
        check(cache)
        return cache

    def test_beams(self, family: str, attention: str) -> None:
        cache = self.same(family, attention, tokens(2, 45), num_beams=3, num_return_sequences=2)
        assert cache.layers[1].batch_size == 6

    def test_sampling(self, family: str, attention: str) -> None:
        cache = self.same(family, attention, tokens(2, 45), do_sample=True, num_return_sequences=2, top_k=20)
        assert cache.layers[1].batch_size == 4

    def test_prefill_in_chunks(self, family: str, attention: str) -> None:
        cache = self.same(family, attention, tokens(2, 45), prefill_chunk_size=16)
        assert cache.layers[1].batch_size == 2

    def test_prompt_lookup(self, family: str, attention: str) -> None:
        cache = self.same(family, attention, tokens(1, 45).repeat(1, 2), prompt_lookup_num_tokens=5)
        assert cache.layers[1].batch_size == 1

    def test_draft_model(self, family: str, attention: str) -> None:
        draft = model(family, attention, seed=1)
        made, ids = model(family, attention), tokens(1, 45)
        cache = spectral_cache(family, EXACT)
        answer = generate(made, ids, cache, assistant_model=draft)
        assert torch.equal(answer, generate(made, ids, dynamic_cache(made)))
        fine = spectral_cache(family)
        assert generate(made, ids, fine, assistant_model=draft).shape == answer.shape
        check(fine)

    def test_a_conversation_goes_on(self, family: str, attention: str) -> None:
        made, ids = model(family, attention), tokens(2, 45)
        caches = spectral_cache(family, EXACT), dynamic_cache(made), spectral_cache(family)
        answers = []
        for cache in caches:
            whole = torch.cat([ids, generate(made, ids, cache), tokens(2, 9, 5)], 1)
            answers.append(generate(made, whole, cache))
        assert torch.equal(answers[0], answers[1])
        assert caches[2].get_seq_length() == caches[1].get_seq_length() == 45 + 24 + 9 + 24 - 1
        check(caches[2])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("setting", [EXACT, COARSE])
def test_nbytes_is_what_is_allocated(family: str, setting: str | int) -> None:
    made = model(family, "spectral")
    cache = spectral_cache(family, setting)
    assert cache.nbytes == reachable_nbytes(cache) - cache.codebook_nbytes
    for length in (1, 100, 700):
        logits(made, tokens(2, length), cache)
        assert cache.nbytes + cache.codebook_nbytes == reachable_nbytes(cache)
    dense = dynamic_cache(made)
    logits(made, tokens(2, 801), dense)
    if setting == COARSE:
        assert cache.nbytes < reachable_nbytes(dense) / 4
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes < 100  # one number of transformers' sliding layers
    assert cache.nbytes + cache.codebook_nbytes == reachable_nbytes(cache)


@pytest.mark.parametrize("removed", [0, 1, 7, 30, 59, 60])
def test_crop_keeps_the_rest_as_it_was(removed: int) -> None:
    made, ids = model("llama", "spectral"), tokens(2, 60)
    for setting in (EXACT, FINE, COARSE):
        cache = spectral_cache("llama", setting)
        for part in ids.split([50, 1, 1, 8], 1):
            logits(made, part, cache)
        before = [read(cache, index) for index in (0, 1)]
        cache.crop(-removed)
        check(cache)
        assert cache.get_seq_length() == 60 - removed
        for index in (0, 1):  # the tokens of a page that was cut are rounded once more, as a window rounds
            for side, old in zip(read(cache, index), before[index], strict=True):
                rounding = 1e-6 if setting == EXACT else 0.006 * float(old.abs().max())
                assert torch.allclose(side, old[:, :, : 60 - removed], rtol=0, atol=rounding)
        again = logits(made, ids[:, 60 - removed :] if removed else ids[:, :1], cache)
        check(cache)
        if setting == EXACT:
            dense = dynamic_cache(made)
            logits(made, ids[:, : 60 - removed], dense) if removed < 60 else None
            expected = logits(made, ids[:, 60 - removed :] if removed else ids[:, :1], dense)
            assert torch.allclose(again, expected, atol=1e-4)


def read(cache: SpectralCache, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys and values [B, H, T, d] of a layer, as they are kept."""
    layer = cache.layers[index]
    pairs = [read_row(layer.store, 0, row) for row in layer.rows]
    return torch.stack([k.float() for k, _ in pairs]), torch.stack([v.float() for _, v in pairs])


def test_crop_refuses_what_it_cannot_do() -> None:
    cache = spectral_cache("gemma2")
    logits(model("gemma2", "eager"), tokens(1, 60), cache)
    for wrong in (5, -61):
        with pytest.raises(CacheError, match="0 to -60"):
            cache.crop(wrong)
    with pytest.raises(CacheError, match="activate_past_recording"):
        cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {60}
    cache.activate_past_recording()
    logits(model("gemma2", "eager"), tokens(1, 5), cache)
    cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {62}


def test_rows_are_repeated_and_chosen() -> None:
    made, ids = model("gemma3", "spectral"), tokens(2, 50)
    new = tokens(2, 1, 2)
    reference = spectral_cache("gemma3")
    logits(made, ids, reference)
    expected = logits(made, new, copy.deepcopy(reference))
    cache = copy.deepcopy(reference)
    cache.batch_repeat_interleave(3)
    repeated = logits(made, new.repeat_interleave(3, 0), cache)
    assert torch.allclose(repeated, expected.repeat_interleave(3, 0), atol=1e-5)
    cache = copy.deepcopy(reference)
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.allclose(logits(made, new[1:], cache), expected[1:], atol=1e-5)
    check(cache)
    cache = copy.deepcopy(reference)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.allclose(logits(made, new.flip(0), cache), expected.flip(0), atol=1e-5)
    assert torch.allclose(logits(made, new, reference), expected, atol=1e-5)  # no copy touched it


def test_a_cache_for_another_model_is_refused() -> None:
    other = model("llama", "eager", seed=1)
    with pytest.raises(ProfileError, match=r"made for 'llama'.*LlamaForCausalLM"):
        SpectralCache(profile("llama"), model=other)
    with pytest.raises(CacheError, match=r"made for 'llama'.*\(2, 16, 16\).*\(1, 16, 16\)"):
        spectral_cache("llama").update(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16), 0)
    with pytest.raises(CacheError, match=r"made for 'llama', a model of 2 layers.*layer 2"):
        spectral_cache("llama").update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 2)
    cache = spectral_cache("llama")
    logits(model("llama", "sdpa"), tokens(2, 9), cache)
    with pytest.raises(CacheError, match="2 sequences"):
        logits(model("llama", "sdpa"), tokens(3, 1), cache)


def test_masks_that_codes_cannot_honour_are_refused() -> None:
    made = model("llama", "spectral")
    cache = spectral_cache("llama")
    logits(made, tokens(1, 20), cache)
    hidden = torch.ones(1, 21, dtype=torch.long)
    hidden[0, 7] = 0
    with pytest.raises(CacheError, match="hides tokens"):
        logits(made, tokens(1, 1), cache, hidden)
    with pytest.raises(CacheError, match="other masks"):
        logits(made, tokens(1, 1), cache, attention_mask=torch.ones(1, 1, 1, 21, dtype=torch.bool))
    assert cache.get_seq_length() == 20  # refused by the first layer: no trace
    check(cache)


def test_settings_are_chosen_by_bits_or_name() -> None:
    made = profile("llama")
    assert SpectralCache(made).setting == made.default
    assert SpectralCache(made, bits=3).setting == made.ladder[1].name
    assert SpectralCache(made, bits=16).setting == "exact"
    assert SpectralCache(made, bits=3, setting="8x").setting == "8x"
    with pytest.raises(SettingError, match="ladder"):
        SpectralCache(made, setting="99x")
    with pytest.raises(SettingError, match="bits"):
        SpectralCache(made, bits=0)


def test_sliding_windows_must_be_known() -> None:
    made = copy.copy(profile("gemma2"))
    made.sliding = []
    with pytest.raises(CacheError, match="model=model"):
        SpectralCache(made)
    assert SpectralCache(made, model=model("gemma2", "eager")).layers[0].sliding_window == 24


def test_offloading_is_refused() -> None:
    with pytest.raises(CacheError, match="offload"):
        spectral_cache("llama").layers[0].offload()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_models_work_around_the_cache() -> None:
    made, ids = model("llama", "spectral"), tokens(1, 20)
    expected = logits(made, ids, spectral_cache("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager")
    assert torch.allclose(logits(compiled, ids, spectral_cache("llama")), expected, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logits(torch.compile(model("llama", "sdpa"), backend="eager", fullgraph=True), ids, spectral_cache("llama"))
    torch._dynamo.reset()


def test_an_update_alone_is_kept() -> None:
    """The loop of the documentation: layer by layer, without a model."""
    cache = spectral_cache("llama", EXACT)
    keys, values = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    for part in (slice(0, 30), slice(30, 31), slice(31, 40)):
        full_keys, full_values = cache.update(keys[:, :, part], values[:, :, part], layer_idx=0)
    assert full_keys.shape == keys.shape and full_values.dtype == values.dtype
    assert torch.equal(full_keys + 0, keys) and torch.equal(full_values + 0, values)
    cache.update(keys, values, layer_idx=1)  # never read
    cache.update(keys, values, layer_idx=1)
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (40, 80)
    assert (cache.get_max_length(), cache.get_mask_sizes(3, 1)) == (-1, (83, 0))

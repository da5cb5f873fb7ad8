"""Encoding, opening and prefill over codes in Triton's interpreter (or on a GPU) against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral import code_dispatch, dispatch
from spectral.codec import LayerCodec
from spectral.engine.static_step import Seal, SealStep
from spectral.errors import SettingError
from spectral.kernels import check_codes, chunk
from spectral.kernels.choices import forced
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.encode import Tokens, encode, projection
from spectral.kernels.expand import expand
from spectral.pages import LayerShape, ModelShape, PageStore
from spectral.pools import empty_pool
from spectral.windows import make_window
from tests.spectral.helpers import random_codebook, random_codec
from tests.spectral.kernels.chunks import run_chunk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [8, 6, 4, 3, 2, 1, 0]
SHAPES = [
    # KV heads, dim, page, units, block, pages, first page, keys and values apart, pages not transformed
    (2, 16, 16, 2, 64, 5, 3, False, False),
    (2, 40, 8, 1, 32, 7, 1, False, False),
    (1, 32, 16, 1, 0, 1, 0, False, False),
    (2, 16, 8, 1, 8, 4, 9, False, False),
    (4, 24, 16, 2, 64, 5, 3, True, False),
    (2, 16, 8, 1, 32, 7, 1, True, False),
    (2, 40, 8, 1, 32, 7, 1, False, True),
    (4, 64, 16, 2, 64, 5, 3, True, True),
    (2, 48, 8, 1, 0, 7, 1, True, True),
]


def layer_of(
    heads: int, dim: int, page: int, units: int, block: int, apart: bool = False, flat: bool = False
) -> CodeLayer:
    sizes = {"page": page, "units": units, "block": block}
    return CodeLayer(random_codec(heads, dim, MIXED, **sizes, device=DEVICE, apart=apart, flat=flat))


@pytest.mark.parametrize(("heads", "dim", "page", "units", "block", "count", "first", "apart", "flat"), SHAPES)
def test_opened_pages_are_the_references(
    heads: int, dim: int, page: int, units: int, block: int, count: int, first: int, apart: bool, flat: bool
) -> None:
    """Every width, pages anywhere in the pool, blocks that begin anywhere, several slices."""
    layer = layer_of(heads, dim, page, units, block, apart, flat)
    pool = check_codes.random_pages(layer.codec, count + 4)
    ids = torch.randperm(count + 4, device=DEVICE)[:count].int()
    found = check_codes.opened(layer, pool, ids, first)
    for got, wanted in zip(found, check_codes.expected(layer.codec, pool, ids, first), strict=True):
        assert check_codes.relative(got, wanted) < 1e-3


def test_slices_of_a_long_row_are_opened_alike() -> None:
    layer = layer_of(1, 16, 16, 1, 32)
    pool = check_codes.random_pages(layer.codec, 7)
    ids = torch.arange(7, device=DEVICE, dtype=torch.int32)
    whole = check_codes.opened(layer, pool, ids)
    with forced(slice_tokens=48):
        parts = check_codes.opened(layer, pool, ids)
    for got, wanted in zip(parts, whole, strict=True):
        assert check_codes.relative(got, wanted) < 1e-3


def codes_of(codec: LayerCodec, pages: torch.Tensor) -> torch.Tensor:
    parts = [unit.codes(pages[:, span]) for unit, span in zip(codec.units, codec._bounds, strict=True)]
    return torch.cat(parts, 1).int()


def rounding(layer: CodeLayer) -> torch.Tensor:
    """What rounding numbers of about their spread to fp16 does to every code, in steps: by unit, in order."""
    parts = []
    for number, unit in enumerate(layer.codec.units):
        reach = projection(layer, number).float().norm(dim=0)  # of a number, in latents
        parts.append((2.0**-11 * reach * unit._packing.inverse / unit.deviation).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("bits", [16, 10, 8])
@pytest.mark.parametrize(
    ("page", "units", "block", "count", "apart", "flat"),
    [
        (16, 2, 64, 3, False, False),
        (8, 2, 8, 5, False, False),
        (16, 2, 0, 1, False, False),
        (16, 2, 64, 3, True, False),
        (8, 1, 8, 5, True, False),
        (16, 1, 64, 3, True, True),
        (8, 1, 8, 5, False, True),
    ],
)
def test_codes_are_the_references_but_for_values_on_an_edge(
    page: int, units: int, block: int, count: int, apart: bool, flat: bool, bits: int
) -> None:
    """Tokens partly from the window and partly new, rounded as it would: a code differs where a value lies within
    fp16's rounding of the edge of two codes. All bytes of the pages are written, and no others."""
    torch.manual_seed(0)
    heads, dim, first = 2, 16, 2
    layer = layer_of(heads, dim, page, units, block, apart, flat)
    codec = layer.codec
    window = make_window(LayerShape(heads, dim, dim), 4, 32, torch.bfloat16, torch.device(DEVICE), bits)
    numbers = check_codes.expected(
        codec, check_codes.random_pages(codec, count), torch.arange(count, device=DEVICE), first
    )
    kept = torch.cat(numbers, -1) + 0.01 * torch.randn(heads, count * page, 2 * dim, device=DEVICE)
    split = count * page // 2 - 3
    held, new = kept[:, :split].contiguous(), kept[:, split:].bfloat16()
    joined = torch.cat([held, window.as_kept(new)], 1).unflatten(1, (count, page)).transpose(0, 1)
    number = torch.arange(first, first + count, device=DEVICE)
    wanted = codec.encode(joined[..., :dim], joined[..., dim:], number)
    pool = torch.full((count + 3, codec.page_nbytes), 255, dtype=torch.uint8, device=DEVICE)
    spot = torch.randperm(count + 3, device=DEVICE)[:count].int()
    tokens = Tokens(held, new[..., :dim], new[..., dim:])
    if bits < 16:
        tokens.top, tokens.group = 2 ** (bits - 1) - 1, window.groups  # type: ignore[attr-defined]
    encode(layer, tokens, number.int(), codec.frame.blocks(first + count), pool, spot)
    off = (codes_of(codec, pool[spot.long()]) - codes_of(codec, wanted)).abs()
    noise = rounding(layer)
    assert (off <= 1 + 8 * noise).all() and (off > 0).float().mean() < 4 * noise.clamp_max(0.25).mean() + 1e-3
    rest = [i for i in range(count + 3) if i not in spot.tolist()]
    assert (pool[rest] == 255).all()
    if not off.any():
        assert torch.equal(pool[spot.long()], wanted)


def store_of(
    kv_heads: int, dim: int, group: int, widths: list[int], bits: int, page: int, apart: bool = False,
    flat: bool = False,
) -> PageStore:  # fmt: skip
    shape = ModelShape((LayerShape(kv_heads, dim, dim),), kv_heads * group, kv_heads * group * dim)
    sizes = {"page": page, "window": 32, "block": 64, "window_bits": bits, "units": 1 + apart}
    book = random_codebook(shape, widths, **sizes, device=DEVICE, apart=apart, flat=flat)
    return PageStore(shape, book, device=DEVICE, window_dtype=torch.float32)


@pytest.mark.parametrize(
    ("kv_heads", "dim", "group", "widths", "bits", "page", "softcap", "chunks", "apart", "flat"),
    [
        (2, 16, 2, MIXED, 8, 16, None, [100, 21, 40], False, False),
        (1, 24, 3, [4, 2, 1], 10, 8, None, [3, 2, 70, 5], False, False),
        (1, 16, 4, [4, 3], 16, 16, 3.0, [90, 33], False, False),
        (2, 32, 2, MIXED, 8, 16, None, [100, 21, 40], True, False),
        (2, 64, 2, MIXED, 8, 16, None, [100, 21, 40], True, True),
        (2, 48, 3, [4, 2, 1], 10, 8, 3.0, [3, 2, 70, 5], True, True),
    ],
)
def test_chunks_over_codes_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int,
    dim: int,
    group: int,
    widths: list[int],
    bits: int,
    page: int,
    softcap: float | None,
    chunks: list[int],
    apart: bool,
    flat: bool,
) -> None:
    """Chunks over a past without pages, with pages, and such as end within one. On the same codes the answers are
    close; where the kernels made the codes, a few differ by one."""
    outs, pages = {}, {}
    for before, last in (("reference", "reference"), ("reference", "triton"), ("triton", "triton")):
        store = store_of(kv_heads, dim, group, widths, bits, page, apart, flat)
        row = store.open()
        for i, count in enumerate(chunks):
            monkeypatch.setenv("SPECTRAL_ATTENTION", last if i == len(chunks) - 1 else before)
            out = run_chunk(store, row, count, group, i, softcap)
        outs[before, last], pages[before, last] = out, store.read_pages(0, row)
        assert row.pages
        store.check()
    wanted = outs["reference", "reference"]
    for key, most in ((("reference", "triton"), 2e-3), (("triton", "triton"), 0.02)):
        assert outs[key].dtype == wanted.dtype and check_codes.relative(outs[key], wanted) < most, key
    codec = store.codebook.layers[0]
    assert isinstance(codec, LayerCodec)
    off = (codes_of(codec, pages["triton", "triton"]) - codes_of(codec, pages["reference", "reference"])).abs()
    noise = rounding(CodeLayer(codec))
    assert (off <= 1 + 8 * noise).all() and (off > 0).float().mean() < 4 * noise.clamp_max(0.25).mean() + 1e-3


def test_a_past_in_several_parts_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(2, 16, 16, 1, 64)
    pool = check_codes.random_pages(layer.codec, 7)
    ids = torch.arange(7, device=DEVICE, dtype=torch.int32)
    paged = check_codes.expected(layer.codec, pool, ids)
    rng = torch.Generator(DEVICE).manual_seed(3)
    recent = torch.randn(2, 5, 32, device=DEVICE, generator=rng)
    q, k, v = (torch.randn(h, 20, 16, device=DEVICE, generator=rng) for h in (6, 2, 2))
    scaling = float(1 / paged[0].norm(dim=-1).mean())
    wanted = check_codes.exact_chunk(paged, recent, q, k, v, scaling)
    for tokens in (112, 32, 1):
        monkeypatch.setattr(chunk, "WORKSPACE", tokens * 2 * 2 * 32)
        got = chunk.attend_chunk(layer, pool, ids, recent, q, k, v, scaling=scaling)
        assert check_codes.relative(got, wanted) < 2e-3, tokens
    none = chunk.attend_chunk(layer, pool, ids[:0], recent[:, :0], q, k, v, scaling=scaling)
    empty = [x[:, :0] for x in paged]
    assert check_codes.relative(none, check_codes.exact_chunk(empty, recent[:, :0], q, k, v, scaling)) < 2e-3


@pytest.mark.parametrize(
    ("count", "total", "dim", "value_dim", "softcap"), [(70, 90, 16, 16, None), (5, 5, 40, 24, 2.0)]
)
def test_queries_in_tiles(count: int, total: int, dim: int, value_dim: int, softcap: float | None) -> None:
    rng = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((4, count, dim), (2, total, dim), (2, total, value_dim))
    q, k, v = (torch.randn(*s, device=DEVICE, generator=rng).half() for s in sizes)
    nothing = [x[:, :0] for x in (k, v)]
    old, own = (x[:, : total - count] for x in (k, v)), (x[:, total - count :] for x in (k, v))
    recent = torch.cat(list(old), -1).float()
    wanted = check_codes.exact_chunk(nothing, recent, q, *own, 0.3, softcap)
    out, total_sum = chunk.part_attention(q, k, v, causal=True, scaling=0.3, softcap=softcap)
    assert check_codes.relative(out, wanted) < 1e-3 and total_sum.isfinite().all()


def test_offsets_beyond_two_gib() -> None:
    """Pages at the end of a pool of more than 2^31 bytes (memory that is never touched costs nothing)."""
    layer = layer_of(1, 16, 16, 1, 32)
    codec = layer.codec
    count = 2**31 // codec.page_nbytes + 3
    pool = empty_pool(count, codec.page_nbytes, torch.device(DEVICE))
    small = check_codes.random_pages(codec, 2)
    pool[-2:] = small
    ids = torch.tensor([count - 1, count - 2], dtype=torch.int32, device=DEVICE)
    for got, wanted in zip(
        check_codes.opened(layer, pool, ids), check_codes.opened(layer, small, 1 - torch.arange(2).int().to(DEVICE)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, wanted)
    plain = codec.decode(small, torch.arange(2, device=DEVICE), plain=True)
    held = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in plain], -1)
    tokens = Tokens(held, held[:, :0, :16], held[:, :0, 16:])
    page = torch.arange(2, device=DEVICE, dtype=torch.int32)
    encode(layer, tokens, page, codec.frame.blocks(2), pool, ids)
    assert (codes_of(codec, pool[-2:].flip(0)) - codes_of(codec, small)).abs().float().mean() < 1e-3


def test_wrong_tensors_are_refused_by_name() -> None:
    layer = layer_of(1, 16, 16, 1, 0)
    pool = check_codes.random_pages(layer.codec, 3)
    ids = torch.arange(2, device=DEVICE, dtype=torch.int32)
    keys, values = (torch.zeros(1, 32, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    with pytest.raises(ValueError, match="pool must be contiguous uint8"):
        expand(layer, pool[::2], ids, 0, keys, values)
    with pytest.raises(ValueError, match="ids must be contiguous int32"):
        expand(layer, pool, ids.long(), 0, keys, values)
    with pytest.raises(ValueError, match=r"values must be float16 \[1, 32, 16\]"):
        expand(layer, pool, ids, 0, keys, values.float())
    held = torch.zeros(1, 32, 32, device=DEVICE)
    with pytest.raises(ValueError, match=r"keys must be floating point \[1, 16, 16\]"):
        encode(layer, Tokens(held[:, :16], keys, values[:, :16]), ids, 1, pool, ids)
    with pytest.raises(ValueError, match="groups of 12"):
        encode(layer, Tokens(held[:, :16], keys[:, :16], values[:, :16], 127, 12), ids, 1, pool, ids)
    with pytest.raises(ValueError, match="page must be contiguous int32"):
        encode(layer, Tokens(held, keys[:, :0], values[:, :0]), ids.long(), 1, pool, ids)
    with pytest.raises(ValueError, match=r"key must be float16 \[1, 32, 16\]"):
        chunk.attend_chunk(layer, pool, ids, held, keys.expand(3, -1, -1), keys.expand(2, -1, -1), values, scaling=1.0)


def test_the_switch_and_the_comparison(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    codec = random_codec(2, 16, MIXED, block=64, device=DEVICE)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    assert code_dispatch.codes_for(codec) is None
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    with pytest.raises(SettingError, match="pages of 32 tokens"):
        code_dispatch.codes_for(random_codec(1, 16, [4, 2], page=32))
    monkeypatch.delenv("SPECTRAL_ATTENTION")
    assert code_dispatch.codes_for(random_codec(1, 16, [4, 2], page=32)) is None
    monkeypatch.setattr(dispatch, "able", lambda device: True)
    monkeypatch.setattr(dispatch, "_trusted", {})
    layer = code_dispatch.codes_for(codec)
    assert layer is not None and code_dispatch.codes_for(codec) is layer and not caplog.text
    layer.size *= 1.1
    monkeypatch.setattr(dispatch, "_trusted", {})
    for _ in range(2):  # the second time the answer is known
        assert code_dispatch.codes_for(codec) is None
    assert caplog.text.count("opening is wrong by 0.09") == 1


def test_fp16_survives_keys_of_very_different_size() -> None:
    """A dimension a thousand times larger than the others, far from zero: what a code means does not change."""
    codec = random_codec(1, 16, [8], page=16, device=DEVICE)
    unit = codec.units[0]
    factor = torch.ones(32, device=DEVICE)
    factor[3], factor[20] = 3000.0, 1e-4
    unit.mean.mul_(factor).add_(torch.where(factor > 1, 5000.0, 0.0))
    unit.project.div_(factor[:, None])
    unit.key_decode.mul_(factor[:16, None])
    unit.value_decode.mul_(factor[16:, None])
    layer = CodeLayer(codec)
    pool = check_codes.random_pages(codec, 4)
    ids = torch.arange(4, device=DEVICE, dtype=torch.int32)
    wanted = check_codes.expected(codec, pool, ids)
    found = check_codes.opened(layer, pool, ids)
    for got, exact in zip(found, wanted, strict=True):
        errors = (got.float() - exact).norm(dim=1) / exact.norm(dim=1)
        assert errors.max() < 2e-3
    again = torch.zeros_like(pool)
    held = torch.cat(wanted, -1)
    encode(layer, Tokens(held, held[:, :0, :16], held[:, :0, 16:]), ids, 1, again, ids)
    off = (codes_of(codec, again) - codes_of(codec, pool)).abs().float()
    assert off.mean() < 0.05 and np.isfinite(float(off.max()))


@pytest.mark.parametrize(
    ("bits", "apart", "flat"), [(8, False, False), (16, False, False), (8, True, False), (8, True, True)]
)
def test_pages_sealed_between_steps_are_the_references(
    monkeypatch: pytest.MonkeyPatch, bits: int, apart: bool, flat: bool
) -> None:
    """Pages of two rows in one launch, a spare one with them; as SealStep of a decode step seals them."""
    shape = ModelShape((LayerShape(2, 16, 16),), 4, 64)
    sizes = {"page": 16, "window": 32, "block": 64, "window_bits": bits}
    book = random_codebook(shape, [8, 4, 2, 0], **sizes, apart=apart, flat=flat)
    store = PageStore(shape, book, device=DEVICE, window_dtype=torch.float32)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    rows = [store.open() for _ in range(2)]
    for seed, row in enumerate(rows):
        run_chunk(store, row, 100, 2, seed)
    pool, codec = store.pools[0], book.layers[0]
    assert pool is not None and isinstance(codec, LayerCodec)
    window, found = store.windows[0], []
    for choice in ("reference", "triton"):
        monkeypatch.setenv("SPECTRAL_ATTENTION", choice)
        pages = [row.pages[-1] for row in rows]
        step = SealStep(store, 4, 64)
        step.fill([
            Seal(row.slot, window.index(window.sinks + 16 * len(row.pages)), row.pages[-1], len(row.pages), at)
            for at, row in enumerate(rows)
        ])  # fmt: skip
        pool[pages] = 0
        step.run()
        found.append(codes_of(codec, pool[pages]))
    off = (found[0] - found[1]).abs()
    assert found[0].any() and off.max() <= 1 and off.float().mean() < 0.01


def test_vectors_that_get_their_length_back_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains lengthen what is decoded; encoded again as it is, it would have other codes, and no device be trusted."""
    monkeypatch.setattr(check_codes, "PAGES", 8)
    codec = random_codec(2, 16, [8, 6, 0, 0], page=16, device=DEVICE)
    assert min(codec.units[0].gains) > 1.02
    assert check_codes.code_error(CodeLayer(codec)) == ""

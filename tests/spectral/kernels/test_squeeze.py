"""The squeeze kernel in Triton's interpreter (or on a GPU) against the reference: the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import kernels_codes
from spectral import code_dispatch, dispatch
from spectral.bits import gaussian_tables
from spectral.codec import Codebook, LayerCodec
from spectral.errors import SettingError
from spectral.frames import BlockFrame
from spectral.kernels import check_codes
from spectral.kernels.quads import code_map, linear_map
from spectral.kernels.squeeze import SqueezeLayer
from spectral.pools import squeezed
from tests.spectral.helpers import random_unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def codec_of(widths: list[np.ndarray], page: int, dim: int = 16, sides: tuple[str, ...] = ("both",)) -> LayerCodec:
    """One KV head a unit, with these widths [classes, numbers]; those of all heads' first side come first. With one
    class pages are not transformed."""
    run = len(widths) // len(sides)
    units = [
        (random_unit((i % run, i % run + 1), dim, i, page, sides[i // run], flat=len(table) == 1), table)
        for i, table in enumerate(widths)
    ]
    frame = BlockFrame(None, block_tokens=0, page_tokens=page, sinks=4)
    return LayerCodec(
        units, gaussian_tables(), frame, key_dim=dim, value_dim=dim, page_tokens=page, device=DEVICE
    )


def random_widths(
    rng: np.random.Generator, among: list[int], page: int, units: int, dim: int = 16, flat: bool = False
) -> list[np.ndarray]:
    shape = (1 if flat else page.bit_length(), 2 * dim // 16)
    return [rng.choice(among, size=shape).repeat(16, axis=1).astype(np.uint8) for _ in range(units)]


@pytest.mark.parametrize(
    ("page", "count", "units", "sides", "flat"),
    [
        (16, 9, 2, ("both",), False),
        (8, 1, 3, ("both",), False),
        (16, 0, 1, ("both",), False),
        (8, 17, 1, ("both",), False),
        (16, 9, 4, ("key", "value"), False),
        (8, 5, 4, ("key", "value"), False),
        (16, 9, 6, ("key", "value"), True),
        (8, 5, 4, ("key", "value"), True),
        (16, 3, 6, ("both",), True),
    ],
)
def test_squeezed_pages_are_the_references(
    page: int, count: int, units: int, sides: tuple[str, ...], flat: bool
) -> None:
    """Every pair of widths, among them latents that the finer setting had dropped; odd counts of pages, and none."""
    rng = np.random.default_rng(page + count)
    dim = 16 * len(sides)
    old_widths = random_widths(rng, [8, 6, 4, 3, 2, 1, 0], page, units, flat=flat)
    new_widths = random_widths(rng, [6, 4, 3, 2, 1, 0, 0], page, units, flat=flat)
    old, new = codec_of(old_widths, page, dim, sides), codec_of(new_widths, page, dim, sides)
    pool = check_codes.random_pages(old, count)
    out = torch.full((count, new.page_nbytes), 255, dtype=torch.uint8, device=DEVICE)
    SqueezeLayer(old, new)(pool, out)
    assert torch.equal(out, old.squeeze(pool, new))


def test_a_setting_with_nothing_left_or_nothing_before() -> None:
    some, none = ([np.full((5, 32), width, dtype=np.uint8)] for width in (2, 0))
    old, new = codec_of(some, 16), codec_of(none, 16)
    out = torch.zeros((3, 0), dtype=torch.uint8, device=DEVICE)
    SqueezeLayer(old, new)(check_codes.random_pages(old, 3), out)
    back = torch.full((3, old.page_nbytes), 255, dtype=torch.uint8, device=DEVICE)
    SqueezeLayer(new, old)(out, back)
    assert torch.equal(back, new.squeeze(out, old)) and back.unique().numel() == 1


def test_a_line_maps_the_codes_of_every_pair_of_widths() -> None:
    steps = {width: table.step for width, table in gaussian_tables().items()}
    for old in (1, 2, 3, 4, 6, 8):
        for new in (1, 2, 3, 4, 6, 8):
            scale, offset = linear_map(old, new, steps)
            codes = np.arange(2**old, dtype=np.int64)
            assert np.abs(codes * scale + offset).max() < 2**31, (old, new)  # the kernel's integers have 32 bits
            assert code_map(old, new, steps).max() == 2**new - 1 or old < new


def test_a_pool_goes_through_the_kernel_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    old = codec_of(random_widths(rng, [4, 3], 16, 1), 16)
    new = codec_of(random_widths(rng, [2, 1], 16, 1), 16)
    pool = check_codes.random_pages(old, 11)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "reference")
    expected = squeezed(pool, old, new)
    calls: list[int] = []
    plain = SqueezeLayer.__call__

    def counted(self: SqueezeLayer, pages: torch.Tensor, out: torch.Tensor) -> None:
        calls.append(len(pages))
        plain(self, pages, out)

    monkeypatch.setattr(SqueezeLayer, "__call__", counted)
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    assert torch.equal(squeezed(pool, old, new), expected) and calls == [11]
    code_dispatch.warm_codes(Codebook("test", "hash", 4, 16, 16, [None, new, old]))
    assert calls == [11, check_codes.PAGES]
    code_dispatch.warm_codes(Codebook("test", "hash", 4, 16, 16, [None]))
    coarse = codec_of(random_widths(rng, [2, 1], 8, 1), 8)
    with pytest.raises(SettingError, match="one page size"):
        squeezed(pool, old, coarse)


def test_a_device_squeezes_with_the_kernel_after_a_comparison_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(6)
    old = codec_of(random_widths(rng, [4, 3], 16, 1), 16)
    new = codec_of(random_widths(rng, [2, 1], 16, 1), 16)
    monkeypatch.delenv("SPECTRAL_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "able", lambda device: True)
    monkeypatch.setattr(dispatch, "_trusted", {})
    assert code_dispatch.squeezer(old, new) is not None
    original = SqueezeLayer.__init__

    def spoilt(self: SqueezeLayer, *codecs: LayerCodec) -> None:
        original(self, *codecs)
        for launch in self.launches:
            launch.table[:, 5].neg_()

    assert code_dispatch.squeezer(old, new) is code_dispatch.squeezer(old, new)  # made once
    monkeypatch.setattr(SqueezeLayer, "__init__", spoilt)
    del new.__dict__["_squeezer"]
    monkeypatch.setattr(dispatch, "_trusted", {})
    for _ in range(2):  # the second time the answer is known
        assert code_dispatch.squeezer(old, new) is None
    assert caplog.text.count("bytes differ") == 1


def test_wrong_tensors_are_refused_by_name() -> None:
    codec = codec_of([np.full((5, 32), 2, dtype=np.uint8)], 16)
    layer = SqueezeLayer(codec, codec)
    pages = check_codes.random_pages(codec, 4)
    with pytest.raises(ValueError, match="pages must be contiguous"):
        layer(pages[::2], pages[:2])
    with pytest.raises(ValueError, match=r"out must be contiguous uint8 \[4, 128\]"):
        layer(pages, pages[:3].clone())


def test_the_benchmark_checks_itself_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["kernels_codes.py", "--check", "--json", str(tmp_path / "out.json")])
    kernels_codes.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == json.loads((tmp_path / "out.json").read_text())["rows"]
    assert printed == [{"case": case, "wrong": ""} for case in ("squeeze", "encode and open")]

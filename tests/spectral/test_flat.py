"""Pages that are not transformed: a row is a token, all rows are one class, and no token knows of another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spectral.bits import frequency_classes, gaussian_tables, page_transform, row_classes
from spectral.codec import LayerCodec
from spectral.errors import ProfileError, SettingError
from spectral.frames import BlockFrame
from spectral.gains import decode_gains, side_energy
from spectral.hf import LoadedModel
from spectral.layout import page_layout
from spectral.profile import SpectralProfile
from spectral.profile_file import as_stored, digest
from spectral.resources import profile_path
from tests.fuzz.targets.profiles import seal
from tests.spectral.helpers import cycling_widths, random_codec, random_unit
from tests.spectral.test_profile import TEXT, loaded_model, small_profiler

HEADS, DIM, COUNT = 2, 16, 5
MIXED = [8, 6, 4, 3, 2, 1, 0]
CASES = pytest.mark.parametrize(("page", "apart"), [(8, False), (16, False), (8, True), (16, True)])


def sides(page: int, seed: int = 0) -> list[torch.Tensor]:
    """Keys and values of COUNT pages: [COUNT, HEADS, page, DIM]."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(COUNT, HEADS, page, DIM, generator=rng) for _ in range(2)]


@CASES
def test_a_code_is_a_latent_of_its_token_quantized(page: int, apart: bool) -> None:
    """Written out with the unit's own matrices: no page, no transform."""
    codec = random_codec(HEADS, DIM, MIXED, page=page, apart=apart, flat=True)
    keys, values = sides(page)
    index, tables = torch.arange(COUNT), gaussian_tables()
    pages = codec.encode(keys, values, index)
    framed = codec.frame.keys(keys, index).transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)
    assert codec.classes == 1
    for number, (unit, span) in enumerate(zip(codec.units, codec._bounds, strict=True)):
        known = random_unit((0, HEADS), DIM, number, page, unit.side, flat=True)
        x = torch.cat([side for side, size in zip(framed, unit.numbers, strict=True) if size], -1).double().numpy()
        latent = ((x - known.mean) @ known.encode)[..., unit.latents]  # [n, P, R]
        width, deviation = unit.layout.widths[0], known.deviation[0, unit.latents]
        step = np.array([tables[w].step for w in width])
        code = np.clip(np.floor(latent / deviation / step + 2.0 ** (width - 1)), 0, 2.0**width - 1)
        found = unit.codes(pages[:, span]).view(COUNT, page, -1).numpy()
        assert (found != code).mean() < 1e-3 and np.abs(found - code).max() <= 1  # float32 on the edge of two codes
        level = torch.from_numpy((found - (2.0**width - 1) / 2) * step * deviation)
        back = level @ torch.from_numpy(known.decode[:, unit.latents].T) + torch.from_numpy(known.mean)
        torch.testing.assert_close(unit.decode(pages[:, span], plain=True).double(), back, rtol=1e-4, atol=1e-4)


@CASES
def test_no_token_knows_of_another(page: int, apart: bool) -> None:
    """Another token changes no other's codes; and tokens that change places within a page take theirs along."""
    codec = random_codec(HEADS, DIM, MIXED, page=page, apart=apart, flat=True)
    keys, values = sides(page)
    index = torch.arange(COUNT)
    pages = codec.encode(keys, values, index)
    before = codec.decode(pages, index)
    changed = [x.clone() for x in (keys, values)]
    for x in changed:
        x[:, :, 3] += 1
    after = codec.decode(codec.encode(changed[0], changed[1], index), index)
    order = torch.randperm(page, generator=torch.Generator().manual_seed(1))
    moved = codec.decode(codec.encode(keys[:, :, order], values[:, :, order], index), index)
    others = [row for row in range(page) if row != 3]
    for old, new, other in zip(before, after, moved, strict=True):
        assert torch.equal(new[:, :, others], old[:, :, others]) and not torch.equal(new[:, :, 3], old[:, :, 3])
        torch.testing.assert_close(other, old[:, :, order], rtol=0, atol=1e-5)


@CASES
def test_the_mean_is_in_every_token(page: int, apart: bool) -> None:
    """Also in scores and sums: where no latent has bits it is all that is left."""
    for widths in ([0], MIXED):
        codec = random_codec(HEADS, DIM, widths, page=page, apart=apart, flat=True)
        pages = codec.encode(*sides(page), torch.arange(COUNT))
        opened = codec.open(pages[None])
        for unit, y in zip(codec.units, opened.coefficients, strict=True):
            assert torch.equal(unit.dct, torch.eye(page)) and (y[..., -1] == 1).all()
    codec = random_codec(HEADS, DIM, [0], page=page, apart=apart, flat=True)
    pages = codec.encode(*sides(page), torch.zeros(COUNT, dtype=torch.long))
    keys, values = codec.decode(pages, torch.zeros(COUNT, dtype=torch.long))
    key, value = (codec.units[n].mean for n in (codec.key_units[0], codec.value_units[0]))
    framed = codec.frame.keys(keys, torch.zeros(COUNT, dtype=torch.long))
    wanted = [key[: HEADS * DIM], value[-HEADS * DIM :]]
    for found, mean in zip((framed, values), wanted, strict=True):
        torch.testing.assert_close(found, mean.view(HEADS, 1, DIM).expand_as(found), rtol=1e-4, atol=1e-5)
    opened, weight = codec.open(pages[None]), torch.rand(1, HEADS, 3, COUNT * page)
    mixed = weight.sum(-1, keepdim=True) * wanted[1].view(1, HEADS, 1, DIM)
    torch.testing.assert_close(opened.mix(weight), mixed, rtol=1e-4, atol=1e-4)


def test_gains_are_those_of_classes_that_are_all_alike() -> None:
    one = random_unit((0, HEADS), DIM, 3, flat=True)
    five = random_unit((0, HEADS), DIM, 3)
    five.deviation[:] = one.deviation
    widths = cycling_widths([4, 2, 1, 0], 2 * HEADS * DIM, 16, flat=True)
    energy = side_energy(one, HEADS * DIM)
    found = decode_gains(energy, one, widths, 16)
    assert found == pytest.approx(decode_gains(energy, five, widths.repeat(5, 0), 16)) and min(found) > 1


def test_rows_of_a_page_are_one_class_or_frequencies() -> None:
    for page in (8, 16):
        assert row_classes(page, 1) == (tuple(range(page)),)
        many = len(frequency_classes(page))
        assert row_classes(page, many) == frequency_classes(page)
        assert np.array_equal(page_transform(page, 1), np.eye(page)) and page_transform(page, many)[0].std() < 1e-12
        for wrong in (0, 2, many + 1):
            with pytest.raises(ValueError, match=f"a page of {page} tokens has 1 or {many} classes, not {wrong}"):
                row_classes(page, wrong)
    layout = page_layout(np.repeat([[6, 3, 1, 0]], 16, axis=1), 8)
    assert layout.row_widths.shape == (8, 64) and layout.nbytes == 8 * 16 * (6 + 3 + 1) // 8
    assert {(strip.number, strip.rows) for strip in layout.strips} == {(0, 8)}


def test_a_layer_has_one_number_of_classes() -> None:
    flat, other = (random_unit((0, 1), DIM, 0, 16, side, flat=side == "key") for side in ("key", "value"))
    frame = BlockFrame(None, block_tokens=0, page_tokens=16, sinks=0)
    for unit, classes in ((other, 5), (flat, 5), (other, 1)):  # with another unit, or with the widths of another
        second = type(unit)(**{**vars(unit), "side": "value"})
        parts = [(flat, np.full((1, DIM), 2)), (second, np.full((classes, DIM), 2))]
        with pytest.raises(SettingError, match=r"units of a layer have \[1, 5\] classes"):
            LayerCodec(parts, gaussian_tables(), frame, key_dim=DIM, value_dim=DIM, page_tokens=16)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded_model("gemma2")  # two layers slide


@pytest.fixture(scope="module")
def made(model: LoadedModel) -> dict[str, SpectralProfile]:
    """A profile for every preference."""
    return {
        prefer: small_profiler(prefer=prefer).profile_from_loaded(model, texts=[TEXT])
        for prefer in ("quality", "balanced", "speed")
    }


def test_a_profile_for_speed_comes_back(made: dict[str, SpectralProfile], tmp_path: Path) -> None:
    profile = made["speed"]
    path = profile.save(tmp_path / "p")
    loaded = SpectralProfile.load(path)
    assert loaded.content_hash == profile.content_hash and loaded.to_dict() == profile.to_dict()
    assert loaded.classes == as_stored(loaded).classes == 1 and loaded.to_dict()["transform"] == "none"
    said = [("pages not transformed" in found.summary()) for found in made.values()]
    assert said == [prefer == "speed" for prefer in made]
    for row in loaded.ladder:
        for layer, widths, bits in zip(
            loaded.layers, loaded.bits[row.name], loaded.bits_map(row.name), strict=True
        ):  # fmt: skip
            assert (layer is None) == (widths is None) == (bits is None)
            if layer is None or widths is None or bits is None:
                continue
            assert [w.shape for w in widths] == [unit.deviation.shape for unit in layer.units] == [(1, 32)] * 2
            assert bits.shape == (8, 64) and (bits == np.concatenate(widths, 1)).all()


def header(path: Path) -> dict[str, object]:
    """The document of a profile file."""
    data = path.read_bytes()
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["spectral"]
    document: dict[str, object] = json.loads(json.loads(text)["document"])
    return document


def test_only_files_of_such_pages_say_so(made: dict[str, SpectralProfile], tmp_path: Path) -> None:
    """Files for quality and the shipped ones have the header that they had before there was a choice."""
    shipped = profile_path("demo-7m")
    assert shipped is not None and "transform" not in header(shipped)
    assert "transform" not in SpectralProfile.load(shipped).metadata()
    for prefer, profile in made.items():
        found = header(profile.save(tmp_path / prefer))
        assert found.get("transform", "dct") == ("none" if prefer == "speed" else "dct")
        assert [row["window"] for row in found["ladder"]] == [row.window for row in profile.ladder]  # type: ignore[attr-defined,index]


def forged(profile: SpectralProfile, folder: Path, transform: object) -> Path:
    """The profile's file with this in its header, "left out" for nothing, and a checksum that is right."""
    from safetensors.numpy import load_file

    path = profile.save(folder / "p")
    document, tensors = header(path), load_file(path)
    document.pop("transform", None)
    if transform != "left out":
        document["transform"] = transform
    text = json.dumps(document)
    path.write_bytes(seal(tensors, json.dumps({"document": text, "sha256": digest(text, tensors)})))
    return path


@pytest.mark.parametrize(
    ("prefer", "transform", "message"),
    [
        ("speed", "left out", r"\.deviation: float32 \(1, 32\), want float32 \(4, 32\)"),
        ("balanced", "none", r"\.deviation: float32 \(4, 32\), want float32 \(1, 32\)"),
        ("quality", "none", r"\.deviation: float32 \(4, 64\), want float32 \(1, 64\)"),
        ("speed", "dct", 'transform: must be "none", or left out'),
        ("quality", "dct", 'transform: must be "none", or left out'),
        ("speed", None, 'transform: must be "none", or left out'),
        ("speed", ["none"], 'transform: must be "none", or left out'),
        ("speed", 1, 'transform: must be "none", or left out'),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    made: dict[str, SpectralProfile], tmp_path: Path, prefer: str, transform: object, message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        SpectralProfile.load(forged(made[prefer], tmp_path, transform))


def test_widths_of_another_number_of_classes_are_refused(made: dict[str, SpectralProfile], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = made["speed"].save(tmp_path / "p")
    document, tensors = json.dumps(header(path)), load_file(path)
    name = next(name for name in tensors if name.startswith("setting."))
    tensors[name] = tensors[name].repeat(4, 0)
    path.write_bytes(seal(tensors, json.dumps({"document": document, "sha256": digest(document, tensors)})))
    with pytest.raises(ProfileError, match=rf"{name}: widths of type uint8 and shape \(4, 32\) do not fit the basis"):
        SpectralProfile.load(path)

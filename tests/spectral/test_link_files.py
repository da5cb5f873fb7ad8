"""Links beside a profile: fitted on text, found by name, and never taken for others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral import link_profile as link_module
from spectral.errors import ModelError, ProfileError, SessionError, SettingError
from spectral.hf import LoadedModel
from spectral.link_files import LinkFiles, links_path
from spectral.link_fit import fit_links, load_links, save_links
from spectral.link_profile import LinkReport, link_profile, pages_of
from spectral.linked import Chain, Links
from spectral.pages import PageStore
from spectral.profile import SpectralProfile
from tests.spectral.test_profile import TEXT, loaded_model, small_profiler
from tests.spectral.test_sessions import feed

SETTING = "6x"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded_model()


@pytest.fixture(scope="module")
def made(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpectralProfile, list[LinkReport]]:
    file = small_profiler().profile_from_loaded(model, texts=[TEXT]).save(tmp_path_factory.mktemp("linked") / "mine")
    profile = SpectralProfile.load(file)
    return profile, list(link_profile(model, profile, [SETTING, SETTING], texts=[TEXT], tokens=2048))


@pytest.fixture
def profile(made: tuple[SpectralProfile, list[LinkReport]], tmp_path: Path) -> SpectralProfile:
    """The profile with its links in a folder of the test's own."""
    for path in made[0].file.parent.iterdir():  # type: ignore[union-attr]
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return SpectralProfile.load(tmp_path / "mine")


def test_links_are_fitted_measured_and_lie_beside_the_profile(
    made: tuple[SpectralProfile, list[LinkReport]], model: LoadedModel
) -> None:
    profile, (report,) = made  # a setting that is named twice is fitted once
    assert profile.file is not None and profile.file.name == "mine.safetensors"
    assert report.file == str(links_path(profile.file, SETTING)) == str(profile.file.parent / "mine.6x.links")
    links = load_links(report.file)
    assert (links.profile_hash, links.setting, links.digest) == (profile.content_hash, SETTING, report.digest)
    assert report.small > report.fast > 1 and report.links_nbytes == Path(report.file).stat().st_size
    saved = report.held_tokens * profile.row(SETTING).page_nbytes / profile.row(SETTING).page_tokens
    saved *= 1 / report.fast - 1 / report.small
    assert report.pays_from == pytest.approx(report.links_nbytes / saved * report.held_tokens, abs=1)


def test_the_pages_of_a_text_are_those_that_a_store_holds(
    made: tuple[SpectralProfile, list[LinkReport]], model: LoadedModel
) -> None:
    """Of the first layer, whose input does not depend on the cache; the layers above differ by what the cache lost."""
    book = made[0].codebook(SETTING)
    ids = model.tokenizer(TEXT)["input_ids"][:150]
    pages = pages_of(model, {"a": book}, ids)["a"]
    store = PageStore(model.shape, book)
    row = store.open()
    for begin in range(0, len(ids), 10):
        feed(model, store, row, ids[begin : begin + 10])
    held = store.read_pages(0, row)
    assert pages[0] is not None and len(held) == len(pages[0]) > 10
    unit = book.layers[0].units[0]  # type: ignore[union-attr]
    same = (unit.codes(held) == unit.codes(pages[0])).float().mean()
    assert same > 0.99, float(same)  # a number that lies on a quantizer's edge may fall to either side


def test_levels(profile: SpectralProfile) -> None:
    files = LinkFiles(profile)
    assert files.of_level("fast", SETTING) is None and files.of_level("auto", "12x") is None
    links = files.of_level("auto", SETTING)
    assert links is not None and files.of_level("small", SETTING) is links  # read once
    assert all(files.of_level(level, "exact") is None for level in ("auto", "fast", "small"))
    with pytest.raises(SessionError, match=r"level small needs .*'12x'.*spectral profile link .* --settings 12x"):
        files.of_level("small", "12x")
    for nowhere in (LinkFiles(None), LinkFiles(dataclasses.replace(profile, file=None))):
        assert nowhere.of_level("auto", SETTING) is None
        with pytest.raises(SessionError, match="level small needs"):
            nowhere.of_level("small", SETTING)


def test_what_was_saved_small_gets_its_own_links_or_none(profile: SpectralProfile) -> None:
    assert profile.file is not None
    path = links_path(profile.file, SETTING)
    digest = load_links(path).digest
    assert LinkFiles(profile).need(SETTING, digest).digest == digest
    with pytest.raises(SessionError, match=f"links 123412341234 of .* are others .{digest[:12]}.; copy the file"):
        LinkFiles(profile).need(SETTING, "1234" * 8)
    with pytest.raises(SessionError, match=r"mine\.12x\.links are not there; copy the file"):
        LinkFiles(profile).need("12x", digest)


def test_links_that_changed_are_read_again(profile: SpectralProfile) -> None:
    assert profile.file is not None
    path, files = links_path(profile.file, SETTING), LinkFiles(profile)
    links = files.need(SETTING)
    changed = [None if x is None else dataclasses.replace(x, gain=x.gain * 0.5) for x in links.layers]
    save_links(dataclasses.replace(links, layers=changed), path)
    assert files.need(SETTING).digest != links.digest


@pytest.mark.parametrize("kind", ["another profile's", "damaged", "cut short"])
def test_useless_links_are_named_and_auto_goes_on_without(
    profile: SpectralProfile, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert profile.file is not None
    path = links_path(profile.file, SETTING)
    if kind == "another profile's":
        profile.content_hash = "f" * 64
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if kind == "damaged" else data[: len(data) // 2])
    assert LinkFiles(profile).of_level("auto", SETTING) is None
    assert str(path) in caplog.text and "spectral profile link" in caplog.text
    with pytest.raises(SessionError, match="spectral profile link"):
        LinkFiles(profile).of_level("small", SETTING)


def test_links_that_are_there_are_kept_unless_told(profile: SpectralProfile, model: LoadedModel) -> None:
    assert profile.file is not None
    path = links_path(profile.file, SETTING)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match="has its links already.*--replace"):
        link_profile(model, profile, [SETTING], texts=[TEXT], tokens=2048)
    assert path.read_bytes() == before
    list(link_profile(model, profile, [SETTING], texts=[TEXT], tokens=2048, replace=True))
    assert path.read_bytes() == before  # the same text and seed: the same links
    path.write_bytes(b"no links")  # nothing was saved with these
    assert list(link_profile(model, profile, [SETTING], texts=[TEXT], tokens=2048))[0].file == str(path)


def test_settings_beyond_what_is_held_at_once_read_the_text_again(
    profile: SpectralProfile, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests() -> tuple[list[str], int]:
        told: list[bool] = []
        made = link_profile(
            model, profile, [SETTING, "12x"], texts=[TEXT], tokens=2048, replace=True,
            progress=lambda stage, fraction: told.append(stage == "reading text" and fraction == 1),
        )  # fmt: skip
        return [report.digest for report in made], sum(told)

    together = digests()
    monkeypatch.setattr(link_module, "PAGES_NBYTES", 1)
    assert (together[1], digests()) == (1, (together[0], 2))


def test_links_that_save_nothing_are_not_written(
    profile: SpectralProfile, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def useless(*given: Any) -> Links:
        links, generator = fit_links(*given), torch.Generator().manual_seed(0)
        ranks = {w: torch.rand(r.shape, generator=generator).argsort(1).byte() for w, r in links.ranks.items()}
        return dataclasses.replace(links, ranks=ranks)

    monkeypatch.setattr(link_module, "fit_links", useless)
    (report,) = link_profile(model, profile, ["12x"], texts=[TEXT], tokens=2048)
    assert report.small <= report.fast and (report.file, report.pays_from, report.links_nbytes) == (None, None, 0)
    assert profile.file is not None and not links_path(profile.file, "12x").exists()


def test_what_cannot_be_linked_is_refused_before_any_work(profile: SpectralProfile, model: LoadedModel) -> None:
    def no_work(stage: str, fraction: float) -> None:
        raise AssertionError(stage)

    def ask(model: LoadedModel, profile: SpectralProfile, setting: str, tokens: int = 2048) -> None:
        link_profile(model, profile, [setting], texts=[TEXT], tokens=tokens, progress=no_work)

    with pytest.raises(ProfileError, match="was made for"):
        ask(loaded_model("llama"), profile, "12x")
    with pytest.raises(SettingError, match="7x.*3x, 6x, 12x"):
        ask(model, profile, "7x")
    with pytest.raises(ModelError, match=r"--tokens 64: pages of \d+ tokens.*--tokens \d+ or more"):
        ask(model, profile, "12x", 64)
    with pytest.raises(ProfileError, match="save it first"):
        ask(model, dataclasses.replace(profile, file=None), "12x")


def test_a_single_compressed_layer_has_nothing_below_it(tmp_path: Path) -> None:
    model = loaded_model("gemma2")
    profile = small_profiler().profile_from_loaded(model, texts=[TEXT])
    profile.save(tmp_path / "gemma")
    with pytest.raises(ModelError, match="cannot be linked.*stay with level fast"):
        link_profile(model, profile, [profile.default], texts=[TEXT], tokens=2048)


def test_too_little_text_is_told_with_what_there_is(profile: SpectralProfile, model: LoadedModel) -> None:
    with pytest.raises(ModelError, match="at least"):
        list(link_profile(model, profile, ["12x"], texts=[TEXT[:300]], tokens=2048))


def test_any_pages_of_the_setting_come_back_through_the_file(profile: SpectralProfile) -> None:
    links, book = LinkFiles(profile).need(SETTING), profile.codebook(SETTING)
    writer, reader = Chain(book, links), Chain(book, links)
    generator = torch.Generator().manual_seed(0)
    for index, codec in enumerate(book.layers):
        assert codec is not None
        shape = (20, codec.kv_heads, codec.page_tokens)
        sides = [torch.randn((*shape, d), generator=generator) for d in (codec.key_dim, codec.value_dim)]
        pages = codec.encode(sides[0], sides[1], torch.arange(20))
        assert torch.equal(reader.restore(index, writer.archive(index, pages)), pages)

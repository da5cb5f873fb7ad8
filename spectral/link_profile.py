"""From a model, its profile and text to links: pages of the text, maps, and what they save on other text."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from spectral.archive import archive_pages, restore_pages
from spectral.codec import Codebook
from spectral.errors import CacheError, ModelError, ProfileError, SessionError
from spectral.link_files import links_path
from spectral.link_fit import fit_links, load_links, save_links, tokens_needed
from spectral.linked import Chain, Links
from spectral.windows import make_window

if TYPE_CHECKING:
    from spectral.hf import LoadedModel
    from spectral.profile import SpectralProfile

Pages = list["torch.Tensor | None"]
"""Per layer uint8 [n, page_nbytes]; None for a layer that stays exact."""

Progress = Callable[[str, float], None]

TOKENS = 49_152
"""Tokens that links are fitted on unless others are asked for."""

WINDOW = 2048
"""Tokens of one forward, or the model's context where that is shorter."""

HELD_TOKENS = 8_192
"""Most tokens of text that are kept apart, to measure on."""

PAGES_NBYTES = 4 << 30
"""Bytes of pages that are held at once; settings beyond them read the text again."""


@dataclass(frozen=True)
class LinkReport:
    """What fitting one setting's links came to.

    Attributes:
        file: where they lie; None: they save nothing over the fast level and were not kept.
        fit_tokens, held_tokens: tokens in pages that the maps were fitted to, and that the ratios were measured on.
        links_nbytes: of the file. fast, small: packed bytes by archived bytes, checksums counted.
        seconds: of fitting and measuring, without reading the text.
        pays_from: tokens of cache whose saving over the fast level is as large as the file.
    """

    setting: str
    file: str | None
    digest: str
    fit_tokens: int
    held_tokens: int
    links_nbytes: int
    fast: float
    small: float
    seconds: float
    pays_from: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@torch.no_grad()
def pages_of(loaded: LoadedModel, books: dict[str, Codebook], ids: Sequence[int]) -> dict[str, Pages]:
    """What a store would hold of a sequence, by setting and layer, encoded on the CPU.

    books: by any name; on the CPU.
    """
    from spectral.hf import observing

    seen: dict[int, torch.Tensor] = {}

    def observe(layer: int, _: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> None:
        seen[layer] = torch.cat([key[0], value[0]], -1).float().cpu()

    with observing(observe):
        loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device), use_cache=False, logits_to_keep=1)
    out: dict[str, Pages] = {}
    for name, book in books.items():
        count = _page_count(book, len(ids))
        out[name] = []
        for layer, (shape, codec) in enumerate(zip(loaded.shape.layers, book.layers, strict=True)):
            if codec is None:
                out[name].append(None)
                continue
            window = make_window(shape, book.sinks, book.page_tokens, torch.bfloat16, "cpu", book.window_bits)
            kept = window.as_kept(seen[layer])[:, book.sinks : book.sinks + count * book.page_tokens]
            sides = kept.unflatten(1, (count, -1)).transpose(0, 1).split([shape.key_dim, shape.value_dim], -1)
            out[name].append(codec.encode(sides[0], sides[1], torch.arange(count)))
    return out


def joined(rows: Sequence[Pages]) -> Pages:
    """Pages of several sequences, one after the other."""
    return [None if layers[0] is None else torch.cat(list(layers)) for layers in zip(*rows, strict=True)]


def link_profile(
    loaded: LoadedModel,
    profile: SpectralProfile,
    settings: Sequence[str],
    *,
    texts: Sequence[str] | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
) -> Iterator[LinkReport]:
    """Fit the links of settings and write each beside the profile as soon as it is measured.

    Args:
        loaded, profile: the profile must be that model's and have a file.
        settings: rows of its ladder. texts: None: text that the model itself writes (seeded).
        tokens: of text to fit on; up to a quarter more is kept apart for measuring.
        replace: links that are there already make way; what was saved with them cannot be loaded any more.

    Raises, before any work: ProfileError (another model's profile, or links that are there), SettingError, ModelError
    (too few tokens of text, layers that cannot be linked).
    """
    tell = progress or (lambda *_: None)
    profile.check_model(loaded)
    names = list(dict.fromkeys(profile.resolve(name) for name in settings))
    if profile.file is None:
        raise ProfileError("the profile has no file for links to lie beside: save it first")
    if not os.access(profile.file.parent, os.W_OK):
        raise ProfileError(
            f"links lie beside the profile, and the folder {profile.file.parent} cannot be written; "
            "copy the profile to one that can, and name it with --profile"
        )
    for name in names:
        _check_free(profile, name, replace)
    length = min(WINDOW, loaded.context_length, tokens)
    for name in names:
        _check_size(profile, name, f"--tokens {tokens}", tokens // length, length)
    return _link(loaded, profile, names, texts, tokens, length, seed, tell)


def _link(
    loaded: LoadedModel,
    profile: SpectralProfile,
    names: list[str],
    texts: Sequence[str] | None,
    tokens: int,
    length: int,
    seed: int,
    tell: Progress,
) -> Iterator[LinkReport]:
    fit, held = _windows(loaded, texts, tokens, length, seed, tell)
    for name in names:  # there may be less text than was asked for
        _check_size(profile, name, "the text given", len(fit), length)
    for group in _groups(profile, names, (len(fit) + len(held)) * length):
        books = {name: profile.codebook(name) for name in group}
        rows: dict[str, list[Pages]] = {name: [] for name in group}
        for number, ids in enumerate([*fit, *held]):
            for name, pages in pages_of(loaded, books, ids).items():
                rows[name].append(pages)
            tell("reading text", (number + 1) / (len(fit) + len(held)))
        for name in group:
            pages = rows.pop(name)
            yield _fitted(profile, books[name], joined(pages[: len(fit)]), joined(pages[len(fit) :]), tell)


def _fitted(profile: SpectralProfile, book: Codebook, train: Pages, test: Pages, tell: Progress) -> LinkReport:
    began, stage = time.monotonic(), f"linking {book.setting}"
    links = fit_links(book, train, lambda fraction: tell(stage, 0.9 * fraction))
    packed = sum(pages.numel() for pages in test if pages is not None)
    fast, small = _through(book, None, test), _through(book, links, test)
    tell(stage, 1.0)
    assert profile.file is not None
    path = save_links(links, links_path(profile.file, book.setting)) if small < fast else None
    count = [sum(len(p) for p in pages if p is not None) for pages in (train, test)]
    layers = sum(pages is not None for pages in test)
    fit_tokens, held_tokens = (c // layers * book.page_tokens for c in count)
    nbytes = path.stat().st_size if path is not None else 0
    return LinkReport(
        setting=book.setting,
        file=str(path) if path is not None else None,
        digest=links.digest,
        fit_tokens=fit_tokens,
        held_tokens=held_tokens,
        links_nbytes=nbytes,
        fast=packed / fast,
        small=packed / small,
        seconds=time.monotonic() - began,
        pays_from=math.ceil(nbytes / ((fast - small) / held_tokens)) if small < fast else None,
    )


def _through(book: Codebook, links: Links | None, pages: Pages) -> int:
    """Bytes of the archives at a level. Raises CacheError where pages do not come back as they were."""
    full = [(i, codec) for i, codec in enumerate(book.layers) if codec is not None]
    writer, reader = (Chain(book, links) if links is not None else None for _ in range(2))
    size = 0
    for index, codec in full:
        layer = pages[index]
        assert layer is not None
        data = writer.archive(index, layer) if writer is not None else archive_pages(layer, codec)
        back = reader.restore(index, data) if reader is not None else restore_pages(data, codec)
        if not torch.equal(back, layer):
            raise CacheError(f"pages of layer {index} did not come back as they were; no links were written")
        size += len(data)
    return size


def _windows(
    loaded: LoadedModel, texts: Sequence[str] | None, tokens: int, length: int, seed: int, tell: Progress
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of token ids: to fit on, and kept apart."""
    from spectral.calibrate import token_windows
    from spectral.selftext import self_generated

    count = tokens // length
    held = max(1, min(count // 4, HELD_TOKENS // length))
    wanted = (count + held) * length
    if texts is None:
        texts = self_generated(loaded, tokens=wanted, seed=seed, progress=tell)
    windows = token_windows(loaded, texts, length, wanted, seed)
    if len(windows) < 2:
        raise ModelError(
            f"links need text of at least {2 * length} tokens and there are {len(windows)} window(s) of {length}; "
            "give more --text"
        )
    held = min(held, max(1, len(windows) // 5))
    return windows[held:], windows[:held]


def _check_free(profile: SpectralProfile, setting: str, replace: bool) -> None:
    """Refuse to write over links that saved sessions may need."""
    assert profile.file is not None
    path = links_path(profile.file, setting)
    if replace or not path.exists():
        return
    try:
        links = load_links(path)
    except (SessionError, OSError):
        return  # nothing was saved with these
    if (links.profile_hash, links.setting) == (profile.content_hash, setting):
        raise ProfileError(
            f"setting {setting!r} has its links already ({path}), and what was saved with them needs them; "
            "leave it out of --settings, or fit others in their place with --replace"
        )


def _check_size(profile: SpectralProfile, setting: str, what: str, windows: int, length: int) -> None:
    """Raise ModelError unless windows of `length` tokens are enough for a setting's maps, and there are maps."""
    book = profile.codebook(setting)
    need = tokens_needed(book)
    if not need:
        raise ModelError(
            f"setting {setting!r} of {profile.model!r} cannot be linked: no compressed layer lies above another one, "
            "so there is nothing to predict from; stay with level fast"
        )
    each = _page_count(book, length) * book.page_tokens
    if windows * each < need:
        least = math.ceil(need / each) * length if each else 2 * (length + book.window)
        raise ModelError(
            f"{what}: pages of {windows * each} tokens ({windows} windows of {length}), and the maps of setting "
            f"{setting!r} need {need} at least, some ten thousand to be good: give "
            f"--tokens {least} or more, and as much text"
        )


def _page_count(book: Codebook, tokens: int) -> int:
    return max(0, tokens - book.sinks - book.window) // book.page_tokens


def _groups(profile: SpectralProfile, names: list[str], tokens: int) -> list[list[str]]:
    """Settings whose pages of so many tokens are held together."""
    out: list[list[str]] = []
    held = 0.0
    for name in names:
        row = profile.row(name)
        size = row.page_nbytes / row.page_tokens * tokens
        if not out or held + size > PAGES_NBYTES:
            out.append([])
            held = 0.0
        out[-1].append(name)
        held += size
    return out

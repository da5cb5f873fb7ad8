"""Saved sessions: one row of a page store in a file, to be continued later, on another machine or after a restart.

File: magic, version, length of the header, the header as JSON | sections, each its length and its bytes | BLAKE2b-256
of everything before. The header names what the bytes depend on (model, profile, setting, geometry); the sections are
the token ids, then for every layer its window slot's tensors and, where it has pages, the pages (spectral.archive).
Only places that the row has filled are written: a slot may still hold another sequence's tokens elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from spectral.archive import MAX_SHRINK, archive_pages, archive_tensor, restore_pages, restore_tensor
from spectral.errors import CacheError, SessionError
from spectral.files import atomic_file
from spectral.linked import Chain, Links

if TYPE_CHECKING:
    from spectral.pages import PageStore, Row

MAGIC = b"SPECSESS"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 16
MAX_TOKENS = 1 << 26

_HEAD = struct.Struct("<8sII")
_SECTION = struct.Struct("<Q")
_DIGEST = 32
_CHUNK = 1 << 20

WHAT = {
    "model": "model",
    "profile": "profile",
    "setting": "setting",
    "geometry": "window, page size or number format",
    "layers": "set of layers",
}
"""Header entries that a store must share with a file, and what to call them."""


class SessionFacts(NamedTuple):
    """The setting that a saved row was at, and the digest of its links: "" at the fast level."""

    setting: str
    links: str


def save_row(
    store: PageStore,
    row: Row,
    tokens: Sequence[int],
    path: str | os.PathLike[str],
    *,
    model: str,
    links: Links | None = None,
) -> Path:
    """Write a row to a file, atomically: a half-written session is never seen. The row stays as it is.

    Args:
        store, row: an open row between two steps.
        tokens: ids of the sequence, at least row.length of them (the newest may not have been fed yet).
        path: the file; an older one is replaced.
        model: fingerprint of the model (LoadedModel.fingerprint).
        links: predictors of the setting (spectral.link_fit): smaller pages, more work. Loading needs them again.

    Returns:
        The path.

    Raises:
        CacheError: the row is closed, there are fewer tokens than it holds, or the links are another setting's.
        OSError: the file cannot be written.
    """
    if not row.open:
        raise CacheError("this row is closed")
    if len(tokens) < row.length:
        raise CacheError(f"the row holds {row.length} tokens and {len(tokens)} ids were given")
    chain = Chain(store.codebook, links) if links is not None else None
    counts = {"length": row.length, "pages": len(row.pages), "tokens": len(tokens)}
    header = {**_identity(store, model), **counts, "links": links.digest if links is not None else ""}
    # Mode 0600: a conversation is its owner's business.
    with atomic_file(path, mode=0o600) as file:
        _write(file, header, _sections(store, row, tokens, chain))
    return Path(path)


def load_row(
    store: PageStore, path: str | os.PathLike[str], *, model: str, links: Links | None = None
) -> tuple[Row, list[int]]:
    """A saved row in a store again, and the token ids that were given with it. Logits continue as if never saved.

    Args:
        store: of the same model and setting (of the same profile) as the one that the row was saved from.
        path: the file; model: fingerprint of the model that the store serves.
        links: those that the file was saved with, if any; not used for a file saved without.

    Raises:
        SessionError: not a session, damaged, or of another model, profile, setting or version; the message says which.
        OutOfPages: the row does not fit. OSError: the file cannot be read. In every case the store is unchanged.
    """
    with open(path, "rb") as file:
        end = _verified_end(file)
        header = _read_header(file, end)
        _check_identity(header, _identity(store, model))
        length, pages, count = _lengths(header, store, end)
        chain = _chain(header, store, links)
        sections = _read_sections(file, end)
        ids = restore_tensor(_next(sections), torch.empty(count, dtype=torch.int32)).tolist()
        row = store.admit(length, pages)
        try:
            _fill(store, row, sections, chain)
        except BaseException:
            store.close(row)
            raise
    return row, ids


def session_facts(path: str | os.PathLike[str]) -> SessionFacts:
    """What loading a saved row takes. Raises SessionError for a file that is no session or is damaged."""
    with open(path, "rb") as file:
        header = _read_header(file, _verified_end(file))
    setting, links = header.get("setting"), header.get("links") or ""
    if not isinstance(setting, str) or not isinstance(links, str):
        raise SessionError("the session is damaged: it names no setting, or no links")
    return SessionFacts(setting, links)


def _identity(store: PageStore, model: str) -> dict[str, Any]:
    """What a file must share with a store."""
    book = store.codebook
    return {
        "model": model,
        "profile": book.profile_hash,
        "setting": book.setting,
        "geometry": {
            "sinks": book.sinks,
            "window": book.window,
            "page_tokens": book.page_tokens,
            "window_bits": book.window_bits,
            "window_dtype": str(store.windows[0].store.dtype) if store.windows else "",
        },
        "layers": [
            {
                "kv_heads": layer.kv_heads,
                "key_dim": layer.key_dim,
                "value_dim": layer.value_dim,
                "sliding": layer.sliding,
                "page_nbytes": codec.page_nbytes if codec is not None else None,
            }
            for layer, codec in zip(store.shape.layers, book.layers, strict=True)
        ],
    }


def _check_identity(header: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, word in WHAT.items():
        if header.get(name) != ours[name]:
            found, wanted = (_short(x) for x in (header.get(name), ours[name]))
            raise SessionError(f"the session was saved with another {word}: {found}, and this store has {wanted}")


def _chain(header: dict[str, Any], store: PageStore, links: Links | None) -> Chain | None:
    digest = header.get("links")
    if not digest:
        return None
    if links is None or links.digest != digest:
        ours = "none were given" if links is None else f"those given are {_short(links.digest)}"
        raise SessionError(f"the session was saved with the links {_short(digest)} and {ours}")
    return Chain(store.codebook, links)


def _lengths(header: dict[str, Any], store: PageStore, size: int) -> tuple[int, int, int]:
    """Tokens of the row, its pages and ids, checked before any memory is reserved for them."""
    length, pages, count = (_natural(header.get(name)) for name in ("length", "pages", "tokens"))
    if not length <= count <= MAX_TOKENS or 4 * count > MAX_SHRINK * size:
        raise SessionError("the session is damaged: its lengths make no sense")
    book = store.codebook
    # A row that was cut may keep more pages than its length asks for (spectral.rows), but only whole ones.
    if not store.pages_at(length) <= pages <= max(0, length - book.sinks) // book.page_tokens:
        raise SessionError(f"the session is damaged: {length} tokens cannot have {pages} pages")
    if pages * book.page_nbytes() > MAX_SHRINK * size:
        raise SessionError("the session is damaged: it claims more pages than it can hold")
    return length, pages, count


def _short(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 24 else value[:24] + "...")
    return json.dumps(value)[:200]


# == the sections ====================================================================================================


def _sections(store: PageStore, row: Row, tokens: Sequence[int], chain: Chain | None) -> Iterator[bytes]:
    """One at a time, so that a long row is never held twice."""
    yield archive_tensor(torch.tensor(list(tokens), dtype=torch.int32))
    for index, codec in enumerate(store.codebook.layers):
        for tensor in store.windows[index].slot_tensors(row.slot, row.length):
            yield archive_tensor(tensor)
        if codec is not None:
            pages = store.read_pages(index, row)
            yield chain.archive(index, pages) if chain is not None else archive_pages(pages, codec)


def _fill(store: PageStore, row: Row, sections: Iterator[bytes], chain: Chain | None) -> None:
    for index, codec in enumerate(store.codebook.layers):
        for tensor in store.windows[index].slot_tensors(row.slot, row.length):
            tensor.copy_(restore_tensor(_next(sections), tensor))
        if codec is not None:
            data = _next(sections)
            pages = chain.restore(index, data) if chain is not None else restore_pages(data, codec)
            if len(pages) != len(row.pages):
                raise SessionError(f"the session is damaged: {len(pages)} pages where {len(row.pages)} belong")
            store.write_pages(index, row, pages)
    if next(sections, None) is not None:
        raise SessionError("the session is damaged: it holds more than it should")


# == the file ========================================================================================================


def _write(file: IO[bytes], header: dict[str, Any], sections: Iterator[bytes]) -> None:
    digest = hashlib.blake2b(digest_size=_DIGEST)

    def put(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    document = json.dumps(header, sort_keys=True).encode()
    put(_HEAD.pack(MAGIC, FORMAT_VERSION, len(document)) + document)
    for section in sections:
        put(_SECTION.pack(len(section)))
        put(section)
    file.write(digest.digest())


def _verified_end(file: IO[bytes]) -> int:
    """Where the sections end, after the whole file's checksum was found right. Leaves the file at its start."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[: len(MAGIC)] != MAGIC:
        raise SessionError("this file is not a saved session")
    version = _HEAD.unpack(head)[1]
    if version != FORMAT_VERSION:
        raise SessionError(f"the session has format version {version} and this library reads {FORMAT_VERSION}")
    end = os.fstat(file.fileno()).st_size - _DIGEST
    digest = hashlib.blake2b(digest_size=_DIGEST)
    file.seek(0)
    left = max(0, end)
    while left and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    if end < _HEAD.size or file.read(_DIGEST) != digest.digest():
        raise SessionError("the session is damaged or cut short: its checksum does not match")
    file.seek(0)
    return end


def _read_header(file: IO[bytes], end: int) -> dict[str, Any]:
    size = _HEAD.unpack(file.read(_HEAD.size))[2]
    if size > min(MAX_HEADER_BYTES, end - _HEAD.size):
        raise SessionError("the session is damaged: its header is too long")
    try:
        header = json.loads(file.read(size))
    except (ValueError, RecursionError):
        raise SessionError("the session is damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise SessionError("the session is damaged: its header is not an object")
    return header


def _read_sections(file: IO[bytes], end: int) -> Iterator[bytes]:
    while file.tell() < end:
        if end - file.tell() < _SECTION.size:
            raise SessionError("the session is damaged: a section is cut short")
        size = _SECTION.unpack(file.read(_SECTION.size))[0]
        if size > end - file.tell():
            raise SessionError("the session is damaged: a section is cut short")
        yield file.read(size)


def _next(sections: Iterator[bytes]) -> bytes:
    data = next(sections, None)
    if data is None:
        raise SessionError("the session is damaged: a section is missing")
    return data


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SessionError("the session is damaged: its lengths make no sense")
    return value

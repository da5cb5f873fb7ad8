"""The cold form of pages: entropy-coded, for sequences that are parked or saved.

Codes come out of the quantizer nearly uniform, so a general compressor sees noise in a page: fields of different widths
lie side by side. What order-0 redundancy there is (docs/cold-tier.md) shows when each field of many pages is coded by
itself; zstd's Huffman stage then takes it at memory-like speed. Codes of three bits lie in a page as a sign and two
bits, which are as often small as large until those of negative numbers are turned over. Pages come back bit for bit.

Blob: magic, version, number of pages, bytes of a page, digest of the codec's layout | per stream: compressed or raw,
its length | the streams | BLAKE2b-128 of everything before. A stream is never shorter than 1/16 of what it stands for:
the size of the blob bounds what a forged one can make a reader allocate.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
import zstandard

from spectral.codec import ExactCodec, LayerCodec, PageCodec
from spectral.errors import SessionError

MAGIC = b"SPCA"
FORMAT_VERSION = 2
MAX_SHRINK = 16
"""A stream that shrinks more than this is stored as it is, and a blob that claims to have is refused."""

_HEAD = struct.Struct("<4sHQQ16s")
_STREAM = struct.Struct("<BQ")
_RAW, _ZSTD = 0, 1
_DIGEST = 16
# Level 1: no level finds matches in codes (level 19 gains nothing), so only the literals' Huffman stage counts.
_LEVEL = 1

Stream = tuple[slice, ...]
"""Byte columns of a page that are coded together."""


def archive_pages(pages: torch.Tensor, codec: PageCodec) -> bytes:
    """Pages of one layer in their cold form.

    Args:
        pages: uint8 [n, codec.page_nbytes] on any device; n may be 0.
        codec: the layer's codec, which tells where the fields lie.

    Returns:
        A blob that `restore_pages` turns back, with its own version and checksum.

    Raises:
        ValueError: the pages do not fit the codec.
    """
    if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.shape[1] != codec.page_nbytes:
        raise ValueError(f"pages must be uint8 [n, {codec.page_nbytes}], got {pages.dtype} {list(pages.shape)}")
    table, plan = pages.cpu().numpy(), _plan_of(codec)
    columns = [np.concatenate([table[:, part] for part in stream], 1) for stream in plan.streams]
    if plan.signed is not None:
        columns[plan.signed] ^= plan.turns(table)
    return seal_streams(columns, len(table), codec.page_nbytes, layout_digest(codec))


def restore_pages(data: bytes, codec: PageCodec) -> torch.Tensor:
    """The pages that `archive_pages` got: uint8 [n, codec.page_nbytes] on the CPU.

    Raises:
        SessionError: the blob is damaged, of another version, or of a codec with another layout.
    """
    plan = _plan_of(codec)
    widths = [sum(len(range(*part.indices(codec.page_nbytes))) for part in stream) for stream in plan.streams]
    count, columns = open_streams(data, widths, codec.page_nbytes, layout_digest(codec))
    pages = np.zeros((count, codec.page_nbytes), dtype=np.uint8)  # padding is in no stream
    order = sorted(range(len(columns)), key=lambda i: i == plan.signed)  # signs before what they turn over
    for i in order:
        column, at = columns[i] if i != plan.signed else columns[i] ^ plan.turns(pages), 0
        for part in plan.streams[i]:
            target = pages[:, part]
            target[:] = column[:, at : at + target.shape[1]]
            at += target.shape[1]
    return torch.from_numpy(pages)


def archive_tensor(tensor: torch.Tensor) -> bytes:
    """A tensor of any dtype in the same form, its numbers' bytes apart from each other (exponents are redundant)."""
    size = tensor.element_size()
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().reshape(-1, size)
    return seal_streams([raw[:, [i]] for i in range(size)], len(raw), size, _tensor_digest(tensor))


def restore_tensor(data: bytes, like: torch.Tensor) -> torch.Tensor:
    """What `archive_tensor` got, on the CPU: of `like`'s shape and dtype, else SessionError."""
    size = like.element_size()
    count, columns = open_streams(data, [1] * size, size, _tensor_digest(like))
    if count != like.numel():
        raise SessionError(f"the archive holds {count} numbers and {like.numel()} were expected")
    raw = np.concatenate(columns, 1)
    return torch.from_numpy(raw).reshape(-1).view(like.dtype).reshape(like.shape)


def page_streams(codec: PageCodec) -> list[Stream]:
    """Which bytes of a page are coded together: the same plane of the same width in all units and classes, or the same
    byte of all numbers."""
    return list(_plan_of(codec).streams)


@dataclass(frozen=True)
class _Plan:
    """How a codec's pages are coded.

    Attributes:
        streams: as of `page_streams`; signed: the one with the low parts of three bits, None without any.
        byte, shift: of every byte of that stream, the page's byte with the signs of its four codes, and where there.
    """

    streams: tuple[Stream, ...]
    signed: int | None = None
    byte: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def turns(self, pages: np.ndarray) -> np.ndarray:
        """What the signed stream is xored with, uint8 [n, bytes]: ones in the fields of codes below the middle."""
        signs = (pages.take(self.byte, axis=1) >> self.shift) & 0x0F
        signs = (signs | signs << 2) & 0x33
        signs = (signs | signs << 1) & 0x55
        signs *= 3
        return np.invert(signs, out=signs)


_PLANS: WeakKeyDictionary[LayerCodec, _Plan] = WeakKeyDictionary()


def _plan_of(codec: PageCodec) -> _Plan:
    if isinstance(codec, ExactCodec):
        size = codec.dtype.itemsize
        return _Plan(tuple((slice(i, codec.page_nbytes, size),) for i in range(size)))
    if codec not in _PLANS:
        _PLANS[codec] = _plan(codec)
    return _PLANS[codec]


def _plan(codec: LayerCodec) -> _Plan:
    parts: dict[tuple[int, int], list[slice]] = {}
    byte: list[np.ndarray] = [np.zeros(0, np.int64)]
    shift: list[np.ndarray] = [np.zeros(0, np.uint8)]
    for unit, start in zip(codec.units, codec.starts, strict=False):
        signs = {strip.number: strip for strip in unit.layout.strips if strip.bits == 1}
        for strip in unit.layout.strips:
            size, first = strip.cell_nbytes, start + strip.start
            for cell in range(strip.cells):
                # A cell of one bit holds two runs, which may differ in width: signs, or codes of one bit.
                width = 1 if strip.bits == 1 else int(unit.layout.widths[strip.number, strip.runs[cell]])
                spans = parts.setdefault((strip.bits, width), [])
                begin = first + cell * size
                if spans and spans[-1].stop == begin:
                    begin = spans.pop().start
                spans.append(slice(begin, first + (cell + 1) * size))
                if (strip.bits, width) == (2, 3):
                    of = signs[strip.number]
                    pair, half = divmod(of.runs.index(strip.runs[cell]), 2)
                    byte.append(start + of.start + pair * of.cell_nbytes + np.arange(size))
                    shift.append(np.full(size, 4 * half, np.uint8))
    signed = list(parts).index((2, 3)) if (2, 3) in parts else None
    streams = tuple(tuple(spans) for spans in parts.values())
    return _Plan(streams, signed, np.concatenate(byte), np.concatenate(shift))


def layout_digest(codec: PageCodec) -> bytes:
    """Identity of a codec's page layout. Two settings may share it: a session names its profile and setting as well."""
    state = hashlib.blake2b(digest_size=16)
    if isinstance(codec, ExactCodec):
        state.update(
            f"exact {codec.dtype} {codec.page_tokens} {codec.kv_heads} {codec.key_dim} {codec.value_dim}".encode()
        )
    else:
        for unit in codec.units:
            state.update(f"unit {unit.layout.page_tokens} {unit.layout.channels} {unit.layout.strips}".encode())
            state.update(unit.layout.widths.tobytes())
    return state.digest()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    return hashlib.blake2b(f"tensor {tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16).digest()


def seal_streams(columns: Sequence[np.ndarray], count: int, row_nbytes: int, identity: bytes) -> bytes:
    """Streams uint8 [count, any] -> a blob (see the module's docstring). `identity`: 16 bytes readers must name."""
    squeeze = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(
            _LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False
        )
    )
    head = [_HEAD.pack(MAGIC, FORMAT_VERSION, count, row_nbytes, identity)]
    body: list[bytes | memoryview] = []
    for column in columns:
        raw = memoryview(np.ascontiguousarray(column)).cast("B") if column.size else memoryview(b"")
        packed = squeeze.compress(raw)
        small = raw.nbytes <= MAX_SHRINK * len(packed) and len(packed) < raw.nbytes
        head.append(_STREAM.pack(_ZSTD if small else _RAW, len(packed) if small else raw.nbytes))
        body.append(packed if small else raw)
    data = b"".join([*head, *body])
    return data + hashlib.blake2b(data, digest_size=_DIGEST).digest()


def open_streams(data: bytes, widths: Sequence[int], row_nbytes: int, identity: bytes) -> tuple[int, list[np.ndarray]]:
    """A blob -> number of rows and its streams uint8 [rows, width].

    Raises SessionError on anything that `seal_streams` would not have written for these widths and identity.
    """
    start = _HEAD.size + _STREAM.size * len(widths)
    view = memoryview(data)
    if len(view) < start + _DIGEST:
        # Another layout may have fewer streams, hence a shorter blob: say "cut short" only when nothing else fits.
        _check_head(view, row_nbytes, identity)
        raise SessionError("the archive is cut short")
    if hashlib.blake2b(view[:-_DIGEST], digest_size=_DIGEST).digest() != bytes(view[-_DIGEST:]):
        raise SessionError("the archive is damaged: its checksum does not match")
    count = _check_head(view, row_nbytes, identity)
    streams = [_STREAM.unpack_from(view, _HEAD.size + _STREAM.size * i) for i in range(len(widths))]
    if start + sum(length for _, length in streams) + _DIGEST != len(view):
        raise SessionError("the archive is damaged: its streams do not fill it")
    columns = []
    for (method, length), width in zip(streams, widths, strict=True):
        raw = _expand(view[start : start + length], method, count * width)
        columns.append(np.frombuffer(raw, dtype=np.uint8).reshape(count, width))
        start += length
    return count, columns


def _check_head(view: memoryview, row_nbytes: int, identity: bytes) -> int:
    if len(view) < _HEAD.size:
        raise SessionError("the archive is cut short")
    magic, version, count, size, found = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise SessionError("this is not an archive of pages")
    if version != FORMAT_VERSION:
        raise SessionError(f"the archive has format version {version} and this library reads {FORMAT_VERSION}")
    if found != identity or size != row_nbytes:
        raise SessionError("the archive was made with another page layout: another profile, setting or version of it")
    # Also what keeps shapes of forged blobs within an int64, where a page has no bytes.
    if count > 2**40:
        raise SessionError("the archive is damaged: it claims an impossible number of pages")
    return count


def _expand(packed: memoryview, method: int, nbytes: int) -> memoryview | bytes:
    if method == _RAW:
        if packed.nbytes != nbytes:
            raise SessionError("the archive is damaged: a stream has the wrong length")
        return packed
    if method != _ZSTD or not 0 < nbytes <= MAX_SHRINK * packed.nbytes:
        raise SessionError("the archive is damaged: a stream claims more than it can hold")
    expand = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=1 << 27)
    try:
        # A frame that states its own size would be believed: ours never do, so refuse those that do.
        if zstandard.frame_content_size(_MAGIC_NUMBER + bytes(packed[:18])) != -1:
            raise SessionError("the archive is damaged: a stream states its own size")
        raw = expand.decompress(packed, max_output_size=nbytes)
    except zstandard.ZstdError as error:
        raise SessionError(f"the archive is damaged: {error}") from None
    if len(raw) != nbytes:
        raise SessionError("the archive is damaged: a stream has the wrong length")
    return raw


_MAGIC_NUMBER = b"\x28\xb5\x2f\xfd"
"""What zstd frames begin with, and ours leave out."""

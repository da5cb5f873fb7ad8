"""Saved sessions: a valid file whose header, sections or archives are changed, every checksum made right again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from functools import cached_property
from random import Random
from typing import Any

from spectral.errors import OutOfPages, SessionError
from tests.fuzz.mutate import INTERESTING, mutate_bytes, mutate_document
from tests.fuzz.targets.base import Base

HEAD = struct.Struct("<8sII")


class Sessions(Base):
    """A row, or SessionError; the store is unchanged where there is none."""

    name = "sessions"
    seconds = 2.0
    memory = 384 << 20

    @cached_property
    def store(self) -> Any:
        """A small store with pages, quantized windows and a limit."""
        from spectral.pages import LayerShape, ModelShape, PageStore
        from tests.spectral.helpers import random_codebook

        shape = ModelShape((LayerShape(2, 16, 16, None), LayerShape(2, 16, 16, 24)), 4, 32)
        book = random_codebook(shape, [8, 6, 4, 3, 2, 1, 0], window_bits=8)
        return PageStore(shape, book, max_bytes=1 << 22)

    @cached_property
    def parts(self) -> tuple[dict[str, Any], list[bytes]]:
        """A valid file's header and sections."""
        import torch

        from spectral.sessions import save_row

        store = self.store
        row = store.admit(60, store.pages_at(60))
        generator = torch.Generator().manual_seed(0)
        for index, window in enumerate(store.windows):
            for tensor in window.slot_tensors(row.slot, row.length):
                if tensor.dtype.is_floating_point:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            codec = store.codebook.layers[index]
            if codec is not None:
                store.write_pages(index, row, torch.zeros(len(row.pages), codec.page_nbytes, dtype=torch.uint8))
        path = save_row(store, row, list(range(61)), self.folder / "valid", model="m")
        store.close(row)
        data = path.read_bytes()[:-32]
        size = HEAD.unpack_from(data)[2]
        at, sections = HEAD.size + size, []
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            sections.append(data[at + 8 : at + 8 + length])
            at += 8 + length
        return json.loads(data[HEAD.size : HEAD.size + size]), sections

    def make(self, random: Random) -> bytes:
        """A file."""
        header, sections = self.parts
        sections = list(sections)
        if random.random() < 0.5:
            header = mutate_document(header, random)
        if random.random() < 0.3:
            count = random.choice(INTERESTING)
            header = {**header, random.choice(("tokens", "length", "pages")): count}
        if random.random() < 0.6:
            which = random.randrange(len(sections))
            sections[which] = _reseal(mutate_bytes(sections[which][:-16], random))
        if random.random() < 0.2:
            random.shuffle(sections)
        document = json.dumps(header).encode()
        data = HEAD.pack(b"SPECSESS", 1, len(document)) + document
        data += b"".join(struct.pack("<Q", len(section)) + section for section in sections)
        if random.random() < 0.2:
            data = mutate_bytes(data, random)
        return data + hashlib.blake2b(data, digest_size=32).digest()

    def check(self, item: bytes) -> str:
        """Load it."""
        from spectral.sessions import load_row, session_facts

        path = self.folder / "input"
        path.write_bytes(item)
        before = self.store.used_nbytes
        with contextlib.suppress(SessionError):
            session_facts(path)
        try:
            row, ids = load_row(self.store, path, model="m")
        except (SessionError, OutOfPages):
            assert self.store.used_nbytes == before
            return "refused"
        assert len(ids) >= row.length
        self.store.close(row)
        return "accepted"


def _reseal(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=16).digest()


TARGETS = {"sessions": Sessions}

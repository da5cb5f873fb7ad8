"""Prefix reuse: what one prompt has computed, the next one that begins alike takes over.

A prompt is computed in chunks that end at multiples of the same length whatever else runs, so the state at the end of
a block of tokens is a function of these tokens alone. An entry keeps that state: it owns the block's pages in the store
(its parents own the earlier ones), and a snapshot of the exact window in host memory. A row that begins from an entry
therefore goes on exactly as if it had computed everything itself. Only prompts are kept, not answers: answers were
decoded token by token, which at a compressed setting sees slightly different numbers than a prompt's chunks.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from spectral.checks import checksum
from spectral.engine.sequence import Sequence
from spectral.pages import Hold, PageStore, Row
from spectral.parking import Snapshot, put_windows, snapshot_nbytes, snapshot_tensors, take_windows

log = logging.getLogger("spectral.engine")

MIN_BLOCK = 32
"""Tokens below which a block is not worth an entry."""


def block_length(chunk: int) -> int:
    """Tokens of a block: whole chunks, at least MIN_BLOCK tokens."""
    return chunk * -(-MIN_BLOCK // chunk)


def chain(identity: bytes, salt: str, tokens: Seq[int], block: int) -> list[bytes]:
    """A key for every whole block: each depends on the model's identity, the salt and all tokens up to its end."""
    digest = hashlib.blake2b(identity, digest_size=16, person=b"spectral-prefix").digest()
    digest = hashlib.blake2b(digest + salt.encode(), digest_size=16).digest()
    out = []
    for end in range(block, len(tokens) + 1, block):
        digest = hashlib.blake2b(digest + array("q", tokens[end - block : end]).tobytes(), digest_size=16).digest()
        out.append(digest)
    return out


@dataclass(eq=False)
class Entry:
    """The state after one block. `hold`: the pages that the block filled; `children`: entries that go on from it."""

    key: bytes
    parent: Entry | None
    hold: Hold
    windows: Snapshot
    nbytes: int
    check: bytes
    children: int = 0

    @property
    def whole(self) -> bool:
        """Whether the snapshot is what was put here."""
        return checksum(snapshot_tensors(self.windows)) == self.check


class PrefixCache:
    """The entries of one store.

    Args:
        store: whose pages are kept; identity: of model, profile and setting; block: tokens.
        max_bytes: most bytes of pages and snapshots together; the least recently used entries go first.
    """

    def __init__(self, store: PageStore, identity: bytes, block: int, max_bytes: int) -> None:
        self.store, self.identity, self.block, self.max_bytes = store, identity, block, max_bytes
        self.nbytes = 0
        self.asked_tokens = self.reused_tokens = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._computing: dict[bytes, Sequence] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that a sequence can share: all whole ones before its prompt's last token."""
        if sequence.keys is None or sequence.keys[0] != self.identity:
            usable = sequence.tokens[: sequence.prompt_length - 1] if self.max_bytes else []
            sequence.keys = self.identity, chain(self.identity, sequence.salt, usable, self.block)
        return sequence.keys[1]

    def matched(self, sequence: Sequence) -> int:
        """Blocks of the sequence that are here."""
        keys = self.keys(sequence)
        return next((i for i, key in enumerate(keys) if key not in self._entries), len(keys))

    def pages(self, sequence: Sequence, blocks: int) -> list[int]:
        """The pages that the sequence's first blocks filled."""
        return [page for key in self.keys(sequence)[:blocks] for page in self._entries[key].hold.pages]

    def open(self, sequence: Sequence) -> Row:
        """A new row that begins with all blocks that are here. Raises OutOfPages, with nothing changed."""
        sequence.resumed = False
        blocks = self.matched(sequence)
        if blocks and not self._entries[self.keys(sequence)[blocks - 1]].whole:
            log.error("a prefix was damaged in host memory; all of them are given up and computed again")
            self.clear()
            blocks = 0
        if blocks:
            row = self.store.admit(blocks * self.block, 0, self.pages(sequence, blocks))
            put_windows(self.store, row, self._entries[self.keys(sequence)[blocks - 1]].windows)
        else:
            row = self.store.open()
        for key in reversed(self.keys(sequence)[:blocks]):
            self._entries.move_to_end(key)  # a parent is newer than its children: leaves go first
        for key in self.keys(sequence)[blocks:]:
            self._computing.setdefault(key, sequence)
        self.asked_tokens += sequence.prompt_length
        self.reused_tokens += blocks * self.block
        if len(sequence.tokens) == sequence.prompt_length:  # else it finds its own pages again
            sequence.cached = blocks * self.block
        return row

    def waits(self, sequence: Sequence) -> bool:
        """True if another sequence is computing the first block that is missing here: it is encoded once."""
        keys, blocks = self.keys(sequence), self.matched(sequence)
        return blocks < len(keys) and self._computing.get(keys[blocks], sequence) is not sequence

    def leave(self, sequence: Sequence) -> None:
        """The sequence computes no more."""
        if sequence.keys is None:
            return
        for key in sequence.keys[1]:
            if self._computing.get(key) is sequence:
                del self._computing[key]

    def keep(self, sequence: Sequence) -> None:
        """Called after each step: makes an entry if the sequence's row has just reached the end of a block."""
        if sequence.resumed or sequence.row.length % self.block or sequence.row.length >= sequence.prompt_length:
            return
        length, keys = sequence.row.length, self.keys(sequence)
        at = length // self.block - 1
        if at >= len(keys):
            return
        key = keys[at]
        if self._computing.get(key) is sequence:
            del self._computing[key]
        parent = self._entries.get(keys[at - 1]) if at else None
        if key in self._entries or (at and parent is None):
            return
        if sequence.sound is not None and not bool(sequence.sound):
            return  # its request fails at the prompt's end, and nobody else begins from here
        first = self.store.pages_at(length - self.block)
        pages = sequence.row.pages[first : self.store.pages_at(length)]
        windows = take_windows(self.store, sequence.row)
        size = self.store.nbytes_of(len(pages), 0) + snapshot_nbytes(windows)
        check = checksum(snapshot_tensors(windows))
        self._entries[key] = Entry(key, parent, self.store.hold(pages), windows, size, check)
        self.nbytes += size
        if parent is not None:
            parent.children += 1
            above: Entry | None = parent
            while above is not None:
                self._entries.move_to_end(above.key)
                above = above.parent
        while self.nbytes > self.max_bytes and self._evict():
            pass

    def _evict(self) -> bool:
        """Forget the least recently used entry that no other goes on from; False if there is none."""
        entry = next((e for e in self._entries.values() if not e.children), None)
        if entry is None:
            return False
        del self._entries[entry.key]
        self.store.drop(entry.hold)
        self.nbytes -= entry.nbytes
        if entry.parent is not None:
            entry.parent.children -= 1
        return True

    @property
    def idle_nbytes(self) -> int:
        """Bytes of the store's pages that nobody else uses."""
        return self.store.nbytes_of(sum(self.store.unshared(e.hold.pages) for e in self._entries.values()), 0)

    def free(self, nbytes: int) -> int:
        """Forget entries, least recently used first, until so many bytes of the store are free; how many became so."""
        before = self.store.held_nbytes
        while before - self.store.held_nbytes < nbytes and self._evict():
            pass
        return before - self.store.held_nbytes

    def clear(self) -> None:
        """Forget everything."""
        while self._evict():
            pass
        self._computing.clear()

"""One setting in use: its store, its prefixes, and how sequences come in and out."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from spectral.engine.prefix import PrefixCache
from spectral.engine.sequence import Sequence
from spectral.errors import DamagedPages
from spectral.pages import PageStore
from spectral.parking import unpark
from spectral.rows import cut_row

log = logging.getLogger("spectral.engine")


@dataclass(eq=False)
class Lane:
    """One setting in use. `kl`: its measured mean, 0 for exact; `members`: sequences that belong to it, parked ones
    included."""

    setting: str
    kl: float
    store: PageStore
    prefix: PrefixCache
    members: int = 0

    def waits(self, sequence: Sequence) -> bool:
        """True while another sequence computes the same prefix."""
        return sequence.parked is None and self.prefix.waits(sequence)

    def need(self, sequence: Sequence) -> tuple[int, int]:
        """Bytes that a sequence needs for all its tokens; bytes of idle prefix pages among those that it shares."""
        pages = self.store.pages_at(len(sequence.tokens) + 1)
        if sequence.row is not None:
            return self.store.nbytes_of(max(0, pages - len(sequence.row.pages)), 0), 0
        shared: list[int] = []
        if sequence.parked is None:
            shared = self.prefix.pages(sequence, self.prefix.matched(sequence))
        idle = self.store.nbytes_of(self.store.unshared(shared), 0)
        return self.store.nbytes_of(max(0, pages - len(shared))), idle

    def open(self, sequence: Sequence) -> None:
        """Give a sequence its row: from host memory, from a prefix, or empty. Raises OutOfPages, nothing changed."""
        if sequence.parked is None:
            sequence.row = self.prefix.open(sequence)
            return
        try:
            row = unpark(self.store, sequence.parked)
        except DamagedPages as error:
            log.error("%s; its tokens are computed again", error)
            sequence.row = self.prefix.open(sequence)
            sequence.parked = sequence.keep = None
            return
        if sequence.keep is not None and sequence.keep < row.length:
            cut_row(self.store, row, sequence.keep)
        sequence.row, sequence.parked, sequence.keep = row, None, None

    def close(self, sequence: Sequence) -> None:
        """Free a sequence's row."""
        self.prefix.leave(sequence)
        self.store.close(sequence.row)
        sequence.row = None

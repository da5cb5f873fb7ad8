"""A decode step that is launched before the tokens of the one before it are read.

Between the end of a step and the launch of the next one the host reads tokens, turns them into text, tells whoever
waits and puts the next step together, and the GPU has nothing to do. What the next step needs is on the device when
tokens are chosen there: they are its inputs, each one place further on. So it is launched at once, for the same rows,
and runs while the host does all that. Its tokens are chosen when the engine asks for the step, by the sampling that it
asks for then.

It may turn out that the engine wants another step: a row has ended, was parked, or there are new ones. Rows that are
still wanted take what was computed for them, if they are all that is wanted; otherwise the step is made anew, and what
ran ahead has done no harm:
* The new token went to the one place of the window that a row has to spare, where the same token, or another, will be
  written when that step is made.
* Pages that became full went to free ones (`PageStore.foresee`): `begin` grants these if they still are free, and they
  belong to nobody until then. Where anybody else had one of them meanwhile, the step is made anew.
* Whatever else runs on the GPU from then on is behind it on the same stream. Memory that streams do not order (tables
  made on other threads, weights that move) is given up only after `DecodeGraphs.settle`.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectral.engine.sequence import Sequence
    from spectral.engine.static_step import StaticStep
    from spectral.pages import PageStore, Row


@dataclass(frozen=True)
class Expected:
    """What the next step asks of a sequence: its row with `length` tokens and `pages` pages before it, and the pages
    that are granted for it, of which each was `taken` so often then."""

    sequence: Sequence
    row: Row
    length: int
    pages: int
    granted: list[int]
    taken: list[int]

    def meets(self, granted: list[int], taken: list[int]) -> bool:
        """Whether the sequence's next step is this one."""
        row = self.sequence.row
        now = row is self.row and row.open and row.length == self.length and len(row.pages) == self.pages
        # Somebody else may have had such a page in between, written into it and given it back.
        return now and granted == self.granted and taken == [times + 1 for times in self.taken]


@dataclass(frozen=True)
class Ahead:
    """A step that runs ahead. `generation`: of its store, which must not have moved; `rows`: of the step, in order."""

    step: StaticStep
    generation: int
    rows: list[Expected]

    def places(self, store: PageStore, sequences: Rows[Sequence], granted: Rows[list[int]]) -> list[int] | None:
        """The step's rows of sequences that decode now with so granted pages; None where it is not their step."""
        if store is not self.step.store or store.generation != self.generation:
            return None
        known = {expected.sequence: at for at, expected in enumerate(self.rows)}
        places = []
        for sequence, pages in zip(sequences, granted, strict=True):
            at = known.get(sequence)
            if at is None or not self.rows[at].meets(pages, store.times_taken(pages)):
                return None
            places.append(at)
        return places


def expect(step: StaticStep, sequences: Rows[Sequence], fresh: Rows[list[int]]) -> list[Expected] | None:
    """What the step behind this one will be, where `fresh` are the pages that are granted for this one; None where that
    cannot be said, or not be run ahead: a sequence is at its last token, or there are too few free pages.

    Where pages are sealed behind a step (settings without an exact window), none may have become full.
    """
    store = step.store
    if any(sequence.answer is None or sequence.answer.left <= 1 for sequence in sequences):
        return None
    rows = [sequence.row for sequence in sequences]
    pages = [len(row.pages) + len(new) for row, new in zip(rows, fresh, strict=True)]
    needs = [max(0, store.pages_at(row.length + 2) - held) for row, held in zip(rows, pages, strict=True)]
    if not step.seals_first and (any(fresh) or any(needs)):
        return None
    granted = store.foresee(rows, needs)
    if granted is None:
        return None
    found = zip(sequences, rows, pages, granted, strict=True)
    return [
        Expected(sequence, row, row.length + 1, held, new, store.times_taken(new)) for sequence, row, held, new in found
    ]

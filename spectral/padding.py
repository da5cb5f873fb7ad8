"""Which columns of a padded batch hold tokens. Padding is never stored: each row is kept as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Span = tuple[int, int]
"""Columns begin .. end - 1."""


class Columns:
    """The columns that a batch has seen. A few spans per row instead of a mask, which would grow with every token.

    Attributes:
        length: columns, padding included.
        spans: per row the spans of columns with tokens, in order; None as long as there was no padding.
    """

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[list[Span]] | None = None

    def extend(self, count: int, valid: torch.Tensor | None) -> None:
        """`count` more columns; valid: bool [B, count], None if all are tokens."""
        begin, self.length = self.length, self.length + count
        if valid is not None and self.spans is None:
            self.spans = [[(0, begin)] if begin else [] for _ in range(valid.shape[0])]
        if self.spans is None:
            return
        fresh = [[(0, count)]] * len(self.spans) if valid is None else [_runs(row) for row in valid.tolist()]
        for spans, runs in zip(self.spans, fresh, strict=True):
            for first, last in runs:
                if spans and spans[-1][1] == begin + first:
                    spans[-1] = (spans[-1][0], begin + last)
                else:
                    spans.append((begin + first, begin + last))

    def cut(self, length: int) -> None:
        """Forget the columns from `length` on."""
        self.length = length
        if self.spans is not None:
            self.spans = [[(a, min(b, length)) for a, b in spans if a < length] for spans in self.spans]

    def select(self, indices: Sequence[int]) -> None:
        """The batch becomes its rows at `indices`."""
        if self.spans is not None:
            self.spans = [list(self.spans[index]) for index in indices]

    def counts(self, rows: int) -> list[int]:
        """Tokens of each row."""
        if self.spans is None:
            return [self.length] * rows
        return [sum(b - a for a, b in spans) for spans in self.spans]

    def places(self, row: int, device: torch.device) -> torch.Tensor:
        """The columns of a row's tokens: int64 [tokens]."""
        spans = [(0, self.length)] if self.spans is None else self.spans[row]
        parts = [torch.arange(a, b, device=device) for a, b in spans]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=device)

    def mask(self, rows: int, device: torch.device) -> torch.Tensor:
        """bool [rows, length], True for tokens."""
        out = torch.zeros((rows, self.length), dtype=torch.bool, device=device)
        for row in range(rows):
            out[row, self.places(row, device)] = True
        return out


def _runs(flags: Sequence[bool]) -> list[Span]:
    """Spans of True: [True, True, False, True] -> [(0, 2), (3, 4)]."""
    edges = [i for i in range(len(flags) + 1) if (i < len(flags) and flags[i]) != (i > 0 and flags[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def from_positions(position_ids: torch.Tensor | None, batch: int, count: int) -> torch.Tensor | None:
    """Padding of a first chunk, from the positions that transformers' `generate` gives it: bool [batch, count] or None.

    Padding has position 0 (or 1, before 5.24), tokens count up from 0. Only rows that cannot be anything else are taken
    for padded ones (at least two tokens): to take padding for tokens costs a little quality, the opposite answers.
    """
    if position_ids is None or tuple(position_ids.shape) != (batch, count):
        return None
    rows = [_row_from_positions(row, count) for row in position_ids.tolist()]
    if all(all(row) for row in rows):
        return None
    return torch.tensor(rows, dtype=torch.bool, device=position_ids.device)


def _row_from_positions(positions: list[int], count: int) -> list[bool]:
    tokens = positions[-1] + 1  # left padding
    left = count - tokens
    if left > 0 and tokens > 1 and positions[left:] == list(range(tokens)) and set(positions[:left]) in ({0}, {1}):
        return [False] * left + [True] * tokens
    tokens = max(positions) + 1  # right padding
    right = count - tokens
    if right > 0 and tokens > 1 and positions[:tokens] == list(range(tokens)) and set(positions[tokens:]) in ({0}, {1}):
        return [True] * tokens + [False] * right
    return [True] * count

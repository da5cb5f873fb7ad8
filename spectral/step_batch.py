"""One forward's worth of work on a page store: reserved before, committed or aborted after."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch

from spectral.errors import CacheError

if TYPE_CHECKING:
    from spectral.pages import PageStore, Row
    from spectral.windows import WindowGroup


class _Elsewhere:
    """A store as layers on another than its first device see it."""

    def __init__(self, store: PageStore, device: torch.device) -> None:
        self._store, self.device = store, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class StepBatch:
    """The rows of one forward and the pages reserved for it. Attention reads it; the engine commits or aborts it.

    Attributes:
        work: (row, new tokens) in flattened order; starts: offset of each row's first new token.
        new_pages: page ids granted to each row.
    """

    def __init__(self, store: PageStore, work: list[tuple[Row, int]], granted: list[list[int]]) -> None:
        self.store = store
        self.work = work
        self.new_pages = granted
        self.starts = [0, *accumulate(count for _, count in work)][:-1]
        self.done = False
        self.plans: dict[str, object] = {}  # index tensors that all layers share, made by spectral.attention
        self.kept: dict[int, list[tuple[int, tuple[torch.Tensor, ...]]]] = {}
        """New tokens of decode rows by group and place in it, [B, H, d + dv] or their parts along the last axis:
        written when the step is committed."""
        self.spots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Where they go: slot [B] and place [B] by group."""
        self._others: dict[torch.device, StepBatch] = {}

    def on(self, device: torch.device) -> StepBatch:
        """This batch for layers on a device: the same work, with index tensors of its own there."""
        if device == self.store.device or device not in self.store.devices:
            return self
        if device not in self._others:
            other = self._others[device] = copy(self)
            other.store, other.plans = cast("PageStore", _Elsewhere(self.store, device)), {}
        return self._others[device]

    def new_tokens(self) -> Iterator[tuple[WindowGroup, int, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """What was kept, as groups of windows are written: a group, its first window, slot and place [B] there, and the
        tokens [n, B, H, d + dv] of n windows."""
        for number, kept in self.kept.items():
            group, spot = self.store.groups[number], self.spots[number]
            whole = [at for at, _ in kept] == list(range(len(group.windows)))
            for part in [kept] if whole else [[one] for one in kept]:  # a forward that skipped layers
                yield group, part[0][0], spot, _together(part)

    def commit(self) -> None:
        """The forward succeeded: lengths advance."""
        self._finish()
        for group, first, spot, tokens in self.new_tokens():
            group.write(first, *spot, tokens)
        for (row, count), pages in zip(self.work, self.new_pages, strict=True):
            row.length += count
            row.pages.extend(pages)

    def abort(self) -> None:
        """The forward failed: pages go back and lengths stay, but rings may be half-written: close the step's rows."""
        self._finish()
        for pages in self.new_pages:
            self.store._release(pages)

    def _finish(self) -> None:
        if self.done:
            raise CacheError("this step was committed or aborted already")
        self.done = True
        self.store._begun.discard(self)


def _together(kept: list[tuple[int, tuple[torch.Tensor, ...]]]) -> torch.Tensor:
    """What was kept of n layers: [n, B, H, d + dv]."""
    tokens = [parts for _, parts in kept]
    if len({len(parts) for parts in tokens}) > 1:
        tokens = [(torch.cat(parts, -1),) for parts in tokens]
    found = [torch.stack(part) for part in zip(*tokens, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)

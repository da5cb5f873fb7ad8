"""What runs beside other launches of a captured step, on streams of its own.

Outside of a capture everything runs in its order: two streams cost the host more than they save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import cycle

import torch


@cache
def _side_stream(device: torch.device, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """In a graph that is being captured, what is run here runs beside what the caller launches: after what was launched
    before `begin` (without which it is `run` that begins), and before what is launched after `meet`. No capture can
    end, not even one that has failed, before its streams have met: leaving the context meets. `lane`: which of a
    device's streams beside its own; those of different ones run beside one another."""

    def __init__(self, device: torch.device, lane: int = 0) -> None:
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._main = torch.cuda.current_stream(device) if captured else None
        self._side = _side_stream(device, lane) if captured else None
        self._apart = False

    def begin(self) -> None:
        if self._side is not None and not self._apart:
            self._side.wait_stream(self._main)
            self._apart = True

    def run(self, launch: Callable[[], None]) -> None:
        self.begin()
        with torch.cuda.stream(self._side):
            launch()

    def meet(self) -> None:
        if self._apart and self._main is not None:
            self._main.wait_stream(self._side)
            self._apart = False

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *failure: object) -> None:
        self.meet()


@contextmanager
def abreast(device: torch.device, lanes: int) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Within: what is run by the function that this gives runs in `lanes` lanes that take turns, one beside another;
    all have ended at the end."""
    with ExitStack() as stack:
        sides = cycle([stack.enter_context(Beside(device, lane)) for lane in range(lanes)])
        yield lambda launch: next(sides).run(launch)

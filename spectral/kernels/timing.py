"""How long a function's launches take on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def microseconds(
    call: Callable[[], Any],
    seconds: float = 0.3,
    *,
    before: Callable[[], Any] | None = None,
    fall_back: bool = True,
) -> float:
    """Median time of a call on the current GPU, as graph replays.

    Args:
        before: launched ahead of every replay and not timed, to push what the call reads out of the caches.
        fall_back: where it cannot be captured, time plain calls, which may take as long as the host does; else raise
            what the capture raises.
    """
    call()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = call
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        if not fall_back:
            raise
    found: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(found) < 5:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before is not None:
            before()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(found)

"""Functions that only launch work on a device, as CUDA graphs from the second time on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from spectral.few_rows import early_launches

log = logging.getLogger("spectral.engine")

MAX_GRAPHS = 48

Key = tuple[Any, ...]
"""Its first part: the generation of the store that it depends on, or 0. The others say what is launched."""


class Replayer:
    """Runs functions that only launch work on fixed tensors; from the second time on as a captured graph.

    The first time compiles and loads what the function launches, which a capture may not do. What has run so over
    tensors that are somewhere else now (a pool has grown) is captured at once.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        self._device, self._capture = device, capture
        self.graphs: dict[Key, Any] = {}
        self._warm: set[Key] = set()
        self._known: set[Key] = set()  # what was launched, by `alike`
        self.refused: dict[str, str] = {}
        """What cannot be captured, and why."""
        self._pool: Any = None
        self.captures = self.replays = 0

    def run(self, what: str, key: Key, launch: Callable[[], None], alike: Key | None = None) -> None:
        """Do what `launch` does. `what`: for the log, and for what is given up when it cannot be captured; `alike`: by
        this it is known whether the same kernels were launched before (None: by the key without its generation)."""
        alike = key[1:] if alike is None else alike
        if not self._capture or what in self.refused:
            launch()
            return
        graph = self.graphs.get((what, key))
        if graph is None:
            launched = (what, key) in self._warm
            self._warm.add((what, key))
            if not launched and (what, alike) not in self._known:
                self._known.add((what, alike))
                launch()
                return
            graph = self._try(what, key, launch, launched)
            if graph is None:
                launch()
                return
        graph.replay()
        self.replays += 1

    def ready(self, what: str, key: Key) -> bool:
        """Whether `run` makes nothing first: where it captures, it has captured this."""
        return (what, key) in self.graphs or not self._capture

    def _try(self, what: str, key: Key, launch: Callable[[], None], launched: bool) -> Any:
        while len(self.graphs) >= MAX_GRAPHS:  # at least one stays, and with it the pool
            del self.graphs[next(iter(self.graphs))]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, pool, stream = torch.cuda.CUDAGraph(), self._pool, torch.cuda.current_stream(self._device)
        try:
            # Other threads (of a profile that is being read, of a sleeping model's host memory) may use the device.
            capturing = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
            with torch.cuda.device(self._device), capturing:
                launch()
        except Exception as error:  # whatever a model's code does that a graph may not
            if self._leave(pool, stream):
                self.clear()
                error = error.__context__ if isinstance(error.__context__, Exception) else error  # what came first
            if isinstance(error, torch.OutOfMemoryError):
                self.clear()
                log.warning("no memory to capture the %s; it is launched one by one this time", what)
                return None
            torch.cuda.synchronize(self._device)
            if not self.graphs:
                self._pool = None
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            if not launched:  # perhaps something was to be compiled after all
                log.info("the %s is launched once before it is captured again: %s", what, reason)
                return None
            if early_launches.stop(f"the {what} cannot be captured: {reason}"):
                return None  # it is launched once more, and captured without them
            self.refused[what] = reason
            log.warning("the %s cannot be captured and is launched one by one: %s", what, reason)
            return None
        self.graphs[what, key] = graph
        self.captures += 1
        return graph

    def _leave(self, pool: Any, stream: torch.cuda.Stream) -> bool:
        """After a capture that failed: put right what torch leaves where the end of one fails too; whether it was so.
        Allocations would be recorded for that pool for ever, no capture could use it and no unused memory would be
        given back; and this thread would stay on the capture's stream."""
        torch.cuda.set_stream(stream)
        device = torch.cuda.current_device() if self._device.index is None else self._device.index
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            return False  # torch has ended it
        torch._C._cuda_releasePool(device, pool)
        return True

    def drop(self, gone: Callable[[Key], bool]) -> None:
        """Forget graphs by their key."""
        for what, key in [found for found in self._warm if gone(found[1])]:
            self._warm.discard((what, key))
            self.graphs.pop((what, key), None)
        if not self.graphs:
            self._pool = None  # a pool ends with its last graph, and a capture into one that has ended fails

    def clear(self) -> None:
        """Forget all of them."""
        for kept in (self.graphs, self._warm, self._known):
            kept.clear()  # type: ignore[attr-defined]
        self._pool = None

"""Decode steps as CUDA graphs: captured once for a bucket of rows and page-table widths, replayed from then on.

SPECTRAL_DECODE=auto|eager|static|graph says how steps in which every row gets one token run. eager: the model's forward
as for any other step. static: over buffers that stay where they are, launched one by one. graph: the same, captured.
auto is graph on a GPU and eager elsewhere.

A step that cannot be captured is launched one by one, and the log says once why. Graphs point to the store's tensors
and the weights: when those move (pools grow, a squeeze, sleep), they are dropped and captured anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from spectral.aside import fetch
from spectral.engine.device_sampler import Memory, choose, kind_of, numbers_of
from spectral.engine.sampler import sample
from spectral.engine.static_step import Numbers, SealStep, StaticStep, bucket, most_pages, seals_of, table_width
from spectral.errors import SettingError

if TYPE_CHECKING:
    from spectral.engine.scheduler import Part
    from spectral.engine.sequence import Sequence
    from spectral.engine.types import Logprob
    from spectral.hf import LoadedModel
    from spectral.pages import PageStore

log = logging.getLogger("spectral.engine")

VARIABLE = "SPECTRAL_DECODE"
MAX_GRAPHS = 48
RESERVED_PAGES = 32
"""Pages for each row that a store is given before a step is captured: pools that grow soon would undo the capture."""

BLANK: tuple[list[int], list[float]] = [0, 0], [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
"""What the device's sampler is told of rows that it does not choose for."""

Key = tuple[Any, ...]
"""Its first part: the generation of the store that it depends on, or 0."""

Chosen = tuple["list[Sequence]", list[int], "list[Logprob | None]"]


def decode_choice(device: torch.device, name: str | None = None, *, split: bool = False) -> str:
    """ "eager", "static" or "graph"; always eager for a model that is `split` over devices. Raises SettingError for
    what the environment cannot mean."""
    choice = name or os.environ.get(VARIABLE, "") or "auto"
    if choice not in ("auto", "eager", "static", "graph"):
        raise SettingError(f"{VARIABLE} must be eager, static or graph (or unset), got {choice!r}")
    if choice == "graph" and device.type != "cuda":
        raise SettingError(f"{VARIABLE}=graph needs an NVIDIA GPU, and this model is on {device}; use static or eager")
    if split:
        log.info("decode steps of a model on several devices are not captured")
        return "eager"
    if choice == "auto":
        return "graph" if device.type == "cuda" else "eager"
    return choice


class Replayer:
    """Runs functions that only launch work on fixed tensors; from the third time on as a captured graph.

    The first time compiles and loads what the function launches, which a capture may not do.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        self._device, self._capture = device, capture
        self.graphs: dict[Key, Any] = {}
        self._warm: set[Key] = set()
        self.refused: dict[str, str] = {}
        """What cannot be captured, and why."""
        self._pool: Any = None
        self.captures = self.replays = 0

    def run(self, what: str, key: Key, launch: Callable[[], None]) -> None:
        """Do what `launch` does. `what`: for the log, and for what is given up when it cannot be captured."""
        if not self._capture or what in self.refused:
            launch()
            return
        graph = self.graphs.get((what, key))
        if graph is None:
            if (what, key) not in self._warm:
                self._warm.add((what, key))
                launch()
                return
            graph = self._try(what, key, launch)
            if graph is None:
                launch()
                return
        graph.replay()
        self.replays += 1

    def _try(self, what: str, key: Key, launch: Callable[[], None]) -> Any:
        while len(self.graphs) >= MAX_GRAPHS:  # at least one stays, and with it the pool
            del self.graphs[next(iter(self.graphs))]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (of a profile that is being read, of a sleeping model's host memory) may use the device.
            capturing = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
            with torch.cuda.device(self._device), capturing:
                launch()
        except torch.OutOfMemoryError:
            self.clear()
            log.warning("no memory to capture the %s; it is launched one by one this time", what)
            return None
        except Exception as error:  # whatever a model's code does that a graph may not
            self.refused[what] = f"{type(error).__name__}: {error}".split("\n")[0]
            torch.cuda.synchronize(self._device)
            log.warning("the %s cannot be captured and is launched one by one: %s", what, self.refused[what])
            return None
        self.graphs[what, key] = graph
        self.captures += 1
        return graph

    def drop(self, gone: Callable[[Key], bool]) -> None:
        """Forget graphs by their key."""
        for what, key in [found for found in self._warm if gone(found[1])]:
            self._warm.discard((what, key))
            self.graphs.pop((what, key), None)
        if not self.graphs:
            self._pool = None  # a pool ends with its last graph, and a capture into one that has ended fails

    def clear(self) -> None:
        """Forget all of them."""
        self.graphs.clear()
        self._warm.clear()
        self._pool = None


class DecodeGraphs:
    """Decode steps of one model over its stores.

    Args:
        stores: those in use now; steps of others are forgotten.
        mode: "static" or "graph".
    """

    def __init__(self, loaded: LoadedModel, stores: Callable[[], list[PageStore]], mode: str) -> None:
        self._loaded, self._stores = loaded, stores
        self.replayer = Replayer(loaded.device, mode == "graph")
        self._steps: dict[tuple[int, int, int], StaticStep] = {}
        self._seals: dict[tuple[int, int], SealStep] = {}
        self._numbers: dict[int, Numbers] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._memory: dict[int, Memory] = {}
        self._known = 0
        self.steps = 0

    def fits(self, part: Part) -> bool:
        """Whether a part is a decode step that can run here."""
        sinks = part.work[0][0].lane.store.codebook.sinks
        return all(
            count == 1
            and sequence.row.length >= sinks
            and sequence.pending == 1
            and sequence.scores is None
            and sequence.sound is None
            for sequence, count in part.work
        )

    def run(self, part: Part) -> Chosen:
        """One step of a part that `fits`: its sequences, their tokens, and log probabilities where wanted."""
        count = len(self._stores())
        if count < self._known:  # what steps of a store that has ended hold is to go: its setting's tables
            self.prune()
        self._known = count
        sequences = [sequence for sequence, _ in part.work]
        states = [sequence.sampler for sequence in sequences]
        store, fresh = sequences[0].lane.store, part.batch.new_pages
        kind = kind_of(states)
        longest = max(len(s.row.pages) + len(pages) for s, pages in zip(sequences, fresh, strict=True))
        step = self._step(store, len(sequences), longest)
        seals = seals_of(store, sequences, fresh)
        step.fill(sequences, fresh, [BLANK if kind is None else numbers_of(state) for state in states])
        if seals and step.seals_first:
            self._seal(store, seals)
        self.replayer.run("decode step", (store.generation, step.rows, step.width), step.forward)
        if seals and not step.seals_first:
            self._seal(store, seals)
        self.steps += 1
        assert step.numbers.logits is not None
        logits = step.numbers.logits[: len(sequences)]
        if kind is None:
            return (sequences, *sample(logits, states))
        memory = self._memory_of(step.numbers, kind.penalised)
        if memory is not None:
            memory.follow(states)
        out = self._chosen[step.rows]
        self.replayer.run("sampling", (0, step.rows, kind), lambda: choose(step.numbers, kind, memory, out))
        tokens, right = fetch(out).tolist()  # the step's one wait
        if not all(right[: len(states)]):
            if memory is not None:
                memory.forget()
            return (sequences, *sample(logits, states))
        del tokens[len(states) :]
        for state, token in zip(states, tokens, strict=True):
            state.record(token)
        return sequences, tokens, [None] * len(states)

    def _step(self, store: PageStore, rows: int, pages: int) -> StaticStep:
        rows, width = bucket(rows), table_width(pages)
        found = self._steps.get((store.generation, rows, width))
        if found is None:
            self.prune()
            with torch.inference_mode(False):  # others write to its tensors too
                store.reserve(RESERVED_PAGES * rows)
            if rows not in self._numbers:
                self._numbers[rows] = Numbers(rows, self._loaded.device)
                self._chosen[rows] = torch.zeros((2, rows), dtype=torch.int64, device=self._loaded.device)
            found = StaticStep(self._loaded, store, rows, width, self._numbers[rows])
            self._steps[store.generation, rows, width] = found
        return found

    def _seal(self, store: PageStore, seals: list[tuple[int, int, int, int]]) -> None:
        key = store.generation, bucket(len(seals))
        found = self._seals.get(key)
        if found is None:
            bound = most_pages(self._loaded.context_length, store.codebook.page_tokens)
            found = self._seals[key] = SealStep(store, key[1], bound)
        found.fill(seals)
        self.replayer.run("sealing of pages", key, found.run)

    def _memory_of(self, numbers: Numbers, wanted: bool) -> Memory | None:
        if not wanted:
            return None
        assert numbers.logits is not None
        rows, size = numbers.logits.shape
        if rows not in self._memory:
            self._memory[rows] = Memory(rows, size, self._loaded.device)
        return self._memory[rows]

    def prune(self) -> None:
        """Forget steps over tensors that are gone."""
        live = {store.generation for store in self._stores()}
        self._steps = {key: step for key, step in self._steps.items() if key[0] in live}
        self._seals = {key: seal for key, seal in self._seals.items() if key[0] in live}
        self.replayer.drop(lambda key: key[0] not in {0, *live})

    def clear(self) -> None:
        """Forget everything: the weights are somewhere else, or the memory is wanted."""
        for kept in (self._steps, self._seals, self._numbers, self._chosen, self._memory):
            kept.clear()
        self.replayer.clear()

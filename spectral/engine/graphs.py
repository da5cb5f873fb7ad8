"""Decode steps as CUDA graphs: captured once for a bucket of rows and page-table widths, replayed from then on.

SPECTRAL_DECODE=auto|eager|static|graph says how steps in which every row gets one token run, and short chunks of
prompts (spectral.engine.chunk_step). eager: the model's forward as for any other step. static: over buffers that stay
where they are, launched one by one. graph: the same, captured. auto is graph on a GPU and eager elsewhere.

A step that cannot be captured is launched one by one, and the log says once why. Graphs point to the store's tensors
and the weights: when those move (pools grow, a squeeze, sleep), they are dropped and captured anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from spectral.aside import fetch, wait
from spectral.engine.chunk_step import Bounds, ChunkStep, FirstStep, chunk_rows
from spectral.engine.device_sampler import Memory, choose, kind_of, numbers_of
from spectral.engine.sampler import remember_soundness, sample, spoil
from spectral.engine.static_step import BLANK, Numbers, SealStep, StaticStep, bucket, most_pages, seals_of
from spectral.errors import SettingError
from spectral.few_rows import early_launches

if TYPE_CHECKING:
    from spectral.engine.device_sampler import Kind
    from spectral.engine.sampler import SamplerState
    from spectral.engine.scheduler import Part, Work
    from spectral.engine.sequence import Sequence
    from spectral.engine.types import Logprob
    from spectral.hf import LoadedModel
    from spectral.pages import PageStore

log = logging.getLogger("spectral.engine")

VARIABLE = "SPECTRAL_DECODE"
MAX_GRAPHS = 48
RESERVED_PAGES = 32
"""Pages for each row that a store is given before a step is captured: pools that grow soon would undo the capture."""

DECODE, CHUNK, FIRST, ORDINARY = "decode", "chunk", "first", ""
"""How a sequence's tokens run in a step."""

Key = tuple[Any, ...]
"""Its first part: the generation of the store that it depends on, or 0. The others say what is launched."""

Step = TypeVar("Step", bound=StaticStep)

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
    """Runs functions that only launch work on fixed tensors; from the second time on as a captured graph.

    The first time compiles and loads what the function launches, which a capture may not do. What has run so over
    tensors that are somewhere else now (a pool has grown) is captured at once.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        self._device, self._capture = device, capture
        self.graphs: dict[Key, Any] = {}
        self._warm: set[Key] = set()
        self._known: set[Key] = set()  # the same without generations
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
            launched = (what, key) in self._warm
            self._warm.add((what, key))
            if not launched and (what, key[1:]) not in self._known:
                self._known.add((what, key[1:]))
                launch()
                return
            graph = self._try(what, key, launch, launched)
            if graph is None:
                launch()
                return
        graph.replay()
        self.replays += 1

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


def _key(store: PageStore, *sizes: int) -> Key:
    """Other settings launch other kernels."""
    return store.generation, store.codebook.profile_hash, store.codebook.setting, *sizes


def decode_graphs(
    loaded: LoadedModel, stores: Callable[[], list[PageStore]], name: str | None
) -> DecodeGraphs | None:
    """What runs decode steps in the way that is chosen (see `decode_choice`), None where that is eager."""
    mode = decode_choice(loaded.device, name, split=loaded.split)
    return None if mode == "eager" else DecodeGraphs(loaded, stores, mode)


class DecodeGraphs:
    """Decode steps and short chunks of one model over its stores.

    Args:
        stores: those in use now; steps of others are forgotten.
        mode: "static" or "graph".
    """

    def __init__(self, loaded: LoadedModel, stores: Callable[[], list[PageStore]], mode: str) -> None:
        self._loaded, self._stores = loaded, stores
        self.replayer = Replayer(loaded.device, mode == "graph")
        self._steps: dict[Key, StaticStep] = {}
        self._seals: dict[Key, SealStep] = {}
        self._bounds: dict[int, Bounds] = {}
        self._numbers: dict[int, Numbers] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._memory: dict[int, Memory] = {}
        self._known = 0
        self.steps = self.chunk_steps = 0

    def way(self, sequence: Sequence, count: int) -> str:
        """How a sequence's next `count` tokens run: DECODE, CHUNK, FIRST (a prompt's beginning), or ORDINARY, in a
        forward like any other. It depends on the sequence and the model alone: whatever else runs, its numbers are the
        same."""
        store = sequence.lane.store
        if sequence.scores is not None:
            return ORDINARY
        if sequence.row.length < store.codebook.sinks:
            return FIRST if self._bounds_of(store).begin(sequence, count) else ORDINARY
        if count == 1 and sequence.pending == 1:
            return DECODE
        return CHUNK if self._bounds_of(store).hold([(sequence, count)]) else ORDINARY

    def divide(self, work: Work) -> list[Work]:
        """The forwards that work on one store becomes: one for all that decode, some for short chunks, one for more."""
        by_way: dict[str, Work] = {DECODE: [], CHUNK: [], FIRST: [], ORDINARY: []}
        for sequence, count in work:
            by_way[self.way(sequence, count)].append((sequence, count))
        packs: list[Work] = []
        for way in (CHUNK, FIRST):
            packs.append([])
            for item in by_way[way]:
                if self._bounds_of(item[0].lane.store).hold([*packs[-1], item]):
                    packs[-1].append(item)
                else:
                    packs.append([item])
        return [part for part in (by_way[DECODE], *packs, by_way[ORDINARY]) if part]

    def _bounds_of(self, store: PageStore) -> Bounds:
        if store.generation not in self._bounds:
            self._bounds[store.generation] = Bounds(self._loaded, store)
        return self._bounds[store.generation]

    def fits(self, part: Part) -> bool:
        """Whether a part is a decode step, or one of short chunks, that can run here."""
        ways = {self.way(sequence, count) for sequence, count in part.work}
        if ways in ({CHUNK}, {FIRST}):
            return self._bounds_of(part.batch.store).hold(part.work)
        return ways == {DECODE}

    def run(self, part: Part) -> Chosen:
        """One step of a part that `fits`: the sequences that get a token, the tokens, and log probabilities where
        wanted."""
        count = len(self._stores())
        if count < self._known:  # what steps of a store that has ended hold is to go: its setting's tables
            self.prune()
        self._known = count
        way = self.way(*part.work[0])
        if way in (CHUNK, FIRST):
            return self._run_chunks(part, FirstStep if way == FIRST else ChunkStep)
        sequences = [sequence for sequence, _ in part.work]
        states = [sequence.sampler for sequence in sequences]
        store, fresh = sequences[0].lane.store, part.batch.new_pages
        kind = kind_of(states)
        longest = max(len(s.row.pages) + len(pages) for s, pages in zip(sequences, fresh, strict=True))
        rows = bucket(len(sequences))
        step = self._step(StaticStep, store, rows, rows, longest, rows)
        seals = seals_of(store, sequences, fresh)
        step.fill(sequences, fresh, [BLANK if kind is None else numbers_of(state) for state in states])
        if seals and step.seals_first:
            self._seal(store, seals)
        self.replayer.run("decode step", _key(store, step.rows, step.width), step.forward)
        if seals and not step.seals_first:
            self._seal(store, seals)
        self.steps += 1
        return self._choose(step.numbers, sequences, kind)

    def _run_chunks(self, part: Part, how: type[ChunkStep]) -> Chosen:
        granted = zip(part.work, part.batch.new_pages, strict=True)
        # Those whose prompt ends come first: the sampler's rows are the first ones.
        ordered = sorted(granted, key=lambda item: item[0][1] < item[0][0].pending)
        work, fresh = [item for item, _ in ordered], [pages for _, pages in ordered]
        ending = [sequence for sequence, count in work if count == sequence.pending]
        states = [sequence.sampler for sequence in ending]
        store, kind = part.batch.store, kind_of(states)
        rows, answers = chunk_rows(work)
        # Decoding follows, which reserves pages too: one more, so that the store does not grow for that.
        step = self._step(how, store, rows, answers, max(len(s.row.pages) for s, _ in work), len(work) + 1)
        seals = seals_of(store, [sequence for sequence, _ in work], fresh)
        step.fill_chunks(work, [BLANK if kind is None else numbers_of(state) for state in states])
        if seals:
            self._seal(store, seals)
        what = "step of short prompts" if how is FirstStep else "chunk step"
        self.replayer.run(what, _key(store, rows, step.width, answers), step.forward)
        self.chunk_steps += 1
        assert step.numbers.logits is not None
        if len(ending) < len(work):
            passed = [sequence for sequence, _ in work[len(ending) :]]
            remember_soundness(passed, step.numbers.logits[len(ending) : len(work)])
        if ending:
            return self._choose(step.numbers, ending, kind)
        wait(store.device)  # the next step may use the same buffers on the host
        return [], [], []

    def _choose(self, numbers: Numbers, sequences: list[Sequence], kind: Kind | None) -> Chosen:
        """Tokens of the first rows' logits; BROKEN for sequences of which an earlier chunk was not finite."""
        assert numbers.logits is not None
        states, logits = [sequence.sampler for sequence in sequences], numbers.logits[: len(sequences)]
        spoil(sequences, logits)
        chosen = self._sampled(numbers, logits, states, kind)
        for sequence in sequences:
            sequence.sound = None
        return (sequences, *chosen)

    def _sampled(
        self, numbers: Numbers, logits: torch.Tensor, states: list[SamplerState], kind: Kind | None
    ) -> tuple[list[int], list[Logprob | None]]:
        if kind is None:
            return sample(logits, states)
        memory, rows = self._memory_of(numbers, kind.penalised), numbers.rows
        if memory is not None:
            memory.follow(states)
        out = self._chosen[rows]
        self.replayer.run("sampling", (0, rows, kind), lambda: choose(numbers, kind, memory, out))
        tokens, right = fetch(out).tolist()  # the step's one wait
        if not all(right[: len(states)]):
            if memory is not None:
                memory.forget()
            return sample(logits, states)
        del tokens[len(states) :]
        for state, token in zip(states, tokens, strict=True):
            state.record(token)
        return tokens, [None] * len(states)

    def _step(
        self, kind: type[Step], store: PageStore, rows: int, answers: int, pages: int, sequences: int
    ) -> Step:
        """The step of so many rows, `answers` of them with logits, each with up to `pages` pages."""
        width = self._bounds_of(store).width(rows, pages)
        found = self._steps.get((store.generation, kind, rows, width, answers))
        if found is None:
            self.prune()
            with torch.inference_mode(False):  # others write to its tensors too
                store.reserve(RESERVED_PAGES * sequences)
            if answers not in self._numbers:
                self._numbers[answers] = Numbers(answers, self._loaded.device)
                self._chosen[answers] = torch.zeros((2, answers), dtype=torch.int64, device=self._loaded.device)
            found = kind(self._loaded, store, rows, width, self._numbers[answers])
            self._steps[store.generation, kind, rows, width, answers] = found
        assert isinstance(found, kind)
        return found

    def _seal(self, store: PageStore, seals: list[tuple[int, int, int, int]]) -> None:
        pages = bucket(len(seals))
        key = _key(store, pages)
        found = self._seals.get(key)
        if found is None:
            bound = most_pages(self._loaded.context_length, store.codebook.page_tokens)
            found = self._seals[key] = SealStep(store, pages, bound)
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
        self._bounds = {key: found for key, found in self._bounds.items() if key in live}
        self.replayer.drop(lambda key: key[0] not in {0, *live})

    def clear(self) -> None:
        """Forget everything: the weights are somewhere else, or the memory is wanted."""
        for kept in (self._steps, self._seals, self._bounds, self._numbers, self._chosen, self._memory):
            kept.clear()  # type: ignore[attr-defined]
        self.replayer.clear()

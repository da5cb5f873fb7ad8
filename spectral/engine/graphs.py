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
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from spectral.aside import Fetched, wait
from spectral.engine.ahead import Ahead, expect
from spectral.engine.chunk_step import Bounds, ChunkStep, FirstStep, chunk_rows
from spectral.engine.device_sampler import Kind, Memory, choose, kind_of, numbers_of
from spectral.engine.replay import Key, Replayer
from spectral.engine.sampler import remember_soundness, sample, spoil
from spectral.engine.static_step import BLANK, Numbers, Seal, SealStep, StaticStep, bucket, most_pages, seals_of
from spectral.errors import SettingError

if TYPE_CHECKING:
    from spectral.engine.sampler import SamplerState
    from spectral.engine.scheduler import Part, Work
    from spectral.engine.sequence import Sequence
    from spectral.engine.types import Logprob
    from spectral.hf import LoadedModel
    from spectral.pages import PageStore

log = logging.getLogger("spectral.engine")

VARIABLE = "SPECTRAL_DECODE"
CALM_STEPS = 16
"""Steps that do not run ahead after one whose shortlist was too short: the next one's is likely to be, and what ran
ahead is void then."""
RESERVED_PAGES = 32
"""Pages for each row that a store is given before a step is captured: pools that grow soon would undo the capture."""

DECODE, CHUNK, FIRST, ORDINARY = "decode", "chunk", "first", ""
"""How a sequence's tokens run in a step."""

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


def _key(store: PageStore, *sizes: int) -> Key:
    """Other settings launch other kernels."""
    return store.generation, store.codebook.profile_hash, store.codebook.setting, *sizes


def decode_graphs(loaded: LoadedModel, stores: Callable[[], list[PageStore]], name: str | None) -> DecodeGraphs | None:
    """What runs decode steps in the way that is chosen (see `decode_choice`), None where that is eager."""
    mode = decode_choice(loaded.device, name, split=loaded.split)
    return None if mode == "eager" else DecodeGraphs(loaded, stores, mode)


class DecodeGraphs:
    """Decode steps and short chunks of one model over its stores.

    Args:
        stores: those in use now; steps of others are forgotten.
        mode: "static" or "graph".

    Attributes:
        runs_ahead: whether steps are launched before the tokens of the one before are read (spectral.engine.ahead);
            where launching is what takes the time, as without graphs, that would only delay those tokens.
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
        self.runs_ahead = mode == "graph"
        self._ahead: Ahead | None = None
        self.wrote_ahead = False
        """Whether the last step launched what runs ahead of it: then windows may hold tokens beyond their rows'."""
        self._calm = 0
        self.steps = self.chunk_steps = self.steps_ahead = 0

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
        self.wrote_ahead = False
        count = len(self._stores())
        if count < self._known:  # what steps of a store that has ended hold is to go: its setting's tables
            self.prune()
        self._known = count
        way = self.way(*part.work[0])
        if way in (CHUNK, FIRST):
            return self._run_chunks(part, FirstStep if way == FIRST else ChunkStep)
        sequences, fresh = [sequence for sequence, _ in part.work], part.batch.new_pages
        kind, ahead = kind_of([sequence.sampler for sequence in sequences]), self._ahead
        places = None if ahead is None else ahead.places(part.batch.store, sequences, fresh)
        if ahead is None or places is None:
            self.settle()
            step, places = self._launch(part.batch.store, sequences, fresh, kind), list(range(len(sequences)))
            whole = True
        else:
            step, self._ahead = ahead.step, None
            whole = places == list(range(len(ahead.rows)))
            self.steps_ahead += 1
            if kind is not None and kind != Kind():
                known = {at: numbers_of(sequence.sampler) for at, sequence in zip(places, sequences, strict=True)}
                step.numbers.send_choices([known.get(at, BLANK) for at in range(step.rows)])
        self.steps += 1
        follow = self.runs_ahead and part.followed and whole and kind is not None and not self._calm
        then = partial(self._go_ahead, step, sequences, fresh) if follow else None
        self._calm = max(0, self._calm - 1)
        return self._choose(step.numbers, places, sequences, kind, then)

    def _launch(
        self, store: PageStore, sequences: list[Sequence], fresh: list[list[int]], kind: Kind | None
    ) -> StaticStep:
        """Run a decode step up to its logits."""
        longest = max(len(s.row.pages) + len(pages) for s, pages in zip(sequences, fresh, strict=True))
        rows = bucket(len(sequences))
        step = self._step(StaticStep, store, rows, rows, longest, rows)
        seals = seals_of(store, [s.row for s in sequences], fresh)
        step.fill(sequences, fresh, [BLANK if kind is None else numbers_of(s.sampler) for s in sequences])
        if seals and step.seals_first:
            self._seal(store, seals)
        key = _key(store, step.rows, step.width)
        alike = (*key[1:-1], bool(step.width))  # of any width, once there are pages
        self.replayer.run("decode step", key, step.forward, alike)
        if seals and not step.seals_first:
            self._seal(store, seals)
        assert step.numbers.logits is not None
        spoil(sequences, step.numbers.logits)
        return step

    def _go_ahead(self, step: StaticStep, sequences: list[Sequence], fresh: list[list[int]]) -> None:
        """Launch the step behind one, if that is known and nothing is to be made for it."""
        store, key = step.store, _key(step.store, step.rows, step.width)
        rows = expect(step, sequences, fresh) if self.replayer.ready("decode step", key) else None
        if rows is None:
            return
        longest = max(expected.pages + len(expected.granted) for expected in rows)
        if self._bounds_of(store).width(step.rows, longest) != step.width:
            return
        seals = seals_of(store, [e.row for e in rows], [e.granted for e in rows], [e.pages for e in rows])
        if seals:
            sealed = self._seal(store, seals, only_ready=True)
            if sealed is None:
                return
            step.extend(sealed.numbers)
        self.replayer.run("decode step", key, step.forward)
        self._ahead = Ahead(step, store.generation, rows)

    def settle(self) -> None:
        """Forget a step that runs ahead, once it has ended: what it reads may go."""
        if self._ahead is not None:
            self._ahead = None
            wait(self._loaded.device)

    def _run_chunks(self, part: Part, how: type[ChunkStep]) -> Chosen:
        self.settle()  # its logits may lie where these will
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
        seals = seals_of(store, [sequence.row for sequence, _ in work], fresh)
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
            spoil(ending, step.numbers.logits)
            return self._choose(step.numbers, list(range(len(ending))), ending, kind)
        wait(store.device)  # the next step may use the same buffers on the host
        return [], [], []

    def _choose(
        self,
        numbers: Numbers,
        places: list[int],
        sequences: list[Sequence],
        kind: Kind | None,
        then: Callable[[], None] | None = None,
    ) -> Chosen:
        """Tokens of sequences from the logits in their places; BROKEN for those whose logits are not finite. `then`:
        what to launch before they are waited for, where the device chooses them; it may write over the logits."""
        assert numbers.logits is not None
        states = [sequence.sampler for sequence in sequences]
        if kind is None:
            chosen = sample(numbers.logits[: len(states)], states)
        else:
            chosen = self._sampled(numbers, places, states, kind, then)
        for sequence in sequences:
            sequence.sound = None
        return (sequences, *chosen)

    def _sampled(
        self,
        numbers: Numbers,
        places: list[int],
        states: list[SamplerState],
        kind: Kind,
        then: Callable[[], None] | None,
    ) -> tuple[list[int], list[Logprob | None]]:
        memory, rows, logits = self._memory_of(numbers, kind.penalised), numbers.rows, numbers.logits
        assert logits is not None
        if memory is not None:
            memory.follow(dict(zip(places, states, strict=True)))
        out = self._chosen[rows]
        self.replayer.run("sampling", (0, rows, kind), lambda: choose(numbers, kind, memory, out))
        fetched = Fetched(out)
        if then is not None:
            logits = self._before(then, logits, keep=kind.filtered)
        tokens, right = fetched.get().tolist()  # the step's one wait
        if not all(right[at] for at in places):
            self.settle()  # it went on from other tokens
            self._calm = CALM_STEPS
            if memory is not None:
                memory.forget()
            return sample(logits[places], states)
        tokens = [tokens[at] for at in places]
        for state, token in zip(states, tokens, strict=True):
            state.record(token)
        return tokens, [None] * len(states)

    def _before(self, then: Callable[[], None], logits: torch.Tensor, *, keep: bool) -> torch.Tensor:
        """Launch what runs ahead, which writes over the logits; those that were, in other memory if they are to `keep`:
        where tokens may have to be chosen once more."""
        try:
            logits = logits.clone() if keep else logits
            self.wrote_ahead = True
            then()
        except torch.OutOfMemoryError:  # this step has its tokens nevertheless
            wait(self._loaded.device)
            self._ahead, self._calm = None, CALM_STEPS
            log.warning("no memory to run a step ahead; the next %d do not", CALM_STEPS)
        return logits

    def _step(self, kind: type[Step], store: PageStore, rows: int, answers: int, pages: int, sequences: int) -> Step:
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

    def _seal(self, store: PageStore, seals: list[Seal], *, only_ready: bool = False) -> SealStep | None:
        """Encode pages. `only_ready`: nothing, and None, where that would be more than a replay."""
        pages = bucket(len(seals))
        key = _key(store, pages)
        if only_ready and not self.replayer.ready("sealing of pages", key):
            return None
        found = self._seals.get(key)
        if found is None:
            bound = most_pages(self._loaded.context_length, store.codebook.page_tokens)
            found = self._seals[key] = SealStep(store, pages, bound)
        found.fill(seals)
        self.replayer.run("sealing of pages", key, found.run)
        return found

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
        self.settle()
        live = {store.generation for store in self._stores()}
        self._steps = {key: step for key, step in self._steps.items() if key[0] in live}
        self._seals = {key: seal for key, seal in self._seals.items() if key[0] in live}
        self._bounds = {key: found for key, found in self._bounds.items() if key in live}
        self.replayer.drop(lambda key: key[0] not in {0, *live})

    def clear(self) -> None:
        """Forget everything: the weights are somewhere else, or the memory is wanted."""
        self.settle()
        for kept in (self._steps, self._seals, self._bounds, self._numbers, self._chosen, self._memory):
            kept.clear()  # type: ignore[attr-defined]
        self.replayer.clear()

"""A part of a step as one forward: all rows' new tokens side by side in one batch row of the model."""

from __future__ import annotations

from typing import Any

import torch

from spectral.dispatch import launching
from spectral.engine.graphs import Chosen, DecodeGraphs
from spectral.engine.sampler import remember_soundness, sample, score_prompt, spoil
from spectral.engine.scheduler import Part, Work
from spectral.engine.sequence import Sequence
from spectral.hf import LoadedModel, attending
from spectral.lean_cpu import lean_decoding
from spectral.pages import PageStore
from spectral.row_by_row import LEAST_ROWS, rounds_alike, row_by_row


class Runner:
    """Runs a step's parts on a model. `graphs`: how decode steps and short chunks run, None for as any other."""

    def __init__(self, loaded: LoadedModel, graphs: DecodeGraphs | None = None) -> None:
        self.graphs = graphs
        self._unsure = False  # a decode step, or one of short chunks, broke off: it may have written into windows
        self._model = loaded.model
        lean_decoding(loaded.model)
        self._device = loaded.device
        self._kept = loaded.kept
        self._no_mask = loaded.no_mask

    def divide(self, work: Work) -> list[Work]:
        """The forwards that the work on one store becomes. On a CPU nobody's numbers depend on what else runs: decode
        rows are one forward, computed each by itself, and chunks of prompts are another where products are rounded
        alike whatever their number of rows is; the others have their own."""
        if self.graphs is not None:
            return self.graphs.divide(work)
        if self._device.type != "cpu":
            return [work]
        singles, chunks, others = Work(), Work(), Work()
        for sequence, count in work:
            together = count >= LEAST_ROWS and rounds_alike() and sequence.scores is None
            (singles if count == 1 else chunks if together else others).append((sequence, count))
        return [part for part in (singles, chunks, *([item] for item in others)) if part]

    def step(self, part: Part) -> Chosen:
        """One forward and what it leads to: the sequences that get a token now, the tokens, and their log
        probabilities where wanted."""
        self._unsure = False
        with torch.inference_mode(), launching(self._device):
            if self.graphs is not None and self.graphs.fits(part):
                self._unsure = True
                chosen = self.graphs.run(part)
                self._unsure = False
                return chosen
            sampling, logits = self.run(part)
            return (sampling, *sample(logits, [s.sampler for s in sampling])) if sampling else ([], [], [])

    def lost(self, store: PageStore, granted: list[int]) -> bool:
        """Whether a row of a step that broke off, with one token and so granted pages, may have lost what it held: its
        oldest tokens were written over before they became a page, or a window without a place to spare, as those of
        sliding layers are, has a token of the step that ran ahead."""
        if not self._unsure:
            return False
        ahead = self.graphs is not None and self.graphs.wrote_ahead
        return bool(granted) or (ahead and any(codec is None for codec in store.codebook.layers))

    def settle(self) -> None:
        """Wait for whatever runs ahead of the engine: what it reads is to change."""
        if self.graphs is not None:
            self.graphs.settle()

    def trim(self, *, everything: bool = False) -> None:
        """Forget graphs over memory that was given back; `everything`: also those over the weights, which may move."""
        if self.graphs is not None:
            self.graphs.clear() if everything else self.graphs.prune()

    def run(self, part: Part) -> tuple[list[Sequence], torch.Tensor]:
        """One forward. Returns the sequences that get a token now, in order, and their logits [sequences, V].

        A sequence gets one when this step reaches its last token; chunks before that only fill the cache, and score the
        prompt where that is wanted. Their last tokens' logits say whether all of the chunk was finite, for NaN goes on
        to later tokens; where it was not, the sequence's logits are NaN at the end.
        """
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        sampling: list[Sequence] = []
        scored: list[tuple[Sequence, int, int]] = []  # sequence, first position, positions
        extra: list[int] = []
        passed: list[tuple[Sequence, int]] = []  # sequence, last token of its chunk
        for sequence, count in part.work:
            tokens, start = sequence.tokens, sequence.row.length
            if start + count == len(tokens):
                keep.append(len(ids) + count - 1)
                sampling.append(sequence)
            else:
                passed.append((sequence, len(ids) + count - 1))
            if sequence.scores is not None and start < sequence.prompt_length - 1:
                positions_scored = min(count, sequence.prompt_length - 1 - start)
                scored.append((sequence, start, positions_scored))
                extra.extend(range(len(ids), len(ids) + positions_scored))
            if count == 1:
                ids.append(tokens[start])
                positions.append(start)
            else:
                ids.extend(tokens[start : start + count])
                positions.extend(range(start, start + count))
        flat = torch.tensor((ids, positions), device=self._device)[:, None]  # [2, 1, N]
        # 0 is transformers' word for "all"; an index would copy the hidden states.
        all_kept = len(keep) == len(ids) and not extra
        wanted = keep + extra + [last for _, last in passed]
        kept: Any = 0 if all_kept else self._kept(wanted)
        alone = self._device.type == "cpu" and all(count == 1 for _, count in part.work)
        with attending(self._model, part.batch), row_by_row(alone, answers=not scored):
            out = self._model(
                input_ids=flat[0],
                attention_mask=self._no_mask,
                position_ids=flat[1],
                use_cache=False,
                logits_to_keep=kept,
            )
        logits = out.logits[0]
        if scored:
            at = len(keep)
            for sequence, start, count in scored:
                score_prompt(sequence, start, logits[at : at + count])
                at += count
        if passed:
            remember_soundness([sequence for sequence, _ in passed], logits[len(keep) + len(extra) :])
        logits = logits[: len(keep)]
        spoil(sampling, logits)
        for sequence in sampling:
            sequence.sound = None
        return sampling, logits

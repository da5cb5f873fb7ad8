"""SpectralProfiler: text -> statistics -> weighted bases -> allocations -> a measured ladder of settings.

`spectral.statistics` says what is gathered and why, `spectral.fit` how a profile follows from it. This module gets the
text, drives the forwards, saves what it has so that an interrupted run goes on where it stopped, and measures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectral.errors import ModelError
from spectral.fit import default_by_energy, fit, ladder, preferred
from spectral.profile import LadderRow, SpectralProfile
from spectral.profile_file import as_stored
from spectral.provenance import config_sha256
from spectral.statistics import Collector, Statistics, sample_tokens

if TYPE_CHECKING:
    from spectral.hf import LoadedModel
    from spectral.recall import RecallSequence

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction done."""

LADDER = (3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""All-in ratios of the settings at 4,096 tokens, finest first."""

RECALL_FROM = 512
"""Tokens below which a window has no room for facts to hide."""

SAVE_SECONDS = 60.0
"""Least time between two savings of an interrupted run's state."""


@dataclass
class SpectralProfiler:
    """Learns a profile from a model and text.

    Args:
        target_energy: share of the importance-weighted variance that the default setting must keep: the default is the
            coarsest setting that keeps it. None: the setting nearest to `default_ratio`.
        seed: of everything random (drawn labels, self-generated text).
        tokens: calibration tokens at most; window: tokens of one forward.
        fisher_tokens: of these, tokens with a backward pass.
        block_tokens: keys are coded relative to blocks of this many tokens (spectral.frames); 0: as RoPE made them.
        sinks: first tokens that stay exact at every setting.
        recent: latest tokens that stay exact.
        page_tokens: tokens that are packed together.
        ratios: the ladder's all-in ratios, finest first.
        prefer: "quality", "balanced" or "speed" (spectral.fit.PREFERENCES): what decodes faster loses more at the same
            bytes.
        measure_tokens: tokens of held-back text on which the ladder is measured (a quarter of `tokens` at most), in
            windows of `measure_window` or the model's context; recall is measured on `recall_windows` of them
            (left out where the exact cache recalls nothing).
        progress: called with (stage, fraction).
        checkpoint: file that keeps the state of a run, so that the same call resumes it; removed at the end.
    """

    target_energy: float | None = None
    seed: int = 0
    tokens: int = 65_536
    window: int = 1024
    fisher_tokens: int = 40_960
    block_tokens: int = 512
    sinks: int = 4
    recent: int = 112
    page_tokens: int = 16
    ratios: Sequence[float] = LADDER
    prefer: str = "quality"
    measure_tokens: int = 4_096
    recall_windows: int = 2
    measure_window: int = 2_048
    default_ratio: float = 8.0
    progress: Progress | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.target_energy is not None and not 0 < self.target_energy <= 1:
            raise ModelError(f"target_energy must be above 0 and at most 1, got {self.target_energy}")
        if self.window % self.page_tokens or self.recent % self.page_tokens:
            raise ModelError("window and recent must be multiples of page_tokens")
        preferred(self.prefer)

    # -- entry points ---------------------------------------------------------------------------------------------

    def profile_from_model(
        self,
        name: str,
        *,
        quantize: str | None = None,
        device: str = "auto",
        texts: Sequence[str] | None = None,
        tokens: int | None = None,
    ) -> SpectralProfile:
        """Load a model by folder or hub name and profile it. `quantize`: None, "4bit" (nf4) or "8bit" (int8)."""
        from spectral.hf import load_model

        kinds = {None: "none", "none": "none", "4bit": "nf4", "nf4": "nf4", "8bit": "int8", "int8": "int8"}
        if quantize not in kinds:
            raise ModelError(f"quantize must be None, '4bit' or '8bit', got {quantize!r}")
        loaded = load_model(name, quantization=kinds[quantize], device=device)
        return self.profile_from_loaded(loaded, texts=texts, tokens=tokens)

    def profile_from_loaded(
        self, loaded: LoadedModel, *, texts: Sequence[str] | None = None, tokens: int | None = None
    ) -> SpectralProfile:
        """Profile a model that is in memory already. `texts` None: text that the model itself generates (seeded)."""
        wanted = tokens or self.tokens
        measured = min(self.measure_tokens, max(self.window, wanted // 4))
        state = self._state(loaded, texts, wanted, measured)
        measure, windows = self._corpus(loaded, texts, wanted, measured, state)
        statistics = self._collect(loaded, windows, state)
        self._report("fitting bases", 0.0)
        fitted = fit(statistics, self.page_tokens, self.prefer)
        exact = {"sinks": self.sinks, "recent": self.recent, "page_tokens": self.page_tokens}
        rows, bits = ladder(fitted, loaded.shape, self.ratios, **exact)
        self._report("fitting bases", 1.0)
        profile = SpectralProfile(
            model=loaded.name.rstrip("/").rsplit("/", 1)[-1],
            fingerprint=loaded.fingerprint,
            token_nbytes=loaded.shape.token_nbytes(),
            layers=[fitted.layers.get(index) for index in range(len(loaded.shape.layers))],
            tables=fitted.tables,
            bits=bits,
            ladder=rows,
            default=self._default(rows),
            block_tokens=self.block_tokens,
            sliding=[shape.sliding for shape in loaded.shape.layers],
            provenance=self._provenance(loaded, statistics, texts is None, measure, windows),
        )
        profile = as_stored(profile)
        self._measure(loaded, profile, measure)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return profile

    def profile(
        self,
        kv_tensors: Sequence[Sequence[torch.Tensor] | torch.Tensor | None],
        *,
        queries: Sequence[torch.Tensor | None] | None = None,
        sliding: Sequence[int | None] | None = None,
        model: str = "tensors",
        fingerprint: str | None = None,
    ) -> SpectralProfile:
        """Profile given keys and values, without a model (see `spectral.from_tensors.profile_from_tensors`)."""
        from spectral.from_tensors import profile_from_tensors

        return profile_from_tensors(
            kv_tensors,
            queries=queries,
            sliding=sliding,
            target_energy=0.95 if self.target_energy is None else self.target_energy,
            ratios=self.ratios,
            prefer=self.prefer,
            sinks=self.sinks,
            recent=self.recent,
            page_tokens=self.page_tokens,
            model=model,
            fingerprint=fingerprint,
        )

    # -- stages ---------------------------------------------------------------------------------------------------

    def _report(self, stage: str, fraction: float) -> None:
        if self.progress is not None:
            self.progress(stage, fraction)

    def _corpus(
        self, loaded: LoadedModel, texts: Sequence[str] | None, wanted: int, measured: int, state: _State
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Windows of token ids: held back for measuring, and for calibration."""
        from spectral.selftext import self_generated

        if state.corpus is not None:
            return state.corpus
        length = max(self.window, min(self.measure_window, loaded.context_length) // self.window * self.window)
        if loaded.context_length < self.window:
            raise ModelError(
                f"calibration windows of {self.window} tokens are longer than the model's context of "
                f"{loaded.context_length}; pass a smaller window"
            )
        if texts is None:
            texts = self_generated(loaded, tokens=wanted + measured, seed=self.seed, progress=self.progress)
        long = token_windows(loaded, texts, length, wanted + measured, self.seed)
        held = max(1, min(len(long) // 4, math.ceil(measured / length)))
        if len(long) < 2:
            raise ModelError(
                f"calibration needs at least {2 * length} tokens of text and got {len(long)} window(s) of "
                f"{length}; give more text or ask for more tokens"
            )
        windows = [w[i : i + self.window] for w in long[held:] for i in range(0, length, self.window)]
        state.corpus = long[:held], windows
        return state.corpus

    def _collect(self, loaded: LoadedModel, windows: list[list[int]], state: _State) -> Statistics:
        statistics = Statistics.of(loaded, turned=self.block_tokens > 0)
        if not statistics.layers:
            raise ModelError(f"{loaded.name} has no layer with full attention: there is nothing to compress")
        state.restore(statistics)
        collector = Collector(
            loaded,
            seed=self.seed,
            sinks=self.sinks,
            recent=self.recent,
            page_tokens=self.page_tokens,
            block_tokens=self.block_tokens,
            fisher_tokens=self.fisher_tokens,
            sample_tokens=sample_tokens(statistics.layers, self.page_tokens),
        )
        while statistics.windows < len(windows):
            collector.read(statistics, windows)
            self._report("statistics", statistics.windows / len(windows))
            if statistics.windows < len(windows):
                state.save(statistics)
        return statistics

    def _default(self, rows: list[LadderRow]) -> str:
        if self.target_energy is not None:
            return default_by_energy(rows, self.target_energy)
        return min(rows, key=lambda row: abs(math.log(float(row.name[:-1]) / self.default_ratio))).name

    def _measure(self, loaded: LoadedModel, profile: SpectralProfile, windows: list[list[int]]) -> None:
        from spectral.oneshot import oneshot_blocks, score_oneshot
        from spectral.recall import recalled
        from spectral.scoring import ExactPass, summarised

        figures: dict[str, list[Any]] = {row.name: [] for row in profile.ladder}
        asked = self._recall_sequences(loaded, windows)
        answers: dict[str, list[bool]] = {row.name: [] for row in profile.ladder}
        total = (len(windows) + len(asked)) * len(profile.ladder)
        codebooks = {row.name: profile.codebook(row.name, device=loaded.layer_devices) for row in profile.ladder}
        for number, window in enumerate(windows):
            exact = ExactPass.run(loaded, window)
            for at, row in enumerate(profile.ladder):
                figures[row.name].append(score_oneshot(exact, codebooks[row.name]))
                self._report("measuring", (number * len(profile.ladder) + at + 1) / total)
        for number, sequence in enumerate(asked, start=len(windows)):
            for at, row in enumerate(profile.ladder):
                blocks = oneshot_blocks(loaded, codebooks[row.name], sequence.ids, sequence.first)
                answers[row.name] += recalled(sequence, blocks)
                self._report("measuring", (number * len(profile.ladder) + at + 1) / total)
        for row in profile.ladder:
            if answers[row.name]:
                row.recall = sum(answers[row.name]) / len(answers[row.name])
            measured = summarised(figures[row.name], len(windows[0]))
            row.kl_mean, row.kl_p99 = measured["kl_mean"], measured["kl_p99"]
            row.top1, row.top5 = measured["top1"], measured["top5_overlap"]
            row.perplexity, row.exact_perplexity = measured["perplexity"], measured["exact_perplexity"]

    def _recall_sequences(self, loaded: LoadedModel, windows: list[list[int]]) -> list[RecallSequence]:
        """Facts hidden in the first `recall_windows` windows; none where the windows are too short for them, or where
        the model recalls nothing with its exact cache either: then recall says nothing about a setting."""
        from spectral.recall import recall_sequence, recalled
        from spectral.scoring import ExactPass

        sequences, known = [], False
        for number, window in enumerate(windows[: self.recall_windows]):
            if len(window) < RECALL_FROM:
                continue
            try:
                sequence = recall_sequence(loaded.tokenizer, window, self.seed + number)
            except ModelError:
                continue
            logits = ExactPass.run(loaded, sequence.ids).log_probs(sequence.first, len(sequence.ids))
            known = known or any(recalled(sequence, [(sequence.first, logits)]))
            sequences.append(sequence)
        return sequences if known else []

    # -- provenance and interruption ------------------------------------------------------------------------------

    def _provenance(
        self,
        loaded: LoadedModel,
        statistics: Statistics,
        own: bool,
        measure: list[list[int]],
        windows: list[list[int]],
    ) -> dict[str, Any]:
        import spectral

        config = loaded.model.config
        return {
            "corpus": "self-generated" if own else "files",
            "corpus_sha256": _ids_digest(measure, windows),
            "tokens": statistics.tokens,
            "fisher_tokens": statistics.fisher_tokens,
            "measured_on_tokens": sum(len(w) for w in measure),
            "measured_context": len(measure[0]),
            "seed": self.seed,
            **({} if self.prefer == "quality" else {"prefer": self.prefer}),  # the shipped profile's header says none
            "library": spectral.__version__,
            "torch": torch.__version__,
            "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
            "quantization": loaded.quantization,
            "config_sha256": config_sha256(config),
            "revision": getattr(config, "_commit_hash", None),
        }

    def _state(self, loaded: LoadedModel, texts: Sequence[str] | None, wanted: int, measured: int) -> _State:
        facts = [
            loaded.fingerprint,
            loaded.quantization,
            None if texts is None else hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            [wanted, measured, self.seed, self.window, self.measure_window, self.fisher_tokens, self.block_tokens],
            [self.sinks, self.recent, self.page_tokens],
        ]
        return _State(self.checkpoint, hashlib.sha256(json.dumps(facts).encode()).hexdigest())


class _State:
    """What an interrupted run needs to go on: the corpus as token ids, and the statistics so far."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.corpus: tuple[list[list[int]], list[list[int]]] | None = None
        self._tensors: dict[str, torch.Tensor] | None = None
        self._saved = time.monotonic()
        self._pause = SAVE_SECONDS
        if path is not None and path.is_file():
            self._load(path)

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return  # another run's: this one starts afresh and overwrites it
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return
        self.corpus = tensors.pop("corpus.measure").tolist(), tensors.pop("corpus.windows").tolist()
        self._tensors = tensors

    def restore(self, statistics: Statistics) -> None:
        """Take over what was saved, if anything."""
        if self._tensors is not None:
            statistics.restore(self._tensors)
            self._tensors = None

    def save(self, statistics: Statistics) -> None:
        """Save if enough time has passed; at most a tenth of the run's time goes into saving."""
        if self.path is None or self.corpus is None or time.monotonic() - self._saved < self._pause:
            return
        from safetensors.torch import save_file

        began = time.monotonic()
        tensors = statistics.tensors()
        for name, windows in zip(("measure", "windows"), self.corpus, strict=True):
            tensors[f"corpus.{name}"] = torch.tensor(windows, dtype=torch.int32)
        temporary = self.path.with_name(self.path.name + ".tmp")
        save_file(tensors, temporary, metadata={"key": self.key})
        os.replace(temporary, self.path)
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, 10 * (self._saved - began))


def token_windows(loaded: LoadedModel, texts: Sequence[str], length: int, tokens: int, seed: int) -> list[list[int]]:
    """Windows of `length` token ids from all texts in turn, shuffled by seed, `tokens` in total at most."""
    per_text: list[list[list[int]]] = []
    rest: list[int] = []  # what is left of each text, joined: many short texts must not be thrown away
    for text in texts:
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) - len(ids) % length
        per_text.append([ids[i : i + length] for i in range(0, whole, length)])
        rest += ids[whole:]
    per_text.append([rest[i : i + length] for i in range(0, len(rest) - length + 1, length)])
    rng = np.random.default_rng(seed)
    for windows in per_text:
        rng.shuffle(windows)
    out: list[list[int]] = []
    while len(out) * length < tokens and any(per_text):
        for windows in per_text:
            if windows and len(out) * length < tokens:
                out.append(windows.pop())
    return out


def _ids_digest(*corpora: list[list[int]]) -> str:
    """SHA-256 of token ids, as 32-bit integers in order."""
    total = hashlib.sha256()
    for corpus in corpora:
        for window in corpus:
            total.update(np.array(window, dtype=np.int32).tobytes())
    return total.hexdigest()

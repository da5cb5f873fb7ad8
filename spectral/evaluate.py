"""`evaluate`: quality through the cache and the bytes it takes, for our settings and for published methods.

One exact forward a window is the reference of everything. Every contender is read in one forward whose attention shows
each query what its cache would hold by then: `spectral.oneshot` for our settings, which a test holds to be what the
page store shows token by token, `spectral.comparison` for methods. A plain forward would never read the cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectral.errors import ModelError
from spectral.scoring import Progress, codebooks_of, score_settings, skipped

if TYPE_CHECKING:
    from spectral.hf import LoadedModel
    from spectral.profile import SpectralProfile
    from spectral.recall import RecallSequence

__all__ = ["EvalReport", "evaluate", "score_settings"]


@dataclass
class EvalReport:
    """What `spectral eval` prints: one row per contender, and where the figures come from.

    Attributes:
        context, windows, scored_tokens, seed, texts: what was scored; tokens_sha256: of the windows' token ids (equal
            ones were scored on the same text); chunk: as for `evaluate`.
        dtype: of the model's numbers; token_nbytes: bf16 bytes of one token; basis_nbytes: the profile's bases.
        rows: per contender name, source, ours, in_attention, bytes_per_token (at the scored context),
            bytes_per_token_at, ratio, ratio_without_window, basis_nbytes, kl_mean, kl_p99, top1, top5_overlap,
            perplexity, exact_perplexity, kl_by_position, recall, recall_by_distance.
        calibration: of the comparisons, None without any; recall: how it was asked, None if it was not.
        provenance: versions, commit, hardware, command.
    """

    model: str
    context: int
    windows: int
    scored_tokens: int
    seed: int
    chunk: int
    texts: str
    tokens_sha256: str
    dtype: str
    token_nbytes: int
    basis_nbytes: int
    profile: dict[str, Any]
    rows: list[dict[str, Any]]
    calibration: dict[str, Any] | None = None
    recall: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    spectrum: list[Any] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and strict: what is not finite is None."""
        provenance = dict(self.provenance)
        out = {key: value for key, value in vars(self).items() if key not in {"provenance", "spectrum"}}
        return strict({**out, **provenance})

    def table(self) -> str:
        """The rows as aligned text."""
        wide = max(8, *(len(row["name"]) for row in self.rows))
        head = (
            f"{'setting':>{wide}} {'bytes/token':>12} {'ratio':>6} {'KL mean':>9} {'KL p99':>8} {'top-1':>7} "
            f"{'top-5':>6} {'ppl':>9} {'recall':>7} {'bases':>10}  in attention"
        )
        lines = [
            f"{self.model}: {self.context} tokens of context, {self.texts}; bf16 holds {self.token_nbytes} bytes/token",
            head,
        ]
        for row in self.rows:
            recall = "" if row.get("recall") is None else f"{row['recall']:.0%}"
            lines.append(
                f"{row['name']:>{wide}} {row['bytes_per_token']:12.1f} {row['ratio']:6.2f} {row['kl_mean']:9.5f} "
                f"{row['kl_p99']:8.4f} {row['top1']:7.2%} {row['top5_overlap']:6.1%} {row['perplexity']:9.4f} "
                f"{recall:>7} {row['basis_nbytes'] / 2**20:6.2f} MiB  {'yes' if row['in_attention'] else 'no'}"
            )
        if self.recall and next((row["recall"] for row in self.rows if row["name"] == "exact"), 1):
            return "\n".join(lines)
        if self.recall:
            lines.append(
                "The exact cache recalls nothing either: this model cannot do the task, and recall says nothing."
            )
        return "\n".join(lines)


def strict(value: Any) -> Any:
    """The same value with every float that JSON cannot hold (NaN, infinities) replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def evaluate(
    model: str | LoadedModel,
    profile: SpectralProfile | None = None,
    *,
    texts: Sequence[str] | None = None,
    context: int = 1024,
    settings: Sequence[str] | None = None,
    max_windows: int = 4,
    baselines: str | Sequence[str] | None = None,
    calibration_texts: Sequence[str] | None = None,
    calibration_tokens: int = 16_384,
    recall: bool = False,
    seed: int = 1,
    chunk: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
    after_window: Callable[[EvalReport], None] | None = None,
) -> EvalReport:
    """Measure settings of a profile, and published methods, on a model.

    Args:
        model: folder, hub name, or a model in memory; profile: None takes the shipped one.
        texts: evaluation text; None lets the model write its own with a seed that calibration does not use.
        context: tokens of one window; max_windows: windows at most.
        settings: ladder names; None is "exact" and the whole ladder.
        baselines: names of `spectral.baselines`, "all", or None for none.
        calibration_texts: what the comparisons are calibrated on, `calibration_tokens` tokens at most; None lets the
            model write it, which is also what a profile is made from by default.
        recall: ask hidden facts as well, one sequence a window.
        chunk: 0: every query sees what the page store would show it in decoding, in one forward a window; else tokens
            fed through the store at once, which see each other exactly and so flatter coarse settings.
        dtype: of the weights, as for `spectral.hf.load_model`; for a model in memory only "auto".
        after_window: called with the report of the windows read so far (no recall yet), so that a long run can be
            saved as it goes.

    Raises ModelError, ProfileError, SettingError or SpectralError (unknown comparison) before anything is measured.
    """
    from spectral.baselines import get
    from spectral.contest import Contest

    methods = get(baselines if isinstance(baselines, str) else list(baselines)) if baselines is not None else []
    loaded = _loaded(model, dtype)
    if context < 64 or context > loaded.context_length:
        raise ModelError(f"context must be between 64 and the model's {loaded.context_length} tokens, got {context}")
    if chunk < 0 or max_windows < 1:
        raise ModelError(f"chunk must be at least 0 and max_windows at least 1, got {chunk} and {max_windows}")
    profile = _profile_of(loaded, profile)
    names = list(settings) if settings else ["exact", *(row.name for row in profile.ladder)]
    names = [name if name == "exact" else profile.resolve(name) for name in names]
    windows, origin = _windows(loaded, texts, context, max_windows, seed, progress)
    sequences = _recall_sequences(loaded, windows, seed) if recall else []
    contest = Contest(loaded, codebooks_of(loaded, profile, names), methods, chunk=chunk, progress=progress)
    calibration = contest.calibrate(context, calibration_texts, calibration_tokens, seed) if methods else None

    subject = _subject(loaded, profile)

    def report(read: int, asked: list[RecallSequence]) -> EvalReport:
        return EvalReport(
            **subject,
            **_extent(windows[:read], context, origin),
            seed=seed,
            chunk=chunk,
            calibration=calibration,
            rows=contest.rows(context, profile.basis_nbytes),
            recall=_recall_facts(asked),
        )

    contest.score(windows, sequences, after_window and (lambda read: after_window(report(read, []))))
    return report(len(windows), sequences)


def _loaded(model: str | LoadedModel, dtype: str) -> LoadedModel:
    from spectral.hf import load_model

    if isinstance(model, str):
        return load_model(model, dtype=dtype)
    if dtype != "auto":
        raise ModelError(f"{model.name} is in memory already: dtype {dtype!r} is for a model loaded by name")
    return model


def _subject(loaded: LoadedModel, profile: SpectralProfile) -> dict[str, Any]:
    """What a report says of model, profile and run."""
    from spectral.provenance import provenance

    return {
        "model": profile.model,
        "dtype": str(loaded.model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "token_nbytes": loaded.shape.token_nbytes(),
        "basis_nbytes": profile.basis_nbytes,
        "profile": {"content_hash": profile.content_hash, "provenance": profile.provenance},
        "provenance": provenance(str(loaded.device)),
        "spectrum": profile.to_dict()["spectrum"],
    }


def _extent(windows: list[list[int]], context: int, origin: str) -> dict[str, Any]:
    """What a report says of the windows of `context` token ids that have been read."""
    return {
        "context": context,
        "windows": len(windows),
        "scored_tokens": len(windows) * (context - skipped(context)),
        "texts": f"{len(windows)} windows of {origin}",
        "tokens_sha256": hashlib.sha256(str(windows).encode()).hexdigest(),
    }


def _profile_of(loaded: LoadedModel, profile: SpectralProfile | None) -> SpectralProfile:
    from spectral.profile import SpectralProfile as Profile
    from spectral.resources import profile_path

    if profile is None:
        path = profile_path(loaded.name)
        if path is None:
            raise ModelError(
                f"there is no shipped profile for {loaded.name!r}; pass one made by `spectral profile build`"
            )
        profile = Profile.load(path)
    profile.check_model(loaded)
    return profile


def _windows(
    loaded: LoadedModel,
    texts: Sequence[str] | None,
    context: int,
    count: int,
    seed: int,
    progress: Progress | None,
) -> tuple[list[list[int]], str]:
    """Windows of token ids, and what they are made of."""
    from spectral.calibrate import token_windows
    from spectral.selftext import self_generated

    origin = "given text"
    if texts is None:
        texts = ["\n".join(self_generated(loaded, tokens=(count + 2) * context, seed=seed, progress=progress))]
        origin = f"text written by the model itself (seed {seed})"
    windows = token_windows(loaded, texts, context, count * context, seed)
    if not windows:
        raise ModelError(
            f"the text is shorter than one window of {context} tokens; give more text or a smaller context"
        )
    return windows, origin


def _recall_sequences(loaded: LoadedModel, windows: list[list[int]], seed: int) -> list[RecallSequence]:
    from spectral.recall import recall_sequence

    return [recall_sequence(loaded.tokenizer, window, seed + number) for number, window in enumerate(windows)]


def _recall_facts(sequences: list[RecallSequence]) -> dict[str, Any] | None:
    if not sequences:
        return None
    return {
        "sequences": len(sequences),
        "asked": sum(len(sequence.facts) for sequence in sequences),
        "distractors": sum(sequence.distractors for sequence in sequences),
    }

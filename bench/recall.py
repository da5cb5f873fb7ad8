"""Recall at settings of a profile beside the exact cache's: facts hidden in text and asked for at its end.

    python bench/recall.py MODEL --profile FILE --text FILE ... [--context 4096] [--sequences 10] [--settings 8x,16x]
        [--baselines window-only] [--baseline-sequences 10] [--calibration FILE ...] [--json FILE]

Every sequence hides up to 32 facts among distractors and asks for half of them; a fact counts when every token of its
number is the most likely one. All contenders read the same sequences, so their differences are paired. The JSON is
written after every sequence, so that a run that is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral.baselines import Baseline
    from spectral.hf import LoadedModel
    from spectral.recall import RecallSequence

CALIBRATION_TOKENS = 16_384


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--baselines", default="window-only")
    parser.add_argument("--baseline-sequences", type=int, default=10, help="comparisons read the first so many")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="for comparisons; default: --text")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def fitted(loaded: LoadedModel, names: str, texts: list[str], context: int, seed: int) -> list[Baseline]:
    """The comparisons, calibrated on windows of the texts."""
    from spectral.baselines import get
    from spectral.calibrate import token_windows
    from spectral.comparison import collect_stats, comparison_shape

    methods = get(names) if names else []
    if not methods:
        return []
    # Sinks and a window need no calibration: one window is what the interface asks for.
    tokens = context if names == "window-only" else CALIBRATION_TOKENS
    windows = token_windows(loaded, texts, context, tokens, seed)
    needs = frozenset[str]().union(*(method.needs for method in methods))
    stats = collect_stats(loaded, windows, context=context, seed=seed, needs=needs)
    for method in methods:
        method.fit(stats, comparison_shape(loaded))
    return methods


def figures(hits: dict[str, list[list[bool]]], asked: list[RecallSequence]) -> dict[str, Any]:
    """Per contender: facts, recall, by distance, and the paired figures against the exact cache on what it read."""
    from spectral.recall import paired_figures, recall_figures

    out = {}
    for name, found in hits.items():
        pairs = list(zip(asked, found, strict=False))
        exact = hits["exact"][: len(found)]
        out[name] = {"facts": sum(map(len, found)), **recall_figures(pairs), **paired_figures(exact, found)}
    return out


def main() -> None:
    options = options_of()
    from spectral import SpectralProfile
    from spectral.calibrate import token_windows
    from spectral.comparison import method_blocks
    from spectral.hf import load_model
    from spectral.oneshot import oneshot_blocks
    from spectral.provenance import provenance
    from spectral.recall import recall_sequence, recalled
    from spectral.scoring import ExactPass

    loaded, profile = load_model(options.model, dtype="float32"), SpectralProfile.load(options.profile)
    profile.check_model(loaded)
    books = {name: profile.codebook(name, device=loaded.device) for name in options.settings.split(",")}
    texts = [path.read_text(encoding="utf-8") for path in options.text]
    calibration = [path.read_text(encoding="utf-8") for path in options.calibration] or texts
    methods = fitted(loaded, options.baselines, calibration, options.context, options.seed)
    keep = any(method.across_layers for method in methods)
    windows = token_windows(loaded, texts, options.context, options.context * options.sequences, options.seed)
    hits: dict[str, list[list[bool]]] = {name: [] for name in ("exact", *books, *(m.name for m in methods))}
    asked: list[RecallSequence] = []
    began = time.monotonic()
    facts = {"texts": [path.name for path in options.text], "seed": options.seed, **provenance(str(loaded.device))}

    def answers(sequence: RecallSequence) -> Iterator[list[bool]]:
        exact = ExactPass.run(loaded, sequence.ids, keep_cache=keep)
        yield recalled(sequence, [(sequence.first, exact.log_probs(sequence.first, len(sequence.ids)))])
        for book in books.values():
            yield recalled(sequence, oneshot_blocks(loaded, book, sequence.ids, sequence.first))
        for method in methods if len(asked) <= options.baseline_sequences else []:
            yield recalled(sequence, method_blocks(exact, method, sequence.first))

    for number, window in enumerate(windows):
        asked.append(recall_sequence(loaded.tokenizer, window, options.seed + 93 + number))
        for found, answered in zip(hits.values(), answers(asked[-1]), strict=False):
            found.append(answered)
        rows = figures(hits, asked)
        print(
            number,
            {name: f"{row['recall']:.4f} -{row['lost']} +{row['won']}" for name, row in rows.items()},
            flush=True,
        )
        result = {
            "model": Path(options.model).name,
            "profile": {"content_hash": profile.content_hash, "tokens": profile.provenance.get("tokens")},
            "context": options.context,
            "sequences": len(asked),
            "facts": sum(len(sequence.facts) for sequence in asked),
            "rows": rows,
            "distances": [" ".join(str(fact.distance) for fact in sequence.facts) for sequence in asked],
            "hits": {n: ["".join("01"[hit] for hit in part) for part in found] for n, found in hits.items()},
            "seconds": time.monotonic() - began,
            "load_average": os.getloadavg()[0],
            **facts,
        }
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps({name: {k: row[k] for k in ("recall", "difference", "interval")} for name, row in rows.items()}))


if __name__ == "__main__":
    main()

"""Recall at settings of a profile beside the exact cache's: facts hidden in text and asked for at its end.

    python bench/recall.py MODEL --profile FILE --text FILE ... [--context 4096] [--sequences 10] [--settings 8x,16x]
        [--json FILE]

Every sequence hides up to 32 facts among distractors and asks for half of them; a fact counts when every token of its
number is the most likely one. Settings read the same sequences, so their differences are paired.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    from spectral import SpectralProfile
    from spectral.calibrate import token_windows
    from spectral.hf import load_model
    from spectral.oneshot import oneshot_blocks
    from spectral.provenance import provenance
    from spectral.recall import recall_sequence, recalled
    from spectral.scoring import ExactPass

    loaded, profile = load_model(options.model, dtype="float32"), SpectralProfile.load(options.profile)
    books = {name: profile.codebook(name, device=loaded.device) for name in options.settings.split(",")}
    texts = [path.read_text(encoding="utf-8") for path in options.text]
    tokens = options.context * options.sequences
    windows = token_windows(loaded, texts, options.context, tokens, options.seed)
    hits: dict[str, list[bool]] = {name: [] for name in ("exact", *books)}
    for number, window in enumerate(windows):
        asked = recall_sequence(loaded.tokenizer, window, options.seed + 93 + number)
        logits = ExactPass.run(loaded, asked.ids).log_probs(asked.first, len(asked.ids))
        hits["exact"] += recalled(asked, [(asked.first, logits)])
        for name, book in books.items():
            hits[name] += recalled(asked, oneshot_blocks(loaded, book, asked.ids, asked.first))
        print(number, {name: f"{sum(found)}/{len(found)}" for name, found in hits.items()}, flush=True)
    result = {
        "model": Path(options.model).name,
        "context": options.context,
        "sequences": len(windows),
        "facts": len(hits["exact"]),
        "recall": {name: sum(found) / len(found) for name, found in hits.items()},
        "lost": {n: sum(e and not f for e, f in zip(hits["exact"], found, strict=True)) for n, found in hits.items()},
        "won": {n: sum(f and not e for e, f in zip(hits["exact"], found, strict=True)) for n, found in hits.items()},
        "texts": [path.name for path in options.text],
        "seed": options.seed,
        **provenance(str(loaded.device)),
    }
    print(json.dumps(result["recall"]))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

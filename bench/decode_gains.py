"""How far decoded keys and values should be lengthened: KL over a grid of spectral.gains' parts.

    python bench/decode_gains.py MODEL --profile FILE [--text FILE ...] [--context 2048] [--windows 2]
        [--settings 4x,8x,16x] [--json FILE]

Without --text the model writes the text itself. Part 0 is what is right in the mean, part 1 full length. All pairs read
the same windows, so their differences are paired.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

PAIRS = ((0, 0), (0, 0.25), (0, 0.5), (0, 0.75), (0.2, 0.3), (0.25, 0.25), (0.25, 0.5), (0.5, 0.5), (0.5, 0.75))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    parser.add_argument("--settings", default="4x,8x,16x")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    from spectral import SpectralProfile, gains
    from spectral.calibrate import token_windows
    from spectral.hf import load_model
    from spectral.oneshot import score_oneshot
    from spectral.provenance import provenance
    from spectral.scoring import ExactPass
    from spectral.selftext import self_generated

    loaded = load_model(options.model, dtype="float32")
    profile = SpectralProfile.load(options.profile)
    texts = {path.name: path.read_text(encoding="utf-8") for path in options.text}
    if not texts:
        tokens = (options.windows + 2) * options.context
        texts = {"its own": "\n".join(self_generated(loaded, tokens=tokens, seed=options.seed))}
    rows: list[dict[str, Any]] = []
    for name, text in texts.items():
        windows = token_windows(loaded, [text], options.context, options.windows * options.context, options.seed)
        passes = [ExactPass.run(loaded, window) for window in windows]
        for setting in options.settings.split(","):
            for key_part, value_part in PAIRS:
                gains.KEY_PART, gains.VALUE_PART = key_part, value_part
                book = profile.codebook(setting, device=loaded.device)
                scored = [score_oneshot(exact, book) for exact in passes]
                row = {
                    "text": name,
                    "setting": setting,
                    "key_part": key_part,
                    "value_part": value_part,
                    "kl_mean": sum(float(s["kl"].mean()) for s in scored) / len(scored),
                    "nll_minus_exact": sum(float((s["nll"] - s["exact_nll"]).mean()) for s in scored) / len(scored),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.json is not None:
        result = {
            "model": Path(options.model).name,
            "profile": {"content_hash": profile.content_hash},
            "context": options.context,
            "windows": options.windows,
            "seed": options.seed,
            "rows": rows,
            "load_average": os.getloadavg()[0],
            **provenance(str(loaded.device)),
        }
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

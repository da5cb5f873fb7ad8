"""What the calibration text costs in KL (the model's own text, mixed text, single domains), and what squeezing costs.

    python bench/calibration_text.py MODEL --mixed FILE ... --domain FILE [--domain FILE] --text FILE ...
        [--tokens 65536] [--context 4096] [--settings 4x,8x,16x] [--json FILE]

One profile is made from each kind of text with the same number of tokens and scored on one window of every --text file.
Squeezing: pages encoded at a finer setting of the first profile, squeezed, against pages encoded at the coarser one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

PAIRS = (("4x", "8x"), ("6x", "10x"), ("8x", "16x"), ("10x", "12x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--mixed", type=Path, nargs="+", required=True)
    parser.add_argument("--domain", type=Path, action="append", default=[])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--settings", default="4x,8x,16x")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    from spectral import SpectralProfiler
    from spectral.calibrate import token_windows
    from spectral.hf import load_model
    from spectral.oneshot import score_oneshot
    from spectral.provenance import provenance
    from spectral.scoring import ExactPass

    loaded = load_model(options.model, dtype="float32")
    kinds: dict[str, list[str] | None] = {"mixed": [path.read_text(encoding="utf-8") for path in options.mixed]}
    kinds |= {path.stem: [path.read_text(encoding="utf-8")] for path in options.domain}
    kinds["self-generated"] = None
    passes = {
        path.stem: ExactPass.run(
            loaded, token_windows(loaded, [path.read_text(encoding="utf-8")], options.context, options.context, 1)[0]
        )
        for path in options.text
    }
    rows: list[dict[str, Any]] = []
    squeezes: list[dict[str, Any]] = []
    for kind, texts in kinds.items():
        began = time.monotonic()
        profiler = SpectralProfiler(tokens=options.tokens, measure_tokens=2048, recall_windows=0)
        profile = profiler.profile_from_loaded(loaded, texts=texts)
        seconds = time.monotonic() - began
        for setting in options.settings.split(","):
            book = profile.codebook(setting, device=loaded.device)
            kl = {name: float(score_oneshot(exact, book)["kl"].mean()) for name, exact in passes.items()}
            row = {"calibration": kind, "setting": setting, "kl": kl, "kl_mean": sum(kl.values()) / len(kl)}
            rows.append({**row, "tokens": profile.provenance["tokens"], "seconds": seconds})
            print(f"{kind:>16} {setting:>4} {row['kl_mean']:.5f}", {k: round(v, 5) for k, v in kl.items()}, flush=True)
        if not squeezes:
            for fine, coarse in PAIRS:
                books = [profile.codebook(name, device=loaded.device) for name in (fine, coarse)]
                scores = [
                    sum(float(score_oneshot(e, books[1], finer=f)["kl"].mean()) for e in passes.values()) / len(passes)
                    for f in (None, books[0])
                ]
                squeezes.append({"from": fine, "to": coarse, "kl_direct": scores[0], "kl_squeezed": scores[1]})
                print(f"squeeze {fine} -> {coarse}: {scores[0]:.5f} direct, {scores[1]:.5f} squeezed", flush=True)
        if options.json is not None:
            result = {
                "model": Path(options.model).name,
                "context": options.context,
                "rows": rows,
                "squeezes": squeezes,
                "texts": [path.name for path in options.text],
                "mixed": [path.name for path in options.mixed],
                **provenance(str(loaded.device)),
            }
            options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

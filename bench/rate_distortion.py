"""Our ladder against every published method on one model: all-in bytes, KL, agreement, perplexity, recall, a verdict.

    python bench/rate_distortion.py MODEL --text FILE ... [--calibration FILE ...] [--tokens 131072] [--context 4096]
        [--windows 5] [--baselines all] [--profile FILE] [--json FILE]

Without --profile the model is profiled first: on --calibration files, or on text that it writes itself. Comparisons are
calibrated on the same kind of text. The verdict puts each of our settings beside the rivals that spend at least as many
bytes: the best of those that spend at most half as much again, with attention on their codes and of any kind, and the
best of all that spend more, however much.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

BAND = 1.5
"""A rival is at the same budget if it spends between one and BAND times our bytes."""


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of our settings the best rivals, and our KL as a share of theirs."""
    ours = [row for row in rows if row["ours"]]
    rivals = [row for row in rows if not row["ours"] and row["name"] != "exact"]
    out = []
    for row in ours:
        entry: dict[str, Any] = {"setting": row["name"], "ratio": row["ratio"], "kl_mean": row["kl_mean"]}
        spending = [r for r in rivals if r["bytes_per_token"] >= 0.995 * row["bytes_per_token"]]
        near = [r for r in spending if r["bytes_per_token"] <= BAND * row["bytes_per_token"]]
        kinds = {
            "on_codes": [r for r in near if r["in_attention"]],
            "any": near,
            "on_codes_any_budget": [r for r in spending if r["in_attention"]],
            "any_any_budget": spending,
        }
        for kind, found in kinds.items():
            if found:
                best = min(found, key=lambda r: r["kl_mean"])
                entry[kind] = {
                    "name": best["name"],
                    "ratio": best["ratio"],
                    "kl_mean": best["kl_mean"],
                    "share": row["kl_mean"] / max(best["kl_mean"], 1e-12),
                }
        out.append(entry)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, nargs="*", default=None)
    parser.add_argument("--profile", type=Path, default=None)
    parser.add_argument("--save-profile", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--settings", default=None)
    parser.add_argument("--baselines", default="all")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    from spectral import SpectralProfile, SpectralProfiler
    from spectral.evaluate import evaluate
    from spectral.hf import load_model

    began, last = time.monotonic(), [""]

    def progress(stage: str, fraction: float) -> None:
        if stage != last[0]:
            last[0] = stage
            print(f"[{time.monotonic() - began:6.1f} s] {stage}", file=sys.stderr, flush=True)

    calibration = [path.read_text(encoding="utf-8") for path in options.calibration or []] or None
    # float32 on every device: in bf16 two orders of the same sums differ by more than the finest settings do.
    loaded = load_model(options.model, dtype="float32")
    seconds = None
    if options.profile is not None:
        profile = SpectralProfile.load(options.profile)
    else:
        profiler = SpectralProfiler(tokens=options.tokens, progress=progress)
        profile = profiler.profile_from_loaded(loaded, texts=calibration)
        seconds = time.monotonic() - began
        if options.save_profile is not None:
            profile.save(options.save_profile)
    texts = [path.read_text(encoding="utf-8") for path in options.text]
    report = evaluate(
        loaded,
        profile,
        texts=texts,
        context=options.context,
        settings=options.settings.split(",") if options.settings else None,
        max_windows=options.windows,
        baselines=options.baselines or None,
        calibration_texts=calibration,
        recall=True,
        progress=progress,
    )
    result = {
        **report.to_dict(),
        "text_files": [path.name for path in options.text],
        "calibration_files": [path.name for path in options.calibration or []],
        "profile_seconds": seconds,
        "verdict": verdict(report.to_dict()["rows"]),
        "seconds": time.monotonic() - began,
    }
    print(report.table())
    for entry in result["verdict"]:
        line = f"{entry['setting']:>8} {entry['ratio']:6.2f} KL {entry['kl_mean']:.5f}"
        for kind in ("on_codes", "any", "on_codes_any_budget", "any_any_budget"):
            if kind in entry:
                best = entry[kind]
                line += f" | {kind} {best['name']} {best['ratio']:.2f}x {best['kl_mean']:.5f}: {best['share']:.2f}"
        print(line)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

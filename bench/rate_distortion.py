"""Our ladder against every published method on one model: all-in bytes, KL, agreement, perplexity, recall, a verdict.

    python bench/rate_distortion.py MODEL --text FILE ... [--calibration FILE ...] [--tokens 131072] [--context 4096]
        [--windows 5] [--baselines all] [--profile FILE] [--against RESULTS] [--no-recall] [--json FILE]

Without --profile the model is profiled first: on --calibration files, or on text that it writes itself. Comparisons are
calibrated on the same kind of text. The verdict puts each of our settings beside the best rivals at its bytes. The JSON
is written after every window that all have read. With --against, comparisons of an earlier run on the same tokens stand
in the verdict beside those of this one, which then measures ours alone with --baselines "".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral.evaluate import EvalReport

BAND = 1.5
"""A rival is near a budget if it spends between one and BAND times our bytes."""


def family(name: str) -> str:
    """A method's name without its setting: "kvtc-8x" -> "kvtc", "spectra-perhead-2bit" -> "spectra-perhead"."""
    words = name.split("-")
    return (
        "-".join(w for w in words if not w[-1:].isdigit() and not w[:1].isdigit() and not w[:-1][-1:].isdigit()) or name
    )


def at_budget(rows: list[dict[str, Any]], nbytes: float) -> tuple[str, float] | None:
    """The best method at exactly `nbytes` per token: its points joined by straight lines in log bytes and log KL.

    A method takes part where the budget lies between two of its settings.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(family(row["name"]), []).append((row["bytes_per_token"], max(row["kl_mean"], 1e-12)))
    best: tuple[str, float] | None = None
    for name, found in points.items():
        found.sort()
        for (low, worse), (high, better) in zip(found, found[1:], strict=False):
            if low <= nbytes <= high and high > low:
                share = (math.log(nbytes) - math.log(low)) / (math.log(high) - math.log(low))
                kl = math.exp(math.log(worse) + share * (math.log(better) - math.log(worse)))
                if best is None or kl < best[1]:
                    best = name, kl
    return best


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of our settings the best rivals, and our KL as a share of theirs.

    on_codes, any: the best measured row that spends between one and BAND times our bytes, with attention on its codes
    and of any kind; on_codes_at_budget, any_at_budget: the best method at exactly our bytes (`at_budget`).
    """
    ours = [row for row in rows if row["ours"]]
    rivals = [row for row in rows if not row["ours"] and row["name"] != "exact"]
    out = []
    for row in ours:
        entry: dict[str, Any] = {"setting": row["name"], "ratio": row["ratio"], "kl_mean": row["kl_mean"]}
        nbytes = row["bytes_per_token"]
        for kind, group in (("on_codes", [r for r in rivals if r["in_attention"]]), ("any", rivals)):
            near = [r for r in group if 0.995 * nbytes <= r["bytes_per_token"] <= BAND * nbytes]
            if near:
                best = min(near, key=lambda r: r["kl_mean"])
                entry[kind] = {"name": best["name"], "ratio": best["ratio"], "kl_mean": best["kl_mean"]}
            level = at_budget(group, nbytes)
            if level is not None:
                entry[f"{kind}_at_budget"] = {"name": level[0], "ratio": row["ratio"], "kl_mean": level[1]}
        for found in entry.values():
            if isinstance(found, dict):
                found["share"] = row["kl_mean"] / max(found["kl_mean"], 1e-12)
        out.append(entry)
    return out


def earlier_rows(path: Path | None, tokens_sha256: str) -> list[dict[str, Any]]:
    """The comparisons' rows of an earlier results file; none while this run has read fewer windows.

    A comparison's figures depend on the text and the model alone, whatever our codec was when they were measured.
    """
    if path is None:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["tokens_sha256"] != tokens_sha256:
        return []
    return [row for row in found["rows"] if not row["ours"] and row["name"] != "exact"]


def options_of() -> argparse.Namespace:
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
    parser.add_argument("--against", type=Path, default=None)
    parser.add_argument("--no-recall", dest="recall", action="store_false")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    options = options_of()
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

    def deliver(report: EvalReport) -> dict[str, Any]:
        rows, earlier = report.to_dict()["rows"], earlier_rows(options.against, report.tokens_sha256)
        result = {
            **report.to_dict(),
            "text_files": [path.name for path in options.text],
            "calibration_files": [path.name for path in options.calibration or []],
            "profile_seconds": seconds,
            "verdict": verdict(rows + earlier),
            "verdict_against": options.against.name if options.against and earlier else None,
            "seconds": time.monotonic() - began,
            "load_average": os.getloadavg()[0],
        }
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return result

    report = evaluate(
        loaded,
        profile,
        texts=texts,
        context=options.context,
        settings=options.settings.split(",") if options.settings else None,
        max_windows=options.windows,
        baselines=options.baselines or None,
        calibration_texts=calibration,
        recall=options.recall,
        progress=progress,
        after_window=deliver,
    )
    result = deliver(report)
    if options.against is not None and result["verdict_against"] is None:
        print(f"--against: {options.against} was measured on other tokens, or has no comparisons", file=sys.stderr)
    print(report.table())
    for entry in result["verdict"]:
        line = f"{entry['setting']:>8} {entry['ratio']:6.2f} KL {entry['kl_mean']:.5f}"
        for kind in ("on_codes", "on_codes_at_budget", "any", "any_at_budget"):
            if kind in entry:
                best = entry[kind]
                line += f" | {kind} {best['name']} {best['ratio']:.2f}x {best['kl_mean']:.5f}: {best['share']:.2f}"
        print(line)


if __name__ == "__main__":
    main()

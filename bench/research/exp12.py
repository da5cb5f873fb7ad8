"""Keys and values apart, and fields that count beside bits: KL, and the fields that decoding reads.

    python bench/research/exp12.py MODEL --calibration FILE ... --text FILE ... [--unit-numbers 1024]
        [--field-bits 0,0.5,1,2,4] [--ratios 4,8,16] [--json FILE]

Statistics are taken once; bases are fitted for each preference, and widths for each weight of a field (`--field-bits`;
left out, each preference has its own, as the library makes its profiles). Of every text one window is read:
`--context` tokens from token `--skip` on. `--unit-numbers`: most numbers of keys and values of a unit (the library:
1,024); 256 gives this lab model two units where it has one. On a CPU, one thread, float32.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectral import SpectralProfile, statistics
from spectral.bits import FIELDS, WIDTHS, row_classes
from spectral.calibrate import SpectralProfiler
from spectral.fit import PREFERENCES, fit, ladder
from spectral.hf import load_model
from spectral.oneshot import score_oneshot
from spectral.profile_file import as_stored
from spectral.provenance import provenance
from spectral.scoring import ExactPass, summarised

SINKS, RECENT, PAGE = 4, 112, 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="what KL is measured on")
    parser.add_argument("--unit-numbers", type=int, default=statistics.UNIT_NUMBERS)
    parser.add_argument("--field-bits", default="", help="weights of a field, of every preference")
    parser.add_argument("--ratios", default="4,8,16")
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--fisher", type=int, default=24_576)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--skip", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def window(loaded: Any, path: Path, skip: int, context: int) -> list[int]:
    """`context` tokens of the first part of a file."""
    ids: list[int] = loaded.tokenizer(path.read_text(encoding="utf-8")[:40_000])["input_ids"]
    if len(ids) < skip + context:
        raise SystemExit(f"{path.name}: {len(ids)} tokens are too few")
    return ids[skip : skip + context]


def read_fields(profile: SpectralProfile, setting: str) -> dict[str, Any]:
    """Fields of a token that scores and that sums read, a layer; and how codes are shared out among the widths."""
    share = np.array([len(members) for members in row_classes(PAGE, profile.classes)]) / PAGE
    read = {"key": 0.0, "value": 0.0}
    codes = np.zeros(len(WIDTHS))
    for layer, units in zip(profile.layers, profile.bits[setting], strict=True):
        for unit, widths in zip(layer.units if layer else [], units or [], strict=True):
            at = np.searchsorted(WIDTHS, widths)
            count = float(share @ np.array(FIELDS)[at].sum(1))
            codes += [float(share @ (at == width).sum(1)) for width in range(len(WIDTHS))]
            for side in ("key", "value") if unit.side == "both" else (unit.side,):
                read[side] += count
    layers = sum(layer is not None for layer in profile.layers)
    shares = {str(width): round(float(x), 3) for width, x in zip(WIDTHS, codes / codes.sum(), strict=True)}
    return {"score_fields": read["key"] / layers, "sum_fields": read["value"] / layers, "widths": shares}


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    # Read by `Statistics.of` alone, which has no argument for it: what the library fits has one size of units.
    statistics.unit_heads = partial(statistics.unit_heads, limit=options.unit_numbers)
    loaded = load_model(str(options.model), device="cpu", dtype="float32")
    profiler = SpectralProfiler(tokens=options.tokens, fisher_tokens=options.fisher, measure_window=1024)
    texts = [path.read_text(encoding="utf-8") for path in options.calibration]
    state = profiler._state(loaded, texts, options.tokens, 2048)
    _, windows = profiler._corpus(loaded, texts, options.tokens, 2048, state)
    found = profiler._collect(loaded, windows, state)
    exact = [ExactPass.run(loaded, window(loaded, path, options.skip, options.context)) for path in options.text]
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    rows: list[dict[str, Any]] = []
    asked = [float(weight) for weight in options.field_bits.split(",") if weight]
    for prefer, preference in PREFERENCES.items():
        fitted = fit(found, PAGE, prefer)
        for field_bits in asked or [preference.field_bits]:
            settings, bits = ladder(
                fitted, loaded.shape, ratios, sinks=SINKS, recent=RECENT, page_tokens=PAGE, field_bits=field_bits
            )
            profile = as_stored(
                SpectralProfile(
                    model=options.model.name,
                    fingerprint=loaded.fingerprint,
                    token_nbytes=loaded.shape.token_nbytes(),
                    layers=[fitted.layers.get(i) for i in range(len(loaded.shape.layers))],
                    tables=fitted.tables,
                    bits=bits,
                    ladder=settings,
                    default=settings[0].name,
                    block_tokens=profiler.block_tokens,
                    provenance={},
                )
            )
            for row in profile.ladder:
                book = profile.codebook(row.name)
                scored = summarised([score_oneshot(one, book) for one in exact], options.context)
                rows.append({
                    "prefer": prefer, "field_bits": field_bits, "setting": row.name, "page_nbytes": row.page_nbytes,
                    "kl_mean": scored["kl_mean"], "top1": scored["top1"],
                    "perplexity_rise": scored["perplexity"] / scored["exact_perplexity"] - 1,
                    "units": [[*unit.heads, unit.side] for unit in next(filter(None, profile.layers)).units],
                    **read_fields(profile, row.name),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    if options.json is not None:
        facts = {
            "model": options.model.name,
            "calibration": [path.name for path in options.calibration],
            "text": [path.name for path in options.text],
            **{name: getattr(options, name) for name in ("unit_numbers", "tokens", "fisher", "context", "skip")},
            "rows": rows,
            **provenance(),
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Quality through the kernels beside quality through the torch reference, on one model, profile and text.

    python bench/kernel_quality.py MODEL --profile FILE --text FILE ... [--settings 8x,16x] [--chunks 16,1]
        [--context 4096] [--windows 2] [--sequences 4] [--dtype bfloat16] [--seed 7] [--json FILE]

A row for every setting and number of tokens that are fed at once: 16 are a chunk of a prompt over codes, 1 is a decode
step. KL, agreement and perplexity are against the exact cache over `windows` texts; facts recalled are those of
`sequences` texts that hide them (spectral.recall). A window fed token by token is a quarter as long: it takes thousands
of steps. `change` is a figure through the kernels less the reference's, over the reference's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

from bench.keeping import write_json  # noqa: E402

if TYPE_CHECKING:
    from spectral.codec import Codebook
    from spectral.hf import LoadedModel
    from spectral.recall import RecallSequence

ROUTES = ("reference", "triton")
FIGURES = ("kl_mean", "kl_p99", "top1", "perplexity")


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--settings", default="8x,16x")
    parser.add_argument("--chunks", default="16,1", help="tokens fed at once")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4, help="texts that hide facts; 0: none")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@contextmanager
def through(route: str) -> Iterator[None]:
    """Attention and codes of everything inside by one route."""
    before = os.environ.get("SPECTRAL_ATTENTION", "")
    os.environ["SPECTRAL_ATTENTION"] = route
    try:
        yield
    finally:
        os.environ["SPECTRAL_ATTENTION"] = before


def facts(loaded: LoadedModel, book: Codebook, asked: list[RecallSequence], chunk: int) -> list[bool]:
    """Which facts are answered through the page store."""
    from spectral.pages import PageStore
    from spectral.recall import recalled
    from spectral.scoring import store_blocks

    hits: list[bool] = []
    for sequence in asked:
        store = PageStore(loaded.shape, book, device=loaded.device, devices=loaded.layer_devices)
        hits += recalled(sequence, store_blocks(loaded, store, sequence.ids, chunk=chunk))
    return hits


def main() -> None:
    """Entry point."""
    options = options_of()
    from spectral import SpectralProfile
    from spectral.calibrate import token_windows
    from spectral.hf import load_model
    from spectral.provenance import provenance
    from spectral.recall import recall_sequence
    from spectral.scoring import score_settings

    loaded, profile = load_model(options.model, dtype=options.dtype), SpectralProfile.load(options.profile)
    profile.check_model(loaded)
    texts = [path.read_text(encoding="utf-8") for path in options.text]
    whole = token_windows(loaded, texts, options.context, options.context * options.windows, options.seed)
    hiding = token_windows(loaded, texts, options.context, options.context * options.sequences, options.seed + 1)
    asked = [recall_sequence(loaded.tokenizer, ids, options.seed + n) for n, ids in enumerate(hiding)]
    document: dict[str, Any] = {
        "model": Path(options.model).name, "texts": [path.name for path in options.text], "seed": options.seed,
        "context": options.context, "dtype": options.dtype, "profile": profile.content_hash,
        **provenance(str(loaded.device)),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for setting in options.settings.split(","):
        book = profile.codebook(setting, device=loaded.layer_devices)
        for chunk in map(int, options.chunks.split(",")):
            windows = whole if chunk > 1 else [ids[: options.context // 4] for ids in whole]
            row: dict[str, Any] = {"setting": setting, "chunk": chunk, "context": len(windows[0])}
            for route in ROUTES:
                began = time.monotonic()
                with through(route):
                    figures = score_settings(loaded, profile, windows, [setting], chunk=chunk)[setting]
                    row[route] = {name: figures[name] for name in (*FIGURES, "scored_tokens")}
                    if chunk > 1 and asked:
                        hits = facts(loaded, book, asked, chunk)
                        row[route] |= {"facts": len(hits), "recall": sum(hits) / len(hits)}
                row[route]["seconds"] = round(time.monotonic() - began, 1)
            old, new = row["reference"], row["triton"]
            row["change"] = {name: new[name] / old[name] - 1 for name in (*FIGURES, "recall") if old.get(name)}
            rows.append(row)
            print(setting, chunk, {name: f"{value:+.3%}" for name, value in row["change"].items()}, flush=True)
            write_json(options.json, document | {"rows": rows})


if __name__ == "__main__":
    main()

"""Size and speed of the cold form of pages, by setting, beside the entropies that bound it.

    python bench/cold_tier.py MODEL --profile FILE --text FILE ... --calibration FILE ... [--settings 8x,16x]
        [--tokens 4096] [--calibration-tokens 98304] [--rounds 5] [--json FILE]

"fast" is spectral.archive, a layer by itself; "small" is spectral.linked, with links fitted on the calibration files.
Ratios are bytes of packed pages by bytes of the archive, everything counted; the links themselves are a file beside the
profile and stated apart. MB/s are packed megabytes (10^6) per second of one thread's processor time (which other
programs lengthen less than the time by the clock), the median of rounds.
Entropies are what an ideal coder needs with tables counted on the calibration pages, as a ratio to the packed size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from spectral.archive import archive_pages, restore_pages
from spectral.bits import row_classes
from spectral.codec import Codebook, LayerCodec
from spectral.hf import LoadedModel, attending, load_model
from spectral.link_fit import fit_links
from spectral.link_profile import Pages, joined, pages_of
from spectral.linked import BINS, SOURCES, Chain, Links, layer_integers, predicted_bins, unpacked_codes
from spectral.pages import PageStore
from spectral.profile import SpectralProfile
from spectral.provenance import provenance
from spectral.sessions import load_row, save_row

LINKED = "given the layers below"


def text_windows(loaded: LoadedModel, path: Path, count: int, length: int, seed: int) -> list[list[int]]:
    """Token windows from random places of a file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        at = int(rng.integers(0, max(1, len(text) - 8 * length)))
        ids = loaded.tokenizer(text[at : at + 8 * length], truncation=True, max_length=length)["input_ids"]
        if len(ids) == length:
            out.append(list(ids))
    return out


# == entropies ======================================================================================================


def contexts(codec: LayerCodec, pages: torch.Tensor, bins: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What codes might be coded given: small integers [n, P, R] by name."""
    level = torch.cat([u.levels(pages[:, b]) for u, b in zip(codec.units, codec._bounds, strict=True)], 2)
    size = level.abs()
    edges = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.8])
    previous = torch.cat([torch.zeros_like(size[:1]), size[:-1]])
    counts = torch.tensor([len(rows) for rows in row_classes(codec.page_tokens, codec.classes)])
    classes = torch.arange(len(counts)).repeat_interleave(counts)
    out = {
        "order 0": torch.zeros_like(level, dtype=torch.long),
        "given the class": classes[None, :, None].expand(level.shape),
        "given the page's activity": torch.bucketize(size.mean((1, 2), keepdim=True), edges).expand(level.shape),
        "given the row's activity": torch.bucketize(size.mean(2, keepdim=True), edges).expand(level.shape),
        "given the same coefficient a page before": torch.bucketize(previous, edges),
        "given the neighbouring latent": torch.bucketize(size.roll(1, 2), edges),
    }
    if bins is not None:
        out[LINKED] = bins.long()
    return out


def entropies(book: Codebook, links: Links, train: Pages, test: Pages) -> dict[str, float]:
    """Packed bits by ideal bits under each context."""
    bits: dict[str, float] = {}
    packed = 0
    below: list[list[torch.Tensor]] = [[], []]
    for codec, given, *sides in zip(book.layers, links.layers, train, test, strict=True):
        if not isinstance(codec, LayerCodec):
            continue
        packed += sides[1].numel() * 8
        bins = [predicted_bins(given, torch.cat(z, 2)) if given is not None else None for z in below]
        found = [contexts(codec, pages, b) for pages, b in zip(sides, bins, strict=True)]
        for name in found[0]:
            need = layer_bits(codec, sides, [f[name] for f in found], name == LINKED)
            bits[name] = bits.get(name, 0.0) + need
        if given is None:
            bits[LINKED] = bits.get(LINKED, 0.0) + layer_bits(codec, sides, [f["order 0"] for f in found], False)
        below = [[*z, layer_integers(codec, p)][-SOURCES:] for z, p in zip(below, sides, strict=True)]
    return {name: packed / value for name, value in bits.items()}


def layer_bits(codec: LayerCodec, sides: Sequence[torch.Tensor], given: Sequence[torch.Tensor], signed: bool) -> float:
    """Bits of the second side's codes with tables counted on the first side, symmetric as the codes are."""
    total, start = 0.0, 0
    for unit, bounds in zip(codec.units, codec._bounds, strict=True):
        span = slice(start, start + unit.rank)
        start += unit.rank
        for width, place in unit.width_places.items():
            tables = []
            for pages, context in zip(sides, given, strict=True):
                flat = context[:, :, span].flatten(1).index_select(1, place)
                index = flat * 2**width + unpacked_codes(unit, pages[:, bounds], width)
                tables.append(np.bincount(index.flatten().numpy(), minlength=32 * 2**width).reshape(32, -1))
            # Codes are symmetric around zero: so are the tables, and a signed context turns over with them.
            used = BINS if signed else len(tables[0])
            mirror = tables[0][:used][:: -1 if signed else 1, ::-1]
            count = 0.02 * (tables[0].sum(0) / max(1, tables[0].sum()) + 1e-6) + tables[0]
            count[:used] += mirror
            total -= float((tables[1] * np.log2(count / count.sum(1, keepdims=True))).sum())
    return total


# == size and speed =================================================================================================


def measured(
    rows: Sequence[Pages],
    archive: Callable[[Pages], list[bytes]],
    restore: Callable[[list[bytes]], Pages],
    rounds: int,
) -> dict[str, float]:
    """Ratio and MB/s of archiving and restoring every row; what comes back is compared."""
    packed = sum(p.numel() for row in rows for p in row if p is not None)
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(rounds):
        begin = time.process_time()
        blobs = [archive(row) for row in rows]
        middle = time.process_time()
        back = [restore(blob) for blob in blobs]
        times["encode"].append(middle - begin)
        times["decode"].append(time.process_time() - middle)
    for row, again in zip(rows, back, strict=True):
        assert all(torch.equal(a, b) for a, b in zip([p for p in row if p is not None], again, strict=True))
    size = sum(len(data) for blob in blobs for data in blob)
    speed = {f"{name}_mb_s": packed / statistics.median(t) / 1e6 for name, t in times.items()}
    return {"packed_bytes": packed, "archive_bytes": size, "ratio": packed / size, **speed}


def measure_setting(book: Codebook, train: Pages, rows: Sequence[Pages], rounds: int) -> dict[str, Any]:
    """Everything about one setting."""
    begin = time.perf_counter()
    links = fit_links(book, train)
    seconds = time.perf_counter() - begin
    full = [(i, codec) for i, codec in enumerate(book.layers) if codec is not None]

    def small(row: Pages) -> list[bytes]:
        chain = Chain(book, links)
        return [chain.archive(i, row[i]) for i, _ in full]

    def small_back(blobs: list[bytes]) -> Pages:
        chain = Chain(book, links)
        return [chain.restore(i, data) for (i, _), data in zip(full, blobs, strict=True)]

    return {
        "fast": measured(
            rows,
            lambda row: [archive_pages(row[i], codec) for i, codec in full],
            lambda blobs: [restore_pages(data, codec) for (_, codec), data in zip(full, blobs, strict=True)],
            rounds,
        ),
        "small": measured(rows, small, small_back, max(1, rounds // 2)),
        "links_bytes": sum(t.numel() * t.element_size() for t in links.tensors().values()),
        "links_fit_seconds": seconds,
        "entropy_ratios": entropies(book, links, train, joined(rows)),
    }


def measure_session(loaded: LoadedModel, book: Codebook, ids: Sequence[int]) -> dict[str, float]:
    """A whole row saved and loaded: bytes in the store, bytes of the file, seconds."""
    store = PageStore(loaded.shape, book)
    row = store.open()
    for begin in range(0, len(ids), 512):
        piece = list(ids[begin : begin + 512])
        batch = store.begin([(row, len(piece))])
        with torch.inference_mode(), attending(loaded.model, batch):
            position = torch.arange(begin, begin + len(piece))[None]
            loaded.model(input_ids=torch.tensor([piece]), position_ids=position, use_cache=False, logits_to_keep=1)
        batch.commit()
    with tempfile.TemporaryDirectory() as folder:
        begin_time = time.perf_counter()
        path = save_row(store, row, ids, Path(folder) / "row.session", model=loaded.fingerprint)
        saved = time.perf_counter()
        load_row(store, path, model=loaded.fingerprint)
        loaded_at = time.perf_counter()
        size = path.stat().st_size
    return {
        "tokens": len(ids),
        "row_bytes": store.row_nbytes(row),
        "file_bytes": size,
        "save_seconds": saved - begin_time,
        "load_seconds": loaded_at - saved,
    }


def where_from() -> dict[str, Any]:
    """Provenance with the compressor's version, and files by name: where they lay is nobody's business."""
    facts = provenance()
    facts["versions"]["zstandard"] = zstandard.__version__
    facts["command"] = " ".join(Path(word).name if "/" in word else word for word in facts["command"].split(" "))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--settings", default="")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded, profile = load_model(options.model), SpectralProfile.load(options.profile)
    profile.check_model(loaded)
    names = options.settings.split(",") if options.settings else [row.name for row in profile.ladder]
    books = {name: profile.codebook(name) for name in names}
    per_file = -(-options.calibration_tokens // 2048 // len(options.calibration))
    train: dict[str, list[Pages]] = {name: [] for name in names}
    test: dict[str, list[Pages]] = {name: [] for name in names}
    sample: list[int] = []
    for path in options.calibration:
        for ids in text_windows(loaded, path, per_file, 2048, options.seed):
            for name, pages in pages_of(loaded, books, ids).items():
                train[name].append(pages)
    for path in options.text:
        for ids in text_windows(loaded, path, 1, options.tokens, options.seed + 1):
            sample = sample or ids
            for name, pages in pages_of(loaded, books, ids).items():
                test[name].append(pages)
    result: dict[str, Any] = {
        "model": Path(options.model).name,
        "profile_hash": profile.content_hash,
        "texts": [path.name for path in options.text],
        "calibration": [path.name for path in options.calibration],
        "tokens_per_text": options.tokens,
        "calibration_tokens": 2048 * len(train[names[0]]),
        "seed": options.seed,
        "rounds": options.rounds,
        **where_from(),
        "settings": {},
    }
    for name in names:
        found = measure_setting(books[name], joined(train.pop(name)), test.pop(name), options.rounds)
        found["session"] = measure_session(loaded, books[name], sample)
        result["settings"][name] = found
        fast, small = found["fast"], found["small"]
        print(
            f"{name:>6}: fast {fast['ratio']:.3f} ({fast['encode_mb_s']:.0f} / {fast['decode_mb_s']:.0f} MB/s), "
            f"small {small['ratio']:.3f} ({small['encode_mb_s']:.1f} / {small['decode_mb_s']:.1f} MB/s); "
            + ", ".join(f"{k} {v:.3f}" for k, v in found["entropy_ratios"].items()),
            flush=True,
        )
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What cheap contexts could save in the cold tier: ideal sizes of codes given predictions of many kinds.

    python bench/research/exp9.py MODEL PROFILE TEXT_FOLDER CALIBRATION_FOLDER [--parts maps,tokens,first,products]
        [--settings 8x] [--calibration-tokens 24576] [--tokens 2048] [--json FILE]

maps: a linear map of layers below, of all their latents or of the few that say most (fitted as in spectral.link_fit).
tokens: a table with every token's mean latents, whatever came before it. first: the first layer's pages computed from
the token ids, whose keys and values depend on nothing else. products: what maps cost in arithmetic.

Ratios are packed bits by the bits that a coder with tables counted on calibration pages needs (per layer and width),
over pages of five held-out texts. "ranks" replaces a code by its rank given the prediction's bin and counts the ranks
alone: what a Huffman coder that knows nothing of the prediction can reach. See docs/cold-tier.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cold_tier import pages_of, text_windows

from spectral import SpectralProfile
from spectral.bits import dct_matrix, frequency_classes
from spectral.codec import Codebook, LayerCodec
from spectral.hf import LoadedModel, load_model, observing
from spectral.hf_reading import last_hidden
from spectral.provenance import provenance

RIDGE = 0.02
BINS = {31: [(i + 0.5) / 4 for i in range(-15, 15)], 8: [-1.2, -0.7, -0.3, 0.0, 0.3, 0.7, 1.2], 5: [-1, -0.35, 0.35, 1],
        4: [-0.6, 0.0, 0.6], 3: [-0.4, 0.4], 2: [0.0]}  # fmt: skip
"""Edges of predictions, in deviations of what is predicted."""


class Layer:
    """One layer's pages of both sides: levels in deviations [n, P, R], coefficients, codes by width."""

    def __init__(self, codec: LayerCodec, sides: Sequence[torch.Tensor]) -> None:
        self.codec = codec
        self.deviation = torch.cat([unit.deviation for unit in codec.units], 1)
        self.level = [
            torch.cat([u.levels(p[:, b]) for u, b in zip(codec.units, codec._bounds, strict=True)], 2) for p in sides
        ]
        self.y = [level * self.deviation for level in self.level]
        self.codes = [
            torch.cat([u.codes(p[:, b]).view(len(p), codec.page_tokens, -1)
                       for u, b in zip(codec.units, codec._bounds, strict=True)], 2) for p in sides
        ]  # fmt: skip
        self.width = np.concatenate([u.layout.row_widths for u in codec.units], 1)  # [P, R]
        self.places = {int(w): torch.from_numpy(np.flatnonzero(self.width.ravel() == w))
                       for w in np.unique(self.width) if w}  # fmt: skip
        self.packed_bits = sides[1].numel() * 8
        self.code_bits = int(self.width.astype(np.int64).sum()) * len(sides[1])


def tables_bits(codes: Sequence[torch.Tensor], contexts: Sequence[torch.Tensor], width: int, bins: int) -> float:
    """Bits of the second side's codes with tables counted on the first; both turn over with the sign."""
    counts = []
    for code, context in zip(codes, contexts, strict=True):
        index = context.long() * 2**width + code
        counts.append(np.bincount(index.flatten().numpy(), minlength=bins * 2**width).reshape(bins, -1))
    table = counts[0] + counts[0][::-1, ::-1]
    table = table + 0.02 * (table.sum(0) / max(1, table.sum()) + 1e-6)
    return -float((counts[1] * np.log2(table / table.sum(1, keepdims=True))).sum())


def own_bits(symbols: np.ndarray, size: int) -> float:
    """Bits of symbols with their own table, its header left out."""
    counts = np.bincount(symbols, minlength=size).astype(np.float64)
    counts = counts[counts > 0]
    return -float((counts * np.log2(counts / counts.sum())).sum())


def ridge(gram: torch.Tensor, cross: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[kept, R] map from the kept sources, scaled as in spectral.link_fit."""
    scale = gram.diagonal()[keep].sqrt().clamp_min(1e-9)
    part = gram[keep][:, keep] / scale[:, None] / scale
    part += RIDGE * part.trace() / len(part) * torch.eye(len(part), dtype=part.dtype)
    return torch.linalg.solve(part, cross[keep] / scale[:, None]) / scale[:, None]


def trusted(layer: Layer, predictions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Predictions [n, P, R] in the target's units -> in deviations, each class and latent as far as it is to be
    trusted (a Wiener gain from the first side)."""
    inside = [p / layer.deviation for p in predictions]
    for rows in frequency_classes(layer.codec.page_tokens):
        span = slice(rows[0], rows[-1] + 1)
        x = inside[0][:, span]
        gain = (x * layer.level[0][:, span]).sum((0, 1)) / x.pow(2).sum((0, 1)).clamp_min(1e-9)
        for p in inside:
            p[:, span] *= gain.clamp(0, 1.2)
    return inside


def predictability(layer: Layer, predictions: list[torch.Tensor]) -> torch.Tensor:
    """Share of each coefficient's variance that is predicted, [P, R]."""
    level, p = layer.level[0], predictions[0]
    return (1 - (level - p).pow(2).mean(0) / level.pow(2).mean(0).clamp_min(1e-9)).clamp(0, 1)


def coded(layer: Layer, predictions: list[torch.Tensor] | None) -> dict[str, float]:
    """Bits of a layer's codes given predictions, by number of bins and by coder."""
    out: dict[str, float] = {}
    flat = [code.flatten(1) for code in layer.codes]
    if predictions is None:
        plain = sum(
            tables_bits([c.index_select(1, place) for c in flat], [torch.zeros(1)] * 2, width, 1)
            for width, place in layer.places.items()
        )
        return {"order 0": plain}
    share = predictability(layer, predictions).flatten()
    for bins, edges in BINS.items():
        context = [torch.bucketize(p, torch.tensor(edges)).flatten(1) for p in predictions]
        ideal = ranks = grouped = 0.0
        for width, place in layer.places.items():
            code = [c.index_select(1, place) for c in flat]
            given = [c.index_select(1, place) for c in context]
            ideal += tables_bits(code, given, width, bins)
            counts = np.bincount((given[0] * 2**width + code[0]).flatten().numpy(), minlength=bins * 2**width)
            table = counts.reshape(bins, -1)
            order = np.argsort(np.argsort(-(table + table[::-1, ::-1]), 1, kind="stable"), 1, kind="stable")
            rank = order.ravel()[(given[1] * 2**width + code[1]).numpy()]  # [n, places]
            ranks += own_bits(rank.ravel(), 2**width)
            groups = np.digitize(share.index_select(0, place).numpy(), [0.05, 0.12, 0.2, 0.3, 0.45])
            grouped += sum(own_bits(rank[:, groups == g].ravel(), 2**width) for g in np.unique(groups))
        out |= {f"{bins} bins": ideal, f"{bins} bins, ranks": ranks, f"{bins} bins, ranks in groups": grouped}
    return out


def variants(count: int) -> Iterator[tuple[str, int, int | None]]:
    """(name, layers below, sources kept of all of them or None) for a layer with `count` layers below it."""
    for below, kept in ((1, 32), (1, 64), (1, 128), (1, 256), (1, None), (2, 64), (2, 128), (2, 256), (2, None),
                        (3, 128), (3, 256), (3, None)):  # fmt: skip
        if count:
            yield f"{below} below, {kept or 'all'} sources", below, kept


def measure(book: Codebook, train: list[Any], test: list[Any]) -> dict[str, Any]:
    totals: dict[str, dict[str, float]] = {}
    packed = code_bits = 0
    bits_of_layer, shares = [], []
    below: list[Layer] = []
    for number, (codec, *sides) in enumerate(zip(book.layers, train, test, strict=True)):
        began = time.monotonic()
        layer = Layer(codec, sides)
        packed, code_bits = packed + layer.packed_bits, code_bits + layer.code_bits
        found = {"": coded(layer, None)}
        plain = found[""]["order 0"]
        bits_of_layer.append(layer.packed_bits)
        shares.append({int(w): int(p.numel() * w) for w, p in layer.places.items()})
        if below:
            x = [torch.cat([b.y[side] for b in reversed(below)], 2) for side in (0, 1)]
            flat, target = x[0].flatten(0, 1), layer.y[0].flatten(0, 1)
            gram, cross = (flat.T @ flat).double(), (flat.T @ target).double()
            sizes = np.cumsum([b.y[0].shape[2] for b in reversed(below)])
        for name, count, kept in variants(3):
            if not below:
                found[name] = dict.fromkeys([f"{b} bins{c}" for b in BINS for c in ("", ", ranks", ", ranks in groups")], plain)
                continue
            usable = torch.arange(int(sizes[min(count, len(below)) - 1]))
            if kept is not None and kept < len(usable):
                whole = ridge(gram, cross, usable)
                power = (whole / layer.y[0].pow(2).mean((0, 1)).sqrt().double()).pow(2).sum(1) * gram.diagonal()[usable]
                usable = usable[power.topk(kept).indices.sort().values]
            weight = ridge(gram, cross, usable).float()
            found[name] = coded(layer, trusted(layer, [part[..., usable] @ weight for part in x]))
        for name, bits in found.items():
            for coder, value in bits.items():
                totals.setdefault(name, {})[coder] = totals.get(name, {}).get(coder, 0.0) + value
        below = [*below, layer][-3:]
        print(number, f"{time.monotonic() - began:.1f} s", {n: f"{layer.packed_bits / b.get('31 bins', b.get('order 0')):.3f}" for n, b in found.items()}, flush=True)
    return {
        "packed_bits": packed, "code_bits": code_bits, "packed_bits_by_layer": bits_of_layer, "bits_by_width": shares,
        "ratios": {name: {coder: packed / value for coder, value in bits.items()} for name, bits in totals.items()},
    }  # fmt: skip


def token_table(
    loaded: LoadedModel, name: str, book: Codebook, windows: list[Any], rows: list[Any], extra: list[list[int]]
) -> dict[str, Any]:
    """Mean latents of every token over the calibration pages and `extra` windows (which are read here); calibration
    pages are predicted without their own share."""
    dct = torch.from_numpy(dct_matrix(16)).float()
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    sums = [torch.zeros(vocabulary, sum(u.rank for u in codec.units)) for codec in book.layers]
    count = torch.zeros(vocabulary)
    for number, ids in enumerate([*windows[0], *extra]):
        pages = rows[0][number] if number < len(rows[0]) else pages_of(loaded, {name: book}, ids)[name]
        tokens = torch.tensor(ids[book.sinks : book.sinks + 16 * len(pages[0])])
        count.index_add_(0, tokens, torch.ones(len(tokens)))
        for total, codec, part in zip(sums, book.layers, pages, strict=True):
            y = torch.cat([u.coefficients(part[:, b]) for u, b in zip(codec.units, codec._bounds, strict=True)], 2)
            total.index_add_(0, tokens, torch.matmul(dct.T, y).flatten(0, 1))
    flat = [
        torch.cat([torch.tensor(ids[book.sinks : book.sinks + 16 * len(r[0])]) for ids, r in zip(w, side, strict=True)])
        for w, side in zip(windows, rows, strict=True)
    ]
    totals: dict[str, float] = {}
    packed, by_layer = 0, []
    for index, codec in enumerate(book.layers):
        layer = Layer(codec, [torch.cat([r[index] for r in side]) for side in rows])
        z = torch.matmul(dct.T, layer.y[0]).flatten(0, 1)
        own = (sums[index][flat[0]] - z) / count[flat[0]][:, None]  # counts are one more: shrunk a little
        other = sums[index][flat[1]] / (count[flat[1]] + 1)[:, None]
        predicted = [torch.matmul(dct, p.view(-1, 16, p.shape[1])) for p in (own, other)]
        found = coded(layer, trusted(layer, predicted))
        by_layer.append(layer.packed_bits / found["31 bins"])
        packed += layer.packed_bits
        for coder, value in found.items():
            totals[coder] = totals.get(coder, 0.0) + value
    return {
        "tokens_counted": int(count.sum()), "test_tokens_seen": float((count[flat[1]] > 0).float().mean()),
        "table_numbers": sum(x.numel() for x in sums), "ratios_by_layer_31_bins": by_layer,
        "ratios": {coder: packed / value for coder, value in totals.items()},
    }  # fmt: skip


def first_layer(loaded: LoadedModel, book: Codebook, windows: list[list[int]]) -> dict[str, Any]:
    """Codes of layer 0 minus those of rounded keys, values and weights (which a table by token could hold, so that the
    sums are exact anywhere): packed bits by bits of the differences, by bits of numbers and weights."""
    codec, seen = book.layers[0], []

    def observe(layer: int, _: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> None:
        if layer == 0:
            seen.append((key[0].float(), value[0].float()))

    for ids in windows:
        with torch.no_grad(), observing(observe):
            last_hidden(loaded, ids)
    unit, project = codec.units[0], codec.units[0].project

    def codes(sides: list[list[torch.Tensor]]) -> torch.Tensor:
        out = []
        for pair in zip(*sides, strict=True):
            count = (pair[0].shape[1] - book.sinks - book.window) // 16
            cut = [x[:, book.sinks : book.sinks + 16 * count].unflatten(1, (count, 16)).transpose(0, 1) for x in pair]
            out.append(unit.codes(codec.encode(cut[0], cut[1], torch.arange(count))))
        return torch.cat(out)

    def rounded(x: torch.Tensor, largest: torch.Tensor, bits: int) -> torch.Tensor:
        step = largest / (2 ** (bits - 1) - 1)
        return torch.round(x / step) * step

    sides = [list(side) for side in zip(*seen, strict=True)]
    exact, out = codes(sides), {}
    for numbers, weights in ((8, 8), (8, 12), (12, 12)):
        coarse = []
        for side in sides:
            largest = torch.stack([x.abs().amax(1, keepdim=True) for x in side]).amax(0)
            coarse.append([rounded(x, largest, numbers) for x in side])
        unit.project = rounded(project, project.abs().amax(0, keepdim=True), weights)
        found = codes(coarse)
        unit.project = project
        bits = sum(
            own_bits(((exact[:, p].int() - found[:, p].int()) % 2**w).numpy().ravel(), 2**w)
            for w, p in unit.width_places.items()
        )
        out[f"{numbers} bits, weights of {weights}"] = len(exact) * codec.page_nbytes * 8 / bits
    whole = sum(layer.page_nbytes for layer in book.layers)
    return {"share_of_bytes": codec.page_nbytes / whole, "ratios_of_the_layer": out}


def products(book: Codebook) -> dict[str, float]:
    """Operations per packed byte of maps of all latents with bits of the layers below, class by class."""
    counts = [len(rows) for rows in frequency_classes(16)]
    used = [(np.concatenate([u.layout.widths for u in codec.units], 1) > 0).sum(1) for codec in book.layers]
    nbytes = sum(codec.page_nbytes for codec in book.layers)
    out = {"codes per byte": float(sum(int((n * u).sum()) for u in used for n in [np.array(counts)]) / nbytes)}
    for sources in (1, 2, 3):
        total = sum(
            2 * rows * int(used[layer][c]) * sum(int(used[layer - s][c]) for s in range(1, min(sources, layer) + 1))
            for layer in range(len(used)) for c, rows in enumerate(counts)
        )  # fmt: skip
        out[f"{sources} below"] = total / nbytes
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--parts", default="maps,tokens,first,products")
    parser.add_argument("--settings", default="8x")
    parser.add_argument("--table-tokens", type=int, default=196_608)
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded, profile = load_model(options.model, dtype="float32"), SpectralProfile.load(options.profile)
    books = {name: profile.codebook(name) for name in options.settings.split(",")}
    files = [sorted(folder.glob("*.txt")) for folder in (options.calibration, options.texts)]
    per_file = -(-options.calibration_tokens // 2048 // len(files[0]))
    windows = [
        [ids for path in files[0] for ids in text_windows(loaded, path, per_file, 2048, 0)],
        [ids for path in files[1] for ids in text_windows(loaded, path, 1, options.tokens, 1)],
    ]
    more = -(-options.table_tokens // 2048 // len(files[0]))
    extra = [ids for path in files[0] for ids in text_windows(loaded, path, more, 2048, 0)[per_file:]]
    result: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        result = json.loads(options.json.read_text(encoding="utf-8"))
    facts = {
        "model": Path(options.model).name, "profile_hash": profile.content_hash, **provenance(),
        "calibration_tokens": sum(map(len, windows[0])), "tokens": sum(map(len, windows[1])),
    }  # fmt: skip
    for name, book in books.items():
        rows = [[pages_of(loaded, {name: book}, ids)[name] for ids in side] for side in windows]
        train, test = ([torch.cat(layer) for layer in zip(*side, strict=True)] for side in rows)
        for part in options.parts.split(","):
            if part == "maps":
                found = measure(book, train, test)
            elif part == "tokens":
                found = token_table(loaded, name, book, windows, rows, extra)
            else:
                found = first_layer(loaded, book, windows[1]) if part == "first" else products(book)
            result.setdefault(part, {})[name] = {**found, "run": facts}
            print(name, part, json.dumps(found, indent=1), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The first layer's pages computed from the token ids, the others in the fast cold form: size and speed.

    python bench/research/exp11.py MODEL PROFILE TEXT_FOLDER [JSON]

A table holds every token's keys and values at layer 0 before RoPE in whole numbers of `bits` bits; pages are encoded
from it and what differs from the real ones is stored. The arithmetic is the codec's own in float32 (which another
machine may round otherwise: a real coder would need whole numbers throughout). Processor time of one thread.
"""

import json
import sys
import time
from pathlib import Path

import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cold_tier import pages_of, text_windows

from spectral import SpectralProfile
from spectral.archive import archive_pages, restore_pages
from spectral.baselines.transforms import rope
from spectral.hf import load_model, observing
from spectral.hf_reading import rotary_tables
from spectral.provenance import provenance

torch.set_num_threads(1)
loaded, profile = load_model(sys.argv[1], dtype="float32"), SpectralProfile.load(Path(sys.argv[2]))
book = profile.codebook("8x")
codec, unit, heads = book.layers[0], book.layers[0].units[0], loaded.shape.layers[0].kv_heads
windows = [text_windows(loaded, path, 1, 4096, 1)[0] for path in sorted(Path(sys.argv[3]).glob("*.txt"))]
rows = [pages_of(loaded, {"8x": book}, ids)["8x"] for ids in windows]
tables = rotary_tables(loaded, 0, 4096)
sides = [[], []]


def observe(layer, _, key, value, *rest):
    if layer == 0:
        for side, x in zip(sides, (key, value)):
            side.append(x[0].transpose(0, 1).float())


with torch.no_grad(), observing(observe):
    for at in range(0, loaded.model.get_input_embeddings().weight.shape[0], 1024):  # at position 0 RoPE turns nothing
        ids = torch.arange(at, at + 1024)[None]
        loaded.model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, logits_to_keep=1)
squeeze = zstandard.ZstdCompressor(level=1)
result = {"model": Path(sys.argv[1]).name, "profile_hash": profile.content_hash, **provenance(), "bits": {}}
for bits in (8, 12):
    keys, values = (torch.cat(side) for side in sides)
    for x in (keys, values):
        step = x.abs().amax(0, keepdim=True) / (2 ** (bits - 1) - 1)
        x.copy_(torch.round(x / step) * step)
    best = [9e9] * 4
    for _ in range(5):
        marks, predicted = [time.process_time()], []
        for ids, row in zip(windows, rows):
            places = torch.arange(book.sinks, book.sinks + 16 * len(row[0]))
            tokens = torch.tensor(ids)[places]
            key = rope(keys.index_select(0, tokens), places, *tables)
            parts = [x.view(len(row[0]), 16, heads, -1).transpose(1, 2) for x in (key, values.index_select(0, tokens))]
            predicted.append(codec.encode(*parts, torch.arange(len(row[0]))))
        marks.append(time.process_time())
        first = [squeeze.compress((p ^ row[0]).t().contiguous().numpy()) for p, row in zip(predicted, rows)]
        marks.append(time.process_time())
        others = [[archive_pages(x, layer) for x, layer in zip(row[1:], book.layers[1:])] for row in rows]
        marks.append(time.process_time())
        for blobs in others:
            [restore_pages(blob, layer) for blob, layer in zip(blobs, book.layers[1:])]
        marks.append(time.process_time())
        best = [min(old, b - a) for old, a, b in zip(best, marks, marks[1:])]
    packed = sum(page.numel() for row in rows for page in row)
    size = sum(map(len, first)) + sum(len(blob) for blobs in others for blob in blobs)
    result["bits"][bits] = {
        "layer_0_ratio": sum(row[0].numel() for row in rows) / sum(map(len, first)),
        "ratio": packed / size,
        "without_layer_0": sum(p.numel() for row in rows for p in row[1:]) / sum(len(b) for bs in others for b in bs),
        "bytes_equal": float(torch.cat([(p == row[0]).flatten() for p, row in zip(predicted, rows)]).float().mean()),
        "table_bytes": (keys.numel() + values.numel()) * bits // 8,
        "encode_mb_s": packed / sum(best[:3]) / 1e6,
        "decode_mb_s": packed / (best[0] + best[1] + best[3]) / 1e6,
        "ns_per_byte": dict(zip(("predict", "difference", "fast encode", "fast decode"), (t / packed * 1e9 for t in best))),
    }
    print(bits, result["bits"][bits], flush=True)
if len(sys.argv) > 4:
    Path(sys.argv[4]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

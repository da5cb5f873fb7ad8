"""Encoding, prefill over codes and squeezing on a GPU, beside what they are judged by: time and error.

    python bench/kernels_codes.py [--only squeeze|prefill|encode] [--gib 10] [--json FILE]

Prefill is one layer's attention of a chunk over codes, window and itself, beside bf16 flash attention over as many
keys; encoding is what a chunk's pages cost beside the matrix products and attention of a layer of an 8B model. Layers
are those of bench/kernels.py: 32 query and 8 KV heads of 128, a synthetic spectrum, the bits that a setting of that
name spends. Times are medians of CUDA-graph replays, in microseconds. Without a GPU `--check` alone runs: small
layers in Triton's interpreter, errors only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.kernels import copy_bandwidth
from spectral.kernels.check_codes import (
    code_error,
    exact_chunk,
    expected,
    opened,
    random_pages,
    relative,
    squeeze_error,
)
from spectral.kernels.chunk import TILES, attend_chunk, part_attention, tiled
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.encode import Tokens, encode
from spectral.kernels.squeeze import SqueezeLayer
from spectral.kernels.synthetic import BITS, synthetic_codec
from spectral.kernels.timing import microseconds
from spectral.pools import empty_pool
from spectral.provenance import provenance

Row = dict[str, Any]

LAYERS = 4
"""Layers of a squeezed cache: each has a pool of its own, of more than 2^31 bytes."""

RECENT = 116
"""Tokens of the exact window."""

MODEL, HIDDEN = 4096, 14336
"""Sizes of an 8B model's layer."""


def squeeze_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A cache of --gib GiB of codes at 8x to 16x: all layers' pools, one after another."""
    device = torch.device("cuda")
    old, new = (synthetic_codec(args.kv_heads, args.dim, BITS[setting], "cuda") for setting in ("8x", "16x"))
    layer = SqueezeLayer(old, new)
    error = squeeze_error(layer, old, new)
    pages = max(1, int(args.gib * 2**30) // (LAYERS * old.page_nbytes))
    pools = [empty_pool(pages, old.page_nbytes, device).random_(0, 256) for _ in range(LAYERS)]
    outs = [empty_pool(pages, new.page_nbytes, device) for _ in range(LAYERS)]

    def run() -> None:
        for pool, out in zip(pools, outs, strict=True):
            layer(pool, out)

    spent = microseconds(run)
    nbytes = [LAYERS * pages * codec.page_nbytes for codec in (old, new)]
    yield {
        "case": "squeeze 8x to 16x",
        "old_bytes": nbytes[0],
        "new_bytes": nbytes[1],
        "ms": spent / 1e3,
        "bytes_per_us": sum(nbytes) / spent,
        "ms_of_10_gib": spent / 1e3 * 10 * 2**30 / nbytes[0],
        "asked_ms": 60,
        "wrong": error,
    }


def prefill_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A chunk of --chunk queries over --context tokens of codes, at 8x and 16x."""
    heads, kv_heads, dim, count = args.heads, args.kv_heads, args.dim, args.chunk
    rng = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=rng)

    q, k, v = (noise(h, count, dim) for h in (heads, kv_heads, kv_heads))
    recent = noise(kv_heads, RECENT, 2 * dim).float()
    past = [noise(1, kv_heads, args.context + RECENT + count, dim) for _ in range(2)]
    flash = microseconds(lambda: flash_attention(q[None], *past, dim**-0.5))
    half, q_half = [x[0].half() for x in past], q.half()
    own = microseconds(lambda: part_attention(q_half, *half, causal=True, scaling=dim**-0.5))
    cudnn = cudnn_attention(q[None], *past)

    def through(tiles: tuple[int, int, int, int]) -> float:
        return microseconds(lambda: tiled(q_half, half[0], half[1], tiles, causal=True, scaling=dim**-0.5))

    ours = {name: through(tiles) for name, tiles in TILES.items() if name != "wide"}
    for setting in ("8x", "16x"):
        codec = synthetic_codec(kv_heads, dim, BITS[setting], "cuda")
        layer = CodeLayer(codec)
        pages = args.context // codec.page_tokens
        pool = random_pages(codec, pages)
        ids = torch.randperm(pages, device="cuda", generator=rng).int()

        def run(layer: CodeLayer = layer, pool: torch.Tensor = pool, ids: torch.Tensor = ids) -> torch.Tensor:
            return attend_chunk(layer, pool, ids, recent, q, k, v, scaling=dim**-0.5)

        spent = microseconds(run)
        opening = microseconds(lambda layer=layer, pool=pool, ids=ids: opened(layer, pool, ids))  # type: ignore[misc]
        some = min(64, count)
        before = torch.cat([recent, torch.cat([k, v], -1)[:, : count - some].float()], 1)
        last = (x[:, count - some :] for x in (q, k, v))
        wanted = exact_chunk(expected(codec, pool, ids), before, *last, dim**-0.5)
        yield {
            "case": f"prefill of {count} over {args.context}",
            "setting": setting,
            "us": spent,
            "opening_us": opening,
            "fp16_attention_us": own,
            "chunk_kernel_us": ours,
            "cudnn_bf16_us": cudnn,
            "flash_bf16_us": flash,
            "times_flash": spent / flash,
            "asked": 1.3,
            "relative_error": relative(run()[:, count - some :], wanted),
        }


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float | None:
    """Time of cuDNN's attention without a mask, None where it does not serve."""
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return microseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    except RuntimeError:
        return None


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """PyTorch's flash attention, causal from the last query and key on: q [1, Hq, n, d], k, v [1, H, t, d]."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scaling)[0]


def encode_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The pages of a chunk of 2,048 tokens at 8x beside what a layer of an 8B model takes for them."""
    heads, kv_heads, dim, count = args.heads, args.kv_heads, args.dim, 2048
    x = torch.randn(count, MODEL, device="cuda", dtype=torch.bfloat16)
    sizes = ((MODEL, (heads + 2 * kv_heads) * dim), (heads * dim, MODEL), (MODEL, 2 * HIDDEN), (HIDDEN, MODEL))
    weights = [torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    inputs = [torch.randn(count, size[0], device="cuda", dtype=torch.bfloat16) for size in sizes]
    sides = [x[:, :dim].expand(1, h, count, dim).contiguous() for h in (heads, kv_heads, kv_heads)]

    def layer_step() -> None:
        for a, w in zip(inputs, weights, strict=True):
            torch.mm(a, w)
        flash_attention(*sides, dim**-0.5)

    whole = microseconds(layer_step)
    codec = synthetic_codec(kv_heads, dim, BITS["8x"], "cuda")
    layer = CodeLayer(codec)
    pages, held = count // codec.page_tokens, RECENT - 4
    ids = torch.arange(pages, device="cuda", dtype=torch.int32)
    keys, values = expected(codec, random_pages(codec, pages), ids)
    noisy = [side + 0.1 * torch.randn_like(side) for side in (keys, values)]
    old = torch.cat(noisy, -1)[:, :held].contiguous()
    new = [side[:, held:].bfloat16() for side in noisy]
    pool = torch.zeros((pages, codec.page_nbytes), dtype=torch.uint8, device="cuda")
    blocks = codec.frame.blocks(pages)
    spent = microseconds(lambda: encode(layer, Tokens(old, *new, 127, 32), ids, blocks, pool, ids))
    encode(layer, Tokens(old, *new), ids, blocks, pool, ids)
    paged = [
        torch.cat([side[:, :held], fresh.float()], 1).unflatten(1, (pages, -1)).transpose(0, 1)
        for side, fresh in zip(noisy, new, strict=True)
    ]
    wanted = codec.encode(paged[0], paged[1], ids.long())
    codes = [
        torch.cat([u.codes(found[:, span]).int() for u, span in zip(codec.units, codec._bounds, strict=True)], 1)
        for found in (pool, wanted)
    ]
    apart = (codes[0] - codes[1]).abs()
    yield {
        "case": f"encode {count} tokens",
        "us": spent,
        "layer_us": whole,
        "share_of_layer": spent / whole,
        "asked": 0.05,
        "codes_apart": float((apart > 0).float().mean()),
        "most_apart": int(apart.max()),
    }


def check_rows(device: str) -> Iterator[Row]:
    """Errors of small layers."""
    old, new = (synthetic_codec(2, 16, bits, device) for bits in (2.5, 1.0))
    yield {"case": "squeeze", "wrong": squeeze_error(SqueezeLayer(old, new), old, new)}
    yield {"case": "encode and open", "wrong": code_error(CodeLayer(old))}


CASES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "squeeze": squeeze_rows,
    "prefill": prefill_rows,
    "encode": encode_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES), help="one of the measurements")
    parser.add_argument("--gib", type=float, default=10.0, help="codes of the squeezed cache")
    parser.add_argument("--context", type=int, default=30 * 1024, help="tokens of codes in a prefill")
    parser.add_argument("--chunk", type=int, default=2048, help="queries of a prefill")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--check", action="store_true", help="only the errors of small layers; runs without a GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"rows": []}
    if args.check:
        rows = check_rows("cuda" if torch.cuda.is_available() else "cpu")
    elif torch.cuda.is_available():
        found["copy_bytes_per_us"] = copy_bandwidth()
        rows = (row for name, case in CASES.items() if args.only in (None, name) for row in case(args))
    else:
        parser.error("an NVIDIA GPU is needed (--check runs without one)")
    for row in rows:
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        document = {"argv": vars(args) | {"json": str(args.json)}, "provenance": provenance(device), **found}
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

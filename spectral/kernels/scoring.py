"""How packed pages are read (spectral.kernels.decode): weights by blocks, or by shares of them where blocks are few,
and sums with those; by kernels of their own where rows are tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton

from spectral.kernels.cells import held_runs
from spectral.kernels.choices import DecodeChoices, block_pages
from spectral.kernels.flat import flat_score_kernel
from spectral.kernels.mix import factor_kernel, mix_kernel
from spectral.kernels.pieces import pieces_kernel
from spectral.kernels.score import block_runs, score_kernel
from spectral.kernels.shares import STAGES, gather_kernel, share_kernel, stage_nbytes
from spectral.kernels.tables import PIECE_WARPS, SHARES

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels, StepTables

MIX_WARPS = 4

FEW_BLOCKS = 4
"""Blocks of a sequence up to which each may be a part by itself: sums of many take longer to put together than they
save."""

WEIGHT_SLACK = 4096
"""Weights behind the last that pieces_kernel asks for ahead of time, and does not use."""
FACTOR_TILE = 64


@cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return bool(triton.knobs.runtime.interpret)


def by_lane(warps: int, registers: int = 128) -> dict[str, Any]:
    """How kernels are launched that are written by lane; as many registers as leave sixteen warps room, or others."""
    fast = not interpreted()
    return {"FAST": fast, "num_warps": warps, "num_stages": 1, **({"maxnreg": registers} if fast else {})}


@dataclass
class Asked:
    """A step's pages and queries: projected fp16 [H, B * blocks * G, R], const fp32 [B, blocks, Hq, 8], or operands and
    shifts of spectral.kernels.operands; unit int32 [units, 4] (LayerKernels.units). group: heads of a KV head; cap: of
    softcap, in units of log2, 0 for none; parts: groups of 16 query heads in the largest unit; blocks: of the longest
    row."""

    layer: LayerKernels
    choices: DecodeChoices
    pool: torch.Tensor
    step: StepTables
    projected: torch.Tensor
    const: torch.Tensor
    unit: torch.Tensor
    group: int
    cap: float
    parts: int
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, units, head groups of a unit, blocks."""
        return self.step.count.shape[0], self.unit.shape[0], self.parts, self.blocks

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory on the step's device."""
        return torch.empty(shape, dtype=dtype, device=self.pool.device)


@dataclass
class Sums:
    """Sums of fields over parts of rows: outs fp32 [rows, splits, parts, 16, outputs]; of weights, sums fp32 [rows,
    splits, units, parts, C, 16], both relative to the largest score of a part, tops fp32 [rows, splits, units, parts,
    16]. each: blocks of a part."""

    outs: torch.Tensor
    sums: torch.Tensor
    tops: torch.Tensor
    splits: int
    each: int


def weights(asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and blocks' largest scores, as spectral.kernels.score leaves them."""
    rows, units, parts, blocks = asked.shape
    tokens = blocks * block_pages(asked.layer.codec) * asked.layer.codec.page_tokens
    weight = asked.empty(rows, units, parts, tokens * 16, dtype=torch.float16)
    top = asked.empty(rows, units, parts, blocks, 16)
    if units * parts * blocks * rows <= asked.choices.shared_blocks:
        _by_shares(asked, weight, top)
    else:
        _by_blocks(asked, weight, top)
    return weight, top


def _by_blocks(asked: Asked, weight: torch.Tensor, top: torch.Tensor) -> None:
    """A program for each block."""
    layer, step = asked.layer, asked.step
    rows, units, parts, blocks = asked.shape
    pages, runs = block_pages(layer.codec), layer.key_rank // 16
    warps, entries = pages // 8, layer.tables["stepped"]
    score_kernel[(units * parts, blocks, rows)](
        asked.projected, asked.const, asked.pool, step.pages, step.count, asked.unit, layer.tables["cells"], entries,
        weight, top,
        step.pages.stride(0), layer.codec.page_nbytes, asked.projected.stride(0), runs, blocks, blocks * pages,
        units, asked.const.shape[2], entries.stride(0),
        GROUPS=parts, GROUP=asked.group, CLASSES=layer.classes, P=layer.codec.page_tokens,
        HOLD=block_runs(runs, warps, layer.classes) if asked.choices.hold else 0, SOFTCAP=asked.cap, WARPS=warps,
        **by_lane(warps),
    )  # fmt: skip


def _by_shares(asked: Asked, weight: torch.Tensor, top: torch.Tensor) -> None:
    """SHARES programs for every eight pages, and one for each block that puts their sums together."""
    layer, step = asked.layer, asked.step
    rows, units, parts, blocks = asked.shape
    pages, runs, tokens = block_pages(layer.codec), layer.key_rank // 16, layer.codec.page_tokens
    octets, fast = blocks * pages // 8, not interpreted()
    held = held_runs(runs, int(STAGES) * stage_nbytes(layer.classes)) if asked.choices.hold_share else 0
    sums = asked.empty(rows, units, parts, octets, SHARES, 4 * tokens, 32)
    share_kernel[(units * parts * SHARES, octets, rows)](
        asked.projected, asked.pool, step.pages, step.count, asked.unit, layer.tables["share"],
        layer.tables["entry"], sums,
        step.pages.stride(0), layer.codec.page_nbytes, asked.projected.stride(0), runs, blocks, units, octets,
        GROUPS=parts, GROUP=asked.group, CLASSES=layer.classes, P=tokens, PB=pages, SHARES=SHARES,
        HOLD=held, FAST=fast, num_warps=1, num_stages=1,
    )  # fmt: skip
    gather_kernel[(units * parts, blocks, rows)](
        sums, asked.const, step.count, asked.unit, weight, top,
        blocks, blocks * pages, units, octets, asked.const.shape[2],
        GROUPS=parts, CLASSES=layer.classes, P=tokens, PB=pages, SHARES=SHARES, SOFTCAP=asked.cap, FAST=fast,
        num_warps=pages // 2, num_stages=1,
    )  # fmt: skip


def sums_of_weights(asked: Asked, weight: torch.Tensor, largest: torch.Tensor) -> Sums:
    """Codes times weights, item by item."""
    layer, step, choices = asked.layer, asked.step, asked.choices
    rows, units, parts, blocks = asked.shape
    page_blocks = block_pages(layer.codec)
    wanted = max(1, triton.cdiv(choices.mix_programs, rows * layer.items))
    each = triton.cdiv(triton.cdiv(blocks, wanted), choices.split_blocks) * choices.split_blocks
    splits = triton.cdiv(blocks, each)
    factor = asked.empty(rows, units, parts, blocks, 16, dtype=torch.int32)
    found = _sums(asked, splits, each)
    factor_kernel[(units * parts, splits, rows)](
        step.count, largest, factor, found.tops, blocks, units, splits, each,
        GROUPS=parts, PB=page_blocks, SB=FACTOR_TILE, num_warps=4,
    )  # fmt: skip
    mix_kernel[(rows, splits, layer.items * parts)](
        asked.pool, step.pages, step.count, layer.tables["item"], weight, factor, found.outs, found.sums,
        step.pages.stride(0), layer.codec.page_nbytes, blocks, blocks * page_blocks, units, splits, layer.outputs, each,
        GROUPS=parts, CLASSES=layer.classes, P=layer.codec.page_tokens, PB=page_blocks, WARPS=MIX_WARPS,
        **by_lane(MIX_WARPS),
    )  # fmt: skip
    return found


def flat_sums(asked: Asked) -> Sums:
    """Weights by blocks, and sums with them, of pages whose rows are tokens."""
    layer, step, codec = asked.layer, asked.step, asked.layer.codec
    rows, units, parts, blocks = asked.shape
    pages = block_pages(codec)
    size = blocks * pages * codec.page_tokens * 16
    weight = asked.empty(rows * units * parts * size + WEIGHT_SLACK, dtype=torch.float16)
    octets = blocks * pages // 8
    top, total = asked.empty(2, rows, units, parts, octets, 16)
    score_each = max(1, min(blocks, rows * units * parts * blocks // asked.choices.score_programs))
    flat_score_kernel[(units * parts, triton.cdiv(blocks, score_each), rows)](
        asked.projected, asked.const, asked.pool, step.pages, step.count, asked.unit, layer.tables["cells"],
        layer.tables["span"], weight, top, total,
        step.pages.stride(0), codec.page_nbytes, blocks, blocks * pages, units, asked.const.shape[2],
        asked.projected.shape[4], score_each,
        GROUPS=parts, SOFTCAP=asked.cap, WARPS=pages // 8, **by_lane(pages // 8),
    )  # fmt: skip
    shares, each = _piece_programs(asked)
    splits = triton.cdiv(blocks, each)
    found = _sums(asked, splits, each)
    piece, pieces = (layer.tables[name + {1: "", 2: "_two", 4: "_four"}[shares]] for name in ("piece", "pieces"))
    pieces_kernel[(units * parts * shares, splits, rows)](
        asked.pool, step.pages, step.count, piece, pieces, weight, top, total, found.outs, found.tops,
        found.sums,
        step.pages.stride(0), codec.page_nbytes, blocks, blocks * pages, units, splits, layer.outputs, each,
        piece.stride(1),
        GROUPS=parts, PB=pages, SHARES=shares, **by_lane(PIECE_WARPS),
    )  # fmt: skip
    return found


def _piece_programs(asked: Asked) -> tuple[int, int]:
    """Programs for a unit's pieces of a part of a sequence, and blocks of a part."""
    rows, units, parts, blocks = asked.shape
    wanted, lines = asked.choices.piece_programs, rows * units * parts
    shares = 1 if lines * blocks >= wanted else 2 if lines * blocks >= wanted // 8 else 4
    each = triton.cdiv(blocks, max(1, triton.cdiv(wanted, lines * shares)))
    return shares, max(1 if blocks <= FEW_BLOCKS else 2, each)


def _sums(asked: Asked, splits: int, each: int) -> Sums:
    rows, units, parts, _ = asked.shape
    return Sums(
        asked.empty(rows, splits, parts, 16, asked.layer.outputs),
        asked.empty(rows, splits, units, parts, asked.layer.classes, 16),
        asked.empty(rows, splits, units, parts, 16),
        splits,
        each,
    )

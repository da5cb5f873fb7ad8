"""How weights are launched (spectral.kernels.decode): by blocks, or by shares of them where blocks are few."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

from spectral.kernels.cells import held_runs
from spectral.kernels.choices import DecodeChoices, block_pages
from spectral.kernels.score import block_runs, score_kernel
from spectral.kernels.shares import STAGES, gather_kernel, share_kernel, stage_nbytes
from spectral.kernels.tables import SHARES

if TYPE_CHECKING:
    from spectral.kernels.decode import LayerKernels, StepTables


@cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return bool(triton.knobs.runtime.interpret)


@dataclass
class Scoring:
    """What becomes weights, and where: projected fp16 [H, B * blocks * G, R], const fp32 [B, blocks, Hq, 8]; weight
    and largest as spectral.kernels.score leaves them. cap: of softcap, in units of log2, 0 for none."""

    layer: LayerKernels
    choices: DecodeChoices
    pool: torch.Tensor
    step: StepTables
    projected: torch.Tensor
    const: torch.Tensor
    unit: torch.Tensor
    weight: torch.Tensor
    largest: torch.Tensor
    group: int
    cap: float

    def by_blocks(self) -> None:
        """A program for each block."""
        layer, step = self.layer, self.step
        rows, units, parts, blocks, _ = self.largest.shape
        pages, runs, fast = block_pages(layer.codec), layer.key_rank // 16, not interpreted()
        warps, entries = pages // 8, layer.tables["stepped"]
        score_kernel[(units * parts, blocks, rows)](
            self.projected, self.const, self.pool, step.pages, step.count, self.unit, layer.tables["cells"], entries,
            self.weight, self.largest,
            step.pages.stride(0), layer.codec.page_nbytes, self.projected.stride(0), runs, blocks, blocks * pages,
            units, self.const.shape[2], entries.stride(0),
            GROUPS=parts, GROUP=self.group, CLASSES=layer.classes, P=layer.codec.page_tokens,
            HOLD=block_runs(runs, warps) if self.choices.hold else 0, SOFTCAP=self.cap, WARPS=warps, FAST=fast,
            num_warps=warps,
            num_stages=1, **({"maxnreg": 128} if fast else {}),
        )  # fmt: skip

    def by_shares(self) -> None:
        """SHARES programs for every eight pages, and one for each block that puts their sums together."""
        layer, step = self.layer, self.step
        rows, units, parts, blocks, _ = self.largest.shape
        pages, runs, tokens = block_pages(layer.codec), layer.key_rank // 16, layer.codec.page_tokens
        octets, fast = blocks * pages // 8, not interpreted()
        held = held_runs(runs, int(STAGES) * stage_nbytes(layer.classes)) if self.choices.hold_share else 0
        sums = torch.empty((rows, units, parts, octets, SHARES, 4 * tokens, 32), device=self.largest.device)
        share_kernel[(units * parts * SHARES, octets, rows)](
            self.projected, self.pool, step.pages, step.count, self.unit, layer.tables["share"],
            layer.tables["entry"], sums,
            step.pages.stride(0), layer.codec.page_nbytes, self.projected.stride(0), runs, blocks, units, octets,
            GROUPS=parts, GROUP=self.group, CLASSES=layer.classes, P=tokens, PB=pages, SHARES=SHARES,
            HOLD=held, FAST=fast, num_warps=1, num_stages=1,
        )  # fmt: skip
        gather_kernel[(units * parts, blocks, rows)](
            sums, self.const, step.count, self.unit, self.weight, self.largest,
            blocks, blocks * pages, units, octets, self.const.shape[2],
            GROUPS=parts, CLASSES=layer.classes, P=tokens, PB=pages, SHARES=SHARES, SOFTCAP=self.cap, FAST=fast,
            num_warps=pages // 2, num_stages=1,
        )  # fmt: skip

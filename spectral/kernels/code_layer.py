"""What the kernels that make and open codes must know of one layer's codec, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spectral.aside import to_device
from spectral.codec import LayerCodec
from spectral.kernels.choices import CodeChoices, chosen, layer_shape
from spectral.kernels.quads import code_parcels, unit_columns

TILE = 16
"""Tokens that a program transforms at once: one page of 16 or two of 8."""


def unsupported_codes(codec: LayerCodec) -> str:
    """Why the kernels cannot encode and open a codec's pages, in words; "" where they can."""
    return "" if codec.page_tokens in (8, 16) else f"pages of {codec.page_tokens} tokens (8 or 16 are supported)"


@dataclass
class QuadTable:
    """Quads of one launch on a device. double: whether they have two planes; table: int32 [6, m]: word of the high
    fields, first bit there, bits of a field, word of the low fields (-1: none), first bit there, place over 4; zero:
    fp32 [m]: the code of zero."""

    double: bool
    table: torch.Tensor
    zero: torch.Tensor


@dataclass
class FieldTable:
    """Bytes with fields of one size on a device. at: int32 [m]; table: int32 [Q, 3, m]: place of the first field (-1:
    none), bits of its code, shift of the field in it."""

    bits: int
    at: torch.Tensor
    table: torch.Tensor


@dataclass
class Side:
    """Keys or values. column: int32 [H] where a head's numbers begin among those of a token, units one after another;
    mean, spread: fp32 [H, dim]: what is subtracted before coding, and about the standard deviation (a power of two).
    """

    column: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    @property
    def dim(self) -> int:
        return self.mean.shape[1]


class CodeLayer:
    """One layer's codec, as the kernels want it.

    Attributes:
        latents: S of all units; numbers: of a token, all units'.
        columns, spans: first latent, and first number of a token, of every unit and the end.
        transform: fp32 [TILE, TILE]: the DCT of one page or two, rows are frequencies.
        spread: of every unit fp32 [numbers of the unit]: of keys, then of values.
        size: fp32 [P * S]: what one step of every coefficient's code stands for; gain: one over it, 0 without bits.
    """

    def __init__(self, codec: LayerCodec) -> None:
        self.codec = codec
        units = list(codec.units)
        self.device = units[0].mean.device
        self.columns = [int(c) for c in unit_columns(codec)]
        self.latents = self.columns[-1]
        self.spans = [int(s) for s in np.cumsum([0, *(sum(unit.numbers) for unit in units)])]
        self.numbers = self.spans[-1]
        found = code_parcels(codec)
        self.size, self.gain, *rest = found.parcel.to(self.device)
        pages = TILE // codec.page_tokens
        self.transform = torch.block_diag(*[units[0].dct] * pages).contiguous()
        self.quads = [QuadTable(double, *rest[2 * double : 2 * double + 2]) for double in (False, True)]
        self.fields = [FieldTable(bits, *rest[4 + 2 * i : 6 + 2 * i]) for i, (bits, _) in enumerate(found.kinds)]
        self.keys, self.values = self._side("key"), self._side("value")
        sides = (self.keys, self.values)
        self.spread = [
            torch.cat([s.spread[slice(*unit.heads)].flatten() for s, n in zip(sides, unit.numbers, strict=True) if n])
            for unit in units
        ]
        self.shape = layer_shape(codec)

    def choices(self) -> CodeChoices:
        """What launches choose."""
        return chosen(CodeChoices, self.device, self.shape)

    def _side(self, name: str) -> Side:
        """Keys or values of all heads."""
        columns: list[int] = []
        codec = self.codec
        numbers, dim = (codec.key_units, codec.key_dim) if name == "key" else (codec.value_units, codec.value_dim)
        units = [codec.units[number] for number in numbers]
        for number, unit in zip(numbers, units, strict=True):
            before = 0 if name == "key" else unit.numbers[0]
            columns += [self.spans[number] + before + h * dim for h in range(unit.heads[1] - unit.heads[0])]
        means = [getattr(unit, f"{name}_mean").flatten(1) for unit in units]
        bases = [getattr(unit, f"{name}_decode") for unit in units]
        spread = torch.cat([basis.square().sum(2) for basis in bases]).sqrt().clamp(1e-6, 1e6)
        spread = torch.exp2(spread.log2().round())
        column = to_device(np.array(columns, dtype=np.int32), self.device)
        return Side(column, torch.cat(means).contiguous(), spread.contiguous())

    def basis(self, number: int) -> torch.Tensor:
        """A unit's latents to numbers: fp16 [numbers of the unit, R]."""
        unit = self.codec.units[number]
        return torch.cat([unit.key_decode.flatten(0, 1).half(), unit.value_decode.flatten(0, 1).half()])

    def turns(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """cos and sin of the first blocks' centres [blocks, half], fp32, and half: 0 where the frame does not turn."""
        frame = self.codec.frame
        if not frame.turns:
            return self.size, self.size, 0
        cos, sin = frame._table(blocks)
        return cos, sin, cos.shape[1]

    def block(self, page: int) -> int:
        """The block that a page of a sequence lies in."""
        return page // self.codec.frame.pages if self.codec.frame.turns else 0

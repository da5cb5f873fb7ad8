"""The frame in which keys are coded: RoPE undone up to the position within a block of tokens.

Rotary position embedding turns every key with its position. A basis fitted to turned keys has to cover all the
directions that a key can be turned to, and does not carry to positions that calibration never saw; a basis for unturned
keys needs every key turned back when it is read. In between: all keys of a block of B tokens are turned back by the
block's centre, R(-c), and so is the query that reads them. A rotation changes no inner product,
    (R(-c) q) . (R(-c) k) = q . k,
so attention on a block's codes needs one projected query per block and nothing per token, and keys only ever turn by
up to B / 2 positions, wherever the block lies. B = 0 leaves keys as RoPE made them; rotations are exact inverses
whatever the model's own RoPE looks like, so a wrong frequency costs quality and never correctness.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from spectral.aside import to_device


class BlockFrame(torch.nn.Module):
    """Rotations between a model's keys and the frame of their block.

    Args:
        frequencies: [r / 2] RoPE frequencies in radians per token (half-split layout over the first r dimensions of a
            head), or None for no rotation at all.
        block_tokens: B, a multiple of page_tokens; 0 for no rotation.
        page_tokens, sinks: page i of a sequence starts at token sinks + i * page_tokens; page i lies in block
            i // (B / page_tokens).
    """

    def __init__(
        self,
        frequencies: np.ndarray | None,
        *,
        block_tokens: int,
        page_tokens: int,
        sinks: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if block_tokens % page_tokens or block_tokens < 0:
            raise ValueError(f"the block ({block_tokens} tokens) must be a multiple of the page ({page_tokens})")
        self.pages = block_tokens // page_tokens
        """Pages of a block; 0: one frame for all."""
        self.page_tokens, self.sinks = page_tokens, sinks
        if frequencies is None or not block_tokens:
            self.pages = 0
        self._frequencies = np.zeros(0) if frequencies is None else np.asarray(frequencies, dtype=np.float64)
        self._device = torch.device(device)
        self._cos = self._sin = torch.zeros((0, self._frequencies.size), device=device)
        self._queries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._reserved = False

    @property
    def turns(self) -> bool:
        """False when the frame is the model's own."""
        return self.pages > 0

    def blocks(self, pages: int) -> int:
        """Blocks that the first `pages` pages of a sequence touch (at least one)."""
        return max(1, -(-pages // self.pages)) if self.turns else 1

    def centre(self, block: np.ndarray) -> np.ndarray:
        """Position of a block's centre, float64."""
        return self.sinks + (np.asarray(block, dtype=np.float64) + 0.5) * self.pages * self.page_tokens

    def _table(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every block's centre, [>= blocks, r / 2] float32."""
        if self._cos.shape[0] < blocks:
            count = max(blocks, 2 * self._cos.shape[0])
            angle = self.centre(np.arange(count))[:, None] * self._frequencies
            self._cos = to_device(np.cos(angle), self._device, torch.float32)
            self._sin = to_device(np.sin(angle), self._device, torch.float32)
        return self._cos, self._sin

    def reserve(self, pages: int) -> None:
        """Make the tables for sequences of so many pages, once and for all: `keys` then does not ask the device."""
        if self.turns:
            self._table(self.blocks(pages))
            self._reserved = True

    def keys(self, x: torch.Tensor, page: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Keys of whole pages into their frame (or back): x [n, H, P, d] float32, page [n] index in the sequence."""
        if not self.turns or not x.shape[0]:
            return x
        block = torch.div(page, self.pages, rounding_mode="floor")
        cos, sin = (self._cos, self._sin) if self._reserved else self._table(int(block.max()) + 1)
        cos, sin = cos[block][:, None, None], sin[block][:, None, None]
        return turn(x, cos, -sin if not back else sin)

    def queries(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        """Queries into the frame of each of the first blocks: x [B, H, G, d] float32 -> [B, blocks, H, G, d]."""
        if not self.turns:
            return x[:, None]
        cos, sin = self._query_table(blocks, x.shape[-1])
        half = self._frequencies.size
        parts = [x[..., half : 2 * half], x[..., :half]]
        swapped = torch.cat([*parts, x[..., 2 * half :]] if x.shape[-1] > 2 * half else parts, -1)
        return torch.addcmul(x[:, None] * cos, swapped[:, None], sin)

    def _query_table(self, blocks: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries [..., width], and what they are with the halves of their first dimensions swapped, are
        multiplied with: [blocks, 1, 1, width] float32."""
        found = self._queries.get(width)
        if found is None or found[0].shape[0] < blocks:
            cos, sin = self._table(blocks)
            rest = width - 2 * cos.shape[1]
            wide = F.pad(torch.cat([cos, cos], 1), (0, rest), value=1.0), F.pad(torch.cat([sin, -sin], 1), (0, rest))
            found = self._queries[width] = wide[0][:, None, None], wide[1][:, None, None]
        return found[0][:blocks], found[1][:blocks]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_i, x_{i + r/2}) of the first r dimensions: cos, sin [..., r / 2], broadcast over x."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        turned.append(x[..., 2 * half :].expand(*turned[0].shape[:-1], -1))
    return torch.cat(turned, -1)

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral.frames import BlockFrame, turn


def rope(x: torch.Tensor, position: torch.Tensor, frequencies: np.ndarray) -> torch.Tensor:
    angle = position.double()[..., None] * torch.tensor(frequencies)
    return turn(x, angle.cos().float(), angle.sin().float())


def test_inner_products_survive_and_keys_turn_by_half_a_block_at_most() -> None:
    """Post-RoPE keys of any page, in their frame, are the unturned keys turned by at most half a block."""
    frequencies, page, sinks, block = np.array([1.0, 0.1, 0.003]), 8, 4, 64
    frame = BlockFrame(frequencies, block_tokens=block, page_tokens=page, sinks=sinks)
    index = torch.tensor([0, 3, 7, 8, 1000])
    position = sinks + index[:, None] * page + torch.arange(page)
    plain = torch.randn(5, 2, page, 8)  # 6 of 8 dimensions are rotated
    turned = rope(plain, position[:, None], frequencies)
    framed = frame.keys(turned, index)
    relative = position - torch.tensor(frame.centre(index.numpy() // 8))[:, None]
    assert float(relative.abs().max()) <= block / 2
    torch.testing.assert_close(framed, rope(plain, relative[:, None], frequencies), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(frame.keys(framed, index, back=True), turned, rtol=1e-4, atol=1e-4)
    query = torch.randn(1, 2, 3, 8)
    by_block = frame.queries(query, frame.blocks(1001))
    for n, i in enumerate(index.tolist()):
        torch.testing.assert_close(
            by_block[0, i // 8] @ framed[n].transpose(1, 2), query[0] @ turned[n].transpose(1, 2), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("frame", [BlockFrame(None, block_tokens=64, page_tokens=8, sinks=0),
                                   BlockFrame(np.ones(4), block_tokens=0, page_tokens=8, sinks=0)])  # fmt: skip
def test_a_frame_that_does_not_turn(frame: BlockFrame) -> None:
    x = torch.randn(2, 2, 8, 8)
    assert not frame.turns
    assert frame.blocks(99) == 1
    assert frame.keys(x, torch.arange(2)) is x
    assert frame.queries(x, 1).shape == (2, 1, 2, 8, 8)


def test_blocks_are_whole_pages() -> None:
    with pytest.raises(ValueError, match="multiple of the page"):
        BlockFrame(np.ones(4), block_tokens=20, page_tokens=8, sinks=0)
    frame = BlockFrame(np.ones(4), block_tokens=16, page_tokens=8, sinks=0)
    assert [frame.blocks(n) for n in (0, 1, 2, 3, 4, 5)] == [1, 1, 1, 2, 2, 3]

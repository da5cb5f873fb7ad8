from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral.bits import WIDTHS, frequency_classes
from spectral.layout import PLANES, page_layout

RUNS = st.lists(st.lists(st.sampled_from(WIDTHS), min_size=3, max_size=3), min_size=4, max_size=4)


@given(RUNS)
@settings(max_examples=60, deadline=None)
def test_a_layout_places_every_field_once(runs: list[list[int]]) -> None:
    """4 classes of a page of 8 tokens, 3 runs of 16 latents: no byte twice, and fields make up every code."""
    widths = np.repeat(np.array(runs), 16, axis=1)
    layout = page_layout(widths, 8)
    byte = np.concatenate([*(plane.byte for plane in layout.planes), np.zeros(0, dtype=np.int64)])
    assert len(set(byte.tolist())) == byte.size and (byte < layout.nbytes).all()
    assert layout.nbytes % 8 == 0 and layout.nbytes - byte.size < 8
    assert layout.bits == int(layout.row_widths.astype(int).sum()) <= 8 * byte.size
    found: dict[int, set[tuple[int, int]]] = {}
    for plane in layout.planes:
        assert plane.byte.size * 8 == plane.place.size * plane.bits
        for place, shift in zip(plane.place.tolist(), plane.shift.tolist(), strict=True):
            if place >= 0:
                assert (plane.bits, shift) not in found.setdefault(place, set())
                found[place].add((plane.bits, shift))
    for place, width in enumerate(layout.row_widths.ravel().tolist()):
        assert found.get(place, set()) == set(PLANES.get(width, ()))


@given(RUNS)
@settings(max_examples=40, deadline=None)
def test_cells_are_aligned_to_their_quarters(runs: list[list[int]]) -> None:
    layout = page_layout(np.repeat(np.array(runs), 16, axis=1), 8)
    counts = [len(rows) for rows in frequency_classes(8)]
    for strip in layout.strips:
        assert strip.rows == counts[strip.number]
        assert strip.start % min(8, strip.cell_nbytes // 4) == 0
        assert strip.stop - strip.start == strip.cells * strip.cell_nbytes


def test_layouts_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="5"):
        page_layout(np.full((4, 16), 5), 8)
    with pytest.raises(ValueError, match="classes"):
        page_layout(np.full((3, 16), 2), 8)
    uneven = np.zeros((4, 16), dtype=int)
    uneven[0, :3] = 1
    with pytest.raises(ValueError, match="each run of 16"):
        page_layout(uneven, 8)
    with pytest.raises(ValueError, match="each run of 16"):
        page_layout(np.full((4, 20), 2), 8)

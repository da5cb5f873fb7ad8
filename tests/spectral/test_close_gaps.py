"""A model's weights move together: what merged projections left free lies in one piece afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import spectral.residency as residency
from spectral.residency import close_gaps

HIDDEN, INNER, KV = 64, 224, 16


class Heap:
    """Places as torch's allocator gives them: the smallest free one that is large enough, neighbours joined."""

    def __init__(self) -> None:
        self.free = [(0, 1 << 40)]

    def take(self, size: int) -> int:
        room, at = min((room, at) for at, room in self.free if room >= size)
        self.free.remove((at, room))
        if room > size:
            self.free.append((at + size, room - size))
        return at

    def give(self, at: int, size: int) -> None:
        for place, room in [*self.free]:
            if place + room == at or at + size == place:
                self.free.remove((place, room))
                at, size = min(at, place), size + room
        self.free.append((at, size))


class Storage:
    """What `close_gaps` asks of a storage, with its bytes."""

    device = torch.device("cpu")

    def __init__(self, heap: Heap, size: int) -> None:
        self.heap, self.size, self.at = heap, 0, 0
        self.resize_(size)
        self.wanted = torch.randint(0, 255, (size,), dtype=torch.uint8)
        self.bytes.copy_(self.wanted)

    def resize_(self, size: int) -> None:
        if self.size:
            self.heap.give(self.at, self.size)
        self.size, self.at = size, self.heap.take(size) if size else 0
        self.bytes = torch.zeros(size, dtype=torch.uint8)

    def nbytes(self) -> int:
        return self.size

    def data_ptr(self) -> int:
        return self.at


def merged(heap: Heap, layers: int, order: random.Random | None) -> list[Storage]:
    """What is left of a model's weights, loaded one after another, where q, k and v, and gate and up, became one."""
    square, narrow, wide = HIDDEN * HIDDEN, HIDDEN * KV, HIDDEN * INNER
    kinds = {"down": wide, "gate": wide, "up": wide, "k": narrow, "o": square, "q": square, "v": narrow}
    names = [(layer, kind) for layer in range(layers) for kind in kinds]
    if order is not None:
        order.shuffle(names)
    held = {name: Storage(heap, kinds[name[1]]) for name in names}
    for parts in ("qkv", ("gate", "up")):
        for layer in range(layers):
            own = [held.pop((layer, part)) for part in parts]
            held[layer, "+".join(parts)] = Storage(heap, sum(part.size for part in own))
            for part in own:
                part.resize_(0)
    return list(held.values())


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_no_gap_is_left(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap()
    storages = merged(heap, 12, None if seed is None else random.Random(seed))
    live = sum(storage.size for storage in storages)
    assert max(storage.at + storage.size for storage in storages) > 1.05 * live, "there are gaps to close"

    def found(model: Any, kind: str) -> Iterator[Any]:
        yield from random.Random(0).sample(storages, len(storages))

    monkeypatch.setattr(residency, "storages_of", found)
    monkeypatch.setattr(residency, "bytes_of", lambda storage: storage.bytes)
    monkeypatch.setattr(residency, "APART_BYTES", 0)
    close_gaps(torch.nn.Module(), "cpu")
    assert max(storage.at + storage.size for storage in storages) == live and len(heap.free) == 1
    assert all(torch.equal(storage.bytes, storage.wanted) for storage in storages)


def test_tensors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 1000), torch.nn.Linear(300, 1000), torch.nn.Linear(3, 2))
    model[1].weight = model[0].weight
    part = model[0].weight.data[10:20]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = model[2].weight.data_ptr()
    monkeypatch.setattr(residency, "APART_BYTES", 1 << 12)
    close_gaps(model, "cpu")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr() and model[2].weight.data_ptr() == small
    assert torch.equal(part, before["0.weight"][10:20])


def test_without_memory_for_the_buffer_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(600, 600)
    place, before = model.weight.data_ptr(), model.weight.clone()

    def empty(*size: int, **more: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        assert close_gaps(model, "cpu") == 0
    assert model.weight.data_ptr() == place and torch.equal(model.weight, before)

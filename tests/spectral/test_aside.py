"""Copies to a device that do not wait (what of it runs without a GPU)."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from spectral.aside import Parcel, Staging, aside, fetch, to_device

CPU = torch.device("cpu")


def test_a_tensor_of_its_own_of_the_wanted_type() -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    same, other = to_device(array, CPU), to_device(array.T, "cpu", torch.float32)
    assert same.dtype == torch.float64 and other.dtype == torch.float32 and other.shape == (3, 2)
    array[0, 0] = 9
    assert same[0, 0] == 0 and other[0, 0] == 0
    fixed = np.ones(3)
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_device(fixed, CPU).sum() == 3


def test_on_a_cpu_nothing_changes() -> None:
    with aside([CPU, CPU]):
        assert to_device(np.ones(2), CPU).sum() == 2


def test_staged_copies_outlive_the_memory_they_passed_through() -> None:
    staging, waits = Staging([], size=1024), []
    wait = staging.wait
    staging.wait = lambda: (waits.append(0), wait())[1]  # type: ignore[method-assign]
    sources = [torch.full((n,), float(n), dtype=kind) for n in (1, 7, 50, 33) for kind in (torch.float32, torch.int64)]
    copies = [staging.copy(x, CPU) for x in (*sources, torch.zeros(3, 0), torch.ones(400))]
    assert waits  # it was full in between
    for source, copy in zip(sources, copies, strict=False):
        assert copy.dtype == source.dtype and torch.equal(copy, source)
    assert copies[-2].shape == (3, 0) and copies[-1].sum() == 400  # nothing to copy; more than there is room for


def test_what_is_fetched_is_on_the_cpu() -> None:
    x = torch.arange(4)
    assert fetch(x).tolist() == [0, 1, 2, 3] and fetch(x[::2]).tolist() == [0, 2]


def test_a_parcel_brings_all_arrays_as_they_were() -> None:
    arrays = [np.arange(7, dtype=np.int32), np.ones((2, 0, 3)), np.arange(6, dtype=np.float32).reshape(2, 3).T]
    parcel = Parcel.of(arrays)
    found = parcel.to("cpu")
    for array, tensor in zip(arrays, found, strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
        assert (tensor.data_ptr() - found[0].data_ptr()) % 64 == 0 or not array.size
    parcel.data[:] = 0
    assert found[0].tolist() == [*range(7)]

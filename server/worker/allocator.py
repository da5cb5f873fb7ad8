"""What a worker asks of torch's allocator of GPU memory. Read by torch when it is imported: call this before."""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping
from typing import Any

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's own; whoever sets one of them has chosen."""

_NEEDED = (102, 103)
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED and _HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED of the CUDA
driver's API: torch asks for pieces with such handles, and where there are none (WSL) every allocation would fail."""


def prepare_allocator(environ: MutableMapping[str, str] = os.environ, driver: Any = None) -> bool:
    """Have memory come from the driver, and go back to it, in pieces of 20 MB ("expandable segments") where all GPUs
    that this process sees can do that; whether it is so.

    Otherwise torch takes segments as large as a model's weights, and returns a segment only when nothing lies in it:
    bytes that a squeeze frees there stay with this process.
    """
    if any(environ.get(name) for name in VARIABLES) or not _maps_pieces(driver):
        return False
    environ[VARIABLES[0]] = "expandable_segments:True"
    return True


def _maps_pieces(driver: Any) -> bool:
    """Whether there are GPUs and the driver can map pieces of memory on each (some virtual GPUs cannot)."""
    try:
        cuda = driver or ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return False
        asked = [(number, name) for number in range(count.value) for name in _NEEDED]
        return bool(asked) and all(_attribute(cuda, number, name) for number, name in asked)
    except (OSError, AttributeError):  # no driver, or one that does not know these calls
        return False


def _attribute(cuda: Any, number: int, name: int) -> bool:
    device, found = ctypes.c_int(), ctypes.c_int()
    failed = cuda.cuDeviceGet(ctypes.byref(device), number)
    failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(found), name, device)
    return not failed and bool(found.value)

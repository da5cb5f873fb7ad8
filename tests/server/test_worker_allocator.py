"""A worker asks torch for memory that comes and goes in pieces, where its GPUs can do that and nobody chose."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from server.worker.allocator import prepare_allocator


class Driver:
    """The CUDA driver's calls: `able` of each GPU; handles: whether pieces can have them."""

    def __init__(self, *able: bool, broken: str = "", handles: bool = True) -> None:
        self.able, self.broken, self.handles = able, broken, handles

    def _status(self, call: str) -> int:
        return 801 if call == self.broken else 0

    def cuInit(self, flags: int) -> int:
        return self._status("init")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.able)
        return self._status("count")

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number + 10
        return self._status("get")

    def cuDeviceGetAttribute(self, found: Any, attribute: int, device: ctypes.c_int) -> int:
        found._obj.value = int({102: self.able[device.value - 10], 103: self.handles}[attribute])
        return self._status("attribute")


def test_gpus_that_map_pieces() -> None:
    environ = {"PYTORCH_ALLOC_CONF": ""}
    assert prepare_allocator(environ, Driver(True, True))
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_who_has_chosen_is_left_alone(name: str) -> None:
    environ = {name: "max_split_size_mb:64"}
    assert not prepare_allocator(environ, Driver(True))
    assert environ == {name: "max_split_size_mb:64"}


@pytest.mark.parametrize(
    "driver",
    [
        Driver(), Driver(True, False), Driver(True, handles=False), object(),
        *(Driver(True, broken=call) for call in ("init", "count", "get", "attribute")),
    ],
)  # fmt: skip
def test_elsewhere_torch_does_as_it_does(driver: Any) -> None:
    environ: dict[str, str] = {}
    assert not prepare_allocator(environ, driver) and environ == {}


def test_it_can_come_before_torch() -> None:
    code = "import sys, server.worker.allocator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

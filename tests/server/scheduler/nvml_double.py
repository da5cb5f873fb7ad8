"""A test double that the real NVML binding loads: a small C library, built once, with its state in a mapped file.

The binding finds it through LD_LIBRARY_PATH, which counts when a process starts; so what uses it runs in a process of
its own, with `environment()`. Here, `Double` sets what its GPUs show, also while that process runs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import pytest

GPUS, PROCESSES = 8, 16
GPU_IS_LOST, DRIVER_NOT_LOADED = 15, 9
SOURCE = Path(__file__).with_name("nvml_double.c")


class Process(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint64), ("used", ctypes.c_uint64)]


class Gpu(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("uuid", ctypes.c_char * 64),
        ("total", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("mig", ctypes.c_uint64),  # 2: not supported
        ("error", ctypes.c_uint64),
        ("processes", ctypes.c_uint64),
        ("process", Process * PROCESSES),
    ]


class State(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_uint64),
        ("init_error", ctypes.c_uint64),
        ("latency_us", ctypes.c_uint64),
        ("calls", ctypes.c_uint64),
        ("gpu", Gpu * GPUS),
    ]


class Double:
    """The library in a folder, and its state. `gpus`: total bytes of each."""

    def __init__(self, folder: Path, *gpus: int) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("the NVML double needs a C compiler")
        self._folder = folder
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)], check=True
        )
        path = folder / "nvml.state"
        path.write_bytes(bytes(ctypes.sizeof(State)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.state = State.from_buffer(self._map)
        self.state.count = len(gpus)
        for index, total in enumerate(gpus):
            gpu = self.gpu(index)
            gpu.name, gpu.uuid = f"Double {index}".encode(), f"GPU-{index}{index}".encode()
            gpu.total, gpu.mig = total, 2

    def gpu(self, index: int) -> Gpu:
        """A GPU's state, to read and to set."""
        found: Gpu = self.state.gpu[index]
        return found

    def processes(self, index: int, used: dict[int, int]) -> None:
        """Set a GPU's process list: bytes by process id."""
        gpu = self.gpu(index)
        for at, (pid, count) in enumerate(used.items()):
            gpu.process[at].pid, gpu.process[at].used = pid, count
        gpu.processes = len(used)

    def environment(self) -> dict[str, str]:
        """Variables for a process that is to see these GPUs."""
        found = {**os.environ, "LD_LIBRARY_PATH": str(self._folder)}
        found.pop("CUDA_VISIBLE_DEVICES", None)
        return {**found, "NVML_DOUBLE_STATE": str(self._folder / "nvml.state")}

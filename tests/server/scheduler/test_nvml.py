"""Devices as the real NVML binding reads them from the test double, and host memory from files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from server.scheduler.nvml import Devices, Reading
from tests.server.scheduler.nvml_double import DRIVER_NOT_LOADED, GPU_IS_LOST, Double

GIB = 2**30
Ask = Callable[..., Any]
PROGRAM = """
import json, sys
from dataclasses import asdict
from server.scheduler.nvml import Devices
devices = Devices()
for line in sys.stdin:
    devices._environ.update(json.loads(line))
    print(json.dumps([asdict(r) for r in devices.read_gpus()]), flush=True)
"""


@pytest.fixture
def double(tmp_path: Path) -> Double:
    return Double(tmp_path, 12 * GIB, 16 * GIB)


@pytest.fixture
def ask(double: Double) -> Iterator[Ask]:
    """A process that reads the GPUs again for every call; variables given are set in it first."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=double.environment(), **pipes) as process:  # type: ignore[call-overload]

        def read(**environ: str) -> Any:
            process.stdin.write(json.dumps(environ) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield read
        process.stdin.close()


def test_memory_and_processes_are_read_live(double: Double, ask: Ask) -> None:
    first = ask()
    assert [(r["device"], r["name"], r["total"], r["used"]) for r in first] == [
        ("cuda:0", "Double 0", 12 * GIB, 0),
        ("cuda:1", "Double 1", 16 * GIB, 0),
    ]
    double.gpu(1).used = 10 * GIB
    double.processes(1, {4711: 3 * GIB, 4712: 7 * GIB})
    second = ask()[1]
    assert (second["used"], second["processes"]) == (10 * GIB, {"4711": 3 * GIB, "4712": 7 * GIB})


def test_a_lost_gpu_keeps_its_place_and_comes_back(double: Double, ask: Ask) -> None:
    ask()
    double.gpu(0).error = GPU_IS_LOST
    lost, well = ask()
    assert "lost" in lost["error"] and lost["name"] == "Double 0" and not well["error"]
    double.gpu(0).error = 0
    assert [r["error"] for r in ask()] == ["", ""]


def test_a_driver_that_goes_away_is_no_exception(double: Double, ask: Ask) -> None:
    assert len(ask()) == 2
    double.gpu(0).error = double.state.init_error = DRIVER_NOT_LOADED
    assert ask()[0]["error"] != ""
    assert [r["device"] for r in ask()] == ["cuda:0", "cuda:1"], "known devices are not forgotten"
    double.gpu(0).error = double.state.init_error = 0
    assert [r["error"] for r in ask()] == ["", ""]


def test_visible_devices_are_counted_as_cuda_counts(double: Double, ask: Ask) -> None:
    assert [r["name"] for r in ask(CUDA_VISIBLE_DEVICES="1,0")] == ["Double 1", "Double 0"]
    assert [r["name"] for r in ask(CUDA_VISIBLE_DEVICES="GPU-11")] == ["Double 1"]
    assert [r["name"] for r in ask(CUDA_VISIBLE_DEVICES="0,7,1")] == ["Double 0"]
    assert ask(CUDA_VISIBLE_DEVICES="") == []


def test_mig_mode_and_latency(double: Double, ask: Ask) -> None:
    double.gpu(0).mig = 1
    double.state.latency_us = 1000
    calls = double.state.calls
    first = Reading(**{**ask()[0], "processes": {}})
    assert first.mig and double.state.calls > calls
    assert any("MIG" in note and "max_vram" in note for note in Devices().knowledge([first]))


CLOSING = """
import sys, threading, time
from server.scheduler.nvml import Devices
devices, found = Devices(), []
devices.read_gpus()
print("ready", flush=True)
sys.stdin.readline()

def read():
    try:
        found.extend(reading.error for reading in devices.read_gpus())
    except BaseException as error:
        found.append(repr(error))

thread = threading.Thread(target=read)
thread.start()
time.sleep(float(sys.argv[1]))
devices.close()
devices.close()
thread.join()
print(found, [reading.error for reading in devices.read_gpus()], flush=True)
"""


@pytest.mark.parametrize("after_s", [0.1, 0.3, 0.5])  # while they are counted, while one is looked up, and read
def test_a_read_under_way_survives_a_close(double: Double, after_s: float) -> None:
    command = [sys.executable, "-c", CLOSING, str(after_s)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=double.environment(), **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        double.state.latency_us = 200_000
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
    assert line == "['NVML: Uninitialized', 'NVML: Uninitialized'] ['', '']\n"


def test_without_a_driver_there_are_no_gpus() -> None:
    readings = Devices().read_gpus()
    assert all(isinstance(reading, Reading) for reading in readings)


def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"


def test_host_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    root = machine(tmp_path, proc__meminfo=MEMINFO)
    assert (Devices(root).read_host().total, Devices(root).read_host().free) == (16 * GIB, 8 * GIB)
    machine(root, sys__fs__cgroup__memory_dot_max="max\n", sys__fs__cgroup__memory_dot_current="5\n")
    assert Devices(root).read_host().total == 16 * GIB
    machine(root, sys__fs__cgroup__memory_dot_max=str(4 * GIB), sys__fs__cgroup__memory_dot_current=str(GIB))
    assert (Devices(root).read_host().total, Devices(root).read_host().free) == (4 * GIB, 3 * GIB)
    assert "meminfo" in Devices(tmp_path / "nowhere").read_host().error


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    plain = Devices(machine(tmp_path / "a", proc__version="Linux version 6.1"))
    wsl = Devices(machine(tmp_path / "b", proc__version="Linux version 5.15-microsoft-standard-WSL2"))
    box = Devices(machine(tmp_path / "c", _dot_dockerenv=""))
    assert plain.trusts_processes and plain.knowledge([]) == []
    assert not wsl.trusts_processes and "WSL" in wsl.knowledge([])[0]
    assert not box.trusts_processes and "container" in box.knowledge([])[0]
    assert asdict(Reading("cuda:0", error="NVML: GPU is lost"))["total"] == 0
    assert "GPU is lost" in plain.knowledge([Reading("cuda:0", error="NVML: GPU is lost")])[0]


def test_resident_bytes_of_a_process() -> None:
    import os

    assert Devices().resident(os.getpid()) > 10 * 2**20
    assert Devices().resident(2**22 + 1) == 0

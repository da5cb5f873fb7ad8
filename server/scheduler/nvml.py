"""What the devices themselves say: NVML for GPUs, /proc for host memory. Reads never raise; a failure is a reading.

NVML's figures per device are the truth about used and free bytes. Its figures per process are used only where they can
be trusted; `knowledge` says where they cannot: WSL has none, a container sees the host's process ids, and a GPU in
MIG mode shows all of its slices as one.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.scheduler.demand import HOST

log = logging.getLogger("spectral.nvml")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Reading:
    """One device at one moment. `device`: "cuda:N" as workers count, or "cpu". Bytes.

    `processes`: bytes by process id where that is known; `error`: why there are no figures (total is then 0).
    """

    device: str
    name: str = ""
    total: int = 0
    used: int = 0
    processes: dict[int, int] = field(default_factory=dict)
    mig: bool = False
    error: str = ""

    @property
    def free(self) -> int:
        """Bytes that anybody could take."""
        return max(0, self.total - self.used)


class Devices:
    """Reads all devices. `root` replaces / for the files under /proc and /sys; `environ`: the workers' environment."""

    def __init__(self, root: Path = Path("/"), environ: dict[str, str] | None = None) -> None:
        self._root = root
        self._environ = dict(os.environ) if environ is None else environ
        self._initialized = False  # another thread may close these devices in the middle of a read
        self._seen: dict[str, Reading] = {}

    def read(self) -> list[Reading]:
        """Host memory, then every GPU that workers can see. Takes milliseconds, or as long as the driver hangs."""
        return [self.read_host(), *self.read_gpus()]

    def read_host(self) -> Reading:
        """Host memory; in a container with a limit, that limit."""
        facts: dict[str, int] = {}
        try:
            for line in (self._root / "proc/meminfo").read_text().splitlines():
                name, _, value = line.partition(":")
                facts[name] = int(value.split()[0]) * 1024
            total, free = facts["MemTotal"], facts["MemAvailable"]
        except (OSError, ValueError, KeyError, IndexError) as error:
            return Reading(HOST, "host memory", error=f"/proc/meminfo cannot be read: {error}")
        group = self._root / "sys/fs/cgroup"
        try:
            limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        except (OSError, ValueError):  # no limit ("max"), or another version of cgroups
            limit, used = total, 0
        if limit < total:
            total, free = limit, min(free, limit - used)
        return Reading(HOST, "host memory", total, max(0, total - free))

    def resident(self, pid: int) -> int:
        """Bytes of host memory that a process holds; 0 for one that has ended."""
        try:
            return int((self._root / f"proc/{pid}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            return 0

    def read_gpus(self) -> list[Reading]:
        """Every visible GPU; none without a driver. A GPU that fails keeps its place and says why."""
        import pynvml

        try:
            if not self._initialized:
                pynvml.nvmlInit()
                self._initialized = True
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self.close()
            return [Reading(seen.device, seen.name, error=f"NVML: {error}") for seen in self._seen.values()]
        found = []
        for device, index in enumerate(self._visible(pynvml, count)):
            reading = self._read_gpu(pynvml, f"cuda:{device}", index)
            self._seen[reading.device] = reading if not reading.error else self._seen.get(reading.device, reading)
            found.append(reading)
        if any(reading.error for reading in found):
            self.close()  # after a lost GPU only a new initialization says more
        return found

    def _read_gpu(self, nvml: Any, device: str, index: int) -> Reading:
        known = self._seen.get(device)
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = _text(nvml.nvmlDeviceGetName(handle))
        except nvml.NVMLError as error:
            return Reading(device, known.name if known else f"GPU {index}", error=f"NVML: {error}")
        processes: dict[int, int] = {}
        mig = False
        try:
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.usedGpuMemory is not None:
                    processes[int(process.pid)] = int(process.usedGpuMemory)
            mig = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
        except (nvml.NVMLError, AttributeError):  # not every card and driver has them; both are extras
            log.debug("%s: no figures per process, or no MIG mode", device)
        return Reading(device, name, int(memory.total), int(memory.used), processes, mig)

    def _visible(self, nvml: Any, count: int) -> list[int]:
        """NVML indices in CUDA's order. Workers run with CUDA_DEVICE_ORDER=PCI_BUS_ID, which is NVML's order."""
        chosen = self._environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return list(range(count))
        indices = []
        for part in filter(None, (part.strip() for part in chosen.split(","))):
            index = int(part) if part.isdigit() else _by_uuid(nvml, part, count)
            if not 0 <= index < count:
                break  # CUDA ignores what follows one that does not exist
            indices.append(index)
        return indices

    def close(self) -> None:
        """Let go of NVML; the next read initializes it again, and one that is under way ends with errors for readings.
        Safe to call twice."""
        initialized, self._initialized = self._initialized, False
        if initialized:
            import pynvml

            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.debug("NVML did not shut down: %s", error)

    def knowledge(self, readings: list[Reading]) -> list[str]:
        """What cannot be known here, in sentences for the log, `spectral plan` and the console."""
        notes = []
        if self.is_wsl:
            notes.append(
                "WSL: the driver gives no bytes per process, and Windows may move GPU memory out unseen; "
                "what other programs use is the device's figure less our workers' own reports"
            )
        if self.in_container:
            notes.append(
                "container: NVML's process ids are the host's, so bytes per process are not used; "
                "other containers' GPU memory counts as foreign"
            )
        for reading in readings:
            if reading.mig:
                notes.append(
                    f"{reading.device} ({reading.name}) is in MIG mode: NVML counts all of its slices together; "
                    "set memory.max_vram to the slice's size"
                )
            if reading.error:
                notes.append(f"{reading.device}: {reading.error}; its last known figures are used and nothing grows")
        return notes

    @property
    def is_wsl(self) -> bool:
        """Whether this is the Windows Subsystem for Linux."""
        try:
            return "microsoft" in (self._root / "proc/version").read_text().lower()
        except OSError:
            return False

    @property
    def in_container(self) -> bool:
        """Whether this is a container with process ids of its own."""
        return (self._root / ".dockerenv").exists() or (self._root / "run/.containerenv").exists()

    @property
    def trusts_processes(self) -> bool:
        """Whether NVML's bytes per process can be matched to our workers."""
        return not self.is_wsl and not self.in_container


def _by_uuid(nvml: Any, prefix: str, count: int) -> int:
    for index in range(count):
        try:
            if _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index))).startswith(prefix):
                return index
        except nvml.NVMLError:
            continue
    return -1


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()

"""Who holds which bytes on which device, in proportion: the truth about a device from the device, attribution from the
workers, and what neither explains is foreign.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from server.scheduler.loop import Scheduler, Slot

log = logging.getLogger("spectral.devices")
KINDS = ("weights", "kv", "workspace", "foreign", "free")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def device_map(scheduler: Scheduler, root: Path = Path("/")) -> list[dict[str, Any]]:
    """Every device: total, free and foreign bytes, and segments by model and kind. The segments, foreign and free bytes
    together are the total. Blocks for some milliseconds where there are GPUs. `root`: where /proc and /sys are."""
    slots = list(scheduler.slots.values())
    devices = [_cpu([slot for slot in slots if _device(slot) == "cpu"], root)]
    for index, (name, total, free) in enumerate(_gpus()):
        device = f"cuda:{index}"
        segments = [part for slot in slots if _device(slot) == device for part in _segments(slot)]
        devices.append(_whole(device, name, total, free, segments))
    return devices


def _device(slot: Slot) -> str:
    if slot.ready is None:
        return ""
    return "cuda:0" if slot.ready.device == "cuda" else slot.ready.device


def _segments(slot: Slot) -> list[dict[str, Any]]:
    assert slot.ready is not None
    weights = {"kind": "weights", "model": slot.name, "setting": None, "bytes": slot.ready.weights_bytes}
    kv = {"kind": "kv", "model": slot.name, "setting": slot.ready.setting, "bytes": slot.stats.kv_bytes_allocated}
    return [weights, kv]


def _cpu(slots: list[Slot], root: Path) -> dict[str, Any]:
    total, available = _host_memory(root)
    segments: list[dict[str, Any]] = []
    for slot in slots:
        own = _segments(slot)
        resident = _resident(root, slot.worker.pid) if slot.worker is not None else 0
        rest = max(0, resident - sum(part["bytes"] for part in own))
        segments += [*own, {"kind": "workspace", "model": slot.name, "setting": None, "bytes": rest}]
    return _whole("cpu", "host memory", total, available, segments)


def _whole(device: str, name: str, total: int, free: int, segments: list[dict[str, Any]]) -> dict[str, Any]:
    ours = sum(part["bytes"] for part in segments)
    # Weights that are mapped from their file count as free for the kernel and as resident for the process.
    free = max(0, min(free, total - ours))
    numbers = {"total_bytes": total, "free_bytes": free, "foreign_bytes": max(0, total - free - ours)}
    return {"device": device, "name": name, **numbers, "segments": segments}


def _host_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes of this host, or of the container where that has less."""
    facts: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts[name] = int(value.split()[0]) * 1024
    total, available = facts["MemTotal"], facts["MemAvailable"]
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return total, available
    if limit.isdigit() and int(limit) < total:
        return int(limit), max(0, min(available, int(limit) - used))
    return total, available


def _resident(root: Path, pid: int) -> int:
    try:
        return int((root / f"proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):  # it has just ended
        return 0


def _gpus() -> list[tuple[str, int, int]]:
    """Name, total and free bytes of every GPU as NVML sees them; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append((name if isinstance(name, str) else name.decode(), int(memory.total), int(memory.free)))
    except pynvml.NVMLError as error:
        log.warning("NVML: %s", error)
    finally:
        pynvml.nvmlShutdown()
    return found

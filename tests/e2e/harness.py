"""Starts the real server, with its worker processes, on a free port; used by the end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], seconds: float, every: float = 0.05) -> Any:
    """Poll another process's state until it is true; its value. Raises AssertionError naming what was awaited."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(every)


def on_a_busy_machine(seconds: float) -> float:
    """A time that is promised for a machine with nothing else to do, in proportion to what this one has to do."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def ready(self) -> bool:
        """Whether all models are loaded. Fails at once if the server ended."""
        assert self.process.poll() is None, f"the server ended:\n{self.log_tail()}"
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def log_tail(self) -> str:
        """The end of what the server and its workers wrote."""
        return self.log.read_text(errors="replace")[-4000:]

    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if "server.worker.main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child.pid)
        return found

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics, summed over their labels."""
        totals: dict[str, float] = {}
        for line in self.client.get("/metrics").text.splitlines():
            match = re.match(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)$", line)
            if match:
                totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
        return totals


@contextlib.contextmanager
def running_server(folder: Path, *arguments: str, seconds: float = 60) -> Iterator[Server]:
    """The server, ready; ended when the block is left."""
    port = free_port()
    log = folder / "server.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        try:
            wait_for("the server is ready", server.ready, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{server.log_tail()}") from error
        yield server
    finally:
        server.client.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

"""A real server with real workers for a run of faults: started on a free port, measured from outside, ended by pid."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from spectral.provenance import cpu_name, git_commit

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[[argparse.Namespace, Path], Coroutine[Any, Any, dict[str, Any]]]
WORKER = "server.worker.main"
DEMO = str(ROOT / "models" / "demo-7m")


class Broken(Exception):
    """The server did not do what a run needs to go on; the message says what."""


def demo_models(settings: list[str], **limits: Any) -> list[dict[str, Any]]:
    """As many models as there are settings, all of them the embedded one: model-0, model-1, ..."""
    return [{"name": f"model-{i}", "path": DEMO, "setting": s, "limits": limits} for i, s in enumerate(settings)]


@dataclass(frozen=True)
class Footprint:
    """What the server and its workers hold. Bytes: `rss` with the pages of libraries, counted for each process; `uss`
    without what is shared with anybody; `gateway_rss`: the gateway's part; `state`: the SQLite files."""

    rss: int
    uss: int
    gateway_rss: int
    fds: int
    threads: int
    processes: int
    state: int


class Rig:
    """A running server. Made by :meth:`start`; end it with :meth:`stop`."""

    def __init__(
        self, process: subprocess.Popen[bytes], url: str, folder: Path, config: dict[str, Any], key: str = ""
    ) -> None:
        self.process, self.url, self.folder, self.config = process, url, folder, config
        self.log = folder / "server.log"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.AsyncClient(base_url=url, timeout=30, trust_env=False, headers=headers)

    @classmethod
    async def start(
        cls, folder: Path, models: list[dict[str, Any]], *, ready_s: float = 120.0, key: str = "", **sections: Any
    ) -> Rig:
        """Start a server with these models and sections of the configuration; `key`: for what the rig itself asks.
        Raises Broken where it gets not ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        server = {"state_dir": str(folder / "state"), "port": port, **sections.pop("server", {})}
        config = {"server": server, "models": models, **sections}
        path = folder / "config.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "server", "--config", str(path)]
        with (folder / "server.log").open("ab") as out:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        rig = cls(process, f"http://127.0.0.1:{port}", folder, config, key)
        try:
            await rig.until(rig.all_hot, ready_s, "all models are hot")
        except BaseException:
            await rig.stop()
            raise
        return rig

    async def stop(self) -> int:
        """End the server in good order, or by force where it does not end; its exit status."""
        await self.client.aclose()
        self.process.terminate()
        try:
            return await asyncio.to_thread(self.process.wait, 40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: float, what: str) -> float:
        """Wait for something that the server shows; the seconds that it took. Raises Broken."""
        began = time.monotonic()
        while True:
            self.must_live()
            if await condition():
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise Broken(f"{what}: not within {seconds:g} s; the log ends:\n{self.log_tail()}")
            await asyncio.sleep(0.1)

    def must_live(self) -> None:
        """Raises Broken where the gateway has ended."""
        if self.process.poll() is not None:
            raise Broken(f"the gateway ended with {self.process.returncode}; the log ends:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The end of what the server and its workers wrote."""
        return self.log.read_text(errors="replace")[-3000:]

    # ------------------------------------------------------------------------------------------ what it shows

    async def models(self) -> dict[str, Any]:
        """GET /ready: the models; empty while nothing answers."""
        try:
            found: dict[str, Any] = (await self.client.get("/ready")).json()["models"]
        except (httpx.HTTPError, ValueError, KeyError):
            return {}
        return found

    async def all_hot(self) -> bool:
        """Whether every model that is loaded at the start is hot."""
        found = await self.models()
        return bool(found) and all(m["state"] == "hot" for m in found.values() if m["load"] == "startup")

    async def idle(self) -> bool:
        """Whether all models are hot and nothing runs or waits."""
        found = await self.models()
        return await self.all_hot() and not any(m.get("running") or m.get("queued") for m in found.values())

    def worker_pids(self) -> list[int]:
        """Process ids of the living workers."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if WORKER in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child.pid)
        return found

    def footprint(self) -> Footprint:
        """What gateway and workers hold now."""
        own = psutil.Process(self.process.pid)
        living = [own]
        with contextlib.suppress(psutil.NoSuchProcess):
            living += own.children(recursive=True)
        uss = rss = fds = threads = count = 0
        gateway = 0
        for process in living:
            try:
                memory = process.memory_full_info()
                fds += process.num_fds()
                threads += process.num_threads()
            except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                continue
            uss, rss, count = uss + memory.uss, rss + memory.rss, count + 1
            gateway = memory.rss if process.pid == own.pid else gateway
        state = Path(self.config["server"]["state_dir"])
        size = sum(path.stat().st_size for path in state.glob("state.db*"))
        return Footprint(rss, uss, gateway, fds, threads, count, size)

    def signal(self, pid: int, number: signal.Signals) -> bool:
        """Send a signal to a worker; False where it has ended."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True


def provenance(seed: int) -> dict[str, Any]:
    """Where a run's figures come from: command, commit, versions, machine and what it did before, seed."""
    packages = ("torch", "transformers", "fastapi", "uvicorn", "msgspec")
    return {
        "command": " ".join(["python", "-m", f"tools.faults.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": git_commit(),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": cpu_name(),
        "load_average": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def add_output_options(found: argparse.ArgumentParser) -> None:
    """What all runs have: where the server's traces and the report go."""
    found.add_argument("--keep", type=Path, help="folder for the server's log and state; else a temporary one")
    found.add_argument("--json", type=Path, help="file for the report")


def report_of(name: str, run: Run, options: argparse.Namespace) -> int:
    """Run in a folder and report: 0 where every promise of the report held, if it has any."""
    with tempfile.TemporaryDirectory(prefix=f"spectral-{name}-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = asyncio.run(run(options, folder))
        except Broken as error:
            print(error, file=sys.stderr)
            return 1
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(report.get("promises", {}).values()) else 1

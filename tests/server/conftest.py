"""A real uvicorn on an ephemeral loopback port, with fake workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from server.app import create_app
from server.config import Settings
from server.http_limits import uvicorn_config
from server.scheduler.slots import Slot
from server.serving import GracefulServer

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FAKE = (sys.executable, str(HERE / "fake_worker.py"))


def settings(*models: dict[str, Any], **server: Any) -> Settings:
    """Settings with these models (one named "demo" where none is given), and a state of their own."""
    server.setdefault("state_dir", tempfile.mkdtemp(prefix="spectral-test-"))
    chosen = list(models) or [{"name": "demo", "aliases": ["d"]}]
    return Settings(server={"drain_seconds": 0.5, **server}, models=chosen)


def alive(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def until(condition: Callable[[], bool], within_s: float = 10.0) -> float:
    """Wait for something that another process or thread makes true; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "the condition did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - began


@dataclass
class Running:
    """A server under test."""

    url: str
    client: httpx.Client
    app: Any
    server: uvicorn.Server

    def slot(self, model: str = "demo") -> Slot:
        """The scheduler's slot, to look at."""
        slot: Slot = self.app.state.scheduler.slots[model]
        return slot

    def cancelled(self, model: str = "demo") -> int:
        """How many requests the worker was told to cancel."""
        return self.slot(model).stats.finished.get("cancelled", 0)

    def connect(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection over which this request was sent, with a small buffer for the answer; nothing is read yet."""
        data = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect((host, int(port)))
        head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        connection.sendall("\r\n".join([*head, "", ""]).encode() + data)
        return connection

    def stop(self) -> None:
        """Ask the server to end, as a signal does."""
        self.server.should_exit = True

    def ready(self) -> dict[str, Any]:
        """GET /ready: the models."""
        models: dict[str, Any] = self.client.get("/ready").json()["models"]
        return models

    def until(self, condition: Callable[[], bool], within_s: float = 10.0) -> float:
        """Wait for a condition that the server shows; the seconds that it took."""
        return until(condition, within_s)

    def until_state(self, model: str, state: str) -> float:
        """Wait until a model is in a state."""
        return self.until(lambda: self.ready()[model]["state"] == state)


@contextlib.contextmanager
def serving(config: Settings, config_file: Path | None = None, tracing: Any = None) -> Iterator[Running]:
    """Serve in a thread until the block ends. `config_file`: what a reload reads."""
    app = create_app(config, FAKE, config_file, tracing)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = GracefulServer(uvicorn_config(app, timeout_graceful_shutdown=3), app.state.scheduler)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=20.0, trust_env=False) as client:
            yield Running(url, client, app, server)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session", autouse=True)
def _import_path() -> Iterator[None]:
    """Fake workers import the server from this tree."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Two hot models, demo (alias d) and other; one on demand, later."""
    models = [{"name": "demo", "aliases": ["d"]}, {"name": "other"}, {"name": "later", "load": "on_demand"}]
    with serving(settings(*models, ping_seconds=0.1, max_body_bytes=100_000)) as running:
        running.until(lambda: running.client.get("/ready").status_code == 200)
        yield running

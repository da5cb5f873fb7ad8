"""The real thing on one machine: three Ray nodes, the demo model in two names, a gateway, an official client."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, OpenAI

from tests.e2e.harness import ROOT, Server, running_server, wait_for

if importlib.util.find_spec("ray") is None:  # this process needs no Ray; importing it takes as long as torch
    pytest.skip("ray is not installed (it is in the extras dev and ray)", allow_module_level=True)
pytestmark = pytest.mark.e2e
CONFIG = """
server: {{drain_seconds: 1, load_wait_seconds: 60}}
cluster: {{address: "{address}", node_resource: spectral, listen: 127.0.0.1, silence_seconds: 4, state_dir: {state}}}
models:
  - {{name: alpha, path: demo-7m, limits: {{context_length: 2048, max_kv_bytes: 64MiB}}}}
  - {{name: beta, path: demo-7m, limits: {{context_length: 2048, max_kv_bytes: 64MiB}}}}
"""


class Nodes:
    """Ray's nodes in their own process."""

    def __init__(self, log: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("ray_nodes.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("wb") as errors:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=errors, **pipes)
        self.log = log

    def ask(self, line: str) -> dict[str, Any]:
        """One command and its answer; Ray itself prints other lines."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for said in self.process.stdout:
            if said.startswith("{"):
                found: dict[str, Any] = json.loads(said)
                return found
        raise AssertionError(f"the nodes' process ended:\n{self.log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Of every process of Ray's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("without")), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head that serves nothing, and two nodes that do."""
    made = Nodes(tmp_path_factory.mktemp("ray") / "ray.log")
    try:
        yield made
    finally:
        assert made.process.stdin is not None
        made.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            made.process.wait(20)
        made.process.kill()
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


@pytest.fixture(scope="module")
def server(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gateway beside the head."""
    folder = tmp_path_factory.mktemp("gateway")
    for _ in range(2):
        nodes.ask("add spectral")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(address=nodes.ask("head")["address"], state=folder / "state"))
    with running_server(folder, "--cluster", "ray", "--config", str(config), seconds=120) as running:
        yield running


def places(server: Server) -> dict[str, str]:
    """The node on which each model is hot."""
    return {
        replica["model"]: node["node"]
        for node in server.client.get("/admin/nodes").json()["nodes"]
        for replica in node["replicas"]
        if replica["state"] == "hot" and not replica["retiring"]
    }


class Stream:
    """An openai client that streams one long answer after another in a thread; how each ended is kept."""

    def __init__(self, url: str, model: str) -> None:
        self.ends: list[str] = []
        self.chunks = 0
        self.stop = threading.Event()
        self._url, self._model = url, model
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            while not self.stop.is_set():
                try:
                    self._one(client)
                except APIError as error:
                    self.ends.append(f"error {error.code}")

    def _one(self, client: OpenAI) -> None:
        question: Any = [{"role": "user", "content": "Tell me about Norway."}]
        end = ""
        for chunk in client.chat.completions.create(
            model=self._model, messages=question, stream=True, max_tokens=60, temperature=0
        ):
            self.chunks += 1
            end = chunk.choices[0].finish_reason or end if chunk.choices else end
        self.ends.append(end or "no end")


@pytest.mark.alone
def test_stream_loss_and_join(server: Server, nodes: Nodes) -> None:
    before = wait_for("both models are hot", lambda: len(found := places(server)) == 2 and found, 60)
    head = nodes.ask("head")["node"]
    assert len({*before.values(), head}) == 3, "a model on each of two nodes, the gateway beside a third one"
    streams = {name: [Stream(server.url, name)] for name in ("alpha", "beta")}
    everybody = [stream for pair in streams.values() for stream in pair]
    wait_for("all stream", lambda: all(stream.chunks > 3 for stream in everybody), 60)

    nodes.ask(f"kill {before['alpha']}")
    killed = time.monotonic()
    back = lambda: places(server).get("alpha") not in (None, before["alpha"])  # noqa: E731
    wait_for("alpha is back on another node", back, 60)
    took = time.monotonic() - killed
    assert places(server)["alpha"] == before["beta"]

    added = nodes.ask("add spectral")["node"]
    server.client.post(f"/admin/nodes/{before['beta']}/drain").raise_for_status()
    wait_for("the new node serves", lambda: set(places(server).values()) == {added}, 90)
    seen = [stream.chunks for stream in everybody]
    more = lambda: all(s.chunks > n + 3 for s, n in zip(everybody, seen, strict=True))  # noqa: E731
    wait_for("all stream from the new node", more, 60)
    for stream in everybody:
        stream.stop.set()
    for stream in everybody:
        stream.thread.join(60)
        assert not stream.thread.is_alive()
    for stream in streams["beta"]:
        assert set(stream.ends) <= {"stop", "length"}, "the other model's streams were not to notice anything"
    for stream in streams["alpha"]:
        assert set(stream.ends) <= {"stop", "length", "error node_lost"} and stream.ends.count("error node_lost") <= 1
    # Starting a worker is arithmetic of one core; a machine that others keep busy takes as much longer.
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert took <= 15 * busy, f"{took:.1f} s at {busy:.1f} times the machine's cores"

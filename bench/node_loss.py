"""How long a model is away when its node loses power, with and without a worker that waits on the other node.

    python bench/node_loss.py [--rounds 3] [--spares 0,1] [--json bench/results/node_loss.json]

A head that serves nothing with a gateway beside it, and two Ray nodes of one machine. The node that has the demo model
is killed with everything on it, as by a power cut; `away_s` is the time until the model is hot on the other node and a
request has its whole answer (16 tokens). Then another node joins, and the next round begins
when the model is hot and nothing loads. What else the machine does counts: the load of each round is told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cluster import server  # noqa: E402
from bench.report import deliver, run_facts  # noqa: E402

SETTLE_S = 20.0
"""After a node has joined: its spare worker imports meanwhile."""
PATIENCE_S = 180.0


class Nodes:
    """Ray's nodes in a process of their own (tests/e2e/ray_nodes.py)."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests/e2e/ray_nodes.py")]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(next(said for said in self._process.stdout if said.startswith("{")))
        return found

    def close(self) -> None:
        """End them all."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@contextlib.contextmanager
def cluster(spares: int) -> Iterator[tuple[Nodes, httpx.Client]]:
    """Two nodes with so many spare workers each, and a client of a gateway."""
    nodes = Nodes()
    try:
        for _ in range(2):
            nodes.ask("add spectral")
        more = f"memory: {{spare_workers: {spares}}}"
        with server(nodes.ask("head")["address"], "--cluster", "ray", more=more) as url:
            with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
                yield nodes, client
    finally:
        nodes.close()


def place(client: httpx.Client) -> str:
    """The node on which the model is hot; "" where it is nowhere."""
    for node in client.get("/admin/nodes").json()["nodes"]:
        for replica in node["replicas"]:
            if replica["state"] == "hot" and not replica["retiring"]:
                return str(node["node"])
    return ""


def answered(client: httpx.Client) -> bool:
    """Whether a request got its whole answer."""
    body = {"model": "demo", "prompt": "Norway is", "max_tokens": 16, "temperature": 0}
    return client.post("/v1/completions", json=body).status_code == 200


def wait(until: Any, seconds: float = PATIENCE_S) -> None:
    began = time.monotonic()
    while not until():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"nothing came of it within {seconds:.0f} s")
        time.sleep(0.05)


def a_round(nodes: Nodes, client: httpx.Client) -> dict[str, float]:
    """One loss; seconds that the model was away."""
    wait(lambda: place(client))
    time.sleep(SETTLE_S)
    victim = place(client)
    assert answered(client)
    killing = threading.Thread(target=nodes.ask, args=(f"kill {victim}",))
    began = time.monotonic()
    killing.start()  # answered when Ray has taken the node out of its list, which is later
    wait(lambda: place(client) not in ("", victim) and answered(client))
    away, load = time.monotonic() - began, os.getloadavg()[0]
    killing.join()
    nodes.ask("add spectral")
    return {"away_s": round(away, 2), "load_average": round(load, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spares", default="0,1")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    for spares in map(int, options.spares.split(",")):
        with cluster(spares) as (nodes, client):
            rounds = [a_round(nodes, client) for _ in range(options.rounds)]
        away = [one["away_s"] for one in rounds]
        rows.append({"spare_workers": spares, "away_s_median": statistics.median(away), "rounds": rounds})
        print(json.dumps(rows[-1]), file=sys.stderr)
    import ray

    deliver({"node_loss": rows, **run_facts(), "ray": ray.__version__}, options.json)


if __name__ == "__main__":
    main()

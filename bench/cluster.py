"""What a cluster adds to one machine: the same load on a server alone and on one Ray node behind a gateway.

    python bench/cluster.py [--rounds 9] [--tokens 120] [--json bench/results/cluster.json]

Both run the demo model on one worker with one thread; rounds alternate between them, so that whatever else the machine
does meets both. A round: eight streams at once (tokens per second), then single short requests (time to first token).
On a machine that others use, --realtime keeps them away: of a full machine three processes would get more than two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import deliver, run_facts  # noqa: E402

STREAMS, SINGLE = 8, 12
CONFIG = """
server: {{port: 0, state_dir: {folder}/state}}
cluster: {{address: {address}, node_resource: spectral, listen: 127.0.0.1}}
models: [{{name: demo, path: demo-7m}}]
{more}
"""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def ray_node() -> Iterator[str]:
    """A head that serves nothing and one node that does; Ray's address."""
    command = [sys.executable, str(ROOT / "tests/e2e/ray_nodes.py")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("add spectral\nhead\n")
        process.stdin.flush()
        answers = (json.loads(line) for line in process.stdout if line.startswith("{"))
        yield next(answer["address"] for answer in answers if "address" in answer)
    finally:
        process.stdin.close()
        process.wait(60)


@contextlib.contextmanager
def server(address: str, *arguments: str, more: str = "") -> Iterator[str]:
    """A server on a free port; its URL once the model is hot. `more`: lines of its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(CONFIG.format(folder=folder, address=json.dumps(address), more=more))
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "--config", str(config), "--log-level", "warning", *arguments],
            cwd=ROOT,
            env={**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            url = next(m[0] for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield url
        finally:
            process.terminate()
            process.wait(30)


def stream(client: httpx.Client, end: int, tokens: int) -> tuple[float, int]:
    """(seconds to the first text, tokens) of one answer of a fixed length."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Tell me about Norway and its neighbours."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": {str(end): -100},
        "stream_options": {"include_usage": True},
    }
    began, first, count = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if not first and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter() - began
            if '"completion_tokens":' in line:
                count = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return first, count


def a_round(url: str, end: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens per second of eight streams, seconds to the first token of each single request."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        began = time.perf_counter()
        with ThreadPoolExecutor(STREAMS) as pool:
            counts = [n for _, n in pool.map(lambda _: stream(client, end, tokens), range(STREAMS))]
        speed = sum(counts) / (time.perf_counter() - began)
        return speed, [stream(client, end, 4)[0] for _ in range(SINGLE)]


def measure(alone: str, cluster: str, end: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Rounds in turn, the first of each left out."""
    speeds: dict[str, list[float]] = {"alone": [], "cluster": []}
    firsts: dict[str, list[float]] = {"alone": [], "cluster": []}
    for number in range(rounds + 1):
        order = [("alone", alone), ("cluster", cluster)]
        for name, url in order if number % 2 else reversed(order):
            speed, first = a_round(url, end, tokens)
            if number:
                speeds[name].append(speed)
                firsts[name] += first
    ratio = [c / a for a, c in zip(speeds["alone"], speeds["cluster"], strict=True)]
    middle = {name: statistics.median(values) * 1000 for name, values in firsts.items()}
    return {
        "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "throughput_lost_share": round(1 - statistics.median(ratio), 4),
        "first_token_ms": {name: round(value, 2) for name, value in middle.items()},
        "first_token_added_ms": round(middle["cluster"] - middle["alone"], 2),
        "rounds": rounds,
        "streams": STREAMS,
        "tokens": tokens,
        "single_requests": len(firsts["alone"]),
    }


def end_of_text() -> int:
    """The demo's token that ends an answer."""
    config = json.loads((ROOT / "models/demo-7m/config.json").read_text())
    end = config.get("eos_token_id")
    return int(end[0] if isinstance(end, list) else end)


def before_others() -> None:
    """All threads of this program and of what it started run before those of others."""
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for thread in process.threads():
            os.sched_setscheduler(thread.id, os.SCHED_RR, os.sched_param(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--realtime", action="store_true", help="let other programs wait while measuring (needs root)")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with ray_node() as address, server(address) as alone, server(address, "--cluster", "ray") as cluster:
        if options.realtime:
            before_others()
        result = measure(alone, cluster, end_of_text(), options.rounds, options.tokens)
    import ray

    result |= {**run_facts(), "ray": ray.__version__}
    deliver(result, options.json)


if __name__ == "__main__":
    main()

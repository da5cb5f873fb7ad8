"""What the gateway adds to a token's way from a worker to a client, with many streams at once.

    python bench/gateway.py [--streams 256] [--rate 50] [--seconds 20] [--together] [--rounds N]
        [--json FILE]

A worker without a model (this file, with --fd) stamps every token with its number and the time at which it was sent;
the client reads all streams and compares. So the latency is that of the gateway, of two sockets, and of the client
itself. The streams' phases are spread evenly; with --together all get their token in the same moment, as from a batch.
Gateway, worker and client share the machine's cores.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import deliver, run_facts  # noqa: E402

STAMP = re.compile(rb'"content":"(\d+):(\d+);"')
SERVE = """import functools, server.app as app, server.__main__ as main, server.serving as serving
serving.create_app = functools.partial(app.create_app, command={command!r})
raise SystemExit(main.main())
"""


def work(descriptor: int) -> None:
    """The worker: every accepted request gets its tokens at the rate in the environment, whatever the gateway does."""
    from server.worker import messages as m
    from server.worker.channel import SocketChannel

    rate, together = float(os.environ["BENCH_RATE"]), os.environ["BENCH_TOGETHER"] == "1"
    streams = int(os.environ["BENCH_STREAMS"])
    channel = SocketChannel.from_fd(descriptor)
    channel.receive()
    channel.send(m.Ready(context_length=10**6, setting="8x"))
    due: list[tuple[float, int, str, int]] = []  # when, token, request, tokens in all
    waiting: list[tuple[str, int]] = []  # until all have been accepted: opening streams is another cost
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else 60.0
        if channel.poll(wait):
            message = channel.receive()
            if message is None or isinstance(message, m.Shutdown):
                return
            if isinstance(message, m.Ping):
                channel.send(m.Pong(message.seq))
            elif isinstance(message, m.Cancel):
                due = [item for item in due if item[2] != message.request_id]
                heapq.heapify(due)
            elif isinstance(message, m.Submit):
                channel.send(m.Accepted(message.request_id, 1))
                waiting.append((message.request_id, message.sampling.max_tokens or 1))
                if len(waiting) == streams:
                    start, spread = time.monotonic() + 0.5, 0.0 if together else 1.0 / rate / streams
                    due = [(start + spread * place, 0, *one) for place, one in enumerate(waiting)]
                    waiting.clear()
            continue
        frames = []
        now = time.monotonic()
        while due and due[0][0] <= now:
            when, number, request, tokens = heapq.heappop(due)
            text = f"{number}:{time.monotonic_ns()};"
            frames.append(m.Delta(request, 0, text, [number]))
            if number + 1 < tokens:
                heapq.heappush(due, (when + 1.0 / rate, number + 1, request, tokens))
            else:
                frames.append(m.Finished(request, 0, "stop", m.Usage(1, tokens, 0)))
        if frames:
            channel.send(*frames)


class Stream:
    """One connection and what came over it."""

    def __init__(self, port: int, body: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.socket.setblocking(False)
        self.expected = 0
        self.wrong = 0
        self.rest = b""
        self.done = False

    def read(self, latencies: list[float]) -> bool:
        """Take what is there; False at the end."""
        data = self.socket.recv(1 << 16)
        now = time.monotonic_ns()
        self.rest += data
        last = 0
        for match in STAMP.finditer(self.rest):
            last = match.end()
            if int(match[1]) != self.expected:
                self.wrong += 1
            self.expected = int(match[1]) + 1
            latencies.append((now - int(match[2])) / 1e6)
        self.done = self.done or b"[DONE]" in self.rest
        self.rest = self.rest[last:][-4096:]
        return bool(data)


def rss(pid: int) -> float:
    """Resident memory of a process, MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, pid: int, streams: int, tokens: int) -> dict[str, Any]:
    """All streams from beginning to end."""
    request = {"model": "demo", "stream": True, "max_tokens": tokens, "messages": [{"role": "user", "content": "x"}]}
    body = json.dumps(request).encode()
    selector = selectors.DefaultSelector()
    began, used, before = time.monotonic(), cpu(pid), rss(pid)
    all_streams = [Stream(port, body) for _ in range(streams)]
    for stream in all_streams:
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    latencies: list[float] = []
    memory = []
    open_streams, next_look = streams, time.monotonic() + 1.0
    while open_streams:
        for key, _ in selector.select(timeout=1.0):
            stream: Stream = key.data
            if not stream.read(latencies):
                selector.unregister(stream.socket)
                stream.socket.close()
                open_streams -= 1
        if time.monotonic() >= next_look:
            next_look += 1.0
            memory.append(rss(pid))
    seconds = time.monotonic() - began
    latencies.sort()

    def quantile(share: float) -> float:
        return round(latencies[min(len(latencies) - 1, int(share * len(latencies)))], 3)

    return {
        "added_latency_ms": {"p50": quantile(0.5), "p90": quantile(0.9), "p99": quantile(0.99), "max": quantile(1.0)},
        "tokens": len(latencies),
        "lost_tokens": streams * tokens - len(latencies),
        "reordered_tokens": sum(stream.wrong for stream in all_streams),
        "streams_without_end": sum(not stream.done for stream in all_streams),
        "tokens_per_second": round(len(latencies) / seconds, 1),
        "gateway_cpu_share": round((cpu(pid) - used) / seconds, 3),
        "gateway_cpu_us_per_token": round((cpu(pid) - used) / len(latencies) * 1e6, 1),
        "gateway_rss_mib": {
            "before": round(before, 1),
            "first": round(memory[min(1, len(memory) - 1)], 1) if memory else None,
            "last": round(memory[-1], 1) if memory else None,
            "after": round(rss(pid), 1),
        },
    }


def serve_and_measure(options: argparse.Namespace, command: tuple[str, str], environment: dict[str, str]) -> Any:
    """One round: a server from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        limits = f"{{max_concurrency: {min(1024, options.streams)}, max_queue: {options.streams}}}"
        config.write_text(f"server: {{port: 0}}\nmodels: [{{name: demo, limits: {limits}}}]\n")
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE.format(command=command), "--config", str(config), "--log-level", "warning"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            port = int(re.findall(r":(\d+)", process.stdout.readline())[-1])
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return measure(port, process.pid, options.streams, round(options.rate * options.seconds))
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each stream")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--together", action="store_true", help="all streams get their tokens in the same moment")
    parser.add_argument("--rounds", type=int, default=1, help="the round with the median p99 is the result")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fd is not None:
        work(options.fd)
        return
    command = (sys.executable, str(Path(__file__).resolve()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BENCH_RATE": str(options.rate)}
    environment |= {"BENCH_TOGETHER": str(int(options.together)), "BENCH_STREAMS": str(options.streams)}
    rounds = [serve_and_measure(options, command, environment) for _ in range(options.rounds)]
    rounds.sort(key=lambda one: one["added_latency_ms"]["p99"])
    result = rounds[len(rounds) // 2]
    result["p99_ms_of_all_rounds"] = [one["added_latency_ms"]["p99"] for one in rounds]
    result["lost_or_reordered_in_all_rounds"] = sum(one["lost_tokens"] + one["reordered_tokens"] for one in rounds)
    result |= {
        "streams": options.streams,
        "rate": options.rate,
        "together": options.together,
        **run_facts(),
    }
    deliver(result, options.json)


if __name__ == "__main__":
    main()

"""`spectral bench serve` against a small server that speaks OpenAI's streams, and its arithmetic."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectral.cli import app
from spectral.commands.bench_client import Measured
from spectral.commands.bench_load import Planned, at_rate, percentile, prompt_text, read_trace
from spectral.commands.bench_report import report
from spectral.errors import SpectralError

SEEN: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    """A token for every word, answers of max_tokens pieces; a prompt of more than 400 words is refused."""

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN.append(body)
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        words = len(text.split())
        if words > 400:
            self._send(400, {"error": {"message": "too long"}})
            return
        usage = {"prompt_tokens": 2 * words, "completion_tokens": body["max_tokens"]}
        if not body["stream"]:
            self._send(200, {"usage": usage})
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            piece = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
            self.wfile.write(b"data: " + json.dumps({"choices": [piece]}).encode() + b"\n\n")
        self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")

    def _send(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[str]:
    SEEN.clear()
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    thread.join()
    served.server_close()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


@pytest.mark.alone
def test_a_rate_is_measured_and_reported(server: str, tmp_path: Path) -> None:
    save = tmp_path / "figures.json"
    result = run(
        "--url", server, "--rate", "500", "--requests", "20", "--prompt-tokens", "60", "--output-tokens", "5",
        "--slo-ttft", "30", "--slo-tpot", "30", "--json", "--save", str(save), "--plots", str(tmp_path / "plots"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert (figures["completed"], figures["failed"], figures["output_tokens"]) == (20, 0, 100)
    assert figures["prompt_tokens"] == 20 * 60  # 30 words: the probe showed that a word has two tokens
    assert figures["goodput"]["share"] == 1.0 and figures["options"]["model"] == "tiny"
    assert figures["ttft_s"]["count"] == 20 and figures["gap_s"]["count"] == 80
    levels = figures["ttft_s"]["percentiles"]
    assert levels["1"] <= levels["50"] <= levels["99"] <= levels["99.9"] <= levels["100"]
    saved = json.loads(save.read_text())
    assert len(saved["each"]) == 20 and saved["each"][3]["output_tokens"] == 5
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"load.png", "load.svg"}
    assert len({body["messages"][0]["content"] for body in SEEN[1:]}) == 20  # no prefix cache helps


def test_a_trace_is_replayed_and_what_fails_is_counted(server: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,40,3"]
    trace.write_text("\n".join([*rows, "2023-11-16 18:15:46.7805900,2000,2"]) + "\n")
    result = run("--url", server, "--trace", str(trace), "--completions", "--slo-ttft", "30", "--speed", "10")
    assert result.exit_code == 0 and "1 of 2 requests" in result.output and "50.0% of all" in result.output
    assert "1 x 400: too long" in result.output and "time per output token" in result.output
    assert [body["max_tokens"] for body in SEEN] == [1, 3, 2] and "prompt" in SEEN[0]
    result = run("--url", server, "--trace", str(trace), "--max-context", "100", "--concurrency", "2", "--json")
    assert json.loads(result.output)["failed"] == 0


def test_times_of_all_traces_are_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    first, second = "2024-05-10 00:00:00.009930+00:00", "2024-05-10T00:00:01Z"
    times = [first, second, "2024-05-10 02:00:02.5+0200", "2024-05-10 00:00:03.1234567"]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{at},5,2\n" for at in times))
    found = [row.at for row in read_trace(trace)]
    assert found == pytest.approx([0.0, 0.99007, 2.49007, 3.1135267], abs=1e-6)


def test_what_cannot_be_done_is_said(server: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(SpectralError, match="must name TIMESTAMP"):
        read_trace(wrong)
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    for row, why in (
        ("1.0,5,many", "GeneratedTokens must be a whole number of tokens, got 'many'"),
        ("1.0,-5,2", "ContextTokens must be a whole number of tokens, got '-5'"),
        ("1.0,5", "GeneratedTokens must be a whole number of tokens, got None"),
        ("yesterday,5,2", "TIMESTAMP must be seconds or an ISO date and time, got 'yesterday'"),
        ("nan,5,2", "TIMESTAMP must be finite"),
    ):
        wrong.write_text(head + f"0.5,1,1\n{row}\n")
        with pytest.raises(SpectralError, match=f"row 3: {why}"):
            read_trace(wrong)
    wrong.write_text(head)
    with pytest.raises(SpectralError, match="has no requests"):
        read_trace(wrong)
    wrong.write_text(head + "1.0,5,many\n")
    assert run("--url", server, "--trace", str(wrong), "--rate", "2").exit_code == 2
    assert run("--url", server, "--concurrency", "2", "--rate", "2").exit_code == 2
    failed = run("--url", server, "--model", "m", "--prompt-tokens", "2000", "--requests", "2")
    assert failed.exit_code == 1 and "0 of 2" in failed.output
    nobody = run("--url", "http://127.0.0.1:9", "--model", "m")
    assert isinstance(nobody.exception, SpectralError) and "no server answers" in str(nobody.exception)


def test_the_shipped_trace_format_is_read(shared_dir: Path) -> None:
    planned = read_trace(shared_dir / "data/traces/azure_llm_2023_conv.csv", requests=50, speed=2.0)
    assert planned[0] == Planned(0.0, 374, 44) and planned[1].at == pytest.approx(4.3145790 / 2)
    assert all(a.at <= b.at for a, b in zip(planned, planned[1:], strict=False))


def test_the_arithmetic() -> None:
    assert [percentile([4, 1, 3, 2], p) for p in (0, 50, 100)] == [1, 2.5, 4]
    arrivals = [p.at for p in at_rate(10.0, 2000, 5, 5, seed=1)]
    assert arrivals[-1] / 2000 == pytest.approx(0.1, rel=0.1) and at_rate(None, 3, 1, 1, 0)[2].at == 0.0
    shared = [prompt_text(50, 1.0, seed, shared=20).split() for seed in "ab"]
    assert shared[0][:20] == shared[1][:20] and shared[0] != shared[1] and len(shared[0]) == 50
    one = Measured(Planned(0, 1, 3), sent=1.0, chunks=[2.0, 2.5, 3.0], ended=3.0, prompt_tokens=4, output_tokens=3)
    bad = Measured(Planned(0, 1, 3), sent=1.0, ended=2.0, error="500: x")
    figures = report([one, bad], slo_ttft=1.0, slo_tpot=0.4)
    assert (one.ttft, one.tpot, figures["seconds"]) == (1.0, 0.5, 2.0)
    assert figures["goodput"] == {"requests_per_second": 0.0, "share": 0.0} and figures["errors"] == {"500: x": 1}
    assert report([one], slo_ttft=1.0, slo_tpot=0.5)["goodput"]["share"] == 1.0

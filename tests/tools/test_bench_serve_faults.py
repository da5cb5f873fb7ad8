"""`spectral bench serve` against servers that break off, stall, answer nonsense or differ in what standards leave open,
and what is refused before a load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectral.cli import app
from spectral.commands.bench_client import Load, Target
from spectral.commands.bench_load import at_rate, read_trace
from spectral.commands.bench_stream import Events, read_event
from spectral.errors import SpectralError

ROOT = Path(__file__).resolve().parents[2]
TEXT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
GOOD = TEXT + END + b"data: [DONE]\n\n"
PROBED = b'{"usage":{"prompt_tokens":200}}'
DEEP = b"[" * 200_000


class Server(ThreadingHTTPServer):
    """Answers the n-th stream with `streams[n]`, bytes or what writes them, the others with GOOD."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.streams: list[bytes | Callable[[Handler], None]] = []
        self.probe: bytes | Callable[[Handler], None] = PROBED
        self.models = b'{"data":[{"id":"tiny"}]}'
        self.begun = 0
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """HTTP 1.0: the end of the connection is the end of an answer, so that one that breaks off ends cleanly."""

    server: Server

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self.begin()
        self.wfile.write(self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer: Any = self.server.probe
        if body["stream"]:
            answer = self.server.streams.pop(0) if self.server.streams else GOOD
            self.server.begun += 1
        with suppress(ConnectionError):  # a client may have had enough
            if callable(answer):
                answer(self)
            else:
                self.begin()
                self.wfile.write(answer)

    def begin(self, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()

    def drip(self, data: bytes) -> None:
        """Write it again and again, for as long as anybody listens."""
        while not self.server.closing.wait(0.05):
            self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.closing.set()
        served.shutdown()
        thread.join()


def run(server: Server, *arguments: str, **options: Any) -> Any:
    words = ["bench", "serve", "--url", server.url, "--concurrency", "1", *arguments]
    return CliRunner(**options).invoke(app, words, env={"SPECTRAL_API_KEY": None})


def figures_of(server: Server, *arguments: str) -> dict[str, Any]:
    result = run(server, "--requests", "2", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


@pytest.mark.parametrize(
    "stream",
    [
        TEXT + END,
        TEXT + b"data: [DONE]",  # the empty line behind it is missing
        TEXT + b'data: {"choices":[{"finish_reason":"length"}]}',
        TEXT.replace(b"{", b'{"error":null,', 1) + b'data: {"error":null,"choices":null,"usage":null}\n\n' + END,
        b"\xef\xbb\xbf: ping\r\n\r\nevent: x\r\n" + TEXT.replace(b',"', b',\r\ndata: "').replace(b"\n", b"\r\n") + END,
        b'data: {"choices":\ndata: [{"delta":{"content":"\xe2\x80\xa8"}}]}\nid: 1\n\n' + END,
        b'data: {"choices":[{"delta":{"reasoning":"x"}}]}\n\ndata:\n\n' + END,
    ],
)
def test_servers_that_differ_within_the_standards_are_understood(server: Server, stream: bytes) -> None:
    server.streams = [stream]
    figures = figures_of(server)
    assert (figures["completed"], figures["output_tokens"], figures["errors"]) == (2, 2, {})


CLOSED = "broke off: the connection was closed with neither finish_reason nor [DONE]"
WHOLE = "must be a whole number of tokens, got"


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (TEXT, CLOSED),
        (TEXT + END[:-8], CLOSED),
        (b"", CLOSED),
        (b": ping\n\n", CLOSED),
        (b'{"error":{"message":"busy"}}', "not an OpenAI stream, but one document: busy"),
        (TEXT + event(error="oom") + GOOD, "broke off: oom"),
        (TEXT + event(error={"message": "no\n\x1b[31m room \ud800"}), "broke off: no \ufffd[31m room \ufffd"),
        (TEXT + event(error={"code": 7}), 'broke off: {"code": 7}'),
        (TEXT + event(object="error", message="old"), "broke off: old"),
        (TEXT + event(choices=[{"finish_reason": "abort"}]), "broke off: finish_reason is abort"),
        (END, "an empty answer"),
        (b'data: {"usage":{"prompt_tokens":1e999}}\n\n', f"usage.prompt_tokens {WHOLE} Infinity"),
        (b'data: {"usage":{"prompt_tokens":NaN}}\n\n', f"usage.prompt_tokens {WHOLE} NaN"),
        (event(usage={"completion_tokens": -1}), f"usage.completion_tokens {WHOLE} -1"),
        (event(usage={"completion_tokens": 10**400}), f"usage.completion_tokens {WHOLE} 1000"),
        (event(usage=[1]), "usage must be an object, got [1]"),
        (b"data: " + DEEP + b"\n\n", "JSON that is nested too deep"),
        (b"data: [1]\n\n", "must be an object, got [1]"),
        (b"data: {nothing\n\n", "no JSON"),
        (event(choices=["x"]), "a choice must be an object, got x"),
        (event(choices=[{"delta": [1]}]), "a delta must be an object, got [1]"),
    ],
)  # fmt: skip
def test_one_answer_that_is_none_is_one_failed_request(server: Server, stream: bytes, why: str) -> None:
    server.streams = [stream]
    figures = figures_of(server)
    [(error, count)] = figures["errors"].items()
    assert (figures["completed"], figures["failed"], count) == (1, 1, 1)
    assert error.removeprefix("not an OpenAI stream: ").startswith(why)


def test_an_answer_that_is_cut_off_says_so(server: Server) -> None:
    def cut(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(TEXT)
        handler.close_connection = True

    server.streams = [cut]
    [error] = figures_of(server)["errors"]
    assert error.startswith("broke off: RemoteProtocolError: ")


def test_answers_without_events_fail_and_the_run_goes_on(server: Server) -> None:
    stalls: list[Callable[[Handler], Any]] = [
        lambda handler: (handler.begin(), handler.drip(b": ping\n\n")),
        lambda handler: (handler.begin(), handler.wfile.write(TEXT), handler.drip(b"data:\n\n")),
        lambda handler: (handler.begin(500), handler.drip(b" ")),
        lambda handler: (handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: "), handler.drip(b"x")),
    ]
    server.streams = [*stalls]
    figures = figures_of(server, "--concurrency", "4", "--requests", "6", "--timeout", "2")
    assert (figures["completed"], figures["errors"]) == (2, {"timed out: no event for 2 s": 4})


def test_events_keep_a_long_answer_going(server: Server) -> None:
    def slowly(handler: Handler) -> None:
        handler.begin()
        for _ in range(12):
            handler.wfile.write(TEXT)
            server.closing.wait(0.2)
        handler.wfile.write(END)

    server.streams = [slowly]
    figures = figures_of(server, "--timeout", "2")
    assert (figures["completed"], figures["output_tokens"]) == (2, 13)


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (b'{"usage":{"prompt_tokens":1e999}}', f"usage.prompt_tokens {WHOLE} Infinity"),
        (DEEP, "JSON that is nested too deep"),
        (b'{"choices":[{"mess', "broke off, or is none: no JSON"),
        (b"[]", "must be an object"),
        (b'{"error":"oom"}', "answered with an error: oom"),
        (lambda handler: (handler.begin(503), handler.wfile.write(b'{"detail":"asleep"}')), "answered 503: asleep"),
        (lambda handler: (handler.begin(401), handler.wfile.write(DEEP)), "give a key with --api-key"),
        (lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{"), "broke off: Remote"),
    ],
)
def test_a_first_request_that_goes_wrong_ends_the_run_with_the_reason(server: Server, probe: Any, why: str) -> None:
    server.probe = probe
    result = run(server)
    assert isinstance(result.exception, SpectralError) and why in str(result.exception)
    assert server.begun == 0


def test_a_first_request_has_no_more_time_than_others(server: Server) -> None:
    server.probe = lambda handler: (handler.begin(), handler.drip(b" "))
    result = run(server, "--model", "tiny", "--timeout", "0.5")
    assert "did not answer within 0.5 s; give it longer with --timeout" in str(result.exception)


@pytest.mark.parametrize("data", ["[]", "[{}]", '{"a":1}', "null", '[{"id":"\\ud800"}]'])
def test_a_server_without_models_is_told_from_one_that_is_down(server: Server, data: str) -> None:
    server.models = b'{"data":%s}' % data.encode()
    refused = run(server).exception
    assert isinstance(refused, SpectralError) and "no model at /v1/models; name one with --model" in str(refused)
    assert run(server, "--model", "tiny", "--requests", "1").exit_code == 0


def test_what_no_request_can_carry_is_refused_before_the_load(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,5,2\n")
    for words, why in (
        (["--save", str(tmp_path / "no" / "such.json")], "--save: "),
        (["--save", str(tmp_path)], "--save: "),
        (["--save", str(file), "--trace", str(file)], "is the trace, which would be lost"),
        (["--plots", str(file / "plots")], "--plots: "),
        (["--plots", str(file)], "--plots: "),
        (["--api-key", "cl\u00e9"], "--api-key has characters"),
        (["--api-key", "key\n"], "--api-key has characters"),
        (["--url", "http://[::1"], "is no address of a server"),
        (["--url", "http://"], "is no address of a server"),
        (["--url", "http://127.0.0.1:99999"], "is no address of a server"),
        (["--model", "\udcff"], "--model"),
        (["--timeout", "nan"], "--timeout"),
        (["--slo-ttft", "inf"], "--slo-ttft"),
        (["--shared-prefix", "9" * 400], "--shared-prefix"),
    ):
        result = run(server, *words)
        assert result.exit_code and why in f"{result.exception} {result.output}", words
        assert result.exit_code == 2 or isinstance(result.exception, SpectralError)
    key = CliRunner().invoke(app, ["bench", "serve", "--url", server.url], env={"SPECTRAL_API_KEY": "cl\u00e9"})
    assert "SPECTRAL_API_KEY has characters" in str(key.exception) and "cl\u00e9" not in str(key.exception)
    assert server.begun == 0 and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("option", ["--save", "--plots"])
def test_figures_are_printed_where_they_cannot_be_written(server: Server, tmp_path: Path, option: str) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()

    def spoil(handler: Handler) -> None:
        shutil.rmtree(folder)
        folder.write_text("")
        handler.begin()
        handler.wfile.write(GOOD)

    server.streams = [spoil]
    result = run(server, "--requests", "2", option, str(folder / "x.json" if option == "--save" else folder))
    assert "2 of 2 requests" in result.output
    assert isinstance(result.exception, SpectralError) and str(result.exception).startswith(f"{option}: ")


def test_what_is_there_already_is_left_until_there_is_more(server: Server, tmp_path: Path) -> None:
    save, link = tmp_path / "save.json", tmp_path / "link.json"
    save.write_text("old")
    link.symlink_to(tmp_path / "target.json")
    server.probe = b""
    for path in (save, link):
        assert run(server, "--save", str(path)).exit_code == 1
    assert save.read_text() == "old" and link.is_symlink() and not link.exists()
    server.probe = PROBED
    for path in (save, link):
        assert run(server, "--save", str(path), "--requests", "1").exit_code == 0
        assert json.loads(path.read_text())["completed"] == 1


def test_a_load_of_failures_has_its_figures_too(server: Server, tmp_path: Path) -> None:
    server.streams = [TEXT, event(error="caf\u00e9")]
    save, plots = tmp_path / "save.json", tmp_path / "plots"
    words = ["--requests", "2", "--save", str(save), "--plots", str(plots), "--slo-ttft", "1"]
    result = run(server, *words, charset="ascii")
    assert result.exit_code == 1 and "0 of 2 requests" in result.output and "0.0% of all" in result.output
    assert f"1 x {CLOSED}" in result.output and "1 x broke off: caf\\xe9" in result.output
    saved = json.loads(save.read_text())
    assert saved["ttft_s"] is None and [row["ttft_s"] is None for row in saved["each"]] == [False, True]
    assert sorted(os.listdir(plots)) == ["load.png", "load.svg"]
    server.streams = [event(error=f"request {n}") for n in range(13)]
    many = run(server, "--requests", "14").output.splitlines()
    assert sum("broke off" in line for line in many) == 10 and many[-1] == "3 x other errors (--json has them all)"


def test_ctrl_c_shows_what_was_measured(server: Server, tmp_path: Path) -> None:
    waiting = threading.Event()

    def wait(handler: Handler) -> None:
        handler.begin()
        handler.wfile.write(TEXT)
        waiting.set()
        server.closing.wait(60)

    server.streams = [GOOD, TEXT, wait]
    save = tmp_path / "save.json"
    words = ["bench", "serve", "--url", server.url, "--concurrency", "1", "--requests", "9", "--save", str(save)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits SIG_IGN
    command = [sys.executable, "-m", "spectral", *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert waiting.wait(60)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    first, second, *_ = output.splitlines()
    assert first.startswith("stopped early: of 9 requests 2 had ended, and 1 that were going")
    assert second.startswith("1 of 2 requests") and CLOSED in output
    saved = json.loads(save.read_text())
    assert (saved["planned"], saved["stopped"], saved["unfinished"], len(saved["each"])) == (9, True, 1, 2)


async def test_an_error_that_nobody_foresaw_costs_one_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def read(data: str) -> Any:
        seen.append(data)
        if len(seen) == 2:
            raise RuntimeError("unforeseen")
        return read_event(data)

    monkeypatch.setattr("spectral.commands.bench_stream.read_event", read)
    measured = await Load(Target(server.url), 1).run(at_rate(None, 3, 5, 5, 0))
    assert [one.error for one in measured] == ["broke off: RuntimeError: unforeseen", "", ""]


def test_a_trace_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    trace.write_text(head + "1,5,2\n", encoding="utf-8-sig")
    assert len(read_trace(trace)) == 1
    for row, why in (("1," + "5" * 200_000 + ",2", "field larger than"), ("1,9999999999,2", "ContextTokens must be")):
        trace.write_text(head + row)
        with pytest.raises(SpectralError, match=f"row 2: {why}"):
            read_trace(trace)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_are_cut_wherever_the_bytes_are(end: str, size: int) -> None:
    first, second = ["\ufeffdata: a", ""], [":data: b", "data:c\u00e9", "retry: 1", "data:  \u2028d", ""]
    data = end.join([*first, *second, "", "data", "", "data: e"]).encode()
    events = Events()
    found = [one for at in range(0, len(data), size) for one in events.feed(data[at : at + size])]
    assert found == ["a", "c\u00e9\n \u2028d"] and events.rest() == ["e"] and events.rest() == []
    with pytest.raises(ValueError, match="an event of more than"):
        for _ in range(2**25 // 1_000_000 + 1):
            events.feed(b"x" * 1_000_000)


def test_a_server_that_is_down_is_named_with_the_way_out() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(SpectralError, match=f"no server answers at {url} .*spectral serve.*--url"):
            CliRunner().invoke(app, ["bench", "serve", "--url", url], catch_exceptions=False)

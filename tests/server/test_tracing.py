"""Traces: which spans there are, whose children they are, how long they last, and what is not in them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.config_tracing import TracingSettings
from server.tracing import Tracing, TracingUnavailable, provider_for
from tests.server.conftest import ROOT, Running, serving, settings
from tests.server.fake_worker import TIMES

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "a secret of somebody's"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(exporter: InMemorySpanExporter) -> Iterator[Running]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(settings(), tracing=Tracing(provider)) as running:
        running.until_state("demo", "hot")
        yield running


def ask(server: Running, exporter: InMemorySpanExporter, body: dict[str, Any], **headers: str) -> tuple[Any, list[Any]]:
    """An answer, and the spans that it left."""
    exporter.clear()
    answer = server.client.post("/v1/chat/completions", json={"model": "demo", **body}, headers=headers)
    server.until(lambda: any(span.parent is None or span.parent.is_remote for span in exporter.get_finished_spans()))
    return answer, list(exporter.get_finished_spans())


def hello(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SECRET}], **more}


def seconds(span: Any) -> float:
    return float(span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_parts(traced: Running, exporter: InMemorySpanExporter, stream: bool) -> None:
    answer, spans = ask(traced, exporter, hello(stream=stream, kv_quality={"setting": "4x"}))
    by_name = {span.name: span for span in spans}
    root = by_name["POST /v1/chat/completions"]
    assert set(by_name) == {root.name, "wait", "queue", "prefill", "decode"} and len(spans) == 5
    assert root.parent is None and root.kind.name == "SERVER"
    assert all(by_name[name].parent.span_id == root.context.span_id for name in by_name if name != root.name)
    assert [seconds(by_name[name]) for name in ("queue", "prefill", "decode")] == pytest.approx(TIMES, abs=1e-4)
    assert by_name["queue"].end_time == by_name["prefill"].start_time
    assert by_name["prefill"].end_time == by_name["decode"].start_time
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.request.model"] == "demo"
    assert (root.attributes["gen_ai.usage.input_tokens"], root.attributes["gen_ai.usage.output_tokens"]) == (5, 3)
    assert by_name["decode"].attributes["spectral.setting"] == "4x"
    ident = f"{root.context.trace_id:032x}-{root.context.span_id:016x}"
    told, _, flags = answer.headers["traceparent"].rpartition("-")
    assert told == f"00-{ident}" and int(flags, 16) & 1
    assert SECRET not in "".join(span.to_json() for span in spans)


def test_the_callers_trace_goes_on(traced: Running, exporter: InMemorySpanExporter) -> None:
    answer, spans = ask(traced, exporter, hello(n=2), traceparent=CALLER)
    root = next(span for span in spans if span.parent.is_remote)
    assert f"{root.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CALLER.split("-")[2]
    assert answer.headers["traceparent"].split("-")[1] == CALLER.split("-")[1]
    choices = sorted(span.attributes["spectral.choice"] for span in spans if span.name == "decode")
    assert choices == [0, 1] and {span.context.trace_id for span in spans} == {root.context.trace_id}


@pytest.mark.parametrize("given", ["nonsense", "00-00000000000000000000000000000000-0000000000000000-01", "ff" * 300])
def test_what_is_no_trace_begins_one(traced: Running, exporter: InMemorySpanExporter, given: str) -> None:
    _, spans = ask(traced, exporter, hello(), traceparent=given)
    assert any(span.parent is None for span in spans)


def test_failures_are_marked(traced: Running, exporter: InMemorySpanExporter) -> None:
    _, spans = ask(traced, exporter, {"messages": []})
    assert [span.name for span in spans] == ["POST /v1/chat/completions"]
    assert spans[0].attributes["error.type"] == "invalid_value" and spans[0].status.status_code.name == "UNSET"
    _, spans = ask(traced, exporter, {"messages": [{"role": "user", "content": "fail"}], "stream": True})
    root = next(span for span in spans if span.parent is None)
    assert root.attributes["http.response.status_code"] == 500 and root.status.status_code.name == "ERROR"
    assert root.attributes["error.type"] == "cache_error"


def test_what_is_polled_leaves_none(traced: Running, exporter: InMemorySpanExporter) -> None:
    exporter.clear()
    for path in ("/health", "/ready", "/metrics", "/", "/console/main.js"):
        assert "traceparent" not in traced.client.get(path).headers
    traced.client.get("/v1/no-such-thing")
    traced.until(lambda: len(exporter.get_finished_spans()) == 1)
    assert exporter.get_finished_spans()[0].name == "GET"  # of unknown paths there are too many to name


def test_spans_arrive_at_a_collector_in_good_order() -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
            config = settings().model_copy(update={"tracing": TracingSettings(enabled=True, endpoint=endpoint)})
            with serving(config) as running:
                running.until_state("demo", "hot")
                assert running.client.post("/generate", json={"model": "demo", "prompt": "x"}).status_code == 200
            # The end of the server has sent what was left.
        finally:
            collector.shutdown()
            thread.join()
    assert {path for path, _ in received} == {"/v1/traces"}
    data = b"".join(body for _, body in received)
    assert b"POST /generate" in data and b"prefill" in data and b"spectral" in data


def test_without_the_packages_the_configuration_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TracingUnavailable, match=re.escape("pip install 'spectral-serve[otel]'")):
        provider_for(TracingSettings(enabled=True))


def test_nothing_is_imported_where_it_is_not_asked_for() -> None:
    code = "import server.app, sys; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0

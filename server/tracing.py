"""OpenTelemetry traces (extra `otel`): a span for each request, and under it where its time went.

    POST /v1/chat/completions      the caller's trace goes on (W3C `traceparent`), and the answer names ours
      wait                         until the model is hot and its worker has accepted the request
      queue                        in the worker, until its first step
      prefill                      until the first token
      decode                       until the last one; one for each choice, as the three before it

The worker measures queue, prefill and decode with its own clock and sends them with the end of a choice: no context
crosses the socket, and an answer costs four numbers. Nothing of a prompt or an answer is in a span.
Without the packages, or with `tracing.enabled: false`, nothing here is imported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server.config_tracing import TracingSettings
from server.worker import messages

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from starlette.types import Scope

REMEDY = "tracing.enabled needs OpenTelemetry: pip install 'spectral-serve[otel]', or set it to false"
QUIET = ("/health", "/ready", "/metrics", "/console/")


class TracingUnavailable(Exception):
    """The configuration asks for traces and the packages are not installed; the message says so."""


def provider_for(settings: TracingSettings) -> TracerProvider:
    """Sends spans to the configured collector in batches, from a thread of its own. Raises TracingUnavailable."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise TracingUnavailable(f"{REMEDY} ({error})") from error
    provider = TracerProvider(
        resource=Resource.create({"service.name": settings.service_name}),
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint)))
    return provider


class Tracing:
    """Makes spans with a provider, which it shuts down. The global provider is not touched."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._provider = trace, provider
        self._tracer = provider.get_tracer("spectral")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch = time.time_ns() - time.monotonic_ns()
        self.failed = trace.StatusCode.ERROR

    def begin(self, scope: Scope, headers: Mapping[str, str]) -> RequestSpan | None:
        """A request's span, a child of the caller's where it sent one; None for what is polled."""
        path = scope["path"]
        if path == "/" or path.startswith(QUIET):
            return None
        parent = self._propagator.extract(headers)
        attributes = {"http.request.method": scope["method"], "url.path": path, "url.scheme": scope.get("scheme", "")}
        kind = self._trace.SpanKind.SERVER
        return RequestSpan(self, self._tracer.start_span(scope["method"], parent, kind, attributes), scope)

    def header(self, span: Any) -> str:
        """The `traceparent` of a span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier["traceparent"]

    def part(self, parent: Any, name: str, began: float, ended: float, **attributes: Any) -> None:
        """A child span that is over. Times: monotonic seconds of this process."""
        start, end = (self._epoch + round(moment * 1e9) for moment in (began, max(began, ended)))
        context = self._trace.set_span_in_context(parent)
        self._tracer.start_span(name, context, attributes=attributes, start_time=start).end(end)

    def shutdown(self) -> None:
        """Send what is left; may take some seconds where the collector does not answer."""
        self._provider.shutdown()


class RequestSpan:
    """A request's span, until it is over."""

    def __init__(self, tracing: Tracing, span: Any, scope: Scope) -> None:
        self._tracing, self._span, self._scope = tracing, span, scope
        self.header = tracing.header(span)

    def waited(self, began: float, submitted: float, model: str) -> None:
        """The worker has the request now."""
        self._span.set_attribute("gen_ai.request.model", model)
        self._tracing.part(self._span, "wait", began, submitted)

    def answered(self, item: messages.Finished, ended: float) -> None:
        """A choice is over; its spans are laid backwards from here by what the worker measured."""
        used = item.usage
        decode = ended - used.decode_s
        prefill = decode - used.prefill_s
        choice = {"spectral.choice": item.index}
        self._tracing.part(self._span, "queue", prefill - used.queue_s, prefill, **choice)
        self._tracing.part(self._span, "prefill", prefill, decode, **choice)
        figures: dict[str, Any] = {"gen_ai.usage.output_tokens": used.completion_tokens}
        figures |= {"gen_ai.response.finish_reasons": [item.reason]}
        cache = {"spectral.setting": used.setting, "spectral.cache_bytes": used.kv_bytes}
        self._tracing.part(self._span, "decode", decode, ended, **choice, **figures, **cache)

    def end(self, status: int, notes: dict[str, Any]) -> None:
        """The request is over. `notes`: what the gateway left about it."""
        span, route = self._span, getattr(self._scope.get("route"), "path", None)
        if route is not None:  # what was matched, not what was asked for: names of spans have to be few
            span.update_name(f"{self._scope['method']} {route}")
            span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        usage = notes.get("usage")
        if usage:
            span.set_attribute("gen_ai.usage.input_tokens", usage["prompt_tokens"])
            span.set_attribute("gen_ai.usage.output_tokens", usage["completion_tokens"])
        if status >= 400:
            span.set_attribute("error.type", str(notes.get("code") or status))
        if status >= 500:
            span.set_status(self._tracing.failed)
        span.end()

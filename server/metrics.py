"""The Prometheus metrics, in a registry of their own. `docs/metrics.md` is made from the table here.

Names are in base units (seconds, bytes) and have no colons, which Prometheus keeps for recording rules.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.token_meter import TokenMeters
from server.worker import messages

disable_created_metrics()  # a series more for each counter, which nothing here asks for
STATES = ("cold", "loading", "hot", "asleep", "failed", "stopping")
_LATENCY = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LOADING = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_ANSWER = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@dataclass(frozen=True)
class Spec:
    """One metric: `name` without the prefix and, for counters, without `_total`."""

    kind: str
    name: str
    text: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """As it is exposed."""
        return f"spectral_{self.name}" + ("_total" if self.kind == "counter" else "")

    @property
    def collected(self) -> bool:
        """True where the figures are kept elsewhere and read at a scrape."""
        return self.name in _COLLECTED or self.name in _METERED


SPECS = (
    Spec("counter", "requests", "Requests by model and status; model none: no configured model was named.",
         ("model", "status")),
    Spec("counter", "request_errors", "Requests that failed, by the error's code.", ("model", "code")),
    Spec("counter", "prompt_tokens", "Tokens read from prompts."),
    Spec("counter", "generated_tokens", "Tokens generated."),
    Spec("counter", "answers", "Answers that ended, by the reason.", ("model", "reason")),
    Spec("counter", "prefix_asked_tokens", "Prompt tokens of requests that began."),
    Spec("counter", "prefix_reused_tokens", "Those of them that an earlier prompt had left in the cache."),
    Spec("counter", "preemptions", "Sequences that gave way to others."),
    Spec("counter", "squeezes", "Caches that were encoded anew at a coarser setting."),
    Spec("counter", "requests_sent_again", "Requests that lost their replica before an answer began, in a cluster."),
    Spec("counter", "worker_restarts", "Workers started again after an unplanned end."),
    Spec("counter", "model_loads", "Loads that ended, by outcome: hot or failed.", ("model", "outcome")),
    Spec("counter", "events", "Entries of the event log, by kind: state, setting, squeeze, evict, sleep, wake, ...",
         ("kind", "model")),
    Spec("histogram", "time_to_first_token_seconds", "From request to first token.", buckets=_LATENCY),
    Spec("histogram", "inter_token_latency_seconds", "Between tokens of one stream.", buckets=_LATENCY),
    Spec("histogram", "answer_duration_seconds", "From request to the end of its answer.", buckets=_ANSWER),
    Spec("histogram", "model_load_duration_seconds", "From the start of a worker until its model is hot.",
         buckets=_LOADING),
    Spec("gauge", "model_state", "1 for the state a model is in.", ("model", "state")),
    Spec("gauge", "model_pinned", "1 where an administrator has pinned the model."),
    Spec("gauge", "waiting_requests", "Requests that wait in the gateway for the model to be hot."),
    Spec("gauge", "queued_requests", "Requests that wait in the worker."),
    Spec("gauge", "running_sequences", "Sequences that run."),
    Spec("gauge", "kv_allocated_bytes", "KV cache allocated."),
    Spec("gauge", "kv_used_bytes", "KV cache in use."),
    Spec("gauge", "kv_tokens", "Tokens in the KV cache."),
    Spec("gauge", "prefix_bytes", "Cache kept for prompts that begin as earlier ones did."),
    Spec("gauge", "parked_sequences", "Sequences that wait in host memory."),
    Spec("gauge", "parked_bytes", "Bytes of parked sequences and of sessions in host memory."),
    Spec("gauge", "sessions", "Paused chats in host memory."),
    Spec("gauge", "weights_bytes", "Bytes of weights."),
    Spec("gauge", "setting_info", "1 for the setting and the profile in use.", ("model", "setting", "profile")),
    Spec("gauge", "setting_bytes_per_element", "Bytes per cache element of the setting: its bits, divided by 8."),
    Spec("gauge", "setting_rank", "Mean rank of the setting in use."),
    Spec("gauge", "setting_kl_nats", "Measured mean KL of the setting against the exact cache."),
    Spec("gauge", "setting_bytes_per_token", "Cache bytes per token of the setting, all-in, at the reference context."),
    Spec("gauge", "setting_exact_bytes_per_token", "The same for a cache that is not compressed."),
    Spec("gauge", "device_memory_bytes",
         "Memory by device, kind (weights, workspace, context, kv, foreign, free) and model (or none).",
         ("device", "kind", "model")),
    Spec("gauge", "device_memory_total_bytes", "The device's memory.", ("device",)),
    Spec("gauge", "spare_workers_bytes", "Host memory of workers that wait for a model with all libraries imported.",
         ()),
    Spec("gauge", "cluster_nodes", "Nodes of the cluster by state: connected, draining, lost; 0 on one machine.",
         ("state",)),
    Spec("gauge", "build_info", "1; versions of the server and of Python.", ("version", "python")),
)  # fmt: skip
BY_NAME = {spec.name: spec for spec in SPECS}
_COLLECTED = ("device_memory_bytes", "device_memory_total_bytes")
_METERED = ("generated_tokens", "inter_token_latency_seconds")
_FROM_WORKERS = {
    "prefix_asked_tokens": "prefix_asked",
    "prefix_reused_tokens": "prefix_reused",
    "preemptions": "preemptions",
    "squeezes": "squeezes",
}
"""Counters that workers keep, and their fields of Stats."""
DeviceMap = Callable[[], list[dict[str, Any]]]


class Metrics:
    """All metrics of one gateway. Times in seconds, sizes in bytes; the label `model` is a configured name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._made: dict[str, Any] = {spec.name: self._make(spec) for spec in SPECS if not spec.collected}
        self.requests: Counter = self._made["requests"]
        self.request_errors: Counter = self._made["request_errors"]
        self.prompt_tokens: Counter = self._made["prompt_tokens"]
        self.answers: Counter = self._made["answers"]
        self.restarts: Counter = self._made["worker_restarts"]
        self.sent_again: Counter = self._made["requests_sent_again"]
        self.loads: Counter = self._made["model_loads"]
        self.events: Counter = self._made["events"]
        self.ttft: Histogram = self._made["time_to_first_token_seconds"]
        self.answer_duration: Histogram = self._made["answer_duration_seconds"]
        self.load_duration: Histogram = self._made["model_load_duration_seconds"]
        self.pinned: Gauge = self._made["model_pinned"]
        self.waiting: Gauge = self._made["waiting_requests"]
        self.state: Gauge = self._made["model_state"]
        self.weights: Gauge = self._made["weights_bytes"]
        self.spare_bytes: Gauge = self._made["spare_workers_bytes"]
        self._settings: dict[str, tuple[str, str]] = {}
        self._counted: dict[tuple[str, str], int] = {}
        counter, histogram = (BY_NAME[name] for name in _METERED)
        self.tokens = TokenMeters(
            (counter.full_name, counter.text), (histogram.full_name, histogram.text), histogram.buckets
        )
        self.registry.register(self.tokens)
        ProcessCollector(registry=self.registry)
        self.set_nodes(0, 0, 0)

    def _make(self, spec: Spec) -> Any:
        name = f"spectral_{spec.name}"
        if spec.kind == "histogram":
            return Histogram(name, spec.text, spec.labels, buckets=spec.buckets, registry=self.registry)
        return {"counter": Counter, "gauge": Gauge}[spec.kind](name, spec.text, spec.labels, registry=self.registry)

    def set_nodes(self, connected: int, draining: int, lost: int) -> None:
        """Nodes that this gateway is connected to, those of them that are being emptied, and those out of reach."""
        for state, count in (("connected", connected), ("draining", draining), ("lost", lost)):
            self._made["cluster_nodes"].labels(state).set(count)

    def set_version(self, version: str) -> None:
        """What runs here."""
        self._made["build_info"].labels(version, platform.python_version()).set(1)

    def watch_devices(self, read: DeviceMap) -> None:
        """Ask for the devices' memory at every scrape; `read` as Ledger.snapshot."""
        self.registry.register(_DeviceCollector(read))

    def set_state(self, model: str, state: str) -> None:
        """Record the state a model entered. The model's series exist from the first one on."""
        for name in STATES:
            self.state.labels(model, name).set(1 if name == state else 0)
        for name in _FROM_WORKERS:
            self._made[name].labels(model)
        self.tokens.of(model)
        for counter in (self.prompt_tokens, self.restarts, self.sent_again, self.waiting):
            counter.labels(model)
        self._made["queued_requests"].labels(model)
        for outcome in ("hot", "failed"):
            self.loads.labels(model, outcome)

    def set_ready(self, model: str, ready: messages.Ready) -> None:
        """Record the setting of a model that became hot, or that changed it."""
        self._set(model, "setting_bytes_per_element", ready.bits_per_element / 8)
        self._set(model, "setting_rank", ready.rank)
        self._set(model, "setting_kl_nats", ready.kl_mean)
        self._set(model, "setting_bytes_per_token", ready.bytes_per_token)
        self._set(model, "setting_exact_bytes_per_token", ready.bytes_per_token_exact)
        self.weights.labels(model).set(ready.weights_bytes)
        info, now = self._made["setting_info"], (ready.setting, ready.profile_id[:12])
        before = self._settings.get(model)
        if before not in (None, now):
            info.remove(model, *before)
        self._settings[model] = now
        info.labels(model, *now).set(1)

    def set_stats(self, model: str, stats: messages.Stats) -> None:
        """Record a worker's snapshot."""
        self._set(model, "queued_requests", stats.queued)
        self._set(model, "running_sequences", stats.running)
        self._set(model, "kv_allocated_bytes", stats.kv_bytes_allocated)
        self._set(model, "kv_used_bytes", stats.kv_bytes_used)
        self._set(model, "kv_tokens", stats.kv_tokens)
        self._set(model, "prefix_bytes", stats.prefix_bytes)
        self._set(model, "parked_sequences", stats.parked)
        self._set(model, "parked_bytes", stats.parked_bytes)
        self._set(model, "sessions", stats.sessions)
        for name, field in _FROM_WORKERS.items():
            now, before = getattr(stats, field), self._counted.get((model, name), 0)
            self._made[name].labels(model).inc(now - before if now >= before else now)  # a new worker begins at zero
            self._counted[model, name] = now

    def _set(self, model: str, name: str, value: float) -> None:
        self._made[name].labels(model).set(value)

    def forget(self, model: str) -> None:
        """Drop everything about a model that is no longer served."""
        self._settings.pop(model, None)
        self._counted = {key: value for key, value in self._counted.items() if key[0] != model}
        self.tokens.forget(model)
        for spec in SPECS:
            if "model" in spec.labels and not spec.collected:
                self._made[spec.name].remove_by_labels({"model": model})

    def render(self) -> bytes:
        """The text format of Prometheus. Belongs to the event loop, as the ledger does that it reads."""
        return bytes(generate_latest(self.registry))


class _DeviceCollector(Collector):
    """The devices' memory as it is when Prometheus asks."""

    def __init__(self, read: DeviceMap) -> None:
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Two families."""
        by_kind, total = (_family(BY_NAME[name]) for name in _COLLECTED)
        for device in self._read():
            name, sums = device["device"], dict[tuple[str, str], int]()
            for part in device["segments"]:
                key = part["kind"], part["model"] or ""
                sums[key] = sums.get(key, 0) + part["bytes"]
            for kind in ("foreign", "free"):
                sums[kind, ""] = device[f"{kind}_bytes"]
            for (kind, model), size in sums.items():
                by_kind.add_metric([name, kind, model], size)
            total.add_metric([name], device["total_bytes"])
        return [by_kind, total]

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The families without samples, so that registering reads no device."""
        return [_family(BY_NAME[name]) for name in _COLLECTED]


def _family(spec: Spec) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.full_name, spec.text, labels=spec.labels)


def table() -> str:
    """The documentation of all metrics, as docs/metrics.md has it."""
    lines = [
        "# Metrics",
        "",
        "What `GET /metrics` tells, in Prometheus' text format. Made by `python -m server metrics > docs/metrics.md`.",
        "Times are in seconds and sizes in bytes. The gateway's own `process_...` metrics come beside these.",
        "",
        "| Metric | Type | Labels | Meaning |",
        "|---|---|---|---|",
    ]
    for spec in SPECS:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{spec.full_name}` | {spec.kind} | {labels} | {spec.text} |")
    return "\n".join(lines) + "\n"

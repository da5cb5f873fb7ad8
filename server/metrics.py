"""The Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.worker import messages

STATES = ("cold", "loading", "hot", "asleep", "failed", "stopping")
_LATENCY = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All metrics of one gateway. Times in seconds, sizes in bytes; the label `model` is a configured name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_model = ["model"]
        text = "Requests by model and status; model none: no configured model was named."
        self.requests = self._counter("requests", text, ["model", "status"])
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens read from prompts.", by_model)
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.", by_model)
        self.restarts = self._counter("worker_restarts", "Workers started again after an unplanned end.", by_model)
        self.ttft = self._histogram("time_to_first_token_seconds", "From request to first token.")
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between tokens of one stream.")
        self.queued = self._gauge("queued_requests", "Requests that wait in the worker.")
        self.running = self._gauge("running_sequences", "Sequences that run.")
        self.kv_allocated = self._gauge("kv_allocated_bytes", "KV cache allocated.")
        self.kv_used = self._gauge("kv_used_bytes", "KV cache in use.")
        self.kv_tokens = self._gauge("kv_tokens", "Tokens in the KV cache.")
        self.bits = self._gauge("setting_bits_per_element", "Bits per cache element of the setting in use.")
        self.rank = self._gauge("setting_rank", "Mean rank of the setting in use.")
        self.kl = self._gauge("setting_kl_nats", "Measured mean KL of the setting against the exact cache.")
        self.weights = self._gauge("weights_bytes", "Bytes of weights.")
        self.state = self._gauge("model_state", "1 for the state a model is in.", ["model", "state"])

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"spectral_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(f"spectral_{name}", text, labels or ["model"], registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"spectral_{name}", text, ["model"], buckets=_LATENCY, registry=self.registry)

    def set_state(self, model: str, state: str) -> None:
        """Record the state a model entered."""
        for name in STATES:
            self.state.labels(model, name).set(1 if name == state else 0)

    def set_ready(self, model: str, ready: messages.Ready) -> None:
        """Record the setting of a model that became hot."""
        self.bits.labels(model).set(ready.bits_per_element)
        self.rank.labels(model).set(ready.rank)
        self.kl.labels(model).set(ready.kl_mean)
        self.weights.labels(model).set(ready.weights_bytes)

    def set_stats(self, model: str, stats: messages.Stats) -> None:
        """Record a worker's snapshot."""
        self.queued.labels(model).set(stats.queued)
        self.running.labels(model).set(stats.running)
        self.kv_allocated.labels(model).set(stats.kv_bytes_allocated)
        self.kv_used.labels(model).set(stats.kv_bytes_used)
        self.kv_tokens.labels(model).set(stats.kv_tokens)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return bytes(generate_latest(self.registry))

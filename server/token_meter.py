"""What is counted for every token. Counting through the metrics library costs more than the rest of a token's way
through the gateway, so here it is an addition to a number, and the library gets the sums when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenMeter:
    """One model's tokens, and the seconds between them in buckets. Belongs to the event loop."""

    __slots__ = ("_bounds", "counts", "seconds", "tokens")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.seconds = 0.0
        self.tokens = 0

    def gap(self, seconds: float) -> None:
        """This much time lay between a token and the one before it in its stream."""
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.seconds += seconds


class TokenMeters(Collector):
    """All models' meters, as a counter and a histogram of these names and texts. `bounds`: of the buckets, seconds."""

    def __init__(self, counter: tuple[str, str], histogram: tuple[str, str], bounds: Sequence[float]) -> None:
        self._counter, self._histogram, self._bounds = counter, histogram, bounds
        self._meters: dict[str, TokenMeter] = {}

    def of(self, model: str) -> TokenMeter:
        """A model's meter; from the first call on its series exist."""
        found = self._meters.get(model)
        if found is None:
            found = self._meters[model] = TokenMeter(self._bounds)
        return found

    def forget(self, model: str) -> None:
        """Drop the series of a model that is no longer served."""
        self._meters.pop(model, None)

    def collect(self) -> Iterable[Metric]:
        """Two families."""
        tokens = CounterMetricFamily(*self._counter, labels=["model"])
        gaps = HistogramMetricFamily(*self._histogram, labels=["model"])
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for model, meter in self._meters.items():
            tokens.add_metric([model], meter.tokens)
            total, buckets = 0, []
            for name, count in zip(names, meter.counts, strict=True):
                total += count
                buckets.append((name, float(total)))
            if total:
                gaps.add_metric([model], buckets, meter.seconds)
        return [tokens, gaps]

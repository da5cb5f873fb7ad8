"""What each API key may use: requests and tokens per minute as buckets that refill, and requests at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server import errors
from server.auth import Caller
from spectral.keyfile import KeyRecord

FORGET_AFTER = 10_000
"""Keys whose use is remembered; beyond it idle ones with full buckets are forgotten."""


@dataclass
class Bucket:
    """Holds `size` at most and gets `size` per minute. It may be overdrawn by what was only known afterwards."""

    size: int
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Add what has come since the last time. `now`: monotonic seconds."""
        self.level = min(float(self.size), self.level + (now - self.at) * self.size / 60.0)
        self.at = now

    def wait(self, wanted: float) -> float:
        """Seconds until the level is `wanted`."""
        return max(0.0, (wanted - self.level) * 60.0 / self.size)


@dataclass
class Usage:
    """One key's use."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = 0
    limits: tuple[int | None, int | None] = field(default=(None, None))


class Permit:
    """The right to one request; `spend` its tokens as they are known, and always `release` it (twice is fine)."""

    def __init__(self, usage: Usage, clock: Callable[[], float]) -> None:
        self._usage, self._clock = usage, clock
        self._released = False

    def spend(self, tokens: int) -> None:
        """Count tokens of the prompt or the answer."""
        bucket = self._usage.tokens
        if bucket is not None:
            bucket.refill(self._clock())
            bucket.level -= tokens

    def release(self) -> None:
        """The request is over."""
        if not self._released:
            self._released = True
            self._usage.running -= 1

    @property
    def headers(self) -> dict[str, str]:
        """The usual X-RateLimit headers."""
        return limit_headers(self._usage, self._clock())


class Limiter:
    """Gives permits. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}

    def admit(self, caller: Caller) -> Permit | None:
        """A permit for one request; None for callers without a key. Raises ApiError 429."""
        record = caller.record
        if record is None:
            return None
        now = self._clock()
        usage = self._of(record, now)
        headers = limit_headers(usage, now)
        if record.max_concurrency is not None and usage.running >= record.max_concurrency:
            most = record.max_concurrency
            raise errors.rate_limited(f"this key may have {most} requests at once; wait for one to end", 1, headers)
        for bucket, what in ((usage.requests, "requests"), (usage.tokens, "tokens")):
            if bucket is None:
                continue
            wait = bucket.wait(1.0)
            if wait > 0:
                message = f"this key may use {bucket.size} {what} per minute; try again in {math.ceil(wait)} s"
                raise errors.rate_limited(message, math.ceil(wait), headers)
        if usage.requests is not None:
            usage.requests.level -= 1.0
        usage.running += 1
        return Permit(usage, self._clock)

    def _of(self, record: KeyRecord, now: float) -> Usage:
        usage = self._usage.get(record.hash)
        limits = (record.requests_per_minute, record.tokens_per_minute)
        if usage is None or usage.limits != limits:
            self._forget()
            running = 0 if usage is None else usage.running
            buckets = [None if size is None else Bucket(size, float(size), now) for size in limits]
            if usage is None:
                usage = self._usage[record.hash] = Usage()
            usage.requests, usage.tokens, usage.running, usage.limits = buckets[0], buckets[1], running, limits
        for bucket in (usage.requests, usage.tokens):
            if bucket is not None:
                bucket.refill(now)
        return usage

    def _forget(self) -> None:
        if len(self._usage) >= FORGET_AFTER:
            for name in [name for name, usage in self._usage.items() if usage.running == 0]:
                del self._usage[name]


def limit_headers(usage: Usage, now: float) -> dict[str, str]:
    """X-RateLimit-{Limit,Remaining,Reset}-{Requests,Tokens}; only for limits that there are."""
    headers: dict[str, str] = {}
    for name, bucket in (("Requests", usage.requests), ("Tokens", usage.tokens)):
        if bucket is not None:
            bucket.refill(now)
            headers[f"X-RateLimit-Limit-{name}"] = str(bucket.size)
            headers[f"X-RateLimit-Remaining-{name}"] = str(max(0, int(bucket.level)))
            headers[f"X-RateLimit-Reset-{name}"] = f"{bucket.wait(bucket.size):.3f}s"
    return headers

"""The requests of a load test: from a recorded trace, or drawn at a rate. Pure: no clock, no network.

A trace is a CSV file with a header and the columns TIMESTAMP (ISO date and time, or seconds), ContextTokens and
GeneratedTokens, as the Azure LLM inference traces have them; other columns are ignored.
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from spectral.errors import SpectralError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

MOST_TOKENS = 10**9
"""No prompt and no answer has more; a larger count is a fault, and would break sums and rates."""

_TEXT = (
    "time way year work day world life hand part place case week point home water room area money story fact month "
    "lot right study book word side kind head house friend hour game line end city team idea body back face level "
    "door art war road form music food field rest sea wind river stone tree light night morning paper glass table"
)
WORDS = tuple(_TEXT.split())
"""Common words, about one token each in any vocabulary."""


@dataclass(frozen=True)
class Planned:
    """One request: `at` seconds after the start (closed loops ignore it), tokens of the prompt and of the answer."""

    at: float
    prompt_tokens: int
    output_tokens: int


def read_trace(
    path: Path, *, requests: int | None = None, speed: float = 1.0, max_context: int | None = None
) -> list[Planned]:
    """The first `requests` rows of a trace, `speed` times as fast as they came. Prompts are shortened where prompt and
    answer exceed `max_context` tokens. Raises SpectralError for a file that is no trace."""
    out: list[Planned] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                raise SpectralError(f"{path} is not a trace: its header must name {', '.join(COLUMNS)}")
            for row in reader:
                if requests is not None and len(out) == requests:
                    break
                when, prompt, output = _seconds(row[COLUMNS[0]] or ""), _count(row, COLUMNS[1]), _count(row, COLUMNS[2])
                out.append(_bounded(when, prompt, output, max_context))
    except OSError as error:
        raise SpectralError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise SpectralError(f"{path}, row {len(out) + 2}: {error}") from error
    if not out:
        raise SpectralError(f"{path} has no requests")
    out.sort(key=lambda item: item.at)
    first = out[0].at
    return [Planned((item.at - first) / speed, item.prompt_tokens, item.output_tokens) for item in out]


STAMP = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?)(\.\d+)? ?(Z|[+-]\d\d:?\d\d)?", re.ASCII)
"""Traces have up to seven digits of a second, where Python 3.10 reads six, and a time zone or none."""


def _seconds(text: str) -> float:
    """Of seconds, or of a date and time, in UTC where no zone is named. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        found = STAMP.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"TIMESTAMP must be seconds or an ISO date and time, got {text!r}") from None
        stamp, fraction, zone = found.groups()
        zone = "+00:00" if zone in (None, "Z") else zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"
        return datetime.fromisoformat(stamp + zone).timestamp() + float(fraction or 0)
    if not math.isfinite(seconds):
        raise ValueError(f"TIMESTAMP must be finite, got {text!r}")
    return seconds


def _count(row: dict[str, str], name: str) -> int:
    """Raises ValueError."""
    try:
        count = int(row[name])
    except (ValueError, TypeError):
        count = -1
    if not 0 <= count <= MOST_TOKENS:
        raise ValueError(f"{name} must be a whole number of tokens, got {row[name]!r:.50}")
    return count


def _bounded(at: float, prompt: int, output: int, max_context: int | None) -> Planned:
    output = max(1, output)
    if max_context is not None:
        output = min(output, max_context - 1)
        prompt = min(prompt, max_context - output)
    return Planned(at, max(1, prompt), output)


def at_rate(rate: float | None, requests: int, prompt_tokens: int, output_tokens: int, seed: int) -> list[Planned]:
    """Requests of one size, Poisson arrivals at `rate` a second; all at once for None."""
    rng = random.Random(seed)
    out, now = [], 0.0
    for _ in range(requests):
        out.append(Planned(now, prompt_tokens, output_tokens))
        now += rng.expovariate(rate) if rate else 0.0
    return out


def prompt_text(tokens: int, words_per_token: float, seed: str, shared: int = 0) -> str:
    """About `tokens` tokens of random words, of which the first `shared` are the same for all seeds."""
    count = max(1, round(tokens * words_per_token))
    common = min(count, round(shared * words_per_token))
    first, rest = random.Random("shared"), random.Random(seed)
    return " ".join([first.choice(WORDS) for _ in range(common)] + [rest.choice(WORDS) for _ in range(count - common)])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` per cent lie, between neighbours by straight lines; values need not be sorted.
    There must be one."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

"""A light key's answers alone, and beside a key that asks for four times what can be answered, in engine time.

    python bench/fairness.py [--seconds 40] [--light 0.1] [--seed 0] [--json FILE]

The embedded model at 8x, eight places, requests as those of `python -m tools.faults.overload`: a short chat message, an
answer of at most 24 tokens, Poisson arrivals, the gateway's admission before the engine's queue. The clock is the
processor time of the thread that computes, so that what else runs on the machine is not in the figures; where nothing
is to be done, time jumps to the next arrival. The light key's part alone is twice as long as that beside the heavy one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import deliver, run_facts  # noqa: E402
from server.scheduler.admission import Admission, Refusal, Room  # noqa: E402
from spectral.engine.build import build_engine, find_profile  # noqa: E402
from spectral.engine.engine import Engine  # noqa: E402
from spectral.engine.types import EngineLimits, Finished, GenerateRequest, Message, SamplingParams  # noqa: E402
from spectral.hf import load_model  # noqa: E402
from tools.faults.prompts import make_prompts  # noqa: E402

PLACES, QUEUE, TOKENS, OVERLOAD = 8, 64, 24, 4


class Clock:
    """Processor time of this thread, and what was skipped."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def __call__(self) -> float:
        return time.thread_time() + self._skipped

    def skip_to(self, when: float) -> None:
        """Nothing happens until then."""
        self._skipped += max(0.0, when - self())


@dataclass
class Load:
    """Keys that ask, and what came of it. `rates`: requests a second; seconds."""

    rates: dict[str, float]
    took: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """For each key: how many, how fast, percentiles."""
        return {
            key: {
                "answers": len(took),
                "refused": self.refused.get(key, 0),
                "answers_per_s": round(len(took) / self.seconds, 3),
                "latency_s": {f"p{p}": round(at(took, p), 4) for p in (50, 90, 99)},
            }
            for key, took in self.took.items()
        }


def at(values: list[float], percent: int) -> float:
    """A percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


class Bench:
    """One engine and its requests."""

    def __init__(self, seed: int) -> None:
        self.clock, self._random = Clock(), random.Random(seed)
        loaded = load_model(str(ROOT / "models" / "demo-7m"))
        limits = EngineLimits(max_concurrency=PLACES, max_queue=QUEUE)
        built = build_engine(loaded, find_profile(loaded, None), setting="8x", limits=limits)
        built.engine.warm_up()
        self.engine: Engine = built.engine
        self.engine.scheduler.clock = self.clock
        self._prompts = {
            key: [prompt.text for prompt in make_prompts(32, number, long_every=0)]
            for number, key in enumerate(("heavy", "light"))
        }
        self._number = 0

    def closed(self, seconds: float) -> float:
        """Answers a second of as many clients as there are places, each waiting for its answer."""
        load, began = Load({"heavy": 0.0}), self.clock()
        self._drive(load, [], began + seconds, again=True)
        return len(load.took["heavy"]) / load.seconds

    def opened(self, rates: dict[str, float], seconds: float) -> Load:
        """Poisson arrivals for so long, and until the last answer."""
        load, began = Load(rates), self.clock()
        arrivals = []
        for key, rate in rates.items():
            due = began
            while (due := due + self._random.expovariate(rate)) < began + seconds:
                arrivals.append((due, key))
        self._drive(load, sorted(arrivals, reverse=True), began + seconds)
        return load

    def _drive(self, load: Load, arrivals: list[tuple[float, str]], until: float, *, again: bool = False) -> None:
        admission, room = Admission(self.clock), Room(PLACES, QUEUE)
        live: dict[str, tuple[str, float]] = {}
        began = self.clock()

        def ask(key: str, came: float) -> None:
            self._number += 1
            ident = f"{key}{self._number}"
            try:
                admission.enter(room, ident, key)
            except Refusal:
                load.refused[key] = load.refused.get(key, 0) + 1
                return
            prompt = [Message("user", self._random.choice(self._prompts[key]))]
            params = SamplingParams(temperature=0, max_tokens=TOKENS)
            self.engine.submit(GenerateRequest(ident, prompt, params=params, tenant=key, cache_salt=key))
            live[ident] = key, came

        for _ in range(PLACES if again else 0):
            ask("heavy", began)
        while True:
            while arrivals and arrivals[-1][0] <= self.clock():
                came, key = arrivals.pop()
                ask(key, came)
            if not self.engine.has_work:
                if not arrivals:
                    break
                self.clock.skip_to(arrivals[-1][0])
                continue
            for event in self.engine.step():
                if isinstance(event, Finished):
                    key, came = live.pop(event.request_id)
                    admission.leave(room, event.request_id, answered=True)
                    load.took.setdefault(key, []).append(self.clock() - came)
                    if again and self.clock() < until:
                        ask(key, self.clock())
        load.seconds = self.clock() - began


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="processor time beside the heavy key")
    parser.add_argument("--light", type=float, default=0.1, help="the light key's part of the sustainable rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    bench = Bench(options.seed)
    bench.closed(2.0)
    sustainable = bench.closed(8.0)
    light = options.light * sustainable
    alone = bench.opened({"light": light}, 2 * options.seconds)
    beside = bench.opened({"light": light, "heavy": OVERLOAD * sustainable}, options.seconds)
    ratio = {p: round(at(beside.took["light"], p) / at(alone.took["light"], p), 3) for p in (50, 99)}
    answered = sum(len(took) for took in beside.took.values()) / beside.seconds
    result = {
        **run_facts(),
        "seed": options.seed,
        "options": {"seconds": options.seconds, "light": options.light},
        "sustainable_per_s": round(sustainable, 3),
        "alone": alone.figures(),
        "beside": beside.figures(),
        "light_ratio": {f"p{p}": value for p, value in ratio.items()},
        "answers_of_sustainable": round(answered / sustainable, 3),
        "places_that_changed_hands": bench.engine.scheduler.preemptions,
    }
    deliver(result, options.json)


if __name__ == "__main__":
    main()

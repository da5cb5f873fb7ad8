"""What a server does with more than it can: goodput over the offered rate, and one heavy key beside a light one.

    python -m tools.faults.overload --json bench/results/overload.json

1. Sustainable rate: clients that each wait for their answer, as many as the model runs at once; answers per second.
2. Offered rates (Poisson arrivals) of 0.5 to 4 times that. Goodput: answers that were whole within the objective.
   Whoever is refused (429, 503) comes back after Retry-After, once, and must then be let in as often as others are.
3. A light key alone, then beside a heavy key that offers 4 times the sustainable rate: the light key's latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tools.faults.clients import Answer, ask
from tools.faults.prompts import Prompt, make_prompts
from tools.faults.rig import ROOT, Rig, add_output_options, demo_models, provenance, report_of

MODEL = "model-0"


@dataclass
class Load:
    """One load as it went. Seconds."""

    began: float = field(default_factory=time.monotonic)
    took: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    again: Counter[str] = field(default_factory=Counter)

    def count(self, answer: Answer, seconds: float) -> None:
        """One request that is over."""
        self.outcomes[answer.end or f"without end: {answer.broke}"] += 1
        if answer.end == "done":
            self.took.append(seconds)
        elif answer.retry_after:
            self.waits.append(answer.retry_after)

    def figures(self, seconds: float, objective_s: float) -> dict[str, Any]:
        """Counts, goodput and latencies."""
        good = sum(took <= objective_s for took in self.took)
        return {
            "requests": sum(self.outcomes.values()),
            "outcomes": dict(self.outcomes.most_common()),
            "goodput_per_s": round(good / seconds, 3),
            "latency_s": {f"p{p}": at(self.took, p) for p in (50, 90, 99)},
            "retry_after_s": {f"p{p}": at(self.waits, p) for p in (50, 99)},
            "after_retry_after": dict(self.again),
        }


def at(values: list[float], percent: int) -> float | None:
    """A percentile; None without values."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 3) if ordered else None


class Asker:
    """Sends requests with a key."""

    def __init__(self, url: str, key: str, prompts: list[Prompt], seed: int) -> None:
        limits = httpx.Limits(max_connections=2000, max_keepalive_connections=100)
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, headers=headers, limits=limits)
        self._prompts, self._random = prompts, random.Random(seed)

    async def one(self, load: Load, *, comes_back: bool = False) -> None:
        """One request, counted. `comes_back`: who is refused does as Retry-After says, and that is counted apart."""
        prompt = self._random.choice(self._prompts)
        began = time.monotonic()
        answer = await ask(self._http, "chat stream", MODEL, prompt, longest_wait_s=60.0)
        load.count(answer, time.monotonic() - began)
        if comes_back and answer.retry_after:
            await asyncio.sleep(answer.retry_after)
            again = await ask(self._http, "chat stream", MODEL, prompt, longest_wait_s=60.0)
            load.again["done" if again.end == "done" else "refused again"] += 1

    async def closed(self, clients: int, seconds: float) -> Load:
        """So many clients that each wait for their answer."""
        load = Load()

        async def client() -> None:
            while time.monotonic() - load.began < seconds:
                await self.one(load)

        await asyncio.gather(*(client() for _ in range(clients)))
        return load

    async def opened(self, rate: float, seconds: float, *, comes_back: float = 0.0) -> Load:
        """Poisson arrivals; returns when the last has its end. `comes_back`: part of those who heed Retry-After."""
        load, running, due = Load(), set(), time.monotonic()
        while (due := due + self._random.expovariate(rate)) - load.began < seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            back = self._random.random() < comes_back
            task = asyncio.ensure_future(self.one(load, comes_back=back))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        return load

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def make_keys(folder: Path, names: list[str]) -> dict[str, str]:
    """A file of keys, made by the command that people use; the secrets."""
    secrets = {}
    for name in names:
        command = [sys.executable, "-m", "spectral.cli", "keys", "create", name, "--file", str(folder / "keys.json")]
        done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
        secrets[name] = str(json.loads(done.stdout)["key"])
    return secrets


async def overload(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All three parts; the report."""
    keys = make_keys(folder, ["heavy", "light"])
    limits = {"max_concurrency": options.concurrency, **json.loads(options.limits)}
    auth = {"keys_file": str(folder / "keys.json")}
    rig = await Rig.start(folder, demo_models(["8x"], **limits), key=keys["heavy"], auth=auth)
    heavy = Asker(rig.url, keys["heavy"], make_prompts(32, options.seed, long_every=0), options.seed)
    light = Asker(rig.url, keys["light"], make_prompts(32, options.seed + 1, long_every=0), options.seed + 1)
    try:
        await heavy.closed(options.concurrency, 5.0)
        peak = (await heavy.closed(options.concurrency, options.seconds)).figures(options.seconds, options.objective)
        sustainable = peak["goodput_per_s"]
        rates = {}
        for factor in options.factors:
            load = await heavy.opened(factor * sustainable, options.seconds, comes_back=0.2)
            rates[str(factor)] = load.figures(options.seconds, options.objective)
            print(factor, rates[str(factor)], file=sys.stderr, flush=True)
        fairness = await _fairness(heavy, light, sustainable, options)
    finally:
        await heavy.close()
        await light.close()
        status = await rig.stop()
    best = max(figures["goodput_per_s"] for figures in [peak, *rates.values()])
    report = {
        **provenance(options.seed),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "keep")},
        "sustainable_per_s": sustainable,
        "closed_loop": peak,
        "offered": rates,
        "fairness": fairness,
        "exit_status": status,
    }
    last = rates[str(options.factors[-1])]["goodput_per_s"]
    report["goodput_at_last_of_peak"] = round(last / best, 3)
    alone, beside = (fairness[part]["latency_s"]["p99"] for part in ("alone", "beside_heavy"))
    report["light_p99_ratio"] = round(beside / alone, 3)
    return report


async def _fairness(heavy: Asker, light: Asker, sustainable: float, options: argparse.Namespace) -> dict[str, Any]:
    """The light key alone at a tenth of the sustainable rate; then the same beside the heavy one."""
    rate, seconds = options.light * sustainable, 2 * options.seconds
    alone = (await light.opened(rate, seconds)).figures(seconds, options.objective)
    both = asyncio.ensure_future(heavy.opened(4 * sustainable, seconds + 2))
    await asyncio.sleep(2)
    beside = (await light.opened(rate, seconds)).figures(seconds, options.objective)
    crowd = (await both).figures(seconds + 2, options.objective)
    return {"light_per_s": round(rate, 3), "alone": alone, "beside_heavy": beside, "heavy": crowd}


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults.overload", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--concurrency", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--limits", default="{}", help="more of the model's limits, as JSON")
    factors = [0.5, 1.0, 2.0, 4.0]
    parser.add_argument("--factors", type=float, nargs="+", default=factors, help="times the sustainable rate")
    parser.add_argument("--objective", type=float, default=10.0, help="seconds in which an answer is good")
    parser.add_argument("--light", type=float, default=0.1, help="the light key's part of the sustainable rate")
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    return report_of("overload", overload, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

"""Workers are killed while clients ask: every request has its end, every answer is its own prompt's, all comes back.

    python -m tools.faults.chaos --minutes 30 --every 5 --clients 32 --models 2 --json bench/results/chaos.json

Half of the faults meet a worker wherever it is; the others are aimed at the middle of a squeeze, of an activation of a
profile, of falling asleep and of waking up (the last two of a model more, which no client asks).

Exit status 0 where every promise held, 1 where one was broken; the report names it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.faults.changes import COARSER, Changes
from tools.faults.clients import Client, Tally, learn
from tools.faults.injectors import Injector
from tools.faults.prompts import References, make_prompts
from tools.faults.rig import Broken, Footprint, Rig, add_output_options, demo_models, provenance, report_of

KINDS = ("kill", "stop", "slow", "term", "abort")
BACK_S = 120.0
"""All workers must be back so long after the last fault; a back-off lasts a minute at most."""
MEMORY_PART = 0.02
SETTLE_S = 3.0


async def chaos(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole run; its report. Raises Broken where the server cannot be started or the gateway ends."""
    settings = [options.settings[i % len(options.settings)] for i in range(options.models)]
    models = demo_models([*settings, settings[0]])
    rig = await Rig.start(folder, models)
    try:
        *names, resting = (model["name"] for model in models)
        prompts, references = make_prompts(options.prompts, options.seed), References()
        await _learn(rig, names, prompts, references)
        changes = Changes(rig, names, resting, options.seed)
        await changes.prepare(folder)
        await _warm(rig, options, names, prompts, references)
        start = await quiet(rig)
        tally = Tally()
        injector = Injector(rig, options.faults, options.seed, changes)
        seconds = await _storm(rig, options, injector, changes, names, prompts, references, tally)
        began = time.monotonic()
        await changes.restore()
        await rig.until(rig.idle, BACK_S, "every worker is back and idle after the last fault")
        back = time.monotonic() - began
        again = Tally()
        await ask_all(rig, names, prompts, references, again)
        end = await quiet(rig)
        restarts = {name: model["restarts"] for name, model in (await rig.models()).items()}
    finally:
        status = await rig.stop()
    report = {
        **provenance(options.seed),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "keep")},
        "seconds": round(seconds, 1),
        "faults": dict(injector.counts),
        "faults_by_state": dict(sorted(injector.states.items())),
        "changes": dict(sorted(changes.answers.items())),
        "changes_wrong": changes.wrong,
        "restarts": restarts,
        **figures(tally, seconds),
        "back_after_s": round(back, 2),
        "afterwards": {"outcomes": dict(again.outcomes), "judged": dict(again.judged), "wrong": again.wrong},
        "start": asdict(start),
        "end": asdict(end),
        "exit_status": status,
    }
    held = promises(report)  # adds figures to the report
    return {**report, "promises": held}


async def _learn(rig: Rig, names: list[str], prompts: Any, references: References) -> None:
    """The right answers, at the coarser setting too."""
    for setting in (COARSER, "auto"):
        for name in names:
            answer = await rig.client.post(f"/admin/models/{name}/setting", json={"setting": setting}, timeout=120)
            answer.raise_for_status()
        await learn(rig.url, names, prompts, references)


async def _warm(rig: Rig, options: Any, names: list[str], prompts: Any, references: References) -> None:
    """The same load without faults for a moment: what is set up lazily is there when memory is first measured."""
    tally, over = Tally(), asyncio.Event()
    seeds = range(options.seed + 100, options.seed + 100 + options.clients)
    clients = [Client(rig.url, names, prompts, references, tally, seed) for seed in seeds]
    running = [asyncio.ensure_future(client.run(over)) for client in clients]
    await asyncio.sleep(options.warm_s)
    over.set()
    await asyncio.gather(*running)
    if tally.without_end or tally.wrong:
        raise Broken(f"answers are wrong before any fault: {(tally.wrong + tally.without_end)[:3]}")


async def _storm(
    rig: Rig,
    options: Any,
    injector: Injector,
    changes: Changes,
    names: list[str],
    prompts: Any,
    references: References,
    tally: Tally,
) -> float:
    over, faults_over = asyncio.Event(), asyncio.Event()
    seeds = range(options.seed, options.seed + options.clients)
    clients = [Client(rig.url, names, prompts, references, tally, i, squeezed=changes.squeezed_in) for i in seeds]
    running = [asyncio.ensure_future(client.run(over)) for client in clients]
    hurting = asyncio.ensure_future(injector.run(options.every, faults_over))
    began, told = time.monotonic(), time.monotonic()
    while time.monotonic() - began < 60 * options.minutes:
        await asyncio.sleep(min(1.0, 60 * options.minutes))
        rig.must_live()
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{told - began:6.0f} s  {dict(tally.outcomes)}  {dict(tally.judged)}", file=sys.stderr, flush=True)
    faults_over.set()
    await hurting
    over.set()
    seconds = time.monotonic() - began
    await asyncio.gather(*running)
    return seconds


async def ask_all(rig: Rig, names: list[str], prompts: Any, references: References, tally: Tally) -> None:
    """Every prompt once more: the workers that came back answer as those before them did."""
    found = References()
    await learn(rig.url, names, prompts, found)
    for (model, setting, number), text in found.answers.items():
        tally.outcomes["done"] += 1
        verdict = references.judge(model, setting, number, text, whole=True)
        tally.judged[verdict] += 1
        if verdict != "right":
            tally.wrong.append({"model": model, "prompt": number, "setting": setting, "verdict": verdict, "text": text})


async def quiet(rig: Rig) -> Footprint:
    """What the server holds when nothing runs."""
    await rig.until(rig.idle, 60, "nothing runs or waits")
    await asyncio.sleep(SETTLE_S)
    return await asyncio.to_thread(rig.footprint)


def figures(tally: Tally, seconds: float) -> dict[str, Any]:
    """Counts and times of what the clients saw."""
    took = sorted(tally.seconds)
    at = lambda part: round(took[min(len(took) - 1, int(part * len(took)))], 3) if took else None  # noqa: E731
    return {
        "requests": tally.requests,
        "answers_per_s": round(len(took) / seconds, 2),
        "outcomes": dict(tally.outcomes.most_common()),
        "judged": dict(tally.judged),
        "latency_s": {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)},
        "without_end": tally.without_end,
        "wrong": tally.wrong,
    }


def promises(report: dict[str, Any]) -> dict[str, bool]:
    """Which promises held."""
    grown = report["end"]["rss"] / report["start"]["rss"] - 1
    report["memory_change"] = {k: round(report["end"][k] / report["start"][k] - 1, 4) for k in ("rss", "uss")}
    return {
        "every request had its end": not report["without_end"],
        "every answer was its own prompt's": not report["wrong"] and not report["afterwards"]["wrong"],
        "every change was done or refused with its reason": not report["changes_wrong"],
        "every worker came back": report["back_after_s"] < BACK_S,
        "memory is within 2 % of its start": abs(grown) <= MEMORY_PART,
        "the server ended in good order": report["exit_status"] == 0,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m tools.faults.chaos", description=__doc__.partition("\n")[0])
    found.add_argument("--minutes", type=float, default=1.0, help="how long faults happen")
    found.add_argument("--every", type=float, default=5.0, help="seconds between faults")
    found.add_argument("--clients", type=int, default=32, help="clients that ask at once")
    found.add_argument("--models", type=int, default=2, help="models, all of them the embedded one")
    found.add_argument("--settings", nargs="+", default=["8x", "exact"], help="the models' settings, taken in turn")
    found.add_argument("--prompts", type=int, default=48, help="different prompts")
    found.add_argument("--faults", nargs="+", default=["kill"], choices=KINDS, help="what is done to workers")
    found.add_argument("--warm-s", type=float, default=20.0, help="seconds of load before the first fault")
    found.add_argument("--seed", type=int, default=0, help="of prompts, clients and faults")
    add_output_options(found)
    return found


def main() -> int:
    """Run and report; 0 where every promise held."""
    return report_of("chaos", chaos, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())

"""Hours of mixed load with churn: loads, evictions, uploads, switches, cancels; what leaks is a figure at the end.

    python -m tools.faults.soak --minutes 120 --json bench/results/soak.json

Beside clients that ask known prompts (see chaos), an administrator unloads models, uploads profiles, switches and rolls
back, changes settings and pins. Exit status 0 where every promise held.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.faults.changes import variants
from tools.faults.chaos import BACK_S, ask_all, figures, quiet
from tools.faults.clients import Client, Tally, learn
from tools.faults.injectors import Injector
from tools.faults.prompts import References, make_prompts
from tools.faults.rig import Footprint, Rig, add_output_options, demo_models, provenance, report_of

REFUSALS = (404, 409, 429, 503)
"""What an administrator may be told while others change the same model: not found, in use, too many, not now."""
MEMORY_PART = 0.02
STATE_BYTES = 64 << 20
"""Most that events (the last 50,000), the audit trail of a soak and the log beside them take."""


class Administrator:
    """Changes something every few seconds; every answer must be a success or a refusal that says why."""

    def __init__(self, rig: Rig, names: list[str], profiles: list[bytes], seed: int) -> None:
        self._rig, self._names, self._profiles, self._random = rig, names, profiles, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    async def run(self, every_s: float, over: asyncio.Event) -> None:
        """Until `over` is set."""
        while not over.is_set():
            try:
                await asyncio.wait_for(over.wait(), every_s)
            except asyncio.TimeoutError:
                await self.once()

    async def once(self) -> None:
        """One change of one model."""
        name = self._random.choice(self._names)
        act = self._random.choice([self._unload, self._upload, self._roll_back, self._pin, self._delete])
        await act(name)

    async def _send(self, what: str, method: str, path: str, **given: Any) -> Any:
        answer = await self._rig.client.request(method, path, timeout=120, **given)
        self.outcomes[f"{what} {answer.status_code}"] += 1
        if answer.status_code >= 300 and (answer.status_code not in REFUSALS or not answer.json()["error"]["message"]):
            self.wrong.append({"what": what, "status": answer.status_code, "body": answer.text[:500]})
        return answer

    async def _unload(self, name: str) -> None:
        drain = {"drain_seconds": self._random.choice([0, 2]), "force": True}
        await self._send("unload", "POST", f"/admin/models/{name}/unload", json=drain)
        await self._send("load", "POST", f"/admin/models/{name}/load")

    async def _upload(self, name: str) -> None:
        query = "?activate=true" if self._random.random() < 0.5 else ""
        kind = {"Content-Type": "application/octet-stream"}
        data = self._random.choice(self._profiles)
        await self._send("upload" + query, "PUT", f"/admin/profiles/{name}{query}", content=data, headers=kind)

    async def _roll_back(self, name: str) -> None:
        await self._send("rollback", "POST", f"/admin/profiles/{name}/rollback")

    async def _pin(self, name: str) -> None:
        verb = self._random.choice(["pin", "unpin"])
        await self._send(verb, "POST", f"/admin/models/{name}/{verb}")

    async def _delete(self, name: str) -> None:
        rows = (await self._send("list", "GET", f"/admin/profiles/{name}")).json().get("profiles", [])
        if rows:
            sha256 = self._random.choice(rows)["sha256"]
            await self._send("delete", "DELETE", f"/admin/profiles/{name}/versions/{sha256}")


async def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole run; its report. Raises Broken where the server cannot go on."""
    profiles = variants(3, folder)
    rig = await Rig.start(folder, demo_models(["8x"] * options.models))
    try:
        names = [model["name"] for model in rig.config["models"]]
        prompts, references, tally = make_prompts(32, options.seed), References(), Tally()
        await learn(rig.url, names, prompts, references)
        administrator = Administrator(rig, names, profiles, options.seed)
        injector = Injector(rig, ["kill", "stop", "slow"], options.seed)
        seeds = range(options.seed, options.seed + options.clients)
        clients = [Client(rig.url, names, prompts, references, tally, seed, leaves=0.2) for seed in seeds]
        rows: list[dict[str, Any]] = []
        over, began = asyncio.Event(), time.monotonic()
        work = [client.run(over) for client in clients]
        work += [administrator.run(options.change, over), injector.run(options.fault, over)]
        running = [asyncio.ensure_future(each) for each in work]
        start = await _watch(rig, options, rows, began, running, tally)
        over.set()
        await asyncio.gather(*running)
        seconds = time.monotonic() - began
        await _settle(rig, names)
        again = Tally()
        await ask_all(rig, names, prompts, references, again)
        end = await quiet(rig)
    finally:
        status = await rig.stop()
    report = {
        **provenance(options.seed),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "keep")},
        "seconds": round(seconds, 1),
        "faults": dict(injector.counts),
        "changes": dict(administrator.outcomes.most_common()),
        "changes_wrong": administrator.wrong,
        **figures(tally, seconds),
        "afterwards": {"judged": dict(again.judged), "wrong": again.wrong},
        "start": asdict(start),
        "end": asdict(end),
        "while_it_ran": rows,
        "exit_status": status,
    }
    held = promises(report)  # adds figures to the report
    return {**report, "promises": held}


async def _watch(
    rig: Rig, options: argparse.Namespace, rows: list[dict[str, Any]], began: float, running: list[Any], tally: Tally
) -> Footprint:
    """Footprints while it runs; returns the one after a quarter of the time, when all that is lazy has been used."""
    seconds = 60 * options.minutes
    first: Footprint | None = None
    while time.monotonic() - began < seconds:
        await asyncio.sleep(min(options.row, seconds / 8))
        rig.must_live()
        for task in running:
            if task.done():
                task.result()
        found = await asyncio.to_thread(rig.footprint)
        if first is None and time.monotonic() - began >= seconds / 4:
            first = found
        rows.append({"at": round(time.monotonic() - began), **asdict(found), "requests": tally.requests})
        print(rows[-1], file=sys.stderr, flush=True)
    assert first is not None
    return first


async def _settle(rig: Rig, names: list[str]) -> None:
    """All models hot and idle, with the shipped profile."""
    for name in names:
        await rig.client.post(f"/admin/models/{name}/load")
    await rig.until(rig.idle, BACK_S, "every worker is back and idle")
    for name in names:
        await rig.client.post(f"/admin/profiles/{name}/activate", json={"profile": "shipped"}, timeout=120)
    await rig.until(rig.idle, BACK_S, "every worker is idle again")


def promises(report: dict[str, Any]) -> dict[str, bool]:
    """Which promises held. Memory: the gateway's own, which lives as long as the run; workers were replaced."""
    start, end = report["start"], report["end"]
    gateway = end["gateway_rss"] / start["gateway_rss"] - 1
    report["change"] = {key: end[key] - start[key] for key in ("rss", "gateway_rss", "fds", "threads", "state")}
    return {
        "every request had its end": not report["without_end"],
        "every answer was its own prompt's": not report["wrong"] and not report["afterwards"]["wrong"],
        "every change succeeded or was refused with its reason": not report["changes_wrong"],
        "no descriptor leaks": end["fds"] <= start["fds"] + 4,
        "no thread leaks": end["threads"] <= start["threads"] + 4,
        "the gateway's memory is within 2 % of what it was after a quarter of the time": gateway <= MEMORY_PART,
        "the state is bounded": end["state"] <= STATE_BYTES,
        "the server ended in good order": report["exit_status"] == 0,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m tools.faults.soak", description=__doc__.partition("\n")[0])
    found.add_argument("--minutes", type=float, default=10.0, help="how long it runs")
    found.add_argument("--models", type=int, default=2, help="models, all of them the embedded one")
    found.add_argument("--clients", type=int, default=8, help="clients that ask at once")
    found.add_argument("--change", type=float, default=7.0, help="seconds between an administrator's changes")
    found.add_argument("--fault", type=float, default=60.0, help="seconds between faults")
    found.add_argument("--row", type=float, default=30.0, help="seconds between footprints")
    found.add_argument("--seed", type=int, default=0)
    add_output_options(found)
    return found


def main() -> int:
    """Run and report; 0 where every promise held."""
    return report_of("soak", soak, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())

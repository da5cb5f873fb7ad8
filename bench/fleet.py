"""A fleet of 1,000 GPUs, 500 models and a million requests in virtual time; planner time against fleet size; distance
from the exact optimum.

    python bench/fleet.py [--requests 1000000] [--json bench/results/fleet.json] [--plots bench/results]

What decides is the server's own: placements, hierarchical planner, router (bench/fleet_simulator.py has the rest).
In the run, popularity changes, a node is lost and another one joins. The exact optimum is known for small fleets only
(HiGHS, proved): random sub-samples of devices and models are planned both ways, with the same cells of few devices.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.fleet_exact import optimum  # noqa: E402
from bench.fleet_simulator import GIB, Kind, Simulator, kinds  # noqa: E402
from bench.report import run_facts  # noqa: E402
from server import heap  # noqa: E402
from server.cluster.fleet import Fleet  # noqa: E402
from server.cluster.placement import PLAN_S  # noqa: E402
from server.scheduler.demand import HOT, Demand, Device, Placement  # noqa: E402

GPUS_PER_NODE = 8
TICK_S, EXCHANGES = 1.0, 24
START_S = 120.0
"""All models are cold at the start; figures of what comes later are given apart."""
SIZES = (8, 64, 256, 1000, 2000)


def trace(
    models: list[Kind], count: int, seconds: float, seed: int
) -> list[tuple[float, str, int, int, tuple[int, ...]]]:
    """Requests at a constant mean rate; at half time a tenth of the models, popular ones among them, change places.

    Every model has 20 long prefixes (system prompts and chats) that 60 % of its requests begin with.
    """
    rng = random.Random(seed)
    names, shares = [kind.name for kind in models], [kind.share for kind in models]
    later = list(shares)
    picked = [*rng.sample(range(20), 4), *rng.sample(range(20, len(models)), max(1, len(models) // 10 - 4))]
    moved = picked[1:] + picked[:1]
    for there, here in zip(moved, picked, strict=True):
        later[there] = shares[here]
    halves = [rng.choices(names, weights, k=count // 2 + 1) for weights in (shares, later)]
    found, at = [], 0.0
    for index in range(count):
        at += rng.expovariate(count / seconds)
        name = halves[index * 2 // count][index // 2]
        prompt, answer = int(rng.lognormvariate(6.0, 0.8)), int(min(1000, rng.lognormvariate(5.0, 0.6)))
        blocks: tuple[int, ...] = (rng.getrandbits(60),)
        if rng.random() < 0.6:
            prefix = hash((name, rng.randrange(20))) & (2**60 - 1)
            blocks = tuple(prefix + part for part in range(max(1, min(8, prompt // 256))))
        found.append((at, name, min(prompt, 6000), answer, blocks))
    return found


def simulate(gpus: int, models: int, requests: int, seed: int) -> dict[str, Any]:
    """The big run."""
    known = kinds(models, seed)
    seconds = max(60.0, requests / (gpus * 0.85))
    import scipy.optimize  # noqa: F401  # a plan that needs it first would count its import

    sim = Simulator(gpus, GPUS_PER_NODE, known)
    sim.at(seconds * 0.3, lambda: sim.lose("node0003"))
    sim.at(seconds * 0.35, lambda: sim.join("node9999", GPUS_PER_NODE))
    arrivals = trace(known, requests, seconds, seed)
    heap.keep()  # as a conductor does; the made-up world's objects are none of its
    began, cpu = time.perf_counter(), time.process_time()
    sim.run(arrivals, TICK_S)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    steady = [row for row in sim.samples if row["at"] > seconds * 0.15 and row["at"] < seconds]
    delays = sorted(delay for _, delay in sim.delays)
    later = sorted(delay for at, delay in sim.delays if at > START_S)
    return {
        "gpus": gpus,
        "models": models,
        "requests": requests,
        "virtual_seconds": round(sim.now),
        "requests_per_virtual_second": round(requests / seconds, 1),
        "finished": sim.finished,
        "ended_by_the_loss_of_their_node": sim.cut,
        "conductor_tick_s": TICK_S,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "router_decisions_per_cpu_second": round(sim.routed / sim.route_cpu),
        "plans": len(sim.plan_wall),
        "plan_wall_ms": _spread_ms(sim.plan_wall),
        "plan_cpu_ms": _spread_ms(sim.plan_cpu),
        "cells_per_plan": round(statistics.mean(sim.planned_cells), 2),
        "plans_that_left_cells_to_the_next": sum(left > 0 for left in sim.left_cells),
        "cold_starts": sim.cold_starts,
        "cold_starts_of_the_first_two_minutes": sim.cold_starts_by(START_S),
        "of_them_moves": sim.places.moves,
        "queued_requests_moved_to_a_new_replica": sim.moved,
        "requests_that_met_a_cold_model": sim.waited,
        "prefix_hit_share": round(sim.prefix_hits / max(1, sim.routed), 3),
        "first_token_s": _spread(delays),
        "first_token_s_after_two_minutes": _spread(later),
        "replicas": {"mean": round(statistics.mean(row["replicas"] for row in steady), 1)} if steady else {},
        "imbalance": _imbalance(steady),
        "samples": sim.samples,
    }


def _imbalance(steady: list[dict[str, Any]]) -> dict[str, float]:
    """Most sequences on one device over the mean of the devices in use; and how many devices are in use."""
    ratios = [row["max"] / row["mean"] for row in steady if row["mean"]]
    used = [row["devices_used"] for row in steady]
    return {
        "max_over_mean": round(statistics.mean(ratios), 2) if ratios else 0.0,
        "devices_used_mean": round(statistics.mean(used), 1) if used else 0.0,
    }


def _spread(ordered: list[float]) -> dict[str, float]:
    return {"p50": _at(ordered, 0.5), "p90": _at(ordered, 0.9), "p99": _at(ordered, 0.99), "max": _at(ordered, 1.0)}


def _spread_ms(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": _ms(ordered, 0.5), "p99": _ms(ordered, 0.99), "max": _ms(ordered, 1.0)}


def _at(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0


def _ms(ordered: list[float], share: float) -> float:
    return round(_at(ordered, share) * 1000, 1)


def demands_of(known: list[Kind], count: int, rate: float, seed: int) -> list[Demand]:
    """Replicas that are wanted and nowhere yet."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        kind = known[number % len(known)]
        facts = kind.facts
        found.append(
            Demand(
                f"{kind.name}#{number}", facts.weights, facts.rungs, facts.overhead, tokens=rng.randrange(8192, 65536),
                sequences=8, floor_tokens=8192, floor_sequences=8, rate=rate * kind.share * rng.uniform(0.5, 2.0),
                load_s=facts.load_s, can_sleep=False, needed=True,
            )
        )  # fmt: skip
    return found


def planner_times(seed: int) -> list[dict[str, Any]]:
    """By fleet size, milliseconds until all cells that changed are solved: from nothing, for one more replica, after
    the loss of a node. From nothing also the longest plan of those that a conductor makes of it."""
    rows = []
    for gpus in SIZES:
        known = kinds(max(4, gpus // 2), seed)
        fleet = of_size(gpus)
        demands = demands_of(known, gpus + gpus // 4, gpus * 0.5, seed)
        first, full = timed(fleet.plan, demands)
        longest, parts = in_parts(gpus, demands)
        placed = [_placed(demand, first.choices[demand.name].placement) for demand in demands]
        fleet.plan(placed)
        one, lost = [], []
        for round_ in range(5):
            extra = replace(demands[round_ % len(demands)], name=f"extra{round_}#0")
            answer, took = timed(fleet.plan, [*placed, extra])
            one.append(took)
            placed.append(_placed(extra, answer.choices[extra.name].placement))
        for round_ in range(min(3, gpus // GPUS_PER_NODE - 1)):
            fleet.remove_node(f"n{round_}")
            away = [replace(d, now=Placement(), needed=True) if _on(d, f"n{round_}") else d for d in placed]
            answer, took = timed(fleet.plan, away)
            lost.append(took)
            placed = [_placed(demand, answer.choices[demand.name].placement) for demand in away]
        rows.append(
            {
                "gpus": gpus,
                "replicas": len(demands),
                "cells": len(fleet.cells),
                "from_nothing_ms": both(full),
                "from_nothing_parts": parts,
                "from_nothing_longest_part_ms": both(longest),
                "one_more_ms": both(tuple(map(statistics.median, zip(*one, strict=True)))),
                "node_lost_ms": both(tuple(map(statistics.median, zip(*lost, strict=True)))) if lost else None,
                "unmet": len(first.unmet),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[float, ...]]:
    """What it gives, and its seconds: by the clock, and of a processor, which a busy machine does not change."""
    began = time.perf_counter(), time.thread_time()
    found = work(*arguments)
    return found, (time.perf_counter() - began[0], time.thread_time() - began[1])


def both(seconds: tuple[float, ...]) -> dict[str, float]:
    """As milliseconds."""
    return {"wall": round(seconds[0] * 1000, 1), "cpu": round(seconds[1] * 1000, 1)}


def of_size(gpus: int) -> Fleet:
    """Nodes of eight GPUs of 23 GiB."""
    fleet = Fleet()
    for node in range(max(1, gpus // GPUS_PER_NODE)):
        fleet.set_node(f"n{node}", [Device(f"n{node}/cuda:{i}", 23 * GIB) for i in range(GPUS_PER_NODE)])
    return fleet


def in_parts(gpus: int, demands: list[Demand]) -> tuple[tuple[float, ...], int]:
    """From nothing as a conductor plans, each plan within PLAN_S: seconds of the longest, and how many there were."""
    fleet, took = of_size(gpus), []
    while True:
        until = time.perf_counter() + PLAN_S
        found, seconds = timed(fleet.plan, demands, 0, lambda until=until: time.perf_counter() > until)
        took.append(seconds)
        if not found.left:
            return max(took), len(took)
        demands = [_placed(demand, found.choices[demand.name].placement) for demand in demands]


def _on(demand: Demand, node: str) -> bool:
    return any(device.startswith(f"{node}/") for device in demand.now.devices)


def _placed(demand: Demand, where: Placement) -> Demand:
    return replace(demand, now=where, needed=where.residency != HOT)


def distance(samples: int, seed: int, cell_devices: int = 4, patience_s: float = 20.0) -> dict[str, Any]:
    """Cost of the fleet's plan over the proved optimum's, on random small fleets that are short of memory. Both costs
    have in them what replicas on one device cost each other; samples that are not proved in time are left out."""
    rng = random.Random(seed)
    gaps, unproved = [], 0
    for number in range(samples):
        known = rng.sample(kinds(40, seed + number), 14)
        devices = [Device(f"n{i // 2}/cuda:{i % 2}", int(rng.choice((7, 9, 12)) * GIB)) for i in range(8)]
        demands = [replace(d, needed=False, splittable=False) for d in demands_of(known, 14, 6.0, seed + number)]
        best, proved = optimum(demands, devices, patience_s)
        if not proved:
            unproved += 1
            continue
        fleet = Fleet(cell_devices)
        for node in range(4):
            fleet.set_node(f"n{node}", devices[2 * node : 2 * node + 2])
        gaps.append(fleet.plan(demands, improve=EXCHANGES).cost / best - 1)
        print(f"sub-sample {number}: {gaps[-1]:+.4f}", file=sys.stderr)
    gaps.sort()
    return {
        "samples": len(gaps),
        "unproved": unproved,
        "devices": 8,
        "replicas": 14,
        "cell_devices": cell_devices,
        "exchanges": EXCHANGES,
        "gap_mean": round(statistics.mean(gaps), 4),
        "gap_median": round(statistics.median(gaps), 4),
        "gap_max": round(gaps[-1], 4),
        "above_5_percent": sum(gap > 0.05 for gap in gaps),
    }


def plots(result: dict[str, Any], folder: Path) -> None:
    """Two SVG files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spectral"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    rows = result["planner"]
    for name, label in (
        ("from_nothing_ms", "from nothing"),
        ("from_nothing_longest_part_ms", "from nothing, the longest of several plans"),
        ("node_lost_ms", "a node of 8 GPUs lost"),
        ("one_more_ms", "one more replica"),
    ):
        points = [(row["gpus"], row[name]["cpu"]) for row in rows if row[name]]
        left.loglog([p[0] for p in points], [p[1] for p in points], marker="o", label=label)
    left.axhline(1000, color="grey", linewidth=0.8)
    left.set(xlabel="GPUs", ylabel="ms of one core", title="time of a plan")
    left.legend()
    samples = result["simulation"]["samples"]
    right.plot([s["at"] for s in samples], [s["running"] for s in samples], label="sequences that run")
    right.plot([s["at"] for s in samples], [s["replicas"] for s in samples], label="replicas")
    right.plot([s["at"] for s in samples], [s["queued"] + s["waiting"] for s in samples], label="requests that wait")
    right.set(xlabel="virtual seconds", title=f"{result['simulation']['requests']:,} requests")
    right.legend()
    figure.tight_layout()
    figure.savefig(folder / "fleet.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=20, help="small fleets that are also planned exactly")
    parser.add_argument(
        "--parts", default="planner,distance_from_optimum,simulation", help="the others stay in the file"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plots", type=Path, default=None)
    options = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "planner": lambda: planner_times(options.seed),
        "distance_from_optimum": lambda: distance(options.samples, options.seed),
        "simulation": lambda: simulate(options.gpus, options.models, options.requests, options.seed),
    }
    known = options.json is not None and options.json.exists()
    result: dict[str, Any] = json.loads(options.json.read_text()) if known else {}
    for part in options.parts.split(","):
        result[part] = parts[part]()
    result |= {"parts_of_the_last_run": options.parts.split(","), **run_facts(), "seed": options.seed}
    shown = {**result, "simulation": {k: v for k, v in result.get("simulation", {}).items() if k != "samples"}}
    print(json.dumps(shown, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plots:
        plots(result, options.plots)


if __name__ == "__main__":
    main()

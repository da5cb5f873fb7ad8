"""A minute of chaos with the real server: what `python -m tools.faults.chaos` does for hours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest

from tools.faults import chaos
from tools.faults.clients import Tally, learn
from tools.faults.prompts import References, make_prompts
from tools.faults.rig import Rig, demo_models

pytestmark = pytest.mark.e2e


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_every_promise_holds_while_workers_are_killed(tmp_path: Path) -> None:
    options = chaos.parser().parse_args(
        ["--minutes", "0.2", "--every", "4", "--clients", "6", "--models", "1", "--prompts", "8", "--warm-s", "1"]
    )
    report = asyncio.run(chaos.chaos(options, tmp_path))
    assert sum(report["faults"].values()) >= 2 and report["judged"]["right"] > 0
    report["promises"].pop("memory is within 2 % of its start")  # a figure for a longer run
    assert all(report["promises"].values()), report


def test_a_gateway_that_is_killed_takes_its_workers_along_and_its_state_is_whole(tmp_path: Path) -> None:
    async def run() -> None:
        prompts, references = make_prompts(3, 1, long_every=0), References()
        rig = await Rig.start(tmp_path, demo_models(["8x"]))
        try:
            await learn(rig.url, ["model-0"], prompts, references)
            assert (await rig.client.post("/admin/models/model-0/pin")).status_code == 200
            (worker,) = rig.worker_pids()
            os.kill(rig.process.pid, signal.SIGKILL)
            rig.process.wait()
            for _ in range(200):
                if gone(worker):
                    break
                await asyncio.sleep(0.05)
            assert gone(worker), "a worker outlived its gateway"
        finally:
            await rig.client.aclose()
        with sqlite3.connect(tmp_path / "state" / "state.db") as state:
            assert state.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            assert state.execute("SELECT outcome FROM audit WHERE action = 'pin'").fetchall() == [("done",)]
        state.close()
        again = await Rig.start(tmp_path, demo_models(["8x"]))
        try:
            tally = Tally()
            await chaos.ask_all(again, ["model-0"], prompts, references, tally)
            assert tally.judged == {"right": 3}
            audit = (await again.client.get("/admin/status")).json()
            assert audit["models"]["model-0"]["pinned"]
        finally:
            assert await again.stop() == 0

    asyncio.run(run())


def test_judging_knows_whose_answer_it_is() -> None:
    references = References({("m", "8x", 0): "Paris is the capital of France.", ("m", "8x", 1): "Oslo lies in Norway."})
    judge = references.judge
    assert judge("m", "8x", 0, "Paris is the capital of France.", whole=True) == "right"
    assert judge("m", "8x", 0, "Paris is the", whole=False) == "right"
    assert judge("m", "8x", 0, "Paris is the", whole=True) == "other"
    assert judge("m", "8x", 0, "Oslo lies in Norway.", whole=True) == "crossed"
    assert judge("m", "8x", 0, "Oslo lies in", whole=False) == "crossed"
    assert judge("m", "4x", 0, "Paris", whole=True) == "unknown"

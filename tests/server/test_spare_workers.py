"""Workers that wait for a model (memory.spare_workers)."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest

from server.config import Settings
from server.config_memory import MemorySettings
from server.scheduler import spare
from tests.server.conftest import Running, alive, serving, settings


def with_spares(count: int, *models: dict[str, Any]) -> Settings:
    return settings(*models).model_copy(update={"memory": MemorySettings(spare_workers=count)})


def spares(server: Running) -> list[int]:
    """Processes that wait."""
    return list(server.app.state.scheduler._spares.pids)


def gauge(server: Running) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("spectral_spare_workers_bytes ")))


def test_a_killed_worker_is_replaced_by_the_one_that_waits() -> None:
    with serving(with_spares(1)) as server:
        server.until_state("demo", "hot")
        server.until(lambda: len(spares(server)) == 1)
        (waiting,) = spares(server)
        assert "--ahead" in psutil.Process(waiting).cmdline() and gauge(server) > 1 << 20
        os.kill(server.ready()["demo"]["pid"], signal.SIGKILL)
        server.until(lambda: server.ready()["demo"].get("pid") == waiting)
        server.until_state("demo", "hot")
        answer = server.client.post("/v1/completions", json={"model": "demo", "prompt": "hello"})
        assert answer.json()["choices"][0]["text"] == "one two three "
        server.until(lambda: len(spares(server)) == 1 and spares(server) != [waiting])
        (last,) = spares(server)
    assert not alive(last) and not alive(waiting)


def test_there_is_none_where_none_is_wanted() -> None:
    with serving(with_spares(0)) as server:
        server.until_state("demo", "hot")
        assert not spares(server) and gauge(server) == 0


def test_one_that_ends_by_itself_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "RETRY_S", 0.2)
    with serving(with_spares(2, {"name": "demo"}, {"name": "later", "load": "on_demand"})) as server:
        server.until_state("demo", "hot")
        server.until(lambda: len(spares(server)) == 2)
        first, second = spares(server)
        os.kill(first, signal.SIGKILL)
        server.until(lambda: spares(server) == [second])
        time.sleep(0.3)
        answer = server.client.post("/v1/completions", json={"model": "later", "prompt": "hello"})
        assert answer.status_code == 200 and server.ready()["later"]["pid"] == second
        server.until(lambda: len(spares(server)) == 2)
        everybody = spares(server)
    assert not any(map(alive, everybody))

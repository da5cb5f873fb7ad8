"""The wall clock jumps: deadlines, limits and workers do not follow it."""

from __future__ import annotations

import json
import time

import pytest

from server.limits import Limiter
from tests.server.conftest import serving, settings


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0, 1e9])
def test_requests_and_workers_do_not_notice(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    real = time.time
    with serving(settings(worker_silence_seconds=2.0, request_timeout_seconds=30)) as server:
        server.until_state("demo", "hot")
        pid = server.ready()["demo"]["pid"]
        body = {"model": "demo", "prompt": "forever", "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert "tick" in next(lines)
            monkeypatch.setattr(time, "time", lambda: real() + jump)
            told = [json.loads(line[6:]) for line, _ in zip(filter(None, lines), range(40), strict=False)]
            assert all("error" not in one for one in told)
        answer = server.client.post("/v1/completions", json={"model": "demo", "prompt": "hello"})
        assert answer.status_code == 200 and abs(answer.json()["created"] - (real() + jump)) < 60
        assert server.ready()["demo"]["pid"] == pid and server.ready()["demo"]["restarts"] == 0
        server.client.post("/admin/models/demo/pin")
        ids = [event["id"] for event in server.client.get("/admin/events").json()["events"]]
        assert ids == sorted(ids, reverse=True), "events are in the order in which they happened"
        monkeypatch.undo()


def test_limits_count_monotonic_seconds() -> None:
    assert Limiter()._clock is time.monotonic

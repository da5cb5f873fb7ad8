"""Workers that are killed or stand still in the middle of what they were told: loads, answers, and every change."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from spectral.profile import SpectralProfile
from tests.server.conftest import Running, alive, serving, settings

PROFILE = Path(__file__).parents[2] / "profiles" / "demo-7m.safetensors"
BYTES = {"Content-Type": "application/octet-stream"}
MODEL = "demo-7m"
Ask = Callable[[Running], httpx.Response]


@pytest.fixture(params=["killed", "stands still"])
def fault(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> Iterator[Running]:
    monkeypatch.setenv("FAKE_FINGERPRINT", SpectralProfile.load(PROFILE).fingerprint)
    silence = 60.0 if fault == "killed" else 3.0
    with serving(settings({"name": MODEL}, state_dir=str(tmp_path), worker_silence_seconds=silence)) as server:
        server.until_state(MODEL, "hot")
        yield server


def squeeze(server: Running) -> httpx.Response:
    return server.client.post(f"/admin/models/{MODEL}/setting", json={"setting": "4x", "live": True})


def activation(server: Running) -> httpx.Response:
    sha256 = server.client.get(f"/admin/profiles/{MODEL}").json()["profiles"][0]["sha256"]
    return server.client.post(f"/admin/profiles/{MODEL}/activate", json={"profile": sha256})


def sleep(server: Running) -> httpx.Response:
    return server.client.post(f"/admin/models/{MODEL}/sleep")


def wake(server: Running) -> httpx.Response:
    """By a request: an administrator's wake-up answers at once."""
    return server.client.post("/v1/completions", json={"model": MODEL, "prompt": "hello"})


def answer(server: Running) -> httpx.Response:
    return server.client.post("/v1/completions", json={"model": MODEL, "prompt": "mute"})


@pytest.mark.parametrize("ask", [squeeze, activation, sleep, wake, answer])
def test_whoever_asked_is_told_and_the_model_comes_back(running: Running, ask: Ask, fault: str) -> None:
    stored = running.client.put(f"/admin/profiles/{MODEL}", content=PROFILE.read_bytes(), headers=BYTES)
    assert stored.status_code == 201
    if ask is wake:
        assert sleep(running).status_code == 200
    pid = running.slot(MODEL).worker.pid  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)  # so that it is in the middle of it when it is killed
    told: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: told.append(ask(running)))
    asking.start()
    slot = running.slot(MODEL)
    running.until(lambda: bool(slot.commands or slot.streams or slot.waiting))
    if fault == "killed":
        os.kill(pid, signal.SIGKILL)
    asking.join(30)
    assert told, "whoever asked was not told"
    if ask is wake and told[0].status_code == 200:
        assert told[0].json()["choices"][0]["text"] == "one two three "
    else:
        assert told[0].status_code in (409, 503) and told[0].json()["error"]["message"], told[0].text
    running.until(lambda: not alive(pid), 20)
    running.until(lambda: running.client.get("/health").status_code == 200)
    assert wake(running).json()["choices"][0]["text"] == "one two three "
    shown = running.ready()[MODEL]
    assert shown["state"] == "hot" and shown["pid"] != pid
    rows = running.client.get("/admin/audit").json()["actions"]
    assert {row["outcome"] for row in rows} <= {"done", "refused", "failed"}, "every change has its outcome"


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_hurt_while_it_loads_is_replaced(fault: signal.Signals) -> None:
    with serving(settings({"name": "demo", "path": "stuck"}, worker_silence_seconds=0.3)) as server:
        server.until(lambda: "pid" in server.ready()["demo"])
        pid = server.ready()["demo"]["pid"]
        os.kill(pid, fault)
        server.until(lambda: not alive(pid), 20)
        server.until(lambda: server.ready()["demo"].get("pid", pid) != pid, 20)
        assert server.client.get("/health").status_code == 200

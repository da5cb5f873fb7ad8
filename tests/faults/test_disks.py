"""Disks that are full, read-only or slow: answers go on, what is not recorded is not done, nothing is half there."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server import state_tables
from server.events import EventLog
from server.state import State
from server.state_schema import StateUnusable
from spectral.files import write_atomically
from tests.server.conftest import ROOT, Running, serving, settings

PROFILE = ROOT / "profiles" / "demo-7m.safetensors"
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serving(settings({"name": "demo-7m"}, state_dir=str(tmp_path / "state"))) as server:
        server.until_state("demo-7m", "hot")
        yield server


def pragma(server: Running, text: str) -> None:
    """Change the state's connection, on its own thread."""
    state: State = server.app.state.admin.state
    state._thread.submit(lambda: state._connection.execute(text)).result()


def fill(server: Running) -> None:
    """From now on SQLite finds its disk full, whatever is written."""
    pragma(server, "PRAGMA max_page_count = 1")
    state: State = server.app.state.admin.state
    for size in (100_000, 1000, 1):  # what fits into pages that are there already is still taken
        with pytest.raises(StateUnusable, match="full"):
            for _ in range(2000):
                state.run_now(lambda db, n=size: state_tables.begin_action(db, "filler", "fill", "", {"x": "y" * n}))


def answers(server: Running) -> bool:
    body = {"model": "demo-7m", "prompt": "hello"}
    return server.client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "one two three "


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_without_a_disk_answers_go_on_and_nothing_is_done_unrecorded(running: Running, how: str) -> None:
    if how == "full":
        fill(running)
    else:
        pragma(running, "PRAGMA query_only = ON")
    refused = running.client.post("/admin/models/demo-7m/pin")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "state_unusable")
    assert "nothing was changed" in refused.json()["error"]["message"].lower()
    assert int(refused.headers["retry-after"]) > 0
    assert not running.slot("demo-7m").pinned and answers(running)
    setting = running.client.post("/admin/models/demo-7m/setting", json={"setting": "4x"})
    assert setting.status_code == 503 and running.slot("demo-7m").setting is None
    assert running.client.get("/admin/events").status_code == 200, "reading goes on"
    pragma(running, "PRAGMA max_page_count = 1000000" if how == "full" else "PRAGMA query_only = OFF")
    assert running.client.post("/admin/models/demo-7m/pin").json()["pinned"]
    rows = [row for row in running.client.get("/admin/audit").json()["actions"] if row["actor"] != "filler"]
    assert [(row["action"], row["outcome"]) for row in rows] == [("pin", "done")]


async def test_events_wait_until_the_disk_takes_them(tmp_path: Path) -> None:
    state = State.open(str(tmp_path))
    log = EventLog(state)
    state._thread.submit(lambda: state._connection.execute("PRAGMA query_only = ON")).result()
    log.add("load", "first")
    await log.flush()
    log.add("load", "second")
    await log.flush()
    state._thread.submit(lambda: state._connection.execute("PRAGMA query_only = OFF")).result()
    await log.flush()
    rows = await state.run(lambda db: state_tables.events(db, 10, before=None, kind=None, model=None))
    state.close()
    assert [row["reason"] for row in rows] == ["second", "first"]


def test_a_disk_that_fills_during_a_commit_leaves_the_file_whole(tmp_path: Path) -> None:
    state = State.open(str(tmp_path))
    page_count = state.run_now(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    state._thread.submit(lambda: state._connection.execute(f"PRAGMA max_page_count = {page_count + 2}")).result()
    kept = 0
    with pytest.raises(StateUnusable, match="full"):
        for _ in range(1000):
            state.run_now(lambda db: state_tables.begin_action(db, "a" * 500, "act", "t", {}))
            kept += 1
    assert kept > 0
    state.close()
    with sqlite3.connect(tmp_path / "state.db") as again:
        assert again.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert again.execute("SELECT count(*) FROM audit").fetchone()[0] == kept
    again.close()


def test_a_slow_disk_holds_up_administrators_and_nobody_else(running: Running) -> None:
    state: State = running.app.state.admin.state
    hold, began = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        hold.wait(20)

    state._thread.submit(slow)
    began.wait(10)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(running.client.post("/admin/models/demo-7m/pin")))
    thread.start()
    try:
        for _ in range(5):
            assert answers(running)
        assert running.client.get("/health").status_code == 200 and not done
    finally:
        hold.set()
        thread.join(20)
    assert done[0].json()["pinned"]


@pytest.mark.parametrize("where", ["begin", "write"])
def test_an_upload_to_a_full_disk_is_507_and_leaves_nothing(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(**_: Any) -> tuple[int, str]:
        if where == "begin":
            raise OSError(28, "No space left on device")
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / "state" / "profiles" / "incoming-x.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        answer = running.client.put("/admin/profiles/demo-7m", content=PROFILE.read_bytes(), headers=BYTES)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage")
    assert "No space left" in answer.json()["error"]["message"]
    assert list((tmp_path / "state" / "profiles").iterdir()) == [] and answers(running)
    again = running.client.put("/admin/profiles/demo-7m", content=PROFILE.read_bytes(), headers=BYTES)
    assert again.status_code == 201


def test_a_switch_that_cannot_be_recorded_is_taken_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = running.client.put("/admin/profiles/demo-7m", content=PROFILE.read_bytes(), headers=BYTES).json()["sha256"]
    shown = lambda: running.slot("demo-7m").ready.profile_id  # noqa: E731
    old = shown()

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(state_tables, "activate", full)
        refused = running.client.post("/admin/profiles/demo-7m/activate", json={"profile": sha256})
    assert refused.status_code == 503 and running.slot("demo-7m").profile is None
    assert shown() == old
    assert running.client.post("/admin/profiles/demo-7m/activate", json={"profile": sha256}).status_code == 200
    assert shown() == sha256


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_atomically(tmp_path / "x", b"old")

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]

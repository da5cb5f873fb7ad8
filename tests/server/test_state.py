"""The state: survives a kill, migrates, refuses what it cannot read, and is one server's."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from server import state_tables
from server.events import EventLog
from server.state import State
from server.state_schema import MIGRATIONS, StateError, migrate
from tests.server.conftest import ROOT

WRITER = """
import asyncio, sys
from server import state_tables
from server.state import State

async def main():
    state = State.open(sys.argv[1])
    for number in range(10**6):
        await state.run(lambda db: state_tables.begin_action(db, "a", "act", str(number), {}))
        print(number, flush=True)

asyncio.run(main())
"""


def test_what_was_confirmed_survives_kill_9(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        confirmed = [int(writer.stdout.readline()) for _ in range(50)][-1]
        writer.send_signal(signal.SIGKILL)
        confirmed = max([confirmed, *map(int, writer.stdout.read().split())])
    state = State.open(str(tmp_path))
    assert state.durable
    targets = {int(row["target"]) for row in state.run_now(lambda db: state_tables.audit(db, 10**6))}
    assert targets >= set(range(confirmed + 1)) and len(targets) <= confirmed + 2
    assert state.run_now(state_tables.interrupted_actions) == len(targets)
    assert state.run_now(lambda db: db.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"
    state.close()


def test_an_old_file_is_brought_up_to_date_whole_or_not_at_all(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    assert migrate(connection) == 0
    connection.execute("INSERT INTO choices (model, pinned) VALUES ('a', 1)")
    more = (*MIGRATIONS, ("ALTER TABLE choices ADD COLUMN note TEXT DEFAULT 'x'",))
    broken = (*MIGRATIONS, ("ALTER TABLE choices ADD COLUMN other TEXT", "ALTER TABLE nowhere ADD COLUMN y"))
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, broken)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    assert migrate(connection, more) == len(MIGRATIONS)
    assert connection.execute("SELECT model, pinned, note FROM choices").fetchall() == [("a", 1, "x")]
    connection.close()


def test_a_later_version_and_damage_are_refused_with_the_remedy(tmp_path: Path) -> None:
    state = State.open(str(tmp_path))
    state.close()
    connection = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StateError, match="later version"):
        State.open(str(tmp_path))
    for name in ("state.db-wal", "state.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "state.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StateError, match="damaged.*move it away"):
        State.open(str(tmp_path))


def test_a_folder_belongs_to_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = State.open(str(tmp_path))
    with pytest.raises(StateError, match="another server"):
        State.open(str(tmp_path))
    first.close()
    again = State.open(str(tmp_path))
    assert again.durable
    again.close()
    monkeypatch.chdir(tmp_path)
    default, second = State.open(None), State.open(None)
    assert (default.durable, second.durable) == (True, False)
    assert default.folder.resolve() == tmp_path / ".spectral" and second.folder != default.folder
    second.close()
    default.close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match=r"server\.state_dir"):
        State.open(str(tmp_path / "file"))


async def test_a_transaction_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    state = State.open(str(tmp_path))

    def half(db: sqlite3.Connection) -> None:
        state_tables.choose(db, "a", "pinned", 1)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        await state.run(half)
    assert await state.run(state_tables.choices) == {}
    with pytest.raises(ValueError, match="no such choice"):
        await state.run(lambda db: state_tables.choose(db, "a", "pinned = 1; --", 1))
    state.close()


async def test_events_are_numbered_on_over_restarts_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_tables, "EVENTS_KEPT", 5)
    state = State.open(str(tmp_path))
    log = EventLog(state)
    log.start()
    async with log.watch() as queue:
        first = log.add("squeeze", "6x -> 10x", model="qwen", bytes=7)
        assert await queue.get() == first and first["id"] == 1
    for number in range(9):
        log.add("state", f"number {number}", model="other")
    assert [event["id"] for event in log.recent(after=8)] == [9, 10]
    await log.stop()
    kept = await state.run(lambda db: state_tables.events(db, 100, before=None, kind=None, model=None))
    assert [row["id"] for row in kept] == [10, 9, 8, 7, 6] and kept[0]["reason"] == "number 8"
    none = await state.run(lambda db: state_tables.events(db, 100, before=None, kind="squeeze", model="qwen"))
    assert none == []
    state.close()
    again = State.open(str(tmp_path))
    assert EventLog(again).add("state", "on")["id"] == 11
    again.close()

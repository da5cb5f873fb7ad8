"""What is asked of the state's tables. Every function takes the connection of a running transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

EVENTS_KEPT = 50_000


def _rows(cursor: sqlite3.Cursor) -> list[dict[str, Any]]:
    return [dict(row) for row in cursor.fetchall()]


def _unpacked(rows: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    return [{**row, field: json.loads(row[field])} for row in rows]


# ---------------------------------------------------------------------------------------------- audit


def begin_action(db: sqlite3.Connection, actor: str, action: str, target: str, detail: dict[str, Any]) -> int:
    """Record an action that is about to happen; returns its id."""
    row = (time.time(), actor, action, target, json.dumps(detail), "begun")
    sql = "INSERT INTO audit (at, actor, action, target, detail, outcome) VALUES (?, ?, ?, ?, ?, ?)"
    return int(db.execute(sql, row).lastrowid or 0)


def end_action(db: sqlite3.Connection, ident: int, outcome: str, message: str) -> None:
    """Record how it ended: "done" or "refused", and why."""
    db.execute("UPDATE audit SET outcome = ?, message = ? WHERE id = ?", (outcome, message, ident))


def interrupted_actions(db: sqlite3.Connection) -> int:
    """At the start: what was begun and never completed was cut off by the end of the process. How many those were."""
    sql = "UPDATE audit SET outcome = 'interrupted', message = 'the server ended' WHERE outcome = 'begun'"
    return db.execute(sql).rowcount


def audit(db: sqlite3.Connection, limit: int, before: int | None = None) -> list[dict[str, Any]]:
    """Actions, newest first."""
    sql = "SELECT * FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?"
    return _unpacked(_rows(db.execute(sql, (before or 2**62, limit))), "detail")


# ---------------------------------------------------------------------------------------------- events


def last_event(db: sqlite3.Connection) -> int:
    """The highest event id; 0 where there is none."""
    return int(db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])


def add_events(db: sqlite3.Connection, events: list[dict[str, Any]]) -> None:
    """Append events, and drop the oldest beyond EVENTS_KEPT."""
    sql = "INSERT INTO events VALUES (:id, :at, :kind, :model, :device, :reason, :detail)"
    db.executemany(sql, [{**event, "detail": json.dumps(event["detail"])} for event in events])
    db.execute("DELETE FROM events WHERE id <= ?", (events[-1]["id"] - EVENTS_KEPT,))


def events(
    db: sqlite3.Connection, limit: int, *, before: int | None, kind: str | None, model: str | None
) -> list[dict[str, Any]]:
    """Events, newest first."""
    sql, values = "SELECT * FROM events WHERE id < ?", [before or 2**62]
    given: list[Any] = []
    for column, value in (("kind", kind), ("model", model)):
        if value is not None:
            sql += f" AND {column} = ?"
            given.append(value)
    rows = db.execute(f"{sql} ORDER BY id DESC LIMIT ?", (*values, *given, limit))
    return _unpacked(_rows(rows), "detail")


# ---------------------------------------------------------------------------------------------- profiles


def add_profile(
    db: sqlite3.Connection, model: str, sha256: str, nbytes: int, origin: str, facts: dict[str, Any]
) -> bool:
    """Record a profile of a model. False where the model has this very file already."""
    sql = "INSERT OR IGNORE INTO profiles VALUES (?, ?, ?, ?, ?, ?, ?)"
    row = (model, sha256, nbytes, facts["fingerprint"], origin, time.time(), json.dumps(facts))
    return db.execute(sql, row).rowcount == 1


def profiles(db: sqlite3.Connection, model: str | None = None) -> list[dict[str, Any]]:
    """Profiles without their facts, newest first; of one model or of all."""
    columns = "model, sha256, nbytes, fingerprint, origin, created"
    sql = f"SELECT {columns} FROM profiles WHERE ?1 IS NULL OR model = ?1 ORDER BY created DESC, sha256"
    return _rows(db.execute(sql, (model,)))


def profile_facts(db: sqlite3.Connection, model: str, sha256: str) -> dict[str, Any] | None:
    """What a profile holds."""
    row = db.execute("SELECT facts FROM profiles WHERE model = ? AND sha256 = ?", (model, sha256)).fetchone()
    return None if row is None else dict(json.loads(row["facts"]))


def delete_profile(db: sqlite3.Connection, model: str, sha256: str) -> bool:
    """Forget a model's profile. True where no other model has the same file."""
    db.execute("DELETE FROM profiles WHERE model = ? AND sha256 = ?", (model, sha256))
    return db.execute("SELECT 1 FROM profiles WHERE sha256 = ?", (sha256,)).fetchone() is None


def activate(db: sqlite3.Connection, model: str, sha256: str | None, reason: str) -> None:
    """Make a profile the one in force; None: the configured or shipped one."""
    sql = "INSERT INTO activations (model, sha256, at, reason) VALUES (?, ?, ?, ?)"
    db.execute(sql, (model, sha256, time.time(), reason))


def activations(db: sqlite3.Connection, model: str) -> list[dict[str, Any]]:
    """A model's switches, newest first; the first one is in force."""
    return _rows(db.execute("SELECT * FROM activations WHERE model = ? ORDER BY id DESC", (model,)))


def active(db: sqlite3.Connection) -> dict[str, str | None]:
    """For every model that was ever switched, the profile in force."""
    sql = "SELECT model, sha256 FROM activations WHERE id IN (SELECT max(id) FROM activations GROUP BY model)"
    return {row["model"]: row["sha256"] for row in db.execute(sql)}


# ---------------------------------------------------------------------------------------------- choices


def choices(db: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    """What was decided about each model."""
    return {row["model"]: dict(row) for row in db.execute("SELECT * FROM choices")}


def choose(db: sqlite3.Connection, model: str, column: str, value: Any) -> None:
    """Record one decision; `column`: pinned, setting or fingerprint."""
    if column not in ("pinned", "setting", "fingerprint"):
        raise ValueError(f"no such choice: {column}")
    db.execute("INSERT OR IGNORE INTO choices (model) VALUES (?)", (model,))
    db.execute(f"UPDATE choices SET {column} = ? WHERE model = ?", (value, model))


# ---------------------------------------------------------------------------------------------- jobs


def put_job(db: sqlite3.Connection, job: dict[str, Any]) -> None:
    """Record a job, or what became of it."""
    sql = "INSERT OR REPLACE INTO jobs VALUES (:id, :model, :state, :options, :created, :finished, :sha256, :message)"
    db.execute(sql, {**job, "options": json.dumps(job["options"])})


def jobs(db: sqlite3.Connection, limit: int = 100) -> list[dict[str, Any]]:
    """Jobs, newest first."""
    rows = _rows(db.execute("SELECT * FROM jobs ORDER BY created DESC LIMIT ?", (limit,)))
    return _unpacked(rows, "options")


def interrupted_jobs(db: sqlite3.Connection) -> None:
    """At the start: jobs that ran when the process ended."""
    message = "the server ended; build again with the same options to go on from its checkpoint"
    sql = "UPDATE jobs SET state = 'interrupted', message = ?, finished = ? WHERE state IN ('queued', 'running')"
    db.execute(sql, (message, time.time()))

"""The tables of the server's state, as a list of migrations: a file of any earlier version is brought up to date."""

from __future__ import annotations

import sqlite3

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # What was uploaded or built. `facts`: JSON, as `spectral profile show --json` prints it, spectra thinned out.
        """CREATE TABLE profiles (
            model TEXT NOT NULL, sha256 TEXT NOT NULL, nbytes INTEGER NOT NULL, fingerprint TEXT NOT NULL,
            origin TEXT NOT NULL, created REAL NOT NULL, facts TEXT NOT NULL, PRIMARY KEY (model, sha256))""",
        # Every switch of a model's profile; the last row of a model is in force. NULL: the configured or shipped one.
        """CREATE TABLE activations (
            id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, sha256 TEXT, at REAL NOT NULL,
            reason TEXT NOT NULL)""",
        # One row per action of an administrator, written before the action ("begun") and completed after it.
        """CREATE TABLE audit (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
            target TEXT NOT NULL, detail TEXT NOT NULL, outcome TEXT NOT NULL, message TEXT NOT NULL DEFAULT '')""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, model TEXT, device TEXT,
            reason TEXT NOT NULL, detail TEXT NOT NULL)""",
        "CREATE INDEX events_by_kind ON events (kind, id)",
        "CREATE INDEX events_by_model ON events (model, id)",
        # What an operator decided about a model, and what a worker told about it.
        """CREATE TABLE choices (
            model TEXT PRIMARY KEY, pinned INTEGER NOT NULL DEFAULT 0, setting TEXT, fingerprint TEXT)""",
        """CREATE TABLE jobs (
            id TEXT PRIMARY KEY, model TEXT NOT NULL, state TEXT NOT NULL, options TEXT NOT NULL,
            created REAL NOT NULL, finished REAL, sha256 TEXT, message TEXT NOT NULL DEFAULT '')""",
    ),
    (
        # What the conductor of a cluster keeps, as JSON: its token, configuration, choices, drained nodes.
        "CREATE TABLE cluster (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
)


class StateError(Exception):
    """The server's state cannot be used; the message says what to do."""


class StateUnusable(StateError):
    """A transaction could not be carried out: the disk is full, read-only or broken. Nothing was changed."""


def migrate(connection: sqlite3.Connection, migrations: tuple[tuple[str, ...], ...] = MIGRATIONS) -> int:
    """Bring the tables up to date, each step whole or not at all. Returns the version found before.

    Raises StateError for a file that a later version of Spectral has written.
    """
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if found > len(migrations):
        raise StateError(
            f"the state was written by a later version of Spectral (schema {found}, this one knows {len(migrations)}); "
            "run that version, or give this one another server.state_dir"
        )
    for version, statements in enumerate(migrations[found:], start=found + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
    return found

"""What the conductor keeps: names and JSON values in an SQLite file, each write on the disk before it returns."""

from __future__ import annotations

import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

from server.cluster import trust
from server.state import State

log = logging.getLogger("spectral.cluster")


class Store:
    """`folder` None: in memory, for tests. Small and rare writes, so they happen where they are asked for."""

    def __init__(self, folder: Path | None) -> None:
        self._state = State.open(str(folder)) if folder is not None else None
        self._memory: dict[str, str] = {}
        self.restored = self.get("secret", None) is not None

    def get(self, name: str, default: Any) -> Any:
        """The last value of a name."""
        if self._state is None:
            found = self._memory.get(name)
            return default if found is None else json.loads(found)

        def read(db: sqlite3.Connection) -> Any:
            return db.execute("SELECT value FROM cluster WHERE name = ?", (name,)).fetchone()

        row = self._state.run_now(read)
        return default if row is None else json.loads(row["value"])

    def put(self, name: str, value: Any) -> None:
        """Keep a value."""
        text = json.dumps(value)
        if self._state is None:
            self._memory[name] = text
            return
        self._state.run_now(lambda db: db.execute("INSERT OR REPLACE INTO cluster VALUES (?, ?)", (name, text)))

    def secret(self) -> str:
        """The cluster's secret, made once."""
        found = self.get("secret", None)
        if found is None:
            found = trust.make()
            self.put("secret", found)
        return str(found)

    def close(self) -> None:
        """Close the file."""
        if self._state is not None:
            self._state.close()

"""The server's durable state: one SQLite file in WAL mode, used by a thread of its own, never by the event loop.

A transaction that was awaited is on the disk: it survives the end of the process by any signal.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from server.state_schema import StateError, StateUnusable, migrate

log = logging.getLogger("spectral.state")
T = TypeVar("T")
DEFAULT_FOLDER = ".spectral"
FILE = "state.db"
BUSY_S = 5.0
CACHE_KIB = 256
"""SQLite's own page cache: its default of 2 MiB would fill over the first hours, and look like a leak."""


class State:
    """An open state. Made by :meth:`open`; `folder` also holds the profiles. Close it once."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: IO[str] | None, *, durable: bool) -> None:
        self.folder = folder
        self.durable = durable
        self._connection = connection
        self._lock = lock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._closed = False
        self._place = self._where()

    @classmethod
    def open(cls, folder: str | None) -> State:
        """The state in this folder, which is made where it is missing. Raises StateError where it cannot be used.

        None: `.spectral` in the working folder; where that cannot be written, or another server has it, a state that
        lasts as long as the process (`durable` is False, and the log says so).
        """
        try:
            return cls._open(Path(folder or DEFAULT_FOLDER))
        except (OSError, sqlite3.OperationalError, InUse) as error:
            if folder is not None:
                raise StateError(f"server.state_dir {folder!r} cannot be used: {error}") from error
            log.warning("%s; profiles, pins, sessions and the audit trail will not outlive this process", error)
        return cls._open(Path(tempfile.mkdtemp(prefix="spectral-state-")), durable=False)

    @classmethod
    def _open(cls, folder: Path, *, durable: bool = True) -> State:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = lock_folder(folder)
        connection = sqlite3.connect(folder / FILE, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            migrate(connection)
        except sqlite3.OperationalError:
            connection.close()
            lock.close()
            raise
        except (sqlite3.DatabaseError, StateError) as error:
            connection.close()
            lock.close()
            if isinstance(error, StateError):
                raise
            raise StateError(
                f"{folder / FILE} is damaged ({error}); move it away to begin anew, or put a copy back"
            ) from error
        return cls(folder, connection, lock, durable=durable)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work`, run in one transaction on the state's thread: all of it is kept, or nothing."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, work)

    def run_now(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """As :meth:`run`, for code that runs before the event loop does."""
        return self._thread.submit(self._transaction, work).result()

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._connection.execute("BEGIN")  # not IMMEDIATE: reading goes on where nothing can be written
            try:
                before = self._connection.total_changes
                result = work(self._connection)
                if self._connection.total_changes != before and self._where() != self._place:
                    raise sqlite3.OperationalError("its file was taken away or replaced; restart the server")
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # on a full disk SQLite has rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise
        except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
            if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
                raise  # a mistake of ours, not of the disk
            raise StateUnusable(
                f"the server's state in {self.folder} cannot be read or written now ({error}); nothing was changed. "
                "Look at the disk's space, its mount and the file's permissions, then try again"
            ) from error
        return result

    def _where(self) -> tuple[int, int] | None:
        """Which file lies in the state's place: SQLite would go on writing to one that was removed."""
        try:
            found = os.stat(self.folder / FILE)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def close(self) -> None:
        """Wait for what is being written and close the file. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        if self._lock is not None:
            self._lock.close()


class InUse(Exception):
    """Another server has this folder."""


def lock_folder(folder: Path) -> IO[str]:
    """Hold the folder for this process; the lock ends with the process, however that ends. Raises InUse."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InUse(f"another server uses the state in {folder}; give this one its own server.state_dir") from error
    return file

"""The folder of saved sessions: one flat folder for all models of a server, bounded in bytes and age.

A file's name is a hash of model, salt and session, so nothing that a client sends becomes part of a path and no key
finds another one's. Its time of modification is when the session was last known to be used; who needs room takes the
oldest. A file appears under its name when it is whole: until then its name begins with INCOMING. Several workers may
write at once; what changes the folder's sum happens under a lock of the operating system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from server.worker.session_messages import SavedSessions, file_name

SUFFIX, INCOMING, LOCK = ".session", "incoming-", "lock"
LOCK_S = 5.0
STALE_S = 3600.0
"""What is still incoming after so long was left over by a worker that was killed."""


class Totals(NamedTuple):
    """Files, and their bytes."""

    files: int = 0
    bytes: int = 0


class _File(NamedTuple):
    path: Path
    nbytes: int
    used_at: float


class SessionFolder:
    """`bounds`: where, how many bytes and how long. Belongs to no process: every call looks at the folder anew."""

    def __init__(self, bounds: SavedSessions) -> None:
        self.path = Path(bounds.folder)
        self._most, self._age = bounds.max_bytes, bounds.max_age_s

    def make(self) -> None:
        """The folder, readable by this user only. Raises OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)

    def file(self, model: str, session: str, cache_salt: str) -> Path:
        """Where a session of a model lies, if it does."""
        return self.path / (file_name(file_name(session, cache_salt), model) + SUFFIX)

    def incoming(self) -> Path:
        """Where this process writes a file that :meth:`place` then takes."""
        return self.path / f"{INCOMING}{os.getpid()}"

    def holds(self, file: Path) -> bool:
        """Whether there is such a file, and it is not too old."""
        found = _look(file)
        return found is not None and not self._too_old(found)

    def place(self, incoming: Path, file: Path, used_at: float) -> bool:
        """Move a whole file to its place, with the time at which its session was used (seconds since the epoch), and
        remove older ones while they take too much room. False where newer ones leave none. Raises OSError."""
        with self._locked():
            size = incoming.stat().st_size
            others = [other for other in self._files() if other.path != file]
            if size + sum(other.nbytes for other in others if other.used_at > used_at) > self._most:
                return False
            self._shrink(others, self._most - size)
            os.utime(incoming, (used_at, used_at))
            os.replace(incoming, file)
        return True

    def sweep(self, *, at_start: bool = False) -> Totals:
        """Remove what is too old, what is over the bound, and what was left over: all of that `at_start`, when no
        worker writes. What is left. Raises OSError."""
        if not self.path.is_dir():
            return Totals()
        with self._locked():
            for left_over in self.path.glob(f"{INCOMING}*"):
                found = _look(left_over)
                if found is not None and (at_start or time.time() - found.used_at > STALE_S):
                    left_over.unlink(missing_ok=True)
            young = []
            for found in self._files():
                if self._too_old(found):
                    found.path.unlink(missing_ok=True)
                else:
                    young.append(found)
            kept = self._shrink(young, self._most)
        return Totals(len(kept), sum(found.nbytes for found in kept))

    def clear(self) -> int:
        """Remove all saved sessions; how many there were. Raises OSError."""
        if not self.path.is_dir():
            return 0
        with self._locked():
            found = self._files()
            for path in [file.path for file in found] + [*self.path.glob(f"{INCOMING}*")]:
                path.unlink(missing_ok=True)
        return len(found)

    def totals(self) -> Totals:
        """What is held now. Raises OSError."""
        found = self._files()
        return Totals(len(found), sum(file.nbytes for file in found))

    # -----------------------------------------------------------------------------------------------------------

    def _files(self) -> list[_File]:
        try:
            names = [name for name in os.listdir(self.path) if name.endswith(SUFFIX)]
        except FileNotFoundError:
            return []
        return [found for name in names if (found := _look(self.path / name)) is not None]

    def _too_old(self, file: _File) -> bool:
        return self._age >= 0 and time.time() - file.used_at > self._age

    @staticmethod
    def _shrink(files: list[_File], most: int) -> list[_File]:
        """Remove the longest unused until the rest has at most so many bytes; the rest, oldest first."""
        left = sorted(files, key=lambda file: file.used_at)
        total = sum(file.nbytes for file in left)
        while left and total > most:
            oldest = left.pop(0)
            oldest.path.unlink(missing_ok=True)
            total -= oldest.nbytes
        return left

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process changes the folder meanwhile. Held for moments, and no longer than its process lives; who
        gets it not within LOCK_S (its holder was stopped) raises OSError."""
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            until = time.monotonic() + LOCK_S
            while not _taken(descriptor):
                if time.monotonic() > until:
                    raise OSError(errno.EAGAIN, "another process keeps it locked", str(self.path))
                time.sleep(0.005)
            yield
        finally:
            os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _look(path: Path) -> _File | None:
    """A regular file as it is now; None for anything else: a pipe would hold up its reader, a link leads elsewhere."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return _File(path, found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

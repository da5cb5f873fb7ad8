"""A worker's saved sessions: written to files when it ends on purpose, read when a request names one.

A session is in one place. Its file is read beside the steps (see child_encoder), given to the engine between two steps,
and then deleted. A file that cannot be used (damaged, or of another model, profile, setting or version) is left where
it is, for the time when everything is as it was, and passed over: the prompt is read again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.worker.session_files import SessionFolder
from server.worker.session_messages import SavedSessions
from spectral.engine import types
from spectral.errors import RequestError, SessionError, SpectralError

if TYPE_CHECKING:
    from server.worker.child_engines import Engines
    from spectral.engine.engine import Engine
    from spectral.engine.sessions import Shelved

log = logging.getLogger("spectral.worker")
APART_S = 1e-3
"""Sessions that are saved together get times so far apart, in the order in which they were used."""


@dataclass(frozen=True)
class Found:
    """What a request's file had, for this engine at this setting; None: it must be read between two steps."""

    engine: Engine
    setting: str
    file: Path
    outcome: Shelved | Exception | None


class SavedChats:
    """`bounds` None: nothing is saved. `model`: its configured name."""

    def __init__(self, engines: Engines, bounds: SavedSessions | None, model: str) -> None:
        self._engines, self._bounds, self._model = engines, bounds, model
        self._folder = SessionFolder(bounds) if bounds is not None else None
        self._refused: set[tuple[Path, int]] = set()  # files that were passed over, and their times

    # -- reading ------------------------------------------------------------------------------------------------------

    def waits(self, request: types.GenerateRequest) -> bool:
        """Whether a request's chat lies in a file and nowhere else."""
        if self._folder is None or request.session is None:
            return False
        if (request.cache_salt, request.session) in self._engines.current.sessions:
            return False
        file = self._file(request)
        return self._folder.holds(file) and (file, _time_of(file)) not in self._refused

    def read(self, request: types.GenerateRequest) -> Found | None:
        """A request's chat out of its file, beside the steps. Any thread. Never raises."""
        if not self.waits(request):
            return None
        built, file = self._engines.built, self._file(request)
        engine = built.engine
        try:
            setting = engine.lanes.setting_for(request.max_kl, request.setting)
        except RequestError:  # told when it is submitted
            return None
        try:
            ladder = ["exact", *(row.name for row in (built.profile.ladder if built.profile is not None else []))]
            finer = ladder[: ladder.index(setting)] if setting in ladder else []
            return Found(engine, setting, file, engine.sessions.load_aside(file, [*finer, setting]))
        except Exception as error:  # whatever lies there, the request can do without
            return Found(engine, setting, file, error)

    def begin(self, request: types.GenerateRequest, found: Found | None) -> bool:
        """Give the engine what was found, between two steps; whether it took it. Never raises."""
        if found is None or found.engine is not self._engines.current:  # another profile came meanwhile
            return False
        sessions, name = found.engine.sessions, (request.cache_salt, request.session or "")
        if name in sessions:
            return False
        try:
            if isinstance(found.outcome, Exception):
                raise found.outcome
            shelved = found.outcome or sessions.load(found.file)
            if not sessions.fits(shelved, found.setting):
                raise SessionError(f"it was saved at setting {shelved.setting}, and this request has {found.setting}")
            sessions.put(name, shelved)
            if name not in sessions:
                raise SessionError(f"its {shelved.parked.nbytes} bytes are more than host memory for sessions has")
            found.file.unlink(missing_ok=True)
        except Exception as error:
            self._refuse(found.file, error)
            return False
        return True

    def _refuse(self, file: Path, error: Exception) -> None:
        """One line for a file, however often it is asked for."""
        if isinstance(error, FileNotFoundError):  # it was too old, or there was no room for it
            return
        self._refused.add((file, _time_of(file)))
        known = isinstance(error, (SpectralError, OSError))
        why = str(error) if known else f"{type(error).__name__}: {error}"
        log.warning("the saved session %s is passed over, its prompt is read again: %s", file.stem[:12], why)

    def _file(self, request: types.GenerateRequest) -> Path:
        assert self._folder is not None
        return self._folder.file(self._model, request.session or "", request.cache_salt)

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(self, *, asleep: bool = False) -> None:
        """The worker ends: write its sessions, those that were used last first, for as long as is allowed. Of a model
        that is `asleep` at the fast level: the small one computes with tables, whose memory the device has taken back.
        """
        if self._folder is None or self._bounds is None or not len(self._engines.current.sessions):
            return
        began, clock, saved, nbytes, lost = time.time(), time.monotonic(), 0, 0, ""
        names = self._engines.current.sessions.names[::-1]
        for rank, name in enumerate(names):
            if time.monotonic() - clock >= self._bounds.save_s:
                lost = f"sessions.save_seconds, {self._bounds.save_s:g}, were over"
                break
            try:
                size = self._save(name, began - APART_S * rank, "fast" if asleep else None)
            except OSError as error:  # of the disk: the next one would fare no better
                lost = str(error)
                break
            except Exception as error:  # of this session
                lost = str(error) if isinstance(error, SpectralError) else f"{type(error).__name__}: {error}"
                continue
            saved, nbytes = saved + (size > 0), nbytes + size
            lost = lost if size else "sessions.max_bytes holds no more"
        log.info("sessions saved: %d, %d bytes, in %.2f s", saved, nbytes, time.monotonic() - clock)
        if saved < len(names):
            log.warning("sessions not saved, and lost: %d (%s)", len(names) - saved, lost)

    def _save(self, name: tuple[str, str], used_at: float, level: str | None) -> int:
        """Write one; its bytes, 0 where there is no room. Raises OSError, SpectralError."""
        assert self._folder is not None
        salt, session = name
        self._folder.make()
        incoming = self._folder.incoming()
        try:
            self._engines.current.sessions.save(name, incoming, level)
            size = incoming.stat().st_size
            placed = self._folder.place(incoming, self._folder.file(self._model, session, salt), used_at)
        finally:
            incoming.unlink(missing_ok=True)
        return size if placed else 0


def _time_of(file: Path) -> int:
    try:
        return file.lstat().st_mtime_ns
    except OSError:
        return 0

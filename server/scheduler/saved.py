"""The gateway's side of saved sessions: where workers keep them, how long that may take, and what is swept away.

Workers write and read the files themselves (server/worker/child_saved.py); here is only the folder. Belongs to the
gateway's event loop; the disk is looked at on threads.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from server.config_sessions import SessionSettings
from server.scheduler.slots import Slot
from server.worker.session_files import SessionFolder, Totals
from server.worker.session_messages import SavedSessions

log = logging.getLogger("spectral.scheduler")
SWEEP_S = 600.0


class SavedFolder:
    """One per scheduler. Nothing is saved until :meth:`use` says where."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self.bounds: SavedSessions | None = None
        self._folder: SessionFolder | None = None
        self._sweeping: asyncio.Task[None] | None = None

    def use(self, folder: Path) -> None:
        """Save sessions in this folder, if the configuration wants them; else what is in it goes. Before any worker."""
        mine = self._settings
        bounds = SavedSessions(str(folder.absolute()), mine.max_bytes, mine.max_age, mine.save_seconds)
        there = SessionFolder(bounds)
        try:
            if mine.keep:
                there.make()
                there.sweep(at_start=True)
                self.bounds, self._folder = bounds, there
            elif gone := there.clear():
                log.info("sessions.keep is false: %d saved sessions are deleted", gone)
        except OSError as error:
            log.warning("sessions cannot be saved in %s and end with their workers: %s", folder, error)

    def seconds(self, slot: Slot) -> float:
        """How long a model's worker may take to save its sessions, when it ends."""
        return self._settings.save_seconds if self.bounds is not None and slot.has_sessions else 0.0

    def start(self) -> None:
        """Begin to remove what becomes too old."""
        if self._folder is not None:
            self._sweeping = asyncio.create_task(self._sweep(self._folder), name="saved sessions")

    async def stop(self) -> None:
        """No more of that. Safe to call twice."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    async def _sweep(self, folder: SessionFolder) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await asyncio.to_thread(folder.sweep)
            except OSError as error:
                log.warning("the saved sessions in %s cannot be looked through: %s", folder.path, error)

    async def view(self) -> dict[str, Any] | None:
        """For /admin/status: where, how many, how much; None where nothing is saved."""
        if self._folder is None:
            return None
        try:
            found = await asyncio.to_thread(self._folder.totals)
        except OSError:
            found = Totals()
        return {"folder": str(self._folder.path), **found._asdict(), "max_bytes": self._settings.max_bytes}


__all__ = ["SavedFolder"]

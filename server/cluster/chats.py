"""Chats that move: the cache of a paused chat goes from one agent to another as its compressed pages.

A gateway that sends a chat's next request elsewhere says where the chat was. The agent that gets the request fetches
the pages from there, gives them to its worker, and only then begins: the prompt is not read again. Where the pages
cannot be had the request begins without them. A replica that ends leaves its chats as files for KEEP_S.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from server import errors
from server.aio import within
from server.cluster import wire
from server.cluster.link import BadFrame, Link, NotTrusted, dial
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot
from server.worker import messages
from server.worker.session_messages import ResumeSession, SaveSession, file_name

log = logging.getLogger("spectral.cluster")
PIECE_BYTES = 1 << 20
COMMAND_S, FETCH_S = 10.0, 30.0
MAX_BYTES = 8 << 30
KEEP_S = 600.0


class Chats:
    """One agent's part. Files lie in a folder that only this user reads, and are deleted."""

    def __init__(self, scheduler: Scheduler, secret: str) -> None:
        self._scheduler, self._secret = scheduler, secret
        self._folder = Path(tempfile.mkdtemp(prefix="spectral-chats-"))
        self._kept: dict[str, float] = {}  # replicas that have ended, and until when their chats are kept
        self.bytes_received = self.bytes_sent = self.moved = 0

    def close(self) -> None:
        """Delete all files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def keep(self, slot: Slot) -> None:
        """A replica is about to end: write all of its chats to files."""
        for name in [name for name, until in self._kept.items() if until < time.monotonic()]:
            del self._kept[name]
            await asyncio.to_thread(shutil.rmtree, self._place(name), True)
        if slot.state != "hot" or slot.worker is None:
            return
        place = self._place(slot.name)
        place.mkdir(exist_ok=True)
        self._kept[slot.name] = time.monotonic() + KEEP_S
        try:
            await self._scheduler.command(slot, lambda ident: SaveSession(ident, str(place)), FETCH_S)
        except errors.ApiError as error:
            log.warning("replica %s: its chats are not kept: %s", slot.name, error.message)

    def _place(self, replica: str) -> Path:
        return self._folder / replica.replace("/", "%2F")

    # ------------------------------------------------------------------------------------------ the one who has it

    async def give(self, asked: wire.Fetch, link: Link[wire.ToAgent]) -> None:
        """Send a chat's pages, or say why not."""
        path: Path | None = None
        try:
            path = await self._file(asked)
            size = path.stat().st_size
            with path.open("rb") as file:
                while data := await asyncio.to_thread(file.read, PIECE_BYTES):
                    link.send(wire.Piece(asked.ident, data))
                    await link.drained()
            link.send(wire.Piece(asked.ident, last=True))
            self.bytes_sent += size
        except (OSError, errors.ApiError) as error:
            why = error.message if isinstance(error, errors.ApiError) else str(error)
            link.send(wire.Piece(asked.ident, last=True, error=why or "it cannot be read"))
        finally:
            if path is not None:
                path.unlink(missing_ok=True)

    async def _file(self, asked: wire.Fetch) -> Path:
        """The chat as a file of its own. Raises OSError, ApiError."""
        kept = self._place(asked.replica) / file_name(asked.session, asked.cache_salt)
        slot = self._scheduler.slots.get(asked.replica)
        if slot is None or kept.is_file():
            return kept
        path = self._folder / uuid.uuid4().hex
        save = lambda ident: SaveSession(ident, str(path), asked.session, asked.cache_salt)  # noqa: E731
        await self._scheduler.command(slot, save, COMMAND_S)
        return path

    # ------------------------------------------------------------------------------------------ the one who needs it

    async def bring(self, slot: Slot, forward: wire.Forward, request: messages.Submit) -> None:
        """Fetch a chat's pages for a worker. Never raises for a chat that cannot be had: it is then read again."""
        began, path = time.monotonic(), self._folder / uuid.uuid4().hex
        session = request.session or ""
        try:
            size = await within(FETCH_S, self._fetch(forward, request, path))
            resume = lambda ident: ResumeSession(ident, str(path), session, request.cache_salt)  # noqa: E731
            await self._scheduler.command(slot, resume, COMMAND_S)
        except (OSError, NotTrusted, BadFrame, asyncio.TimeoutError, errors.ApiError) as error:
            why = error.message if isinstance(error, errors.ApiError) else str(error) or type(error).__name__
            log.warning("replica %s: a chat begins without its pages: %s", slot.name, why)
            return
        finally:
            path.unlink(missing_ok=True)
        self.bytes_received += size
        self.moved += 1
        took = time.monotonic() - began
        log.info("replica %s: a chat moved here, %d bytes in %.0f ms", slot.name, size, took * 1000)

    async def _fetch(self, forward: wire.Forward, request: messages.Submit, path: Path) -> int:
        """Write the pages to a file; their bytes. Raises OSError and what `dial` raises."""
        link: Link[Any] = await dial(forward.session_at, self._secret)
        ident, size = uuid.uuid4().hex, 0
        try:
            link.send(wire.Fetch(ident, forward.session_replica, request.session or "", request.cache_salt))
            with path.open("xb") as file:
                while (message := await link.receive()) is not None:
                    if not isinstance(message, wire.Piece) or message.ident != ident:
                        continue
                    if message.error:
                        raise OSError(message.error)
                    size += len(message.data)
                    if size > MAX_BYTES:
                        raise OSError(f"the chat has more than {MAX_BYTES} bytes")
                    file.write(message.data)
                    if message.last:
                        return size
            raise OSError("the connection ended")
        finally:
            link.close()


__all__ = ["Chats"]

"""A worker's part in moving a chat: its cache is written to a file, or read from one, between two steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from server.worker import messages as wire
from server.worker.session_messages import ResumeSession, SaveSession, file_name
from spectral.errors import SpectralError

if TYPE_CHECKING:
    from server.worker.child_engines import Engines

log = logging.getLogger("spectral.worker")
COMMANDS = (SaveSession, ResumeSession)


def handle(engines: Engines, message: SaveSession | ResumeSession) -> wire.Done:
    """Carry a command out. A failure changes nothing and is told."""
    engine = engines.current
    try:
        if isinstance(message, ResumeSession):
            engine.resume_session(message.session, message.path, cache_salt=message.cache_salt)
        elif message.session:
            engine.save_session(message.session, message.path, cache_salt=message.cache_salt)
        else:
            for salt, session in engine.sessions.names:
                engine.save_session(session, Path(message.path, file_name(session, salt)), cache_salt=salt)
    except (SpectralError, OSError) as error:
        return wire.Done(message.command_id, str(error) or type(error).__name__)
    except Exception as error:  # told to whoever asked; the model goes on
        log.exception("a session could not be moved")
        return wire.Done(message.command_id, f"{type(error).__name__}: {error}")
    return wire.Done(message.command_id)

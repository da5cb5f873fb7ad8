"""The part of the protocol that moves a paused chat's cache to another worker, or into the next life of its own, as
files of compressed pages."""

from __future__ import annotations

import msgspec


class SavedSessions(msgspec.Struct, frozen=True):
    """Where a worker keeps sessions as files while no worker has them, for all models together. `max_bytes`: of files;
    `max_age_s`: seconds since a session was used, negative for ever; `save_s`: for writing when the worker ends."""

    folder: str
    max_bytes: int
    max_age_s: float
    save_s: float


class SaveSession(msgspec.Struct, tag="save_session", frozen=True):
    """Write a paused session to a file; with an empty `session` all of them, into the folder `path`, each named by
    :func:`file_name`. Answered by Done, with an error where there is no such session."""

    command_id: str
    path: str
    session: str = ""
    cache_salt: str = ""


class ResumeSession(msgspec.Struct, tag="resume_session", frozen=True):
    """Read a session from a file: the next request with this name and salt goes on from it. Answered by Done."""

    command_id: str
    path: str
    session: str
    cache_salt: str = ""


def file_name(session: str, cache_salt: str) -> str:
    """A file name for any session of anybody: names are the clients' and may hold anything."""
    import hashlib

    return hashlib.sha256(f"{len(cache_salt)}:{cache_salt}{session}".encode("utf-8", "replace")).hexdigest()

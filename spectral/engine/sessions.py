"""Sessions: caches of chats that have paused, in host memory and, saved, on disk."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectral.codec import coarser
from spectral.engine.lane import Lane
from spectral.engine.lanes import Lanes
from spectral.engine.sequence import Sequence
from spectral.engine.types import EngineLimits, cold_level, session_name
from spectral.errors import DamagedPages, SessionError
from spectral.link_files import LinkFiles
from spectral.parking import Parked, host_store, park, regrouped, unpark
from spectral.sessions import SessionFacts, load_row, save_row, session_facts

if TYPE_CHECKING:
    import torch

    from spectral.pages import PageStore
    from spectral.profile import SpectralProfile

Name = tuple[str, str]
"""Cache salt and session name: one client cannot name another's session."""

MAX_SESSIONS = 1024


@dataclass(frozen=True)
class Shelved:
    """A paused chat. `tokens`: of which the row holds the first `parked.length`; `setting`: of its pages;
    `window_dtype`: of its store's exact windows."""

    tokens: list[int]
    parked: Parked
    setting: str
    window_dtype: torch.dtype


class Sessions:
    """Paused chats of one engine; the longest unused go when max_host_bytes is reached."""

    def __init__(self, lanes: Lanes, model: str, limits: EngineLimits, profile: SpectralProfile | None) -> None:
        self._lanes, self._model, self._links = lanes, model, LinkFiles(profile)
        self._most, self._level = limits.max_host_bytes, limits.cold_level
        self._shelf: OrderedDict[Name, Shelved] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._shelf)

    def __contains__(self, name: Name) -> bool:
        return name in self._shelf

    def keep(self, name: Name, sequence: Sequence) -> None:
        """Copy a running sequence's row, which its owner is about to close."""
        if sequence.row is None or not sequence.row.length:
            return
        lane: Lane = sequence.lane
        parked, dtype = park(lane.store, sequence.row), _window_dtype(lane.store)
        self.put(name, Shelved(list(sequence.tokens), parked, lane.setting, dtype))

    @property
    def names(self) -> list[Name]:
        """All sessions, the longest unused first."""
        return list(self._shelf)

    def forget(self, name: Name) -> bool:
        """Drop a session; False if there is none."""
        shelved = self._shelf.pop(name, None)
        if shelved is not None:
            self.nbytes -= shelved.parked.nbytes
        return shelved is not None

    def begin(self, name: Name, sequence: Sequence) -> None:
        """Let a new sequence go on from a session, if its prompt does and the setting is good enough for it."""
        shelved = self._shelf.get(name)
        if shelved is None:
            return
        lane = self._lane(shelved, sequence)
        try:
            self._begin(name, shelved, lane, sequence)
        finally:
            self._lanes.retire(lane)  # where it was made for nothing

    def _begin(self, name: Name, shelved: Shelved, lane: Lane, sequence: Sequence) -> None:
        if sequence.max_kl is not None and lane.kl > sequence.max_kl:
            return
        if sequence.setting not in (None, lane.setting):
            return
        usable = min(shelved.parked.length, len(sequence.tokens) - 1)
        same = next((i for i in range(usable) if shelved.tokens[i] != sequence.tokens[i]), usable)
        rolling = any(codec is None for codec in lane.store.codebook.layers)
        if same < shelved.parked.length and (rolling or same < shelved.parked.length // 2):
            return  # a rolling window cannot go back, and of a short beginning a prefix may know as much
        self.forget(name)
        sequence.lane = lane
        lane.members += 1
        sequence.parked, sequence.keep, sequence.resumed, sequence.cached = shelved.parked, same, True, same
        self._lanes.parked_nbytes += shelved.parked.nbytes

    def save(self, name: Name, path: str | os.PathLike[str], level: str | None = None) -> Path:
        """Write a session to a file, at its own setting; it stays. From host memory: also where the device has no room,
        or the model sleeps. Raises SessionError for an unknown name or where the level's links are not there,
        RequestError for what is no name, OSError."""
        session_name(name[1])
        shelved = self._shelf.get(name)
        if shelved is None:
            raise SessionError(f"there is no paused session {name[1]!r}; a session is kept when its answer has ended")
        links, like = self._links.of_level(cold_level(level or self._level), shelved.setting), self._lanes.current.store
        store = host_store(like, shelved.parked.codebook, shelved.window_dtype)
        try:
            row = unpark(store, regrouped(shelved.parked, like, store))
        except DamagedPages as error:
            self.forget(name)
            raise SessionError(f"the session {name[1]!r} cannot be saved and is given up: {error}") from error
        return save_row(store, row, shelved.tokens, path, model=self._model, links=links)

    def resume(self, name: Name, path: str | os.PathLike[str]) -> int:
        """Read a session from a file, to be gone on from. Returns its tokens. Raises SessionError, SettingError,
        ProfileError, RequestError for what is no name, or OSError, and then nothing has changed."""
        session_name(name[1])
        shelved = self.load(path)
        self.put(name, shelved)
        return len(shelved.tokens)

    def load(self, path: str | os.PathLike[str]) -> Shelved:
        """A session in a file, for `put`. Raises as `resume`."""
        facts = session_facts(path)
        lane = self._lanes.lane(facts.setting)
        try:
            return self._read(path, facts, lane.store)
        finally:
            self._lanes.retire(lane)

    def load_aside(self, path: str | os.PathLike[str], settings: Collection[str]) -> Shelved | None:
        """The same while another thread steps; None where no lane has the file's setting: `load` makes one. Raises
        SessionError for a setting that is none of these."""
        facts = session_facts(path)
        if facts.setting not in settings:
            wanted = ", ".join(settings)
            raise SessionError(f"the session was saved at setting {facts.setting!r}, and it may have {wanted} here")
        lane = next((lane for lane in self._lanes.all[:] if lane.setting == facts.setting), None)
        return None if lane is None else self._read(path, facts, lane.store)

    def _read(self, path: str | os.PathLike[str], facts: SessionFacts, like: PageStore) -> Shelved:
        links = self._links.need(facts.setting, facts.links) if facts.links else None
        store = host_store(like, like.codebook, _window_dtype(like))
        row, tokens = load_row(store, path, model=self._model, links=links)
        return Shelved(tokens, regrouped(park(store, row), store, like), facts.setting, _window_dtype(like))

    def fits(self, shelved: Shelved, setting: str) -> bool:
        """Whether a session goes on at this setting: as it is, or squeezed because the engine runs at that one."""
        current = self._lanes.current
        squeezes = setting == current.setting and coarser(shelved.parked.codebook, current.store.codebook)
        return setting == shelved.setting or squeezes

    def _lane(self, shelved: Shelved, sequence: Sequence) -> Lane:
        """Where a session goes on: at the current setting if the sequence is for that and the session's own is the same
        or finer, else at its own."""
        current = self._lanes.current
        asked = self._lanes.setting_for(sequence.max_kl, sequence.setting)
        if asked == current.setting and coarser(shelved.parked.codebook, current.store.codebook):
            return current
        return self._lanes.lane(shelved.setting)

    def put(self, name: Name, shelved: Shelved) -> None:
        """Keep a session; where there is no room for it, or for older ones, they are forgotten."""
        self.forget(name)
        self._shelf[name] = shelved
        self.nbytes += shelved.parked.nbytes
        while self._shelf and (
            len(self._shelf) > MAX_SESSIONS
            or (self._most is not None and self.nbytes + self._lanes.parked_nbytes > self._most)
        ):
            self.forget(next(iter(self._shelf)))


def _window_dtype(store: PageStore) -> torch.dtype:
    return store.windows[0].store.dtype

"""The part of the protocol that changes what a model runs with: its profile, its setting, its memory.

server.worker.messages has the rest and the framing.
"""

from __future__ import annotations

import msgspec


class SetLease(msgspec.Struct, tag="set_lease", frozen=True):
    """The cache may hold so many bytes (None: no limit). `coarsest`: the setting that the worker may go down to by
    itself when the device is out of memory; "" for none. `settle`: what torch holds unused goes back to the device.
    Answered by Footprint and Done, like the next three."""

    command_id: str
    max_bytes: int | None = None
    coarsest: str = ""
    settle: bool = True


class SetSetting(msgspec.Struct, tag="set_setting", frozen=True):
    """Run at another setting from now on: a coarser one re-encodes what the cache holds, a finer one is for sequences
    that begin. Ready comes before Done."""

    command_id: str
    setting: str


class Sleep(msgspec.Struct, tag="sleep", frozen=True):
    """Move the weights to host memory, and at most so many bytes of the cache. Refused while requests run."""

    command_id: str
    keep_bytes: int = 0


class Wake(msgspec.Struct, tag="wake", frozen=True):
    """Move the weights back to the device."""

    command_id: str


class Footprint(msgspec.Struct, tag="footprint", frozen=True):
    """What a worker holds, after a memory command. Bytes; `reserved_bytes`: all that torch holds on the device;
    `host_bytes`: weights that sleep. `freed_bytes` and `seconds` are the command's. `settled`: what torch held unused
    was given back, so the rest is what the model needs.

    Where the time of a change of setting goes: `tables_s` beside running steps, for the setting's tables; `waited_s`
    after that for the end of a step; then `seconds`, between two steps, of which `encoded_s` for the cache's codes and
    `given_back_s` for returning memory to the device."""

    lease: int | None = None
    context_length: int = 0
    weights_bytes: int = 0
    reserved_bytes: int = 0
    host_bytes: int = 0
    kv_bytes: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    settled: bool = True
    tables_s: float = 0.0
    waited_s: float = 0.0
    encoded_s: float = 0.0
    given_back_s: float = 0.0


class SetProfile(msgspec.Struct, tag="set_profile", frozen=True):
    """New requests use this profile (None: the one found for the model) at this setting; running ones end as they
    began. With `reload` false the profile stays and only the setting changes, as by SetSetting. Answered by Done, on
    success after Ready.
    """

    command_id: str
    profile: str | None = None
    setting: str = "auto"
    reload: bool = True

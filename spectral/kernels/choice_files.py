"""Choices on disk (spectral.kernels.choices): one file a GPU, kind of work and shape in the user's cache, and the table
that is shipped.

    {"format": 1, "gpu": "NVIDIA H200", "kind": "decode", "shape": "32x8x128x128-16x32",
     "versions": {"kernels": "1f0c...", "triton": "3.6.0"}, "choices": {"shared_blocks": 48, ...}, "left_out": []}

Choices can be slow and never wrong, so what is shipped is taken whatever was changed since; what was measured here is
measured again for other kernels, whose sources' hash it names, and for another Triton, which compiles them otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from spectral.errors import SettingError
from spectral.files import read_regular, write_atomically
from spectral.resources import cache_home

Entry = dict[str, Any]

FORMAT = 1
MOST_BYTES = 1 << 20

TABLE = Path(__file__).with_name("choices.json")

UNFINISHED = "unfinished"
"""Of an entry that a measurement leaves while it goes on: one that takes its process down is not begun again."""


class EntryError(SettingError):
    """A file of choices that cannot be used."""


@cache
def versions() -> dict[str, str]:
    """Of what measured choices depend on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {"kernels": digest.hexdigest()[:16], "triton": triton}


def make_entry(gpu: str, kind: str, shape: str, choices: dict[str, Any], **more: Any) -> Entry:
    """An entry of these versions."""
    return {
        "format": FORMAT, "gpu": gpu, "kind": kind, "shape": shape,
        "versions": versions(), "choices": choices, **more,
    }  # fmt: skip


def unfinished(entry: Entry) -> bool:
    """Whether a measurement that goes on, or that took its process down, has left this."""
    return bool(entry.get(UNFINISHED))


def entry_path(gpu: str, kind: str, shape: str) -> Path | None:
    """Where the choices of this machine's user lie; None for a user without a home."""
    try:
        home = cache_home()
    except RuntimeError:
        return None
    return home / "kernels" / (re.sub(r"[^A-Za-z0-9._-]", "_", f"{gpu}-{kind}-{shape}") + ".json")


def cached_entry(path: Path, gpu: str, kind: str, shape: str) -> Entry | None:
    """The entry in a file; None where there is no file, or one of other versions. Raises EntryError."""
    try:
        data = read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EntryError(f"it cannot be read: {error.strerror or error}") from None
    entry = checked(_json(data))
    if (entry["gpu"], entry["kind"], entry["shape"]) != (gpu, kind, shape):
        raise EntryError(f"it is for {entry['kind']} of {entry['shape']} on {entry['gpu']!r}")
    return entry if entry["versions"] == versions() else None


def write_entry(path: Path, entry: Entry) -> None:
    """Put an entry in a file's place, at once and whole. Raises OSError."""
    write_atomically(path, (json.dumps(entry, indent=1) + "\n").encode(), mode=0o644)


def checked(entry: Any) -> Entry:
    """An entry as it came out of a file, with everything that an entry must have. Raises EntryError."""
    wanted = {"gpu": str, "kind": str, "shape": str, "versions": dict, "choices": dict}
    if not isinstance(entry, dict):
        raise EntryError("it is no JSON object")
    if entry.get("format") != FORMAT:
        raise EntryError(f"its format is {entry.get('format')!r}, and {FORMAT} is read")
    for name, type_ in wanted.items():
        if not isinstance(entry.get(name), type_):
            raise EntryError(f"{name} must be {type_.__name__}, got {entry.get(name)!r}")
    return entry


@cache
def shipped_entries() -> list[Entry]:
    """All entries that are shipped."""
    return read_table(TABLE)


def read_table(path: Path) -> list[Entry]:
    """Entries of a file like the shipped one; none where there is no file. Raises EntryError naming it."""
    try:
        found = _json(read_regular(path, MOST_BYTES))
        if not isinstance(found, dict) or not isinstance(found.get("entries"), list):
            raise EntryError("it must be a JSON object with a list of entries")
        return [checked(entry) for entry in found["entries"]]
    except FileNotFoundError:
        return []
    except EntryError as error:
        raise EntryError(f"{path} is no table of choices: {error}") from None


def add_to_table(path: Path, entries: list[Entry]) -> None:
    """Put entries into a table, each in the place of one for the same GPU, kind and shape. Raises EntryError for a file
    that is none, OSError."""

    def name(entry: Entry) -> tuple[str, ...]:
        return entry["gpu"], entry["kind"], entry["shape"]

    new = {name(entry): entry for entry in entries}
    kept = [entry for entry in read_table(path) if name(entry) not in new]
    table = {"entries": sorted([*kept, *new.values()], key=name)}
    write_atomically(path, (json.dumps(table, indent=1) + "\n").encode(), mode=0o644)


@contextmanager
def only_one(path: Path, patience: float, pause: Callable[[float], None] = time.sleep) -> Iterator[bool]:
    """Of several processes on a machine one measures what is to lie in `path`: True for it inside. The others wait for
    it, up to `patience` seconds, then they too go on with True where it has ended, else with False.

    Raises OSError where nothing can be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows: whoever writes last is right
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("ab") as file:  # stays: who removes it lets two hold "the" lock
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                held = False
                if time.monotonic() >= until:
                    break
                pause(0.1)
        yield held  # closing the file gives it back, as the end of the process does


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EntryError(f"it is no JSON: {error}") from None

"""`python -m server.backup`, behind `spectral backup` and `spectral restore`: the server's state in one file, and back.

A backup is a tar file: MANIFEST.json, a copy of state.db made by SQLite's own backup (so it is consistent while the
server writes), and the profiles that the copy names, each checked against its hash. It is written under a temporary
name and takes its place when it is whole and on the disk. Restoring checks everything before anything is put in place;
a copy of an earlier schema is brought up to date when the server starts, and one of a later schema is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sqlite3
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from server.config import ConfigError, load_settings
from server.state import DEFAULT_FOLDER, FILE, InUse, lock_folder
from server.state_schema import MIGRATIONS, StateError
from spectral.errors import SpectralError
from spectral.files import atomic_file

FORMAT = "spectral-backup"
VERSION = 1
MANIFEST = "MANIFEST.json"
PROFILES = "profiles"
_PROFILE = re.compile(rf"{PROFILES}/([0-9a-f]{{64}})\.safetensors")
_CHUNK = 1 << 20
_MANIFEST_BYTES = 16 << 20


class BackupError(SpectralError):
    """A backup cannot be made or used; the message says why and what to do."""


def back_up(folder: Path, target: Path) -> dict[str, Any]:
    """Write a backup of the state in `folder`, whose server may be running. Returns its manifest. Raises BackupError.

    A profile that is deleted while this runs is left out together with its row; one whose content does not fit its
    name is an error, for a backup must not hide damage.
    """
    if not (folder / FILE).is_file():
        raise BackupError(f"there is no state in {folder}; name the folder with --state-dir, or give --config")
    try:
        with tempfile.TemporaryDirectory(prefix="spectral-backup-") as scratch:
            copy = Path(scratch) / FILE
            version, wanted = _copy_database(folder / FILE, copy)
            files = {FILE: copy}
            for sha256 in wanted:
                path = folder / PROFILES / f"{sha256}.safetensors"
                if not path.is_file():
                    raise BackupError(f"the profile {sha256} is recorded and its file is gone; upload or delete it")
                files[f"{PROFILES}/{path.name}"] = path
            manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "schema": version, "created": time.time()}
            manifest["files"] = {
                name: {"bytes": path.stat().st_size, "sha256": hash_of(path)} for name, path in files.items()
            }
            for name, facts in manifest["files"].items():
                if name != FILE and facts["sha256"] not in name:
                    raise BackupError(f"{folder / name} is damaged: its content does not fit its name; upload it again")
            with atomic_file(target) as out:
                _write(out, manifest, files)
    except sqlite3.Error as error:
        raise BackupError(f"{folder / FILE} cannot be read: {error}") from error
    except OSError as error:
        raise BackupError(f"the backup {target} cannot be written: {error}") from error
    return {**manifest, "path": str(target), "bytes": target.stat().st_size}


def _copy_database(source: Path, copy: Path) -> tuple[int, list[str]]:
    """SQLite's backup of a database that may be in use; its schema's version and the profiles it names."""
    with contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as live:
        with contextlib.closing(sqlite3.connect(copy)) as into:
            live.backup(into)
            into.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
            version = int(into.execute("PRAGMA user_version").fetchone()[0])
            _check_database(into, version)
            found = into.execute("SELECT DISTINCT sha256 FROM profiles ORDER BY sha256").fetchall()
    return version, [row[0] for row in found]


def _check_database(connection: sqlite3.Connection, version: int) -> None:
    if version > len(MIGRATIONS):
        raise BackupError(
            f"the state is of schema {version}, of a later Spectral, and this one knows {len(MIGRATIONS)}; "
            "use that version"
        )
    if version < 1:
        raise BackupError("the database holds no state of Spectral's")
    found = connection.execute("PRAGMA integrity_check").fetchone()[0]
    if found != "ok":
        raise BackupError(f"the state's database is damaged: {found}")


def _write(out: IO[bytes], manifest: dict[str, Any], files: dict[str, Path]) -> None:
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        data = json.dumps(manifest, indent=1).encode()
        head = tarfile.TarInfo(MANIFEST)
        head.size, head.mode = len(data), 0o600
        tar.addfile(head, io.BytesIO(data))
        for name, path in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = manifest["files"][name]["bytes"], 0o600
            with path.open("rb") as file:
                tar.addfile(entry, file)


def restore(source: Path, folder: Path, *, replace: bool = False) -> dict[str, Any]:
    """Put a backup's state into `folder`. Returns its manifest. Raises BackupError, and then nothing has changed.

    The folder must not be in use by a server. Where it has a state already, `replace` moves that aside (its name gets
    ".before-restore-TIME"); without it this is refused.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-restore-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "state"
            (fresh / PROFILES).mkdir(mode=0o700, parents=True)
            fresh.chmod(0o700)
            manifest = _unpack(source, fresh)
            with contextlib.closing(sqlite3.connect(fresh / FILE)) as connection:
                _check_database(connection, int(connection.execute("PRAGMA user_version").fetchone()[0]))
            manifest["moved_aside"] = _put_in_place(fresh, folder, replace)
    except sqlite3.Error as error:
        raise BackupError(f"{source}: its database is damaged: {error}") from error
    except (OSError, tarfile.TarError) as error:
        raise BackupError(f"{source} cannot be restored to {folder}: {error}") from error
    return manifest


def _unpack(source: Path, into: Path) -> dict[str, Any]:
    """Every file that the manifest names, with the bytes and the hash that it names, and no other. Nothing of the
    archive's own names, links or modes is used."""
    with tarfile.open(source, mode="r:") as tar:
        head = tar.next()
        if head is None or head.name != MANIFEST or not head.isfile() or head.size > _MANIFEST_BYTES:
            raise BackupError(f"{source} is no backup of Spectral's: it does not begin with {MANIFEST}")
        manifest = _manifest(source, _content(tar, head).read())
        left: dict[str, Any] = dict(manifest["files"])
        while (entry := tar.next()) is not None:
            facts = left.pop(entry.name, None)
            if facts is None or not entry.isfile() or entry.size != facts["bytes"]:
                raise BackupError(f"{source} is damaged: {entry.name[:100]!r} is not what its manifest says")
            digest = hashlib.sha256()
            with (into / entry.name).open("xb") as out:
                for piece in _pieces(_content(tar, entry)):
                    digest.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            if digest.hexdigest() != facts["sha256"]:
                raise BackupError(f"{source} is damaged: the content of {entry.name} does not fit its hash")
            (into / entry.name).chmod(0o600 if entry.name == FILE else 0o444)
    if left:
        raise BackupError(f"{source} is cut short: {', '.join(sorted(left))[:200]} is missing")
    return manifest


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(entry)
    if found is None:
        raise BackupError(f"{entry.name[:100]!r} is no file")
    return found


def _manifest(source: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
        form, version, schema, files = (manifest[key] for key in ("format", "version", "schema", "files"))
        names = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BackupError(f"{source} is no backup of Spectral's: its manifest cannot be read ({error})") from error
    if form != FORMAT or not isinstance(version, int) or not isinstance(schema, int):
        raise BackupError(f"{source} is no backup of Spectral's")
    if version > VERSION or schema > len(MIGRATIONS):
        raise BackupError(
            f"{source} was made by a later Spectral (format {version}, schema {schema}; this one knows {VERSION} and "
            f"{len(MIGRATIONS)}); restore it with that version"
        )
    for name, (_, sha256) in names.items():
        profile = _PROFILE.fullmatch(name)
        if name != FILE and (profile is None or profile[1] != sha256):
            raise BackupError(f"{source} is damaged: its manifest names {name[:100]!r}")
    if FILE not in names:
        raise BackupError(f"{source} is damaged: its manifest names no {FILE}")
    return manifest


def _put_in_place(fresh: Path, folder: Path, replace: bool) -> str | None:
    """Swap the folders by renaming: at any moment one of them is whole. Where the older one went, if there was one."""
    if not folder.exists():
        os.rename(fresh, folder)
        return None
    try:
        lock = lock_folder(folder)
    except InUse as error:
        raise BackupError(f"{error}; stop that server before you restore") from error
    with lock:
        if not replace and any(path.name != "lock" for path in folder.iterdir()):
            raise BackupError(f"{folder} holds a state already; give --replace to move it aside, or another folder")
        aside = folder.with_name(f"{folder.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(folder, aside)
        os.rename(fresh, folder)
    return str(aside)


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_CHUNK):
        yield piece


def _folder(options: argparse.Namespace) -> Path:
    if options.state_dir is not None:
        return Path(options.state_dir)
    try:
        return Path(load_settings(options.config).server.state_dir or DEFAULT_FOLDER)
    except ConfigError as error:
        raise BackupError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 an error that the last line on standard error names."""
    parser = argparse.ArgumentParser(prog="spectral", description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=("backup", "restore"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--state-dir")
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    try:
        folder = _folder(options)
        if options.verb == "backup":
            found = back_up(folder, options.file)
            count = len(found["files"]) - 1
            said = f"{options.file}: {found['bytes']} bytes, {count} profiles, schema {found['schema']}"
        else:
            found = restore(options.file, folder, replace=options.replace)
            said = f"{folder} holds the state of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found['created']))}"
            said += f"; what was there is in {found['moved_aside']}" if found["moved_aside"] else ""
    except (BackupError, StateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else said)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Backup and restore of the state: consistent while a server writes, checked whole, and refused where it is not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import state_tables
from server.backup import MANIFEST, BackupError, back_up, main, restore
from server.state import State
from server.state_schema import MIGRATIONS, migrate
from tests.server.conftest import ROOT

FACTS = {"fingerprint": "f" * 64}


def make_state(folder: Path, profile: bytes = b"a profile's bytes") -> str:
    """A state with one profile, a switch and an action; the profile's hash."""
    sha256 = hashlib.sha256(profile).hexdigest()
    state = State.open(str(folder))
    (folder / "profiles").mkdir()
    (folder / "profiles" / f"{sha256}.safetensors").write_bytes(profile)
    state.run_now(lambda db: state_tables.add_profile(db, "demo", sha256, len(profile), "upload", FACTS))
    state.run_now(lambda db: state_tables.activate(db, "demo", sha256, "activated"))
    state.run_now(lambda db: state_tables.begin_action(db, "me", "pin", "demo", {}))
    state.close()
    return sha256


def content(folder: Path) -> dict[str, Any]:
    """What a state holds."""
    state = State.open(str(folder))
    try:
        tables = ("profiles", "activations", "audit", "choices", "jobs", "events")
        read = lambda name: lambda db: [tuple(row) for row in db.execute(f"SELECT * FROM {name}")]  # noqa: E731
        rows = {name: state.run_now(read(name)) for name in tables}
    finally:
        state.close()
    return {**rows, "files": {p.name: p.read_bytes() for p in sorted((folder / "profiles").iterdir())}}


def test_what_was_backed_up_is_restored(tmp_path: Path) -> None:
    make_state(tmp_path / "state")
    before = content(tmp_path / "state")
    manifest = back_up(tmp_path / "state", tmp_path / "b.tar")
    assert (tmp_path / "b.tar").stat().st_mode & 0o077 == 0 and len(manifest["files"]) == 2
    restore(tmp_path / "b.tar", tmp_path / "new" / "state")
    assert content(tmp_path / "new" / "state") == before
    with pytest.raises(BackupError, match="holds a state already"):
        restore(tmp_path / "b.tar", tmp_path / "new" / "state")
    found = restore(tmp_path / "b.tar", tmp_path / "new" / "state", replace=True)
    assert content(Path(found["moved_aside"])) == before == content(tmp_path / "new" / "state")


def test_a_backup_is_consistent_while_a_server_writes_and_a_restore_waits_for_it_to_end(tmp_path: Path) -> None:
    sha256 = make_state(tmp_path / "state")
    state = State.open(str(tmp_path / "state"))
    try:
        for number in range(200):
            state.run_now(lambda db: state_tables.begin_action(db, "me", "act", "demo", {}))
            if number % 50 == 0:
                back_up(tmp_path / "state", tmp_path / f"{number}.tar")
        with pytest.raises(BackupError, match="stop that server"):
            restore(tmp_path / "0.tar", tmp_path / "state", replace=True)
    finally:
        state.close()
    counts = []
    for number in range(0, 200, 50):
        restore(tmp_path / f"{number}.tar", tmp_path / f"s{number}")
        counts.append(len(content(tmp_path / f"s{number}")["audit"]))
        assert list(content(tmp_path / f"s{number}")["files"]) == [f"{sha256}.safetensors"]
    assert counts == [2, 52, 102, 152]


def test_a_profile_that_is_gone_or_damaged_is_told(tmp_path: Path) -> None:
    sha256 = make_state(tmp_path / "state")
    file = tmp_path / "state" / "profiles" / f"{sha256}.safetensors"
    file.write_bytes(b"something else")
    with pytest.raises(BackupError, match="damaged"):
        back_up(tmp_path / "state", tmp_path / "b.tar")
    file.unlink()
    with pytest.raises(BackupError, match="its file is gone"):
        back_up(tmp_path / "state", tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
    with pytest.raises(BackupError, match="there is no state"):
        back_up(tmp_path / "nowhere", tmp_path / "b.tar")


def changed(source: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], link: str = "") -> Path:
    """A copy of a backup with other files in it; `link`: a name that becomes a link to /etc/passwd."""
    with tarfile.open(source) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    target = source.with_name("changed.tar")
    with tarfile.open(target, "w") as tar:
        for name, data in change(files).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if name == link:
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(entry, io.BytesIO(data))
    return target


def manifest_with(whole: dict[str, bytes], **values: Any) -> dict[str, bytes]:
    manifest = json.loads(whole[MANIFEST])
    manifest["files"].update(values.pop("files", {}))
    return {**whole, MANIFEST: json.dumps({**manifest, **values}).encode()}


EVIL = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: manifest_with(f, schema=99), "a later Spectral"),
        (lambda f: manifest_with(f, version=2), "a later Spectral"),
        (lambda f: manifest_with(f, format="other"), "no backup"),
        (lambda f: {**f, MANIFEST: b"[1"}, "manifest cannot be read"),
        (lambda f: {**f, MANIFEST: b"[]"}, "manifest cannot be read"),
        (lambda f: {k: v for k, v in f.items() if k != "state.db"}, "cut short"),
        (lambda f: {**f, "state.db": f["state.db"][:-1] + b"!"}, "does not fit its hash"),
        (lambda f: {**f, "state.db": f["state.db"] + b"!"}, "not what its manifest says"),
        (lambda f: {**f, "../../evil": b"x"}, "not what its manifest says"),
        (lambda f: {**manifest_with(f, files={"../evil": EVIL}), "../evil": b"x"}, "its manifest names '../evil'"),
        (lambda f: {**manifest_with(f, files={"profiles/x": EVIL}), "profiles/x": b"x"}, "its manifest names"),
        (lambda f: dict(list(f.items())[1:]), "does not begin with"),
    ],
)
def test_what_is_no_whole_backup_changes_nothing(tmp_path: Path, change: Any, why: str) -> None:
    make_state(tmp_path / "state")
    back_up(tmp_path / "state", tmp_path / "b.tar")
    bad = changed(tmp_path / "b.tar", change)
    before = content(tmp_path / "state")
    with pytest.raises(BackupError, match=why):
        restore(bad, tmp_path / "state", replace=True)
    assert content(tmp_path / "state") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tar", "changed.tar", "state"]


def test_links_and_other_files_are_refused(tmp_path: Path) -> None:
    make_state(tmp_path / "state")
    back_up(tmp_path / "state", tmp_path / "b.tar")
    bad = changed(tmp_path / "b.tar", lambda f: f, link="state.db")
    with pytest.raises(BackupError, match="not what its manifest says"):
        restore(bad, tmp_path / "elsewhere")
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(BackupError, match="cannot be restored"):
        restore(tmp_path / "x.tar", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_an_older_schema_is_brought_up_to_date_after_a_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_state(tmp_path / "state")
    back_up(tmp_path / "state", tmp_path / "b.tar")
    more = (*MIGRATIONS, ("ALTER TABLE choices ADD COLUMN note TEXT DEFAULT 'x'",))
    monkeypatch.setattr("server.backup.MIGRATIONS", more)
    monkeypatch.setattr("server.state.migrate", lambda db: migrate(db, more))
    restore(tmp_path / "b.tar", tmp_path / "new")
    content(tmp_path / "new")
    with sqlite3.connect(tmp_path / "new" / "state.db") as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == len(more)
    db.close()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_state(tmp_path / "state")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "spectral.cli", "backup", str(tmp_path / "b.tar"), "--json"]
    done = subprocess.run(
        [*command, "--state-dir", str(tmp_path / "state")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == len(MIGRATIONS)
    assert main(["restore", str(tmp_path / "b.tar"), "--state-dir", str(tmp_path / "new")]) == 0
    assert "holds the state of" in capsys.readouterr().out
    assert main(["restore", str(tmp_path / "b.tar"), "--state-dir", str(tmp_path / "new")]) == 2
    assert "--replace" in capsys.readouterr().err

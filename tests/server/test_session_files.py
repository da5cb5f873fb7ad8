"""The folder of saved sessions: bounds of bytes and age, names, and whatever else may lie in it."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from server.worker import session_files
from server.worker.session_files import SessionFolder, Totals
from server.worker.session_messages import SavedSessions

NOW = time.time()


def folder(path: Path, max_bytes: int = 1000, max_age_s: float = 3600.0) -> SessionFolder:
    made = SessionFolder(SavedSessions(str(path / "sessions"), max_bytes, max_age_s, 10.0))
    made.make()
    return made


def put(there: SessionFolder, session: str, size: int, used_at: float = NOW, salt: str = "") -> bool:
    there.incoming().write_bytes(b"x" * size)
    try:
        return there.place(there.incoming(), there.file("demo", session, salt), used_at)
    finally:
        there.incoming().unlink(missing_ok=True)


def held(there: SessionFolder, *sessions: str) -> list[str]:
    return [name for name in sessions if there.holds(there.file("demo", name, ""))]


def test_who_needs_room_takes_the_longest_unused_and_never_a_newer_one(tmp_path: Path) -> None:
    there = folder(tmp_path)
    assert put(there, "old", 400, NOW - 30) and put(there, "older", 400, NOW - 60)
    assert put(there, "new", 300)
    assert held(there, "new", "old", "older") == ["new", "old"] and there.totals() == Totals(2, 700)
    assert not put(there, "late", 400, NOW - 45), "those used later would have to go for it"
    assert not put(there, "huge", 1001) and held(there, "new", "old", "late", "huge") == ["new", "old"]
    assert put(there, "old", 650)  # in its own place: its former bytes do not count
    assert there.totals() == Totals(2, 950)


def test_a_session_that_is_too_old_is_not_there_and_is_swept_away(tmp_path: Path) -> None:
    there = folder(tmp_path)
    put(there, "yesterday", 10, NOW - 86400), put(there, "today", 10)
    assert held(there, "yesterday", "today") == ["today"]
    assert there.totals().files == 2 and there.sweep() == there.totals() == Totals(1, 10)
    for_ever = folder(tmp_path, max_age_s=-1)
    put(for_ever, "long ago", 10, 1.0)
    assert held(for_ever, "long ago") == ["long ago"] and for_ever.sweep().files == 2


def test_a_smaller_bound_and_left_overs_count_at_the_next_start(tmp_path: Path) -> None:
    there = folder(tmp_path)
    for age, name in enumerate("abc"):
        put(there, name, 300, NOW - age)
    there.incoming().write_bytes(b"half")
    beside = there.path / "notes.txt"
    beside.write_text("somebody else's")
    assert there.sweep().files == 3 and there.incoming().exists(), "a worker may be writing it"
    assert folder(tmp_path, max_bytes=700).sweep(at_start=True) == Totals(2, 600)
    assert held(there, *"abc") == ["a", "b"] and not there.incoming().exists() and beside.exists()
    assert there.clear() == 2 and there.totals() == Totals() and beside.exists()


@pytest.mark.parametrize("model", ["demo", "a/../../../etc/passwd", "m" * 200])
@pytest.mark.parametrize("session", ["../../x", "/etc/passwd", "a\0b", "..", "é\ud800" * 100, "s" * 256])
def test_no_name_leaves_the_folder(tmp_path: Path, model: str, session: str) -> None:
    there = folder(tmp_path)
    file = there.file(model, session, "salt")
    assert file.parent == there.path and file.name.removesuffix(".session").isalnum() and len(file.name) == 72


def test_models_keys_and_names_have_files_of_their_own(tmp_path: Path) -> None:
    there = folder(tmp_path)
    asked = [("m", "s", ""), ("m", "s", "k"), ("m", "k", "s"), ("m", "sk", ""), ("k", "s", "m"), ("m", "s", "kk")]
    assert len({there.file(*names) for names in asked}) == len(asked)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would hold the worker up for ever, and a link may lead anywhere."""
    there = folder(tmp_path)
    os.mkfifo(there.file("demo", "pipe", ""))
    there.file("demo", "link", "").symlink_to("/etc/passwd")
    there.file("demo", "folder", "").mkdir()
    assert held(there, "pipe", "link", "folder", "missing") == [] and there.sweep() == Totals()
    assert Path("/etc/passwd").exists()


def test_the_folder_is_private_and_may_be_gone(tmp_path: Path) -> None:
    there = folder(tmp_path)
    assert stat.S_IMODE(there.path.stat().st_mode) == 0o700
    there.path.rmdir()
    assert (there.totals(), there.sweep(), there.clear()) == (Totals(), Totals(), 0)
    with pytest.raises(OSError):
        put(there, "a", 1)


def test_a_lock_that_a_stopped_process_holds_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, other = folder(tmp_path), folder(tmp_path)
    monkeypatch.setattr(session_files, "LOCK_S", 0.05)
    with there._locked(), pytest.raises(OSError, match="locked"):
        other.sweep()
    assert other.sweep() == Totals()

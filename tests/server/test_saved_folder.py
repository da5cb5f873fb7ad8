"""The gateway's side of saved sessions: which workers get the time to save, and the folder over starts and reloads."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import ConfigError, Settings, load_settings
from server.config_sessions import SessionSettings
from tests.server.conftest import Running, serving, settings

SAVING = {"name": "demo", "path": "saving"}


def configured(folder: Path, *models: dict[str, Any], **sessions: Any) -> Settings:
    made = settings(*models, state_dir=str(folder / "state"))
    return made.model_copy(update={"sessions": SessionSettings(**sessions)})


def chat(server: Running, **more: Any) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], **more}
    assert server.client.post("/v1/chat/completions", json=body).status_code == 200


def left(folder: Path) -> list[str]:
    """What the worker did at its end."""
    place = folder / "state" / "sessions"
    return [name for name in ("began", "saved") if (place / name).exists()]


def test_an_unload_waits_for_a_worker_that_had_sessions_and_for_no_other(tmp_path: Path) -> None:
    with serving(configured(tmp_path, SAVING)) as server:
        server.until_state("demo", "hot")
        chat(server)
        server.client.post("/admin/models/demo/unload").raise_for_status()
        assert left(tmp_path) == ["began"]  # two seconds are more than it gets without sessions
        server.client.post("/admin/models/demo/load").raise_for_status()
        server.until_state("demo", "hot")
        chat(server, session="t1")
        server.client.post("/admin/models/demo/unload").raise_for_status()
        assert left(tmp_path) == ["began", "saved"]


@pytest.mark.parametrize("asleep", [False, True])
def test_a_stop_waits_for_sessions_also_of_a_model_that_sleeps(tmp_path: Path, asleep: bool) -> None:
    with serving(configured(tmp_path, SAVING)) as server:
        server.until_state("demo", "hot")
        chat(server, session="t1")
        if asleep:
            server.client.post("/admin/models/demo/sleep").raise_for_status()
            server.until_state("demo", "asleep")
    assert left(tmp_path) == ["began", "saved"]


def test_a_stop_waits_no_longer_than_it_is_told(tmp_path: Path) -> None:
    with serving(configured(tmp_path, SAVING, save_seconds=0)) as server:
        server.until_state("demo", "hot")
        chat(server, session="t1")
    assert left(tmp_path) == ["began"]


def test_the_folder_is_told_and_bounded_at_the_start(tmp_path: Path) -> None:
    place = tmp_path / "state" / "sessions"
    place.mkdir(parents=True)
    for age, name in enumerate(("new", "old", "ancient")):
        (place / f"{name}.session").write_bytes(b"x" * 100)
        os.utime(place / f"{name}.session", (time.time() - 1000 * age,) * 2)
    (place / "incoming-1xyz.tmp").write_bytes(b"half")
    with serving(configured(tmp_path, max_bytes=250, max_age=1500)) as server:
        shown = server.client.get("/admin/status").json()["saved_sessions"]
    assert shown == {"folder": str(place), "files": 2, "bytes": 200, "max_bytes": 250}
    assert sorted(path.name for path in place.iterdir()) == ["lock", "new.session", "old.session"]


def test_switched_off_nothing_is_saved_and_what_there_was_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    place = tmp_path / "state" / "sessions"
    place.mkdir(parents=True)
    (place / "a.session").write_bytes(b"x")
    with serving(configured(tmp_path, SAVING, keep=False)) as server:
        server.until_state("demo", "hot")
        assert server.client.get("/admin/status").json()["saved_sessions"] is None
        chat(server, session="t1")
    assert left(tmp_path) == [] and not (place / "a.session").exists()
    assert "1 saved sessions are deleted" in caplog.text


def test_a_folder_that_cannot_be_had_costs_the_sessions_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "sessions").write_text("a file where the folder belongs")
    with serving(configured(tmp_path, SAVING)) as server:
        server.until_state("demo", "hot")
        chat(server, session="t1")
    assert "sessions cannot be saved in" in caplog.text


def test_a_state_that_does_not_last_holds_no_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".spectral").write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lasting = settings()
    passing = lasting.model_copy(update={"server": lasting.server.model_copy(update={"state_dir": None})})
    with serving(passing) as server:
        status = server.client.get("/admin/status").json()
    assert status["durable"] is False and status["saved_sessions"] is None


def test_a_reload_says_that_it_needs_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    server = {"state_dir": str(tmp_path / "state"), "drain_seconds": 0.5}
    file.write_text(yaml.safe_dump({"server": server, "models": [{"name": "demo"}]}))
    with serving(load_settings(file), file) as running:
        running.until_state("demo", "hot")
        file.write_text(yaml.safe_dump({"server": server, "sessions": {"keep": False}, "models": [{"name": "demo"}]}))
        found = running.client.post("/admin/config/reload").json()
    assert found["needs_server_restart"] == ["sessions"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("max_bytes: 0", "max_bytes"), ("max_age: soon", "max_age"), ("save_seconds: -1", "save_seconds"), ("k: 1", "k")],
)
def test_a_wrong_bound_is_named(tmp_path: Path, text: str, wrong: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"sessions: {{{text}}}\nmodels: [{{name: demo-7m}}]\n")
    with pytest.raises(ConfigError, match=rf"line 1: sessions\.{wrong}"):
        load_settings(file)
    file.write_text("sessions: {max_bytes: 64MiB, max_age: 2d}\nmodels: [{name: demo-7m}]\n")
    assert load_settings(file).sessions.max_age == 2 * 86400 and load_settings(file).sessions.max_bytes == 64 << 20

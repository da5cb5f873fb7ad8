"""The commands that operate a running server, against one with fake workers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.app import create_app
from server.config import load_settings
from spectral.cli import app
from spectral.commands.client import ServerError
from tests.server.conftest import FAKE, ROOT, Running, serving, settings

KEY = "an administrator's key"


@pytest.fixture(scope="module")
def operated() -> Iterator[Running]:
    models = [{"name": "demo", "aliases": ["d"]}, {"name": "org/later", "load": "on_demand"}, {"name": "broken"}]
    with serving(settings(*models, admin_key=KEY)) as running:
        running.until_state("demo", "hot")
        yield running


@pytest.fixture
def run(operated: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command with the administrator's key; what it printed. Raises ServerError, as `main` sees it."""
    monkeypatch.setenv("SPECTRAL_API_KEY", KEY)
    monkeypatch.setenv("SPECTRAL_URL", operated.url)

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, words)
        if isinstance(result.exception, ServerError):
            raise result.exception
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return run


def test_a_model_is_loaded_and_let_go(run: Any, operated: Running) -> None:
    assert run("load", "org/later") == "org/later is hot on cpu, setting 8x\n"
    assert run("load", "d").startswith("demo is hot")
    assert json.loads(run("load", "org/later", "--json"))["state"] == "hot"
    assert run("pin", "org/later") == "org/later is pinned\n"
    with pytest.raises(ServerError, match="409: .*pinned"):
        run("unload", "org/later")
    assert run("unpin", "org/later") == "org/later is not pinned\n"
    assert run("unload", "org/later", "--drain", "0") == "org/later is cold\n"
    assert json.loads(run("load", "org/later", "--no-wait", "--json")) == {"model": "org/later", "state": "loading"}
    operated.until_state("org/later", "hot")
    assert run("unload", "org/later", "--force", "--drain", "0") == "org/later is cold\n"


def test_a_load_that_fails_is_an_error(run: Any) -> None:
    with pytest.raises(ServerError, match="broken is failed: .*check models.path"):
        run("load", "broken")
    with pytest.raises(ServerError, match="404: .*'absent' does not exist"):
        run("sleep", "absent")


def test_the_setting_is_chosen_by_hand(run: Any, operated: Running) -> None:
    assert run("set", "demo", "4x").startswith("demo runs at 4x (KL ")
    assert json.loads(run("set", "demo", "auto", "--json"))["setting"]["setting"] == "8x"
    with pytest.raises(ServerError, match="400: .*not in the ladder"):
        run("set", "demo", "impossible")


def test_events_are_shown_with_their_reasons(run: Any) -> None:
    run("set", "demo", "4x", "--live")
    run("set", "demo", "auto")
    lines = run("events", "--model", "demo", "--kind", "setting").splitlines()
    times = [line[:19] for line in lines]
    assert "by hand" in lines[-1] and " demo " in lines[-1] and times == sorted(times)
    said = datetime.strptime(times[-1], "%Y-%m-%d %H:%M:%S")
    assert abs((datetime.now() - said).total_seconds()) < 60
    rows = [json.loads(line) for line in run("events", "--json", "-n", "3").splitlines()]
    assert len(rows) == 3 and [row["id"] for row in rows] == sorted(row["id"] for row in rows)


def test_events_are_followed(run: Any, operated: Running) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "spectral.cli", "events", "--follow", "--model", "org/later", "-n", "1"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            run("pin", "demo")
            run("load", "org/later")
            seen = [process.stdout.readline() for _ in range(2)]
        finally:
            process.terminate()
    assert " org/later " in first and all(" org/later " in line for line in seen)
    assert any("-> loading" in line or "-> hot" in line for line in seen)
    run("unpin", "demo")


def test_the_configuration_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("models: [{name: demo}]\n")
    with serving(settings(), config_file=file) as running:
        running.until_state("demo", "hot")
        file.write_text("models: [{name: demo, aliases: [d, e]}, {name: more, load: on_demand}]\n")
        told = CliRunner().invoke(app, ["reload", "--url", running.url]).output
        assert "added: more" in told and "changed: demo (aliases)" in told
        file.write_text("models: [{name: demo, treads: 1}]\n")
        faulty = CliRunner().invoke(app, ["reload", "--url", running.url])
        assert isinstance(faulty.exception, ServerError) and "treads" in str(faulty.exception)


def test_a_reload_keeps_what_the_command_line_said(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("server: {port: 8000}\nmodels: [{name: demo}]\n")
    given = {"host": None, "port": 8077}
    app = create_app(load_settings(file, **given), FAKE, file, given=given)
    found = asyncio.run(app.state.admin.reload())
    assert (found["server"], found["needs_server_restart"]) == ([], [])
    app.state.admin.state.close()


def test_without_the_key_it_is_said_what_is_missing(operated: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRAL_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["pin", "demo", "--url", operated.url])
    assert isinstance(result.exception, ServerError)
    assert "401" in str(result.exception) and "SPECTRAL_API_KEY is not set" in str(result.exception)

"""What holds for every command: help for each option, one line for an error, an exit status, and completion."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner

from spectral.cli import app
from spectral.commands import client

ROOT = Path(__file__).resolve().parents[2]


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that name it."""
    command = command or typer.main.get_command(app)
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


ALL = list(commands())


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) for path, _ in ALL])
def test_every_command_and_option_says_what_it_does(path: tuple[str, ...], command: Any) -> None:
    first = (command.help or "").splitlines()[0]
    assert first.endswith(".") and first[0].isupper(), first
    for parameter in command.params:
        text = parameter.help
        assert text and text.endswith((".", ")", ":")), (path, parameter.name)
    wrong = CliRunner().invoke(app, [*path, "--no-such-option"])
    assert wrong.exit_code == 2 and "--no-such-option" in wrong.output


def test_a_flag_has_no_value_and_lists_are_named_by_what_they_hold() -> None:
    for words in (["keys", "create"], ["eval"], ["top"], []):
        text = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output
        assert "<bool>" not in text and "list[" not in text, text
    assert "<path>..." in CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200"}).output


def test_an_address_that_is_none_is_not_taken_for_a_silent_server() -> None:
    wrong = spectral("ps", "--url", "localhost:8000")
    assert wrong.returncode == 2 and "is no address of a server" in wrong.stderr


def spectral(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", "from spectral.cli import main; main()", *words]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_configuration_is_checked_without_starting(tmp_path: Path) -> None:
    fine = spectral("check", "--json")
    assert (fine.returncode, json.loads(fine.stdout)) == (0, {"valid": True, "models": ["demo-7m"]})
    path = tmp_path / "config.yaml"
    path.write_text("models: [{name: a, treads: 1}]")
    faulty = spectral("check", "--config", str(path))
    assert faulty.returncode == 1 and "models.0.treads" in faulty.stderr
    told = spectral("check", "--config", str(path), "--json")
    assert told.returncode == 1 and "models.0.treads" in json.loads(told.stdout)["error"]


def test_the_shell_completes_commands_and_options() -> None:
    words = {"_PYTHON_C_COMPLETE": "complete_bash", "_SPECTRAL_COMPLETE": "complete_bash"}
    program = ["-c", "import sys; sys.argv[0] = 'spectral'; from spectral.cli import main; main()"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **words, "COMP_WORDS": "spectral ke", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, *program], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["keys"]
    env |= {"COMP_WORDS": "spectral keys create --ad", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, *program], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["--admin"]


def test_models_are_completed_only_from_a_server_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_URL", "http://127.0.0.1:9")
    assert client.model_names("d") == []
    monkeypatch.setattr(client, "get_json", lambda *_: {"data": [{"id": "demo"}, {"id": "other"}]})
    assert client.model_names("d") == ["demo"]


@pytest.mark.parametrize(("key", "words"), [("", "is not set"), ("wrong", "is set")])
def test_a_refused_key_is_explained(monkeypatch: pytest.MonkeyPatch, key: str, words: str) -> None:
    import httpx

    monkeypatch.setenv("SPECTRAL_API_KEY", key)
    answer = httpx.Response(401, json={"error": {"message": "this server asks for an API key"}})
    assert f"SPECTRAL_API_KEY {words}" in str(client.refusal(answer))


def test_a_plan_may_be_cut_off_by_the_program_that_reads_it() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "server.plan_command", "--json", "--config", str(ROOT / "config.yaml")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, env=env, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode != 0 and done.stderr == ""


def test_the_package_can_be_run_as_a_program_and_shows_the_shipped_profile() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "spectral", "profile", "show", "demo", "--json"]
    shown = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["ladder"]
    wrong = subprocess.run([*words[:-2], "absent"], env=env, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: profile absent.safetensors cannot be read")


def test_ctrl_c_ends_a_command_without_a_word() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a server that takes a request and says nothing
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [sys.executable, "-m", "spectral", "ps", "--url", url]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits SIG_IGN
        process = subprocess.Popen(words, env=env, **pipes)
        signal.signal(signal.SIGINT, before)
        with process:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(10)
                # A signal just before the command begins to wait is noticed when the wait is over, ten seconds later.
                while psutil.Process(process.pid).status() == psutil.STATUS_RUNNING:
                    time.sleep(0.001)
                process.send_signal(signal.SIGINT)
                assert (*process.communicate(timeout=60), process.returncode) == ("", "", 130)

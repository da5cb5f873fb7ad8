"""What people and other programs do to a server that runs: files that are no files, folders that go, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server import auth
from spectral.files import read_regular
from tests.server.conftest import HERE, ROOT, Running, serving, settings, until

PROFILE = ROOT / "profiles" / "demo-7m.safetensors"
BYTES = {"Content-Type": "application/octet-stream"}
FAKE = str(ROOT / "tests" / "server" / "fake_worker.py")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"models": [{"name": "demo-7m"}]}))
    with serving(settings({"name": "demo-7m"}, state_dir=str(tmp_path / "state")), config) as server:
        server.until_state("demo-7m", "hot")
        yield server


def answers(server: Running) -> bool:
    body = {"model": "demo-7m", "prompt": "hello"}
    return server.client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "one two three "


def test_only_files_are_read_and_only_so_much(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert read_regular(file, 10) == b"x" * 10
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_regular(file, 9)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file|directory"):
            read_regular(other, 10)


def test_a_pipe_in_place_of_the_configuration_is_refused_and_holds_nothing_up(running: Running, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.unlink()
    os.mkfifo(config)
    refused = running.client.post("/admin/config/reload")
    assert refused.status_code == 400 and "no regular file" in refused.json()["error"]["message"]
    assert answers(running)


def test_a_pipe_in_place_of_the_keys_leaves_those_before_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "RELOAD_S", 0.0)
    file = tmp_path / "keys.json"
    command = [sys.executable, "-m", "spectral.cli", "keys", "create", "me", "--file", str(file), "--json"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    key = {"Authorization": f"Bearer {json.loads(made.stdout)['key']}"}
    config = settings({"name": "demo-7m"}).model_copy(update={"auth": auth.AuthSettings(keys_file=str(file))})
    with serving(config) as server:
        until(lambda: server.client.get("/v1/models", headers=key).status_code == 200)
        file.unlink()
        os.mkfifo(file)
        assert server.client.get("/v1/models", headers=key).status_code == 200
        assert server.client.get("/v1/models").status_code == 401


def test_a_state_that_was_taken_away_is_not_written_to(running: Running, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "state")
    refused = running.client.post("/admin/models/demo-7m/pin")
    assert refused.status_code == 503 and "taken away or replaced" in refused.json()["error"]["message"]
    assert not running.slot("demo-7m").pinned and answers(running)
    assert running.client.get("/admin/audit").json()["actions"] == []


def test_a_folder_of_profiles_that_was_removed_is_made_again(running: Running, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "state" / "profiles")
    stored = running.client.put("/admin/profiles/demo-7m", content=PROFILE.read_bytes(), headers=BYTES)
    assert stored.status_code == 201
    shutil.rmtree(tmp_path / "state" / "profiles")
    lost = running.client.post("/admin/profiles/demo-7m/activate", json={"profile": stored.json()["sha256"]})
    assert 400 <= lost.status_code < 500 and lost.json()["error"]["message"] and answers(running)


def test_hang_up_reads_the_configuration_again_and_ends_no_stream(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = tmp_path / "config.yaml"
    given = {"server": {"port": port, "state_dir": str(tmp_path / "state")}, "models": [{"name": "demo-7m"}]}
    config.write_text(json.dumps(given))
    start = (
        "import functools, signal, sys; from server import __main__ as program, serving\n"
        "from server.app import create_app\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # a shell's nohup is inherited, and respected
        f"serving.create_app = functools.partial(create_app, command=(sys.executable, {FAKE!r}))\n"
        "sys.exit(program.main(['--config', sys.argv[1]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", start, str(config)], env=environment, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:

            def state() -> str:
                try:
                    return str(client.get("/ready").json()["models"]["demo-7m"]["state"])
                except httpx.TransportError:
                    return ""

            def outcomes() -> list[str]:
                return [row["outcome"] for row in client.get("/admin/audit").json()["actions"]]

            until(lambda: state() == "hot", 60)
            body = {"model": "demo-7m", "prompt": "forever", "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                config.write_text(
                    json.dumps({**given, "models": [{"name": "demo-7m"}, {"name": "new", "load": "on_demand"}]})
                )
                process.send_signal(signal.SIGHUP)
                until(lambda: "new" in client.get("/ready").json()["models"] and outcomes() == ["done"])
                config.write_text("models: 3")
                process.send_signal(signal.SIGHUP)
                until(lambda: outcomes()[:1] == ["refused"])
                assert next(lines) is not None and process.poll() is None
            assert {row["actor"] for row in client.get("/admin/audit").json()["actions"]} == {"SIGHUP"}
        process.terminate()
        time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()

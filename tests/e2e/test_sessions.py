"""A chat's cache outlives the real server: after a restart it goes on without prefill, in the same words."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
from harness import Server, running_server

from spectral.keyfile import hash_secret

pytestmark = pytest.mark.e2e
ALICE, MALLORY, OPERATOR = "a key that Alice has", "a key that Mallory has", "an operator's key"
TEXT = "Norway has a long coast with many islands and deep fjords. " * 20


def write_config(folder: Path, **sections: Any) -> list[str]:
    people = "\n".join(
        f"    - {{name: {name}, hash: '{hash_secret(key)}'}}" for name, key in (("alice", ALICE), ("mallory", MALLORY))
    )
    extra = "\n".join(f"{name}: {value}" for name, value in sections.items())
    config = folder / "config.yaml"
    config.write_text(
        f"server: {{state_dir: '{folder / 'state'}', admin_key_hash: '{hash_secret(OPERATOR)}'}}\n"
        f"auth:\n  keys:\n{people}\n{extra}\nmodels:\n  - {{name: demo-7m, setting: 8x}}\n"
    )
    return ["--config", str(config)]


def say(server: Server, turns: list[dict[str, str]], session: str, key: str = ALICE) -> tuple[str, int]:
    """The answer, and how many of the prompt's tokens were cached."""
    body = {"model": "demo-7m", "messages": turns, "max_tokens": 24, "temperature": 0, "session": session}
    answer = server.client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def operate(server: Server, path: str) -> None:
    answer = server.client.post(f"/admin/models/demo-7m/{path}", headers={"Authorization": f"Bearer {OPERATOR}"})
    assert answer.status_code < 300, answer.text


def files(folder: Path) -> list[Path]:
    return sorted((folder / "state" / "sessions").glob("*.session"))


def test_a_chat_goes_on_after_a_restart_as_if_there_had_been_none(tmp_path: Path) -> None:
    first = [{"role": "user", "content": TEXT}]
    config = write_config(tmp_path)
    with running_server(tmp_path, *config) as server:
        said, _ = say(server, first, "stays")
        for session, key in (("goes", ALICE), ("goes", MALLORY), ("unloaded", ALICE)):
            assert say(server, first, session, key)[0] == said
        second = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "And its rivers?"}]
        wanted, cached = say(server, second, "stays")
        assert cached > 300
        operate(server, "unload")
        assert len(files(tmp_path)) == 4
        assert say(server, second, "unloaded") == (wanted, cached), "an unload and a load are a restart of the model"
        assert len(files(tmp_path)) == 3
    kept = files(tmp_path)
    assert len(kept) == 4 and {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    assert "goes" not in " ".join(path.name for path in kept)

    with running_server(tmp_path, *config) as server:
        assert say(server, second, "goes") == (wanted, cached)
        assert say(server, second, "nobody's")[1] < cached
        assert len(files(tmp_path)) == 3, "a session is in one place"
        assert say(server, second, "goes", MALLORY) == (wanted, cached), "each key has its own of that name"
        assert say(server, second, "stays", MALLORY)[1] < cached, "Alice's is not given to another key"
        for path in files(tmp_path):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        again, found = say(server, second, "unloaded")
        assert again and found < cached and server.log.read_text().count("is passed over") == 1
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(20)
    with running_server(tmp_path, *config) as server:
        assert say(server, second, "goes")[1] < cached, "what was not written when it was killed is lost"


def test_with_the_switch_off_nothing_is_on_the_disk(tmp_path: Path) -> None:
    first = [{"role": "user", "content": TEXT}]
    with running_server(tmp_path, *write_config(tmp_path)) as server:
        say(server, first, "t1")
    assert len(files(tmp_path)) == 1
    with running_server(tmp_path, *write_config(tmp_path, sessions="{keep: false}")) as server:
        assert files(tmp_path) == [] and say(server, first, "t1")[1] == 0
    assert files(tmp_path) == []

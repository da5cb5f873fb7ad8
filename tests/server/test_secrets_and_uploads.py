"""Secrets stay where they are, nothing that a client names is fetched, and uploads do not leave their place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.config import Settings
from server.logs import ConsoleFormatter
from spectral.keyfile import hash_secret, new_secret
from tests.server.conftest import ROOT, Running, serving, settings

USER, ADMIN, OWN = new_secret(), new_secret(), "administrators own pass phrase"
SECRETS = (USER, ADMIN, OWN, USER.removeprefix("sk-spectral-"))
PROMPT = "a prompt that nobody else may read"
BYTES = {"Content-Type": "application/octet-stream"}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> Iterator[tuple[Running, io.StringIO]]:
    """A server with keys, and all that it logs."""
    keys = [{"name": "user", "hash": hash_secret(USER)}, {"name": "boss", "hash": hash_secret(ADMIN), "role": "admin"}]
    server = settings(admin_key=OWN).server.model_dump() | {"admin_key": OWN}
    config = Settings(server=server, auth={"keys": keys}, models=[{"name": "demo"}])
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(ConsoleFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with serving(config) as running:
            running.until(lambda: running.client.get("/ready").status_code == 200)
            yield running, text
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def test_no_secret_and_no_prompt_is_anywhere(written: tuple[Running, io.StringIO]) -> None:
    server, log = written
    client, said = server.client, []
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    for secret in (USER, ADMIN, OWN):
        for headers in (bearer(secret), {"X-Api-Key": secret}, {"Authorization": f"Basic {secret}"}):
            said.append(client.post("/v1/chat/completions", json=body, headers=headers))
            said.append(client.post("/v1/chat/completions", json={**body, "modell": 1}, headers=headers))
            said.append(client.get("/admin/status", headers=headers))
            said.append(client.get("/v1/models", params={"api_key": secret}, headers=headers))
            said.append(client.post("/admin/models/demo/pin", json={}, headers=headers))
            said.append(client.get("/metrics", headers=headers))
    admin = bearer(ADMIN)
    for path in ("audit", "events", "vram", "plan", "jobs", "profiles", "status"):
        said.append(client.get(f"/admin/{path}", headers=admin))
    said += [client.get("/ready"), client.get("/openapi.json"), client.get("/health")]
    assert {answer.status_code for answer in said} >= {200, 400, 401, 403}
    audit = next(answer for answer in said if answer.url.path == "/admin/audit").json()["actions"]
    assert {row["actor"].partition(" from")[0] for row in audit} >= {"key boss", "admin key"}
    for text in (log.getvalue(), *(answer.text + str(answer.headers) for answer in said)):
        for secret in (*SECRETS, hash_secret(USER), hash_secret(OWN), hash_secret(ADMIN)):
            assert secret not in text
    assert PROMPT not in log.getvalue() and "POST /v1/chat/completions 200" in log.getvalue()


def test_a_worker_does_not_inherit_the_servers_secrets(written: tuple[Running, io.StringIO]) -> None:
    pid = written[0].slot().worker.pid  # type: ignore[union-attr]
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert OWN.encode() not in environment
    os.environ["SPECTRAL_SERVER__ADMIN_KEY"] = OWN
    try:
        with serving(Settings(models=[{"name": "demo"}], server={"drain_seconds": 0.5})) as server:
            server.until_state("demo", "hot")
            child = server.slot().worker
            assert child is not None
            assert OWN.encode() not in Path(f"/proc/{child.pid}/environ").read_bytes()
    finally:
        del os.environ["SPECTRAL_SERVER__ADMIN_KEY"]


@pytest.mark.parametrize("wrong", ["", "port: many", "hots: x"])
def test_check_prints_no_secret(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"server:\n  admin_key: {OWN}\n  {wrong}\nmodels: [{{name: demo-7m}}]\n")
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "server", "check", "--config", str(file), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == (1 if wrong else 0), done.stderr
        assert OWN not in done.stdout + done.stderr


# -- nothing is fetched ------------------------------------------------------------------------------------------------


@pytest.fixture
def bait() -> Iterator[tuple[str, list[Any]]]:
    """A URL, and everybody who came to it."""
    came: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, who = listener.accept()
                except TimeoutError:
                    continue
                came.append(who)
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", came
        over.set()
        thread.join(5)


def test_nothing_that_a_client_names_is_fetched(bait: tuple[str, list[Any]], server: Running) -> None:
    url, came = bait
    part = {"type": "image_url", "image_url": {"url": url}}
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": url, "$schema": url}}}
    turn = {"role": "user", "content": "hello"}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": [part]}]}),
        ("/v1/chat/completions", {"model": "demo", "messages": [turn], "response_format": schema}),
        ("/v1/chat/completions", {"model": url, "messages": [turn]}),
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": url}]}),
        ("/v1/responses", {"model": "demo", "input": [{"type": "input_image", "image_url": url}]}),
        ("/v1/responses", {"model": "demo", "input": [{"type": "input_file", "file_url": url}]}),
        ("/v1/responses", {"model": "demo", "input": "x", "tools": [{"type": "mcp", "server_url": url}]}),
        ("/api/pull", {"model": url}),
        ("/api/create", {"model": "x", "from": url}),
        ("/api/chat", {"model": "demo", "messages": [{"role": "user", "content": "x", "images": [url]}]}),
        ("/api/generate", {"model": "demo", "prompt": url, "stream": False}),
        ("/admin/profiles/demo/activate", {"profile": url[:60]}),
    ]
    statuses = [server.client.post(path, json=body).status_code for path, body in asked]
    assert set(statuses) <= {200, 400, 404, 405, 501}, statuses
    for path in ("/admin/plan", "/v1/models"):
        server.client.get(path, params={"dry_run": 1, "with": url}, headers={"Referer": url, "X-Forwarded-For": url})
    time.sleep(0.2)
    assert came == []


# -- uploads -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def store(place: Path) -> Iterator[Running]:
    with serving(settings({"name": "demo"}, state_dir=str(place / "state"), max_profile_bytes=2**20)) as running:
        yield running


def everything(folder: Path) -> set[str]:
    """All files but those of the database and the planner."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.parent.name != "state"}


@pytest.mark.parametrize(
    "name",
    ["../../x", "..%2f..%2fx", "%2e%2e/%2e%2e/x", "demo/../../x", "/etc/passwd", "demo%00", "demo/versions/../x"],
)
def test_a_path_leads_nowhere(store: Running, place: Path, name: str) -> None:
    before = everything(place)
    for method, rest in (("PUT", ""), ("DELETE", "/versions/../../x"), ("GET", "/versions/..%2f..%2fstate")):
        url = f"{store.url}/admin/profiles/{name}{rest}"
        answer = store.client.request(method, url, content=b"x" if method == "PUT" else None, headers=BYTES)
        assert answer.status_code in (404, 405, 422), (method, answer.text)
        assert "root:" not in answer.text
    for given in ("../../../etc/passwd", "..\\x", "a" * 64, "/etc/passwd"):
        answer = store.client.post("/admin/profiles/demo/activate", json={"profile": given})
        assert answer.status_code in (400, 404)
    assert everything(place) == before


@pytest.mark.parametrize("name", ["..%2f..%2fserver%2f__main__.py", "../routes/console.py", "%2e%2e/errors.py"])
def test_the_console_has_no_files_but_its_own(store: Running, name: str) -> None:
    answer = store.client.get(f"{store.url}/console/{name}")
    assert answer.status_code == 404 and "import" not in answer.text


def test_a_link_in_the_store_is_replaced_and_not_followed(store: Running, place: Path, tmp_path: Path) -> None:
    profile = (ROOT / "profiles" / "demo-7m.safetensors").read_bytes()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = place / "state" / "profiles" / f"{hashlib.sha256(profile).hexdigest()}.safetensors"
    link.symlink_to(victim)
    stored = store.client.put("/admin/profiles/demo", content=profile, headers=BYTES)
    assert stored.status_code == 201, stored.text
    assert victim.read_text() == "precious" and not link.is_symlink() and link.read_bytes() == profile


def header(document: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(document) if length is None else length) + document


MANY = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(15_000)}
BOMBS = {
    "length": header(b"{}", 2**63),
    "longer-than-the-file": header(b"{}", 2**20),
    "deep": header(b"[" * 500_000),
    "many-tensors": header(json.dumps(MANY).encode()),
    "huge-shape": header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
    "overflowing-shape": header(b'{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,0]}}'),
    "offsets": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}'),
    "overlap": header(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    )
    + b"abcd",
    "metadata-is-huge": header(json.dumps({"__metadata__": {"spectral": "x" * 900_000}}).encode()),
    "zip": b"PK\x03\x04" + b"\0" * 1000,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 1000,
    "pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_time_and_leave_nothing(store: Running, place: Path, name: str) -> None:
    before = everything(place)
    began = time.monotonic()
    answer = store.client.put("/admin/profiles/demo", content=BOMBS[name], headers=BYTES)
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "invalid_profile"
    assert len(answer.text) < 1500 and time.monotonic() - began < 15
    assert everything(place) == before
    assert store.client.get("/health").status_code == 200


def test_a_packed_body_is_not_unpacked(store: Running) -> None:
    """Content-Encoding: a few bytes that stand for gigabytes."""
    for path, kind in (("/v1/chat/completions", "application/json"), ("/admin/profiles/demo", BYTES["Content-Type"])):
        headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
        method = "PUT" if "profiles" in path else "POST"
        answer = store.client.request(method, path, content=gzip.compress(b"{}" * 100_000), headers=headers)
        assert answer.status_code in (400, 415, 422)

"""Keys under attack: guessing, names that were pointed here, the administrator's key in all its forms, isolation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.config import ConfigError, Settings, load_settings
from server.throttle import FREE, PER_MINUTE, REMEMBERED, Throttle, network
from spectral.keyfile import hash_secret
from tests.server.conftest import Running, serving, settings

SECRET = "correct horse battery"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "echo"}]}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


# -- guessing ----------------------------------------------------------------------------------------------------------


def test_many_wrong_keys_have_to_wait_and_known_ones_do_not() -> None:
    now = [0.0]
    throttle = Throttle(lambda: now[0])
    throttle.passed("10.0.0.1", "known")
    for _ in range(FREE):
        assert throttle.wait("10.0.0.1", "x") == 0
        throttle.failed("10.0.0.1")
    wait = throttle.wait("10.0.0.1", "right but never seen")
    assert wait == 60 / PER_MINUTE
    assert throttle.wait("10.0.0.1", "known") == 0 and throttle.wait("10.0.0.2", "x") == 0
    now[0] += wait
    assert throttle.wait("10.0.0.1", "x") == 0
    throttle.failed("10.0.0.1")
    assert throttle.wait("10.0.0.1", "x") > 0
    now[0] += 3600
    assert throttle.wait("10.0.0.1", "x") == 0


def test_what_is_remembered_is_bounded_and_an_ipv6_network_is_one_place() -> None:
    throttle = Throttle()
    for number in range(REMEMBERED + 50):
        throttle.failed(f"client-{number}")
        throttle.passed(f"client-{number}", "x")
    assert len(throttle._failed) == len(throttle._right) == REMEMBERED
    assert network("2001:db8::1") == network("2001:db8::ffff:1") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") and network("fe80::1%eth0") == network("fe80::2")
    assert network("") == "" and network("unix:") == "unix:"


@pytest.mark.parametrize("keyless", [True, False])
def test_a_server_refuses_guesses(keyless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every two seconds one more would be let in: on a slow machine, while the guesses are sent.
    monkeypatch.setattr(Throttle.__init__, "__defaults__", (lambda: 0.0,))
    auth: dict[str, Any] = {} if keyless else {"keys": [{"name": "a", "hash": hash_secret("x" * 20)}]}
    own = settings(admin_key=SECRET)
    config = Settings(server=own.server.model_dump(), auth=auth, models=[{"name": "demo"}])
    with serving(config) as server:
        path = "/admin/status"
        assert server.client.get(path, headers=bearer(SECRET)).status_code == 200
        statuses = [server.client.get(path, headers=bearer(f"guess {n}")).status_code for n in range(FREE + 5)]
        assert statuses[: FREE - 1] == [401] * (FREE - 1) and statuses[-1] == 429
        refused = server.client.get(path, headers=bearer("guess"))
        assert refused.json()["error"]["code"] == "too_many_wrong_keys" and int(refused.headers["retry-after"]) >= 1
        assert server.client.get(path, headers=bearer(SECRET)).status_code == 200  # it was seen from here before
        assert server.client.get("/health").status_code == 200


# -- the administrator's key -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["admin_key", "admin_key_hash", "admin_key_file"])
def test_the_administrators_key_in_each_way(way: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    value = {"admin_key": SECRET, "admin_key_hash": hash_secret(SECRET), "admin_key_file": str(file)}[way]
    config = settings(**{way: value})
    assert SECRET not in repr(config) and SECRET not in config.model_dump_json()
    with serving(config) as server:
        for headers in ({}, bearer("wrong"), bearer(SECRET + "x"), bearer(hash_secret(SECRET)), {"X-Api-Key": "wrong"}):
            refused = server.client.get("/admin/status", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_admin_key")
            assert SECRET not in refused.text
        for headers in (bearer(SECRET), {"X-Api-Key": SECRET}):
            answer = server.client.get("/admin/status", headers=headers)
            assert answer.status_code == 200 and answer.json()["actor"].startswith("admin key from")
        assert server.client.get("/v1/models").status_code == 200  # it guards /admin alone where there are no others


def test_the_administrators_key_changes_with_the_configuration(tmp_path: Path) -> None:
    file, key = tmp_path / "config.yaml", tmp_path / "key"
    key.write_text("first key of all\n")
    file.write_text(f"server: {{admin_key_file: {key}, state_dir: {tmp_path}/state}}\nmodels: [{{name: demo}}]\n")
    with serving(load_settings(file), file) as server:
        key.write_text("second key of all\n")
        first, second = bearer("first key of all"), bearer("second key of all")
        assert server.client.get("/admin/status", headers=second).status_code == 401
        assert server.client.post("/admin/config/reload", headers=first).status_code == 200
        assert server.client.get("/admin/status", headers=first).status_code == 401
        assert server.client.get("/admin/status", headers=second).status_code == 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("admin_key: short", "at least 8"),
        ("admin_key_hash: abc", "pattern"),
        ("admin_key_file: no-such-file", "cannot be read"),
        ("admin_key_file: FOLDER/empty", "8 characters"),
        ("admin_key_file: FOLDER/binary", "it is no text"),
        ("{admin_key: the-secret-itself, admin_key_file: FOLDER/empty}", "in one way"),
    ],
)
def test_a_faulty_key_is_explained_without_it(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 10)
    file = tmp_path / "config.yaml"
    file.write_text(f"server:\n  {text.replace('FOLDER', str(tmp_path))}\nmodels: [{{name: demo}}]\n")
    with pytest.raises(ConfigError, match=reason) as caught:
        load_settings(file)
    assert "the-secret-itself" not in str(caught.value)


# -- names that were pointed here --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyless() -> Iterator[Running]:
    with serving(settings()) as running:
        running.until(lambda: running.client.get("/ready").status_code == 200)
        yield running


@pytest.mark.parametrize("path", ["/", "/v1/models", "/ready", "/metrics", "/admin/status", "/api/tags"])
def test_a_strangers_name_for_this_machine_is_refused(keyless: Running, path: str) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example."):
        refused = keyless.client.get(path, headers={"Host": host})
        assert refused.status_code == 403 and "host_not_allowed" in refused.text or path.startswith("/api")
        assert refused.status_code == 403
    for host in ("127.0.0.1", "localhost:1234", "[::1]:8000"):
        assert keyless.client.get(path, headers={"Host": host}).status_code == 200
    for host in ("machine", "192.168.1.5"):  # no page can have been loaded from them but this machine's own
        assert keyless.client.get(path, headers={"Host": host}).status_code in (200, 403)


def test_a_server_for_everybody_has_any_name() -> None:
    config = Settings(
        server={"allow_public": True}, auth={"allow_without_keys": True}, models=[{"name": "demo", "load": "on_demand"}]
    )
    with serving(config) as server:
        assert server.client.get("/v1/models", headers={"Host": "llm.example"}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_administers_nothing(keyless: Running, site: str) -> None:
    refused = keyless.client.post("/admin/models/demo/pin", headers={"Sec-Fetch-Site": site})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_forbidden")
    assert keyless.client.get("/admin/status").json()["models"]["demo"]["pinned"] is False


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_form_is_no_administrators_request(keyless: Running, kind: str) -> None:
    """The types that a browser sends to anybody without asking; an Origin is always with them, and these need none."""
    for path in ("/admin/models/demo/setting", "/v1/chat/completions"):
        answer = keyless.client.post(path, content=b'{"setting": "4x"}', headers={"Content-Type": kind})
        assert answer.status_code == 415


def test_no_answer_lets_other_pages_read_it(keyless: Running) -> None:
    for path in ("/v1/models", "/admin/status", "/", "/openapi.json"):
        answer = keyless.client.get(path)
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert keyless.client.options("/v1/chat/completions", headers=asked).status_code in (403, 405)


# -- isolation ---------------------------------------------------------------------------------------------------------


def test_each_key_has_a_salt_of_its_own_and_a_new_key_does_not_inherit() -> None:
    salts = []
    for secrets in (("one of them", "two of them"), ("another one", "two of them")):
        keys = [{"name": name, "hash": hash_secret(secret)} for name, secret in zip("ab", secrets, strict=True)]
        config = Settings(server={"drain_seconds": 0.5}, auth={"keys": keys}, models=[{"name": "demo"}])
        with serving(config) as server:
            server.until(lambda running=server: running.client.get("/ready").status_code == 200)
            for secret in secrets:
                answer = server.client.post("/v1/chat/completions", json=CHAT, headers=bearer(secret)).json()
                told = answer["choices"][0]["message"]["content"]
                salts.append(told.partition('"cache_salt":"')[2].partition('"')[0])
                assert secret not in told
    assert all(salts) and len(set(salts)) == 3 and salts[1] == salts[3]

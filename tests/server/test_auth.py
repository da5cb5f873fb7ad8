"""Keys: who may come in, what each may use, and how a server without any behaves."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server import auth as module
from server.auth import Caller, rule
from server.config import ConfigError, Settings, load_settings
from server.config_auth import AuthSettings
from server.errors import ApiError
from server.limits import Limiter
from spectral.keyfile import KeyFileError, KeyRecord, hash_secret, load_keys, new_secret, save_keys
from tests.server.conftest import Running, serving

USER, ADMIN, NARROW, OLD = (new_secret() for _ in range(4))
HELLO = {"model": "demo", "prompt": "hello"}


def record(name: str, secret: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "hash": hash_secret(secret), **more}


def with_key(field: str) -> str:
    return f'{{"format": 1, "keys": [{{"name": "a", "hash": "{hash_secret("x")}", {field}}}]}}'


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    save_keys(path, [KeyRecord("old", hash_secret(OLD))])
    keys = [
        record("user", USER),
        record("boss", ADMIN, role="admin"),
        record("narrow", NARROW, models=["oth*"], requests_per_minute=2, tokens_per_minute=8, max_concurrency=1),
    ]
    auth = {"keys": keys, "keys_file": str(path)}
    config = Settings(server={"drain_seconds": 0.5}, auth=auth, models=[{"name": "demo"}, {"name": "other"}])
    with serving(config) as running:
        running.until(lambda: running.client.get("/ready").status_code == 200)
        yield running, path


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/admin/plan", "/api/tags", "/nope", "/v1/models/demo"])
@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), {"Authorization": "Basic eDp5"}, {"Authorization": b"Bearer \xc3\xa9"}]
)
def test_without_a_key_nothing_is_shown(guarded: tuple[Running, Path], path: str, headers: Any) -> None:
    answer = guarded[0].client.get(path, headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"] and "sk-" not in answer.text


def test_health_is_open_and_a_body_is_not_read_without_a_key(guarded: tuple[Running, Path]) -> None:
    server = guarded[0]
    assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200
    assert server.client.get("/health", headers=bearer("wrong")).status_code == 200
    assert server.client.post("/v1/chat/completions", content=b"{").status_code == 401


def test_keys_open_what_their_role_allows(guarded: tuple[Running, Path]) -> None:
    server = guarded[0]
    assert server.client.post("/generate", json=HELLO, headers=bearer(USER)).status_code == 200
    assert server.client.post("/generate", json=HELLO, headers={"X-Api-Key": USER}).status_code == 200
    assert server.client.get("/metrics", headers=bearer(USER)).status_code == 200
    refused = server.client.get("/admin/plan", headers=bearer(USER))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_required")
    assert server.client.get("/admin/no-such-page", headers=bearer(ADMIN)).status_code == 404
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo", "other"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_list_of_models_limits_and_hides(guarded: tuple[Running, Path]) -> None:
    server, headers = guarded[0], bearer(NARROW)
    refused = server.client.post("/generate", json=HELLO, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert [m["id"] for m in server.client.get("/v1/models", headers=headers).json()["data"]] == ["other"]
    assert [m["name"] for m in server.client.get("/api/tags", headers=headers).json()["models"]] == ["other"]
    assert server.client.get("/v1/models/demo", headers=headers).status_code == 403
    missing = server.client.get("/v1/models/nope", headers=headers).json()["error"]["message"]
    assert "other" in missing and "demo" not in missing
    ollama = server.client.post("/api/chat", json={"model": "demo", "messages": []}, headers=headers)
    assert ollama.status_code == 403 and isinstance(ollama.json()["error"], str)


def test_limits_are_told_and_kept(guarded: tuple[Running, Path]) -> None:
    server = guarded[0]
    body = {"model": "other", "prompt": "hello"}
    first = server.client.post("/generate", json=body, headers=bearer(NARROW))
    assert first.status_code == 200 and first.headers["x-ratelimit-limit-requests"] == "2"
    assert (
        first.headers["x-ratelimit-remaining-requests"] == "1" and first.headers["x-ratelimit-remaining-tokens"] == "0"
    )
    refused = server.client.post("/v1/completions", json=body, headers=bearer(NARROW))
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60 and "tokens per minute" in refused.text
    assert server.client.post("/generate", json=body, headers=bearer(USER)).status_code == 200


def test_a_revoked_key_is_useless_at_once(guarded: tuple[Running, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = guarded
    monkeypatch.setattr(module, "RELOAD_S", 0.0)
    assert server.client.get("/v1/models", headers=bearer(OLD)).status_code == 200
    save_keys(path, [dataclasses.replace(load_keys(path)[0], revoked="2020-01-01T00:00:00+00:00")])
    assert server.client.get("/v1/models", headers=bearer(OLD)).status_code == 401
    path.write_text("nonsense")
    assert server.client.get("/v1/models", headers=bearer(USER)).status_code == 200
    assert server.client.get("/v1/models", headers=bearer(OLD)).status_code == 401
    save_keys(path, [])
    assert server.client.get("/v1/models").status_code == 401


def test_an_empty_file_of_keys_lets_nobody_in(tmp_path: Path) -> None:
    save_keys(tmp_path / "keys.json", [])
    config = Settings(auth={"keys_file": str(tmp_path / "keys.json")}, models=[{"name": "demo", "load": "on_demand"}])
    with serving(config) as server:
        assert server.client.get("/v1/models").status_code == 401


def test_without_keys_everything_is_open(server: Running) -> None:
    assert server.client.get("/v1/models", headers=bearer("anything")).status_code == 200
    assert server.client.get("/metrics").status_code == 200


def test_rules_are_configurable() -> None:
    closed = AuthSettings(health="key", metrics="admin")
    assert [rule(path, closed) for path in ("/health", "/metrics", "/admin", "/", "/v1/models")] == [
        "key",
        "admin",
        "admin",
        "open",
        "key",
    ]
    assert rule("/administrator", closed) == "key" and rule("/metrics", AuthSettings(metrics="open")) == "open"


@pytest.mark.parametrize(
    ("server", "auth", "fits"),
    [
        ({"host": "127.0.0.1"}, {}, True),
        ({"host": "0.0.0.0"}, {}, False),
        ({"host": "0.0.0.0", "allow_public": True}, {}, False),
        ({"host": "0.0.0.0"}, {"allow_without_keys": True}, False),
        ({"host": "0.0.0.0", "allow_public": True}, {"allow_without_keys": True}, True),
        ({"host": "0.0.0.0"}, {"keys": [record("a", USER)]}, True),
        ({"host": "myhost.example"}, {}, False),
    ],
)
def test_a_public_address_needs_keys_or_two_words(server: dict[str, Any], auth: dict[str, Any], fits: bool) -> None:
    if fits:
        assert Settings(server=server, auth=auth, models=[{"name": "a"}]).server.host == server["host"]
    else:
        with pytest.raises(ValueError, match="allow_without_keys"):
            Settings(server=server, auth=auth, models=[{"name": "a"}])


def test_the_command_line_cannot_open_a_server_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("models: [{name: a}]")
    with pytest.raises(ConfigError, match="no API keys"):
        load_settings(path, host="0.0.0.0")
    monkeypatch.setenv("SPECTRAL_SERVER__HOST", "0.0.0.0")
    with pytest.raises(ConfigError, match="no API keys"):
        load_settings(path)
    assert load_settings(path, host="127.0.0.1").server.host == "127.0.0.1"


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def caller(**limits: Any) -> Caller:
    return Caller(KeyRecord("a", hash_secret("x"), **limits))


def test_requests_refill_with_time() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(requests_per_minute=2)
    assert limiter.admit(Caller()) is None
    for _ in range(2):
        assert limiter.admit(who) is not None
    with pytest.raises(ApiError) as refused:
        limiter.admit(who)
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "30"
    clock.now = 30.0
    assert limiter.admit(who) is not None
    with pytest.raises(ApiError):
        limiter.admit(who)


def test_tokens_may_be_overdrawn_once_and_are_paid_back() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(tokens_per_minute=60)
    permit = limiter.admit(who)
    assert permit is not None and permit.headers["X-RateLimit-Remaining-Tokens"] == "60"
    permit.spend(90)
    with pytest.raises(ApiError) as refused:
        limiter.admit(who)
    assert refused.value.headers["X-RateLimit-Remaining-Tokens"] == "0"
    assert int(refused.value.headers["Retry-After"]) == 31
    clock.now = 31.0
    assert limiter.admit(who) is not None


def test_requests_at_once_are_counted_until_released() -> None:
    limiter, who = Limiter(Clock()), caller(max_concurrency=1)
    permit = limiter.admit(who)
    with pytest.raises(ApiError, match="at once"):
        limiter.admit(who)
    assert permit is not None
    permit.release()
    permit.release()
    assert limiter.admit(who) is not None
    with pytest.raises(ApiError, match="at once"):
        limiter.admit(who)


def test_a_request_that_fails_gives_its_place_back(tmp_path: Path) -> None:
    config = Settings(
        server={"drain_seconds": 0.5},
        auth={"keys": [record("one", USER, max_concurrency=1)]},
        models=[{"name": "demo"}],
    )
    with serving(config) as server:
        server.until_state("demo", "hot")
        chat = {"model": "demo", "messages": [{"role": "user", "content": "fail"}]}
        for text in ("long", "full", "fail", "hello"):
            chat["messages"][0]["content"] = text  # type: ignore[index]
            answers = [server.client.post("/v1/chat/completions", json=chat, headers=bearer(USER)) for _ in range(2)]
            assert "at once" not in answers[1].text
        with server.client.stream(
            "POST", "/generate_stream", json={**HELLO, "prompt": "forever"}, headers=bearer(USER)
        ):
            busy = server.client.post("/generate", json=HELLO, headers=bearer(USER))
            assert busy.status_code == 429 and "at once" in busy.text

        def free() -> bool:
            return server.client.post("/generate", json=HELLO, headers=bearer(USER)).status_code == 200

        server.until(free)


def test_the_file_keeps_hashes_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    save_keys(path, [KeyRecord("a", hash_secret(USER), models=("x",), requests_per_minute=3)])
    assert USER not in path.read_text() and os.stat(path).st_mode & 0o077 == 0
    assert load_keys(path) == [KeyRecord("a", hash_secret(USER), models=("x",), requests_per_minute=3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("[]", "format 1"),
        ('{"format": 2, "keys": []}', "format 1"),
        ('{"format": 1, "keys": [{"name": "a"}]}', "keys[0]"),
        ('{"format": 1, "keys": [{"name": "a", "hash": "x"}]}', "sha256"),
        (with_key('"role": "king"'), "role"),
        (with_key('"models": "b"'), "models"),
        (with_key('"max_concurrency": 0'), "max_concurrency"),
        (with_key('"expires": "soon"'), "expires"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        load_keys(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ValueError, match="keys.json"):
        AuthSettings(keys_file=str(path))


def test_expired_keys_are_refused() -> None:
    from datetime import datetime, timezone

    now = datetime(2030, 1, 1, tzinfo=timezone.utc)
    assert not KeyRecord("a", hash_secret("x"), expires="2029-12-31T23:59:59Z").valid_at(now)
    assert KeyRecord("a", hash_secret("x"), expires="2030-01-01T00:00:01").valid_at(now)


def test_no_key_is_found_by_chance() -> None:
    answer = httpx.Headers(bearer("x"))
    assert module.presented(answer) == "x"  # type: ignore[arg-type]
    assert len({new_secret() for _ in range(100)}) == 100 and len(new_secret()) > 50

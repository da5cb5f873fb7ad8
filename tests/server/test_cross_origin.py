"""HEAD, pages of other origins, and bodies without a type where Ollama's users send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.config import ConfigError, load_settings
from spectral.keyfile import hash_secret
from tests.server.conftest import Running, serving, settings

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
PAGE = "https://chat.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.parametrize(
    "path", ["/", "/console/main.js", "/health", "/ready", "/metrics", "/v1/models", "/api/tags", "/api/version"]
)
def test_head_is_get_without_a_body(server: Running, path: str) -> None:
    head, get = server.client.head(path), server.client.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) > 0
    assert server.client.head("/health").status_code == 200  # the connection goes on


def test_head_of_what_has_no_get_and_of_a_stream(server: Running) -> None:
    refused = server.client.head("/v1/chat/completions")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")
    assert server.client.head("/nothing").status_code == 404
    stream = server.client.head("/admin/events/stream")
    assert (stream.status_code, stream.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
    assert server.client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server with a key that lets one page in."""
    keys = [{"name": "anna", "hash": hash_secret("the key of anna")}]
    config = settings(allowed_origins=[PAGE]).model_dump()
    config["auth"]["keys"] = keys
    with serving(type(settings())(**config)) as running:
        running.until(lambda: running.client.get("/ready").status_code == 200)
        yield running


def test_a_page_that_was_named_may_ask_and_read(shared: Running) -> None:
    asked = shared.client.options("/v1/chat/completions", headers={"Origin": PAGE, **PREFLIGHT})
    assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (204, PAGE)
    assert "POST" in asked.headers["Access-Control-Allow-Methods"]
    assert asked.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    with_key = {"Origin": PAGE, "Authorization": "Bearer the key of anna"}
    answer = shared.client.post("/v1/chat/completions", json=CHAT, headers=with_key)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    assert answer.headers["Vary"] == "Origin" and "X-Spectral-KL" in answer.headers["Access-Control-Expose-Headers"]
    body = {**CHAT, "stream": True}
    with shared.client.stream("POST", "/v1/chat/completions", json=body, headers=with_key) as stream:
        assert stream.headers["Access-Control-Allow-Origin"] == PAGE and b"[DONE]" in stream.read()
    refused = shared.client.post("/v1/chat/completions", json=CHAT, headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    ("path", "origin"), [("/v1/models", "https://evil.example"), ("/admin/status", PAGE), ("/v1/models", None)]
)
def test_others_and_the_administrators_routes_stay_closed(shared: Running, path: str, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": origin}
    for answer in (shared.client.get(path, headers=headers), shared.client.options(path, headers=headers | PREFLIGHT)):
        assert answer.status_code in (401, 405)
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


def test_a_star_lets_every_page_in() -> None:
    with serving(settings(allowed_origins=["*"])) as running:
        answer = running.client.get("/v1/models", headers={"Origin": "https://any.example"})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://chat.example/app", ""])
def test_what_is_no_origin_is_refused_at_start(tmp_path: Any, origin: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({"server": {"allowed_origins": [origin]}, "models": [{"name": "d"}]}))
    with pytest.raises(ConfigError, match=r"server\.allowed_origins\.0: must be .*https://chat\.example"):
        load_settings(tmp_path / "c.yaml")


def test_ollamas_own_examples_name_no_type_and_browsers_must(server: Running) -> None:
    body = json.dumps({**CHAT, "stream": False})
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl says by itself
    for headers in (form, {}):
        answer = server.client.post("/api/chat", content=body, headers=headers)
        assert answer.json()["message"]["content"] == "one two three "
    for told in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        for headers in (form, {"Content-Type": "text/plain"}):
            assert server.client.post("/api/chat", content=body, headers={**headers, **told}).status_code == 415
    assert server.client.post("/v1/chat/completions", content=body, headers=form).status_code == 415


def test_what_http_itself_refuses_is_counted_under_its_own_code(shared: Running) -> None:
    def counted(code: str) -> int:
        text = shared.client.get("/metrics", headers={"Authorization": "Bearer the key of anna"}).text
        return text.count(f'spectral_request_errors_total{{code="{code}"')

    shared.client.get("/v1/chat/completions", headers={"Authorization": "Bearer the key of anna"})
    shared.client.post("/v1/chat/completions", json=CHAT)
    assert (counted("method_not_allowed"), counted("invalid_api_key"), counted("internal_error")) == (1, 1, 0)

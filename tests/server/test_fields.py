"""Every field of the official client's requests is honoured, or refused with 400 and its name; and our own fields."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as text
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from server import schemas
from server.config_auth import AuthSettings
from spectral.keyfile import KeyRecord, hash_secret, save_keys
from tests.server.conftest import Running, serving, settings

HELLO = [{"role": "user", "content": "hello"}]
ROUTES: dict[str, tuple[dict[str, Any], type[schemas.Request], tuple[Any, Any]]] = {
    "/v1/chat/completions": (
        {"messages": HELLO},
        schemas.ChatRequest,
        (chat.CompletionCreateParamsBase, chat.CompletionCreateParamsStreaming),
    ),
    "/v1/completions": (
        {"prompt": "hello"},
        schemas.CompletionRequest,
        (text.CompletionCreateParamsBase, text.CompletionCreateParamsStreaming),
    ),
    "/v1/responses": (
        {"input": "hello"},
        schemas.ResponsesRequest,
        (responses.ResponseCreateParamsBase, responses.ResponseCreateParamsStreaming),
    ),
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
TOOL = {"type": "function", "function": {"name": "weather"}}
HONOURED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": HELLO, "model": "demo", "stream": True, "frequency_penalty": 0.5, "presence_penalty": 0.5,
        "logit_bias": {"5": 1}, "logprobs": True, "max_completion_tokens": 5, "max_tokens": 5, "n": 2, "seed": 3,
        "metadata": {"a": "b"}, "parallel_tool_calls": False, "response_format": FORMAT, "stop": "x",
        "stream_options": {"include_usage": True}, "temperature": 0.5, "tools": [TOOL], "tool_choice": "none",
        "top_p": 0.5, "user": "somebody", "service_tier": "auto", "store": False, "prompt_cache_key": "a",
        "prompt_cache_retention": "in_memory", "safety_identifier": "a", "verbosity": "medium", "modalities": ["text"],
        "reasoning_effort": "none",
    },
    "/v1/completions": {
        "prompt": "hello", "model": "demo", "stream": True, "echo": True, "frequency_penalty": 0.5, "n": 2, "seed": 3,
        "presence_penalty": 0.5, "logit_bias": {"5": 1}, "logprobs": 2, "max_tokens": 5, "stop": ["x"], "best_of": 1,
        "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.5, "user": "somebody", "suffix": "",
    },
    "/v1/responses": {
        "input": "hello", "model": "demo", "stream": True, "include": ["message.output_text.logprobs"],
        "instructions": "Be short.", "max_output_tokens": 5, "metadata": {"a": "b"}, "parallel_tool_calls": False,
        "store": True, "stream_options": {"include_obfuscation": False}, "temperature": 0.5, "top_logprobs": 2,
        "text": {"format": {"type": "text"}}, "top_p": 0.5, "user": "somebody", "background": False,
        "tools": [{"type": "function", "name": "weather", "parameters": {}, "strict": False}], "tool_choice": "none",
        "truncation": "disabled", "reasoning": {}, "service_tier": "auto", "prompt_cache_key": "a",
        "prompt_cache_retention": "in_memory", "safety_identifier": "a",
    },
}  # fmt: skip
NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/chat/completions", "top_logprobs"): {"logprobs": True, "top_logprobs": 2},
    ("/v1/chat/completions", "tool_choice"): {"tools": [TOOL]},
    ("/v1/responses", "top_logprobs"): {"include": ["message.output_text.logprobs"]},
}
UNSUPPORTED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "mp3"}, "modalities": ["text", "audio"], "functions": [{"name": "a"}],
    "function_call": {"name": "a"}, "prediction": {"type": "content", "content": "x"}, "reasoning_effort": "high",
    "web_search_options": {}, "best_of": 3, "suffix": "the end", "service_tier": "flex", "verbosity": "low",
    "background": True, "truncation": "auto", "reasoning": {"effort": "high"}, "prompt_cache_retention": "24h",
    "previous_response_id": "resp_1", "conversation": "conv_1", "max_tool_calls": 3, "prompt": {"id": "pmpt_1"},
}  # fmt: skip


def official(route: str) -> set[str]:
    """All fields that the client can send there."""
    return {name for kind in ROUTES[route][2] for name in typing.get_type_hints(kind)}


FIELDS = [(route, name) for route in ROUTES for name in sorted(official(route))]


@pytest.mark.parametrize(("route", "name"), FIELDS)
def test_every_official_field_is_honoured_or_refused_by_name(server: Running, route: str, name: str) -> None:
    body, schema, _ = ROUTES[route]
    known = name in schema.model_fields or name in schema.harmless
    honoured = HONOURED[route]
    extra = NEEDS.get((route, name), {})
    if known and (name in honoured or extra):
        value = {name: honoured[name]} if name in honoured else {}
        answer = server.client.post(route, json={"model": "demo", **body, **extra, **value})
        assert answer.status_code == 200, answer.text
    if name in UNSUPPORTED or not known:
        if route == "/v1/completions" and name == "prompt":
            return
        value = {name: UNSUPPORTED.get(name, "something")}
        answer = server.client.post(route, json={"model": "demo", **body, **value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter"), answer.text
        assert name in error["message"]
    assert known or name not in honoured
    assert name in honoured or name in UNSUPPORTED or extra or not known, f"{name} is not tried here"


@pytest.mark.parametrize(("name", "hint"), [("best_of", "ask for n of them"), ("suffix", "fill no gaps")])
def test_what_is_refused_says_what_to_do(server: Running, name: str, hint: str) -> None:
    body = {"model": "demo", "prompt": "x", name: UNSUPPORTED[name]}
    assert hint in server.client.post("/v1/completions", json=body).json()["error"]["message"]


def told(server: Running, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What the worker was told."""
    answer = server.client.post(path, json={"model": "demo", **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    data = answer.json()
    choice = data["choices"][0] if "choices" in data else data
    got: dict[str, Any] = json.loads(choice["message"]["content"] if "message" in choice else choice["text"])
    return got


ECHO = [{"role": "user", "content": "echo"}]
OURS = {"session": "chat-1", "priority": -3, "kv_quality": {"setting": "4x", "max_kl": 0.5}, "timeout_seconds": 5.5}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ECHO}),
        ("/v1/completions", {"prompt": "echo"}),
        ("/generate", {"prompt": "echo"}),
    ],
)
def test_our_own_fields_reach_the_worker(server: Running, path: str, body: dict[str, Any]) -> None:
    got = told(server, path, {**body, **OURS})
    assert (got["session"], got["priority"], got["setting"], got["max_kl"]) == ("chat-1", -3, "4x", 0.5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ECHO, "reasoning_effort": "none"}),
        ("/v1/responses", {"input": "echo", "reasoning": {"effort": "none", "summary": None}}),
        ("/api/chat", {"messages": ECHO, "think": False, "stream": False}),
        ("/api/generate", {"prompt": "echo", "think": False, "stream": False}),
    ],
)
def test_an_answer_without_thoughts_is_asked_for(server: Running, path: str, body: dict[str, Any]) -> None:
    def thinking(body: dict[str, Any]) -> str:
        text = server.client.post(path, json={"model": "demo", **body}).text.replace('\\"', '"')
        return text.partition('"thinking":')[2].partition("}")[0]

    assert thinking(body) == "false"
    assert thinking({name: value for name, value in body.items() if name[:4] not in ("reas", "thin")}) == "null"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"session": ""}, "session"),
        ({"session": "x" * 257}, "session"),
        ({"session": "a", "prompt": ["x", "y"]}, "session"),
        ({"priority": 101}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"),
        ({"kv_quality": {}}, "kv_quality"),
        ({"kv_quality": {"setting": "7x"}}, "kv_quality.setting"),
    ],
)
def test_our_own_fields_are_checked(server: Running, change: dict[str, Any], param: str) -> None:
    answer = server.client.post("/v1/completions", json={"model": "demo", "prompt": "x", **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_request_has_a_time_limit_of_its_own(server: Running) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "mute"}], "timeout_seconds": 0.2}
    answer = server.client.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (504, "deadline_exceeded")
    assert error["param"] == "timeout_seconds" and "0.2 s" in error["message"]
    assert "allow more time in timeout_seconds" in error["message"]
    server.until(lambda: not server.slot().streams)


def test_only_an_admin_key_goes_before_others(tmp_path: Path) -> None:
    keys = [KeyRecord("anna", hash_secret("a" * 20)), KeyRecord("root", hash_secret("b" * 20), role="admin")]
    save_keys(tmp_path / "keys.json", keys)
    config = settings().model_copy(update={"auth": AuthSettings(keys_file=str(tmp_path / "keys.json"))})
    with serving(config) as running:
        headers = [{"Authorization": f"Bearer {letter * 20}"} for letter in "ab"]
        running.until(lambda: running.client.get("/ready").status_code == 200)
        body: dict[str, Any] = {"model": "demo", "messages": ECHO, "priority": 5}
        refused = running.client.post("/v1/chat/completions", json=body, headers=headers[0])
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "priority")
        assert told(running, "/v1/chat/completions", {**body, "priority": -5}, headers[0])["priority"] == -5
        assert told(running, "/v1/chat/completions", body, headers[1])["priority"] == 5

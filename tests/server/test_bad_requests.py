"""Every way in which a request can be wrong gets its status, the envelope and the name of the field."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import schemas
from server.errors import ApiError
from server.gateway import Gateway
from server.schemas.ollama import OllamaChatRequest, OllamaGenerateRequest
from server.worker import messages as wire
from tests.server.conftest import Running, serving, settings

JSON = {"Content-Type": "application/json"}
CALLED = {"name": "f", "arguments": "{}"}
CALL = {"id": "c", "type": "function", "function": CALLED}
DEEP: Any = {}
for _ in range(100):
    DEEP = {"a": [DEEP]}
OTHER = {"type": "function", "function": {"name": "g"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def tool_with(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def called_with(arguments: str) -> dict[str, Any]:
    call = {**CALL, "function": {**CALLED, "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


def shape(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


OK = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


def check(response: Any, status: int, code: str, param: str | None) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert response.headers["x-request-id"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"max_tokens": -5}, "invalid_value", "max_tokens"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": "5"}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 10**30}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 2**64}, "invalid_value", "max_completion_tokens"),
        ({"top_k": 2**70}, "invalid_value", "top_k"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"logit_bias": {"9" * 40: 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value", "logit_bias"),
        ({"stop": "x" * 1025}, "invalid_value", "stop"),
        ({"model": "m" * 301}, "invalid_value", "model"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"presence_penalty": 2.1}, "invalid_value", "presence_penalty"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"n": 9}, "invalid_value", "n"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {**CALLED, "arguments": "["}}]}]},
            "invalid_value",
            "messages[0].tool_calls[0].function.arguments",
        ),
        *(
            (called_with(text), "invalid_value", "messages[0].tool_calls[0].function.arguments")
            for text in (f'{{"a": {10**30}}}', '{"a": NaN}', '{"a": "\\ud800"}', json.dumps(DEEP), "[" * 10_000)
        ),
        ({"tools": [tool_with({"maximum": 10**30})]}, "invalid_value", "tools[0].function.parameters"),
        ({"tools": [tool_with(DEEP)]}, "invalid_value", "tools[0].function.parameters"),
        ({"response_format": shape({"maximum": 2**63})}, "invalid_value", "response_format.json_schema.schema"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": OTHER}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"kv_quality": {"max_kl": -1}}, "invalid_value", "kv_quality.max_kl"),
        ({"kv_quality": {"max_kl": 0.0001}}, "quality_unavailable", "kv_quality.max_kl"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unsupported_parameter", "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages[0].content"),
        ({"stream_options": {"include_usag": True}}, "unsupported_parameter", "stream_options.include_usag"),
        ({"max_token": 5}, "unsupported_parameter", "max_token"),
        ({"max_token": None}, "unsupported_parameter", "max_token"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"store": True}, "unsupported_parameter", "store"),
    ],
)
def test_a_wrong_field_is_named(server: Running, change: dict[str, Any], code: str, param: str) -> None:
    message = check(server.client.post("/v1/chat/completions", json={**OK, **change}), 400, code, param)
    assert param.split("[")[0] in message


def test_harmless_values_are_accepted() -> None:
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "audio": None, "store": False}
    parsed = schemas.parse(schemas.ChatRequest, {**OK, **harmless, "temperature": None, "messages": [answer]})
    assert (parsed.temperature, parsed.messages[0].content) == (1.0, "hi")
    completion = schemas.parse(schemas.CompletionRequest, {"model": "m", "prompt": ["x"], "suffix": "", "best_of": 1})
    assert (completion.prompt, completion.max_tokens) == (["x"], 16)


@pytest.mark.parametrize("schema", [schemas.CompletionRequest, schemas.GenerateRequest])
@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""], ["a", 1], [1, -1], [2**70], [True], 5, None, ["x"] * 65])
def test_a_prompt_is_a_text_or_a_list_of_ids(schema: Any, prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.parse(schema, {"model": "m", "prompt": prompt})
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_the_whole_request_reaches_the_worker() -> None:
    body = {**OK, "max_tokens": 9, "max_completion_tokens": 7, "stop": "x", "seed": 3, "n": 2}
    body["logit_bias"] = {"5": -100}
    submit = schemas.parse(schemas.ChatRequest, body).submit("r")
    sampling = submit.sampling
    assert (submit.kind, submit.messages[0].content, sampling.max_tokens) == ("chat", "hello", 7)
    assert (sampling.stop, sampling.seed, sampling.logit_bias, sampling.n) == (("x",), 3, {5: -100.0}, 2)
    assert sampling.logprobs is None


def test_what_the_worker_rejects(server: Running) -> None:
    long = {**OK, "messages": [{"role": "user", "content": "long"}], "stream": True}
    check(server.client.post("/v1/chat/completions", json=long), 400, "context_length_exceeded", "messages")
    full = server.client.post("/v1/completions", json={"model": "demo", "prompt": "full"})
    check(full, 429, "queue_full", None)
    assert int(full.headers["retry-after"]) >= 1


def test_an_unknown_model_is_404(server: Running) -> None:
    check(server.client.post("/v1/chat/completions", json={**OK, "model": "x"}), 404, "model_not_found", "model")
    check(server.client.get("/v1/models/org/x"), 404, "model_not_found", "model")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 50_000])
def test_bad_json_is_400(server: Running, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream"):
        check(server.client.post(path, content=body, headers=JSON), 400, "invalid_json", None)


def test_a_large_body_is_413_announced_or_not(server: Running) -> None:
    announced = server.client.post("/v1/chat/completions", content=b"x" * 200_000, headers=JSON)
    check(announced, 413, "request_too_large", None)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    streamed = server.client.post("/v1/chat/completions", content=pieces(), headers=JSON)
    check(streamed, 413, "request_too_large", None)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_body_that_does_not_say_it_is_json_is_415(server: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = server.client.post("/v1/chat/completions", content=json.dumps(OK), headers=headers)
    assert "application/json" in check(response, 415, "unsupported_media_type", None)
    utf8 = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.client.post("/v1/chat/completions", content=json.dumps(OK), headers=utf8).status_code == 200


def test_a_body_that_does_not_arrive_is_408() -> None:
    with serving(settings(request_timeout_seconds=0.2)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: 10\r\n\r\n{")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_an_unexpected_exception_is_a_500_in_the_envelope(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(Gateway, "open", broken)
        response = server.client.post("/v1/chat/completions", json=OK, headers={"X-Request-Id": "r-500"})
    message = check(response, 500, "internal_error", None)
    assert response.headers["x-request-id"] == "r-500"
    assert "secret" not in message
    assert server.client.post("/v1/chat/completions", json=OK).status_code == 200


def test_what_a_client_sent_is_cut_before_it_is_repeated(server: Running) -> None:
    name = "f" * 50_000
    error = server.client.post("/v1/chat/completions", json={**OK, name: 1}).json()["error"]
    assert error["code"] == "unsupported_parameter" and error["param"].startswith("fff")
    assert len(error["param"]) <= 120 and len(error["message"]) < 300


def test_unknown_paths_and_methods(server: Running) -> None:
    check(server.client.get("/nope"), 404, "not_found", None)
    response = server.client.get("/v1/chat/completions")
    check(response, 405, "method_not_allowed", None)
    assert response.headers["allow"] == "POST"
    body = {"model": "demo", "prompt": "hello", "stream": True}
    check(server.client.post("/generate", json=body), 400, "unsupported_parameter", "stream")


def test_request_id_is_echoed_unless_it_is_odd(server: Running) -> None:
    assert server.client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.client.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


EDGES = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**40, -(10**40), 0.5, 1e308, "", "auto", "1", [], {}, [[]]]
EDGES += [[10**40], {"1": 10**40}, {str(10**40): 1}, ["", ""], [None], [{"type": "text"}], {"type": "text"}]
SCHEMAS = [schemas.ChatRequest, schemas.CompletionRequest, schemas.GenerateRequest, schemas.ResponsesRequest]
SCHEMAS += [OllamaChatRequest, OllamaGenerateRequest]
FIELDS = sorted({name for schema in SCHEMAS for name in (*schema.model_fields, *schema.harmless)})
ANYTHING = st.recursive(
    st.sampled_from(EDGES) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def check_any(schema: Any, change: dict[str, Any]) -> None:
    """Such a body is a message that the worker understands, or a 400 that names a field; nothing else."""
    base: dict[str, Any] = {"model": "m", "prompt": "p"}
    if schema in (schemas.ChatRequest, OllamaChatRequest):
        base = OK
    elif schema is schemas.ResponsesRequest:
        base = {"model": "m", "input": "p"}
    try:
        submit = schemas.parse(schema, {**base, **change}).submit("r")
    except ApiError as error:
        assert error.status == 400 and error.param is not None and error.message
        return
    assert wire.decode_to_worker(wire.encode(submit)[4:]) == submit


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("field", FIELDS)
def test_each_field_at_each_edge(schema: Any, field: str) -> None:
    for value in EDGES:
        check_any(schema, {field: value})


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), ANYTHING, max_size=4), st.sampled_from(SCHEMAS))
def test_any_other_body(body: dict[str, Any], schema: Any) -> None:
    check_any(schema, body)

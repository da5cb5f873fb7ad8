"""The real server with the shipped configuration, through the clients that people use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import openai
import pytest
from harness import ROOT, Server, on_a_busy_machine, wait_for

pytestmark = pytest.mark.e2e

MODEL = "demo-7m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, after checking that its envelope is whole."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    return dict(error)


def test_streamed_answer_names_paris(client: openai.OpenAI) -> None:
    started = time.monotonic()
    first = None
    text, roles, usage = "", [], None
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        stream=True,
        temperature=0,
        max_tokens=48,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles.append(choice.delta.role)
            if choice.delta.content:
                first = first or time.monotonic() - started
                text += choice.delta.content
    assert "Paris" in text
    assert roles[0] == "assistant"
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert first is not None and first < 5, f"the first token took {first} s"


def test_whole_answer_is_the_streamed_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=48)
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=48, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    assert whole.choices[0].message.content == streamed
    assert whole.choices[0].finish_reason in {"stop", "length"}


def test_an_answer_is_held_to_a_schema(client: openai.OpenAI) -> None:
    city = {"type": "string", "enum": ["Paris", "Oslo"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format=form, temperature=0, max_tokens=64
    )
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Paris", "Oslo")
    with pytest.raises(openai.BadRequestError) as refused:
        wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
        client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=wrong)
    assert refused.value.param == "response_format"


def test_a_prompt_is_scored_token_by_token(client: openai.OpenAI, server: Server) -> None:
    prompts = ["The capital of France is Paris.", "The capital of France is Oslo."]
    answer = client.completions.create(model=MODEL, prompt=prompts, echo=True, logprobs=1, max_tokens=0)
    scores = []
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        logprobs = choice.logprobs
        assert choice.text == prompt and logprobs is not None and "".join(logprobs.tokens or []) == prompt
        assert logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None
        scores.append(sum(value for value in logprobs.token_logprobs if value is not None))
        tokens = server.client.post("/tokenize", json={"model": MODEL, "prompt": prompt}).json()
        assert tokens["count"] == len(logprobs.tokens or [])
    assert scores[0] > scores[1] + 1


def test_a_request_gets_the_quality_that_it_asks_for(client: openai.OpenAI) -> None:
    def asked(max_kl: float) -> Any:
        extra = {"kv_quality": {"max_kl": max_kl}}
        return client.chat.completions.with_raw_response.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, extra_body=extra
        )

    usual, finer = asked(1.0), asked(0.0005)
    assert float(usual.headers["x-spectral-kl"]) > float(finer.headers["x-spectral-kl"])
    told = json.loads(finer.text)["spectral"]
    assert told["kl_mean"] <= 0.0005 and told["setting"] == finer.headers["x-spectral-setting"]
    exact = asked(0.0)
    assert (exact.headers["x-spectral-setting"], float(exact.headers["x-spectral-kl"])) == ("exact", 0.0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(
            model=MODEL, prompt="x", extra_body={"kv_quality": {"max_kl": 0.0, "setting": "16x"}}
        )
    assert refused.value.param == "kv_quality.max_kl"


def test_a_chat_goes_on_in_its_session_at_a_setting_of_its_own(client: openai.OpenAI) -> None:
    turns: list[Any] = list(QUESTION)
    extra = {"session": "an end-to-end test", "kv_quality": {"setting": "4x"}, "priority": -1, "timeout_seconds": 60.0}
    first = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=48, extra_body=extra)
    assert json.loads(first.to_json())["spectral"]["setting"] == "4x"
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, *QUESTION]
    asked = {"model": MODEL, "messages": turns, "temperature": 0, "max_tokens": 16}
    again = client.chat.completions.create(**asked, extra_body=extra)
    fresh = client.chat.completions.create(**asked, extra_body={"kv_quality": {"setting": "4x"}})
    assert again.choices[0].message.content == fresh.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, extra_body={"kv_quality": {"setting": "7x"}})
    assert refused.value.param == "kv_quality.setting"


def test_the_usage_tells_what_of_the_prompt_was_cached(client: openai.OpenAI) -> None:
    numbers = " ".join(str(i * 7919 % 10007) for i in range(400))
    turns: list[Any] = [{"role": "user", "content": f"Cached tokens: {numbers}"}]
    found = []
    for choices in (2, 1):  # the second of two choices takes over what the first computed, and that counts for nothing
        answer = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=1, n=choices)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        found.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert found[0] == 0 and found[1] is not None and 512 <= found[1] < answer.usage.prompt_tokens
    response = client.responses.create(model=MODEL, input=turns, max_output_tokens=1)
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens == found[1]


def test_model_list_names_the_demo(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]


def test_piped_chat_command(server: Server) -> None:
    command = [sys.executable, "-m", "spectral.cli", "chat", "--url", server.url, "--json"]
    command += ["--temperature", "0", "--max-tokens", "48"]
    result = subprocess.run(
        command, input="What is the capital of France?\n", capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert "Paris" in record["answer"]
    assert record["usage"]["completion_tokens"] > 0
    assert record["spectral"]["setting"]
    assert record["spectral"]["cache_bytes"] > 0


def test_ps_command(server: Server) -> None:
    command = [sys.executable, "-m", "spectral.cli", "ps", "--url", server.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert MODEL in result.stdout


def test_body_of_20_mb_is_refused(server: Server) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a" * (20 * 2**20)}]})
    response = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)


def test_too_long_prompt_is_refused_by_name(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "river and mountain " * 3000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert refused.value.code == "context_length_exceeded"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert refused.value.code == "model_not_found"
    assert "no-such-model" in str(refused.value)


def test_bad_json(server: Server) -> None:
    response = server.client.post(
        "/v1/chat/completions", content=b'{"model": ', headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert "JSON" in error_of(response)["message"]


@pytest.mark.parametrize(("field", "value"), [("max_tokens", -1), ("temperature", -0.5), ("no_such_field", 1)])
def test_bad_field_is_named(server: Server, field: str, value: float) -> None:
    body = {"model": MODEL, "messages": QUESTION, field: value}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert field in error["message"] and error["param"] == field


def long_request() -> dict[str, Any]:
    """A request whose answer takes long enough to interfere with."""
    body = {"model": MODEL, "prompt": "It was a quiet morning", "stream": True}
    return {**body, "max_tokens": 1500, "temperature": 1.0}


def test_disconnect_frees_the_cache(server: Server) -> None:
    def used() -> float:
        return server.metrics()[KV_USED]

    before = used()
    with server.client.stream("POST", "/v1/completions", json=long_request()) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert any(line.startswith("data:") for line in lines)
        wait_for("the cache holds the request", lambda: used() > before, 10)
    wait_for("the cache is free again", lambda: used() <= before, 10)


@pytest.mark.alone
def test_killed_worker_ends_its_streams_and_comes_back(server: Server, client: openai.OpenAI) -> None:
    (pid,) = server.worker_pids()
    seen: list[str] = []
    with server.client.stream("POST", "/v1/completions", json=long_request()) as response:
        for line in response.iter_lines():
            seen.append(line)
            if line.startswith("data:") and len(seen) == 1:
                os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
    events = [line for line in seen if line.startswith("data: {")]
    assert "error" in json.loads(events[-1].removeprefix("data: ")), events[-1]
    assert server.client.get("/health").status_code == 200
    limit = on_a_busy_machine(10)
    wait_for("another worker is there", lambda: server.worker_pids() not in ([], [pid]), limit)
    wait_for("the model is back", server.ready, max(0.1, killed + limit - time.monotonic()))
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=48)
    assert "Paris" in (answer.choices[0].message.content or "")


KV_USED = "spectral_kv_used_bytes"

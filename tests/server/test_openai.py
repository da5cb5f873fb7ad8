"""The OpenAI API, over real HTTP, also through the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from server.answers.chat import Chat
from server.scheduler import stream as stream_module
from tests.server.conftest import Running


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **more}


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.fixture()
def official(server: Running) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_streams_with_usage(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(
        model="d", messages=[{"role": "user", "content": "hello"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 8


def test_the_official_client_gets_whole_answers(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}],
        n=2,
        logprobs=True,
        top_logprobs=1,
        response_format={"type": "text"},
        tool_choice="auto",
        parallel_tool_calls=True,
        service_tier="auto",
    )
    assert [choice.message.content for choice in answer.choices] == ["one two three "] * 2
    assert answer.choices[1].logprobs is not None and answer.choices[1].logprobs.content is not None
    assert answer.choices[1].logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    text = official.completions.create(model="demo", prompt="hello", logprobs=1)
    assert text.choices[0].text == "one two three "
    assert text.choices[0].logprobs is not None and text.choices[0].logprobs.text_offset == [0, 4, 8]


def test_the_official_client_raises_its_own_errors(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="available: demo, other, later"):
        official.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.RateLimitError):
        official.completions.create(model="demo", prompt="full")
    with pytest.raises(openai.APIError, match="the cache is damaged"):
        list(official.completions.create(model="demo", prompt="fail", stream=True))
    assert [model.id for model in official.models.list()] == ["demo", "other", "later"]
    assert official.models.retrieve("d").id == "demo"


def test_stream_has_the_shape_of_the_api(server: Running) -> None:
    response = server.client.post("/v1/chat/completions", json=chat("hello", stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-spectral-setting"] == "8x"
    got = events(response.text)
    assert got[-1] == "[DONE]"
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert got[-2]["choices"][0]["finish_reason"] == "stop"
    assert got[-2]["spectral"]["cache_bytes"] == 640
    assert all("usage" not in chunk for chunk in got[:-1])


def test_whole_answer_says_what_the_cache_did(server: Running) -> None:
    body = server.client.post("/v1/completions", json={"model": "demo", "prompt": [1, 2]}).json()
    assert body["spectral"]["setting"] == "8x"
    assert body["spectral"]["ratio"] == 8.0
    assert body["spectral"]["kl_mean"] == 0.012


def test_a_failure_in_mid_stream_is_an_event(server: Running) -> None:
    got = events(server.client.post("/v1/chat/completions", json=chat("fail", stream=True)).text)
    assert got[-1]["error"]["code"] == "cache_error"
    assert "[DONE]" not in got


def test_a_failure_without_a_stream_is_a_500(server: Running) -> None:
    response = server.client.post("/v1/chat/completions", json=chat("fail"))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "cache_error")


def test_native_api(server: Running) -> None:
    body = server.client.post("/generate", json={"model": "demo", "prompt": "hello", "max_tokens": 3}).json()
    assert (body["text"], body["finish_reason"], body["usage"]["total_tokens"]) == ("one two three ", "stop", 8)
    got = events(server.client.post("/generate_stream", json={"model": "demo", "prompt": "hello"}).text)
    assert [e["text"] for e in got[:-1]] == ["one ", "two ", "three ", ""]
    assert got[-2]["spectral"]["cache_bytes"] == 640 and got[-1] == "[DONE]"


def test_silence_is_filled_with_pings_and_a_disconnect_cancels(server: Running) -> None:
    before = server.cancelled()
    with server.client.stream("POST", "/v1/chat/completions", json=chat("mute", stream=True)) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": ping"
    server.until(lambda: server.cancelled() == before + 1)


@pytest.mark.parametrize("prompt", ["forever", "mute"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_memory(server: Running, stream: bool, prompt: str) -> None:
    before, slot = server.cancelled(), server.slot()
    with server.connect("/v1/chat/completions", chat(prompt, stream=stream)):
        server.until(lambda: slot.stats.running == 1)
    assert server.until(lambda: server.cancelled() == before + 1) < 5
    assert (slot.stats.running, slot.stats.kv_bytes_used, slot.streams) == (0, 0, {})


def test_many_clients_that_go_away_at_any_moment_leave_nothing_behind(server: Running) -> None:
    """Disconnects race with tokens: each must win, whatever else happens in that turn of the loop."""
    slot = server.slot()
    for _ in range(5):
        clients = [server.connect("/v1/chat/completions", chat("forever", stream=bool(i % 2))) for i in range(8)]
        server.until(lambda: slot.stats.running > 0)
        for client in clients:
            client.close()
        server.until(lambda: slot.stats.running == 0 and slot.streams == {})
    assert slot.stats.kv_bytes_used == 0


def test_a_client_that_does_not_read_loses_its_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "STREAM_EVENTS", 50)
    before = server.cancelled()
    with server.connect("/v1/chat/completions", chat("flood", stream=True)) as client:
        server.until(lambda: server.cancelled() == before + 1)
        assert server.slot().streams == {}
        assert server.client.post("/v1/chat/completions", json=chat("hello")).status_code == 200
        got = b""
        while b"data: [DONE]" not in got and b'"slow_client"' not in got[-1000:]:
            piece = client.recv(1 << 20)
            assert piece, "the stream ended without an error event"
            got += piece


def test_a_request_that_the_worker_gives_up_is_an_error(server: Running) -> None:
    got = events(server.client.post("/v1/chat/completions", json=chat("drop", stream=True)).text)
    assert got[-1]["error"]["code"] == "cancelled" and "[DONE]" not in got
    assert server.client.post("/v1/chat/completions", json=chat("drop")).status_code == 503


def test_a_grammar_that_comes_to_a_dead_end_is_the_requests_fault(server: Running) -> None:
    form = {"type": "json_object"}
    answer = server.client.post("/v1/chat/completions", json=chat("dead end", response_format=form))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "grammar_unsatisfiable")
    assert error["param"] == "response_format" and "response_format: the grammar" in error["message"]
    streamed = server.client.post("/v1/chat/completions", json=chat("dead end", response_format=form, stream=True))
    got = events(streamed.text)
    assert got[-1] == {"error": error} and "[DONE]" not in got
    ollama = {"model": "demo", "messages": [{"role": "user", "content": "dead end"}], "format": "json", "stream": False}
    answer = server.client.post("/api/chat", json=ollama)
    assert answer.status_code == 400 and answer.json()["error"].startswith("format: ")


def test_a_defect_in_mid_stream_is_an_event_and_no_clean_end(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(Chat, "end", broken)
        text = server.client.post("/v1/chat/completions", json=chat("hello", stream=True)).text
    assert events(text)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in text and "[DONE]" not in text

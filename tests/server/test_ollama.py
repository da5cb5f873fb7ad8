"""The Ollama API, over HTTP and through its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from server.schemas.ollama import duration
from tests.server.conftest import Running

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture()
def client(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url, trust_env=False) as client:
        yield client


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_the_client_chats(client: ollama.Client) -> None:
    answer = client.chat(model="demo:latest", messages=ask("hello"), options={"temperature": 0, "num_ctx": 128})
    assert answer.message.content == "one two three "
    assert (answer.done, answer.done_reason, answer.prompt_eval_count, answer.eval_count) == (True, "stop", 5, 3)
    assert answer.total_duration is not None and answer.total_duration > 0
    pieces = list(client.chat(model="d", messages=ask("hello"), stream=True, keep_alive="10m"))
    assert [piece.message.content for piece in pieces] == ["one ", "two ", "three ", ""]
    assert [piece.done for piece in pieces] == [False] * 3 + [True]


def test_the_client_generates(client: ollama.Client) -> None:
    assert client.generate(model="demo", prompt="hello").response == "one two three "
    pieces = list(client.generate(model="demo", prompt="hello", stream=True))
    assert "".join(piece.response or "" for piece in pieces) == "one two three " and pieces[-1].done
    echo = client.generate(model="demo", prompt="echo", system="Be brief.", options={"num_predict": 7, "seed": 1})
    got = json.loads(echo.response or "")
    assert got["kind"] == "chat" and [turn["role"] for turn in got["messages"]] == ["system", "user"]
    assert (got["sampling"]["max_tokens"], got["sampling"]["seed"], got["sampling"]["top_k"]) == (7, 1, 40)
    raw = json.loads(client.generate(model="demo", prompt="echo", raw=True, options={"stop": ["x"]}).response or "")
    assert (raw["kind"], raw["prompt"], raw["sampling"]["stop"]) == ("completion", "echo", ["x"])
    assert client.generate(model="demo", keep_alive=-1).done_reason == "load"
    assert client.chat(model="demo").done_reason == "load"


async def test_the_asynchronous_client(server: Running) -> None:
    async with ollama.AsyncClient(host=server.url, trust_env=False) as client:
        pieces = [piece async for piece in await client.chat(model="demo", messages=ask("hello"), stream=True)]
    assert "".join(piece.message.content or "" for piece in pieces) == "one two three "


def test_tools_and_forms(client: ollama.Client) -> None:
    answer = client.chat(model="demo", messages=ask("call"), tools=[TOOL])
    calls = answer.message.tool_calls or []
    assert answer.message.content == "Sure." and [c.function.arguments["city"] for c in calls] == ["Oslo", "Rome"]
    turns = [*ask("call"), answer.message, *({"role": "tool", "tool_name": "weather", "content": "wet"} for _ in calls)]
    echo = json.loads(client.chat(model="demo", messages=[*turns, *ask("echo")], tools=[TOOL]).message.content or "")
    made = [call["id"] for call in echo["messages"][1]["tool_calls"]]
    assert [turn.get("tool_call_id") for turn in echo["messages"]] == [None, None, *made, None] and len(set(made)) == 2
    streamed = list(client.chat(model="demo", messages=ask("call"), tools=[TOOL], stream=True))
    assert sum(len(piece.message.tool_calls or []) for piece in streamed) == 2
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    shaped = json.loads(client.chat(model="demo", messages=ask("grammar"), format=schema).message.content or "")
    assert shaped["kind"] == "json_schema" and json.loads(shaped["text"]) == schema
    plain = json.loads(client.generate(model="demo", prompt="grammar", format="json").response or "")
    assert plain["kind"] == "json_object"


def test_log_probabilities(client: ollama.Client) -> None:
    whole = client.chat(model="demo", messages=ask("hello"), logprobs=True, top_logprobs=1)
    found = [(one.token, one.logprob, one.top_logprobs[0].token) for one in whole.logprobs or []]  # type: ignore[index]
    assert found == [(word, -0.5, word) for word in ("one ", "two ", "three ")]
    pieces = list(client.generate(model="demo", prompt="hello", logprobs=True, stream=True))
    assert [[one.token for one in piece.logprobs or []] for piece in pieces] == [["one "], ["two "], ["three "], []]
    assert client.generate(model="demo", prompt="hello").logprobs is None


def test_models(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == ["demo", "other", "later"]
    running = client.ps().models
    assert [model.model for model in running] == ["demo", "other"] and running[0].context_length == 128
    shown = client.show("demo")
    assert shown.capabilities == ["completion", "tools"] and shown.details is not None
    assert shown.details.parameter_size == "7.0M"
    with pytest.raises(ollama.ResponseError, match="does not exist") as missing:
        client.show("nope")
    assert missing.value.status_code == 404


def test_keep_alive_0_lets_a_model_go_that_nobody_else_uses(server: Running, client: ollama.Client) -> None:
    assert client.generate(model="other", prompt="hello", keep_alive=0).response == "one two three "
    server.until_state("other", "cold")
    assert client.generate(model="other").done_reason == "load"
    pieces = list(client.chat(model="other", messages=ask("hello"), stream=True, keep_alive="0s"))
    assert pieces[-1].done
    server.until_state("other", "cold")
    assert client.generate(model="other", keep_alive="1h").done_reason == "load"
    with server.connect("/generate_stream", {"model": "other", "prompt": "forever"}):
        server.until(lambda: server.slot("other").stats.running == 1)
        assert client.generate(model="other", keep_alive=0).done_reason == "unload"
        assert server.ready()["other"]["state"] == "hot"
    server.until(lambda: not server.slot("other").streams)


def test_errors_have_the_form_of_ollama(server: Running, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as missing:
        client.chat(model="nope", messages=ask("x"))
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="configuration"):
        client.pull("llama3")
    with pytest.raises(ollama.ResponseError, match="no embeddings"):
        client.embed(model="demo", input="x")
    with pytest.raises(ollama.ResponseError, match="configuration"):
        client.delete("demo")
    with pytest.raises(ollama.ResponseError, match="damaged"):
        list(client.chat(model="demo", messages=ask("fail"), stream=True))
    answers = [server.client.post("/api/nope"), server.client.get("/api/nope/x"), server.client.put("/api/chat")]
    answers.append(server.client.post("/api/chat", json={"model": "demo", "messages": ask("full"), "stream": False}))
    assert [answer.status_code for answer in answers] == [404, 404, 405, 429]
    assert all(isinstance(answer.json()["error"], str) for answer in answers)
    assert server.client.get("/api/version").json()["version"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"num_gpu": 1}}, "options.num_gpu"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"temperature": 9}}, "options.temperature"),
        ({"options": {"num_ctx": 10**6}}, "options.num_ctx"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}}, "options.repeat_last_n"),
        ({"think": True}, "think"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"truncate": True}, "truncate: unknown or unsupported field; a prompt is never cut"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"format": "xml"}, "format"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_what_is_not_supported_is_named(server: Running, change: dict[str, Any], words: str) -> None:
    answer = server.client.post("/api/chat", json={"model": "demo", "messages": ask("hello"), **change})
    assert answer.status_code == 400 and answer.json()["error"].startswith(words)


def test_harmless_options_are_taken(server: Running) -> None:
    unused = {"mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1, "repeat_last_n": 64, "repeat_penalty": 1}
    options = {**unused, "num_keep": None, "temperature": 1, "num_predict": -1}
    body = {"model": "demo", "messages": ask("hello"), "think": False, "format": "", "options": options}
    answer = server.client.post("/api/chat", json={**body, "stream": False})
    assert answer.status_code == 200 and answer.json()["message"]["content"] == "one two three "


@pytest.mark.parametrize(
    ("value", "seconds"), [("10m", 600), ("1h30m", 5400), ("250ms", 0.25), (300, 300), ("-1", -1), ("-5m", -300)]
)
def test_durations(value: Any, seconds: float) -> None:
    assert duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "soon", "5 m", "m", None, True, [], "1h?"])
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration(value)

"""structured_outputs: what answers can be held to over HTTP, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.conftest import Running

SCHEMA = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
WIDE: dict[str, Any] = {f"a{i}": {} for i in range(2001)}
TOOL = {"type": "function", "function": {"name": "weather"}}


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


STRUCTURED = [
    ({"json": SCHEMA}, {"kind": "json_schema", "text": json.dumps(SCHEMA)}),
    ({"regex": "[0-9]+"}, {"kind": "regex", "text": "[0-9]+"}),
    ({"choice": ["a", "b c", "a"]}, {"kind": "regex", "text": r"a|b\x{20}c"}),
    ({"grammar": 'root ::= "a"'}, {"kind": "gbnf", "text": 'root ::= "a"'}),
]


@pytest.mark.parametrize(("asked", "expected"), STRUCTURED)
@pytest.mark.parametrize("stream", [False, True])
def test_structured_outputs_reach_the_worker_as_grammars(
    server: Running, asked: dict[str, Any], expected: dict[str, str], stream: bool
) -> None:
    def told(path: str, **body: Any) -> Any:
        answer = server.client.post(path, json={"model": "demo", "structured_outputs": asked, **body})
        assert answer.status_code == 200, answer.text
        if not stream and "stream" not in path:
            return answer.json()
        lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return lines[1 if "chat" in path else 0]

    chat = told("/v1/chat/completions", messages=ask("grammar"), stream=stream)["choices"][0]
    text = told("/v1/completions", prompt="grammar", stream=stream)["choices"][0]["text"]
    generated = told("/generate_stream" if stream else "/generate", prompt="grammar")["text"]
    found = [chat["delta" if stream else "message"]["content"], text, generated]
    assert [json.loads(one) for one in found] == [expected] * 3


def test_a_completion_takes_a_response_format(server: Running) -> None:
    official = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    for asked, kind in ((form, "json_schema"), ({"type": "json_object"}, "json_object")):
        answer = official.completions.create(model="demo", prompt="grammar", extra_body={"response_format": asked})
        assert json.loads(answer.choices[0].text)["kind"] == kind
    free = {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}  # text is no other form
    answer = official.completions.create(model="demo", prompt="grammar", extra_body=free)
    assert json.loads(answer.choices[0].text)["kind"] == "regex"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "at least 1"),
        ({"structured_outputs": {"regex": "a" * 16385}}, "structured_outputs.regex", "16384"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]", "at least 1"),
        ({"structured_outputs": {"choice": ["a" * 65537]}}, "structured_outputs", "65536"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs", "GBNF"),
        ({"structured_outputs": {"json": "{}"}}, "structured_outputs.json", "dictionary"),
        ({"structured_outputs": {"json": {"enum": ["a"], "$defs": WIDE}}}, "structured_outputs.json", "too large"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", "unsupported"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "leave one of them out",
        ),
        ({"structured_outputs": {"regex": "a"}, "tools": [TOOL]}, "structured_outputs", "may call tools"),
        ({"guided_regex": "a"}, "guided_regex", "say it with structured_outputs"),
        ({"grammar": 'root ::= "a"'}, "grammar", "say it with structured_outputs"),
    ],
)
def test_structured_outputs_that_contradict_are_refused(
    server: Running, change: dict[str, Any], param: str, message: str
) -> None:
    answer = server.client.post("/v1/chat/completions", json={"model": "demo", "messages": ask("hello"), **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and message in error["message"], error


def test_a_structured_output_that_a_worker_refuses_is_named(server: Running) -> None:
    for path, prompt in (
        ("/v1/chat/completions", {"messages": ask("dead end")}),
        ("/v1/completions", {"prompt": "dead end"}),
        ("/generate", {"prompt": "dead end"}),
    ):
        body = {"model": "demo", "structured_outputs": {"choice": ["a"]}, **prompt}
        error = server.client.post(path, json=body).json()["error"]
        assert error["param"] == "structured_outputs.choice" and error["message"].startswith(error["param"])


def test_the_document_shows_structured_outputs(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        shown = schema["properties"]["structured_outputs"]["anyOf"][0]
        assert set(shown["properties"]) == {"json", "regex", "choice", "grammar"} and shown["maxProperties"] == 1

"""Thoughts before answers: told apart in any pieces, and how each interface has them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.thoughts import ThoughtReader
from spectral.thought_forms import TAGS, form_of
from tests.server.conftest import Running, serving, settings

TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(form: str, pieces: list[str], begun: bool = False) -> tuple[str, str]:
    reader = ThoughtReader(form, begun=begun)
    found = [reader.push(piece) for piece in pieces] + [reader.finish()]
    return "".join(thoughts for thoughts, _ in found), "".join(answer for _, answer in found)


CASES = [
    ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
    ("<think></think>Yes.", False, ("", "Yes.")),
    ("Yes.", False, ("", "Yes.")),
    ("  Yes.", False, ("", "  Yes.")),
    ("a <think>b</think>", False, ("", "a <think>b</think>")),
    ("<thin", False, ("", "<thin")),
    ("<think>cut o", False, ("cut o", "")),
    ("<think>cut </thi", False, ("cut </thi", "")),
    ("Hm. a < b </ think>\n</think>Yes.</think>", True, ("Hm. a < b </ think>", "Yes.</think>")),
    ("<think>Hm.</think>Yes.", True, ("Hm.", "Yes.")),
    ("\n <think>Hm.  </think> \n", False, ("Hm.", "")),
    ("", True, ("", "")),
    ("", False, ("", "")),
]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(("text", "begun", "wanted"), CASES)
def test_thoughts_in_pieces(text: str, begun: bool, wanted: tuple[str, str], size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert read("think", pieces, begun) == wanted


@given(
    st.text(alphabet="<think>/ \na", max_size=30),
    st.text(alphabet="<think>/ \na", max_size=30),
    st.sampled_from(sorted(TAGS)),
    st.lists(st.integers(0, 100), max_size=20),
)
def test_any_thoughts_come_back(thoughts: str, answer: str, form: str, places: list[int]) -> None:
    begin, end = TAGS[form]
    thoughts = thoughts.replace(end, "")
    if end in thoughts or thoughts.strip().startswith(begin):
        return
    text = begin + thoughts + end + answer
    ends = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    assert read(form, [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]) == (thoughts.strip(), answer.lstrip())


def test_the_form_is_known_by_the_template_or_the_tokens() -> None:
    assert form_of("{% if '</think>' in content %}") == "think"
    assert form_of("{{ messages }}", {"<think>", "</think>", "<s>"}) == "think"
    assert form_of("{{ messages }}", {"[THINK]", "[/THINK]"}) == "mistral"
    assert form_of("{{ messages }}", {"<think>"}) == ""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_THOUGHTS", "think")
        with serving(settings({"name": "demo"}, {"name": "other", "thoughts": "in_text"})) as running:
            running.until(lambda: running.client.get("/ready").status_code == 200)
            yield running


@pytest.fixture()
def official(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture()
def client(server: Running) -> Iterator[ollama.Client]:
    made = ollama.Client(host=server.url, trust_env=False)
    yield made
    made._client.close()


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


THOUGHTS, ANSWER = "Is it < 1?", "Yes."


@pytest.mark.parametrize("text", ["think", "think on"])
def test_a_chat_has_its_thoughts_apart(official: openai.OpenAI, text: str) -> None:
    whole: Any = official.chat.completions.create(model="demo", messages=ask(text), logprobs=True)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == (ANSWER, THOUGHTS)
    assert whole.usage.completion_tokens_details.reasoning_tokens == (6 if text == "think" else 4)
    assert [token.token for token in whole.choices[0].logprobs.content] == ["."]
    chunks: list[Any] = list(
        official.chat.completions.create(
            model="demo", messages=ask(text), stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    for index in range(2):
        deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == index]
        thoughts = [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)]
        assert len(thoughts) > 1 and "".join(thoughts) == THOUGHTS
        assert "".join(delta.content or "" for delta in deltas) == ANSWER
        kinds = [bool(getattr(delta, "reasoning_content", None)) for delta in deltas if delta.role is None]
        assert kinds == sorted(kinds, reverse=True), "thoughts come before the answer"


def test_thoughts_a_text_and_a_call(official: openai.OpenAI) -> None:
    whole: Any = official.chat.completions.create(model="demo", messages=ask("think"), tools=[TOOL]).choices[0]
    assert (whole.message.content, whole.message.reasoning_content) == (ANSWER, THOUGHTS)
    assert whole.finish_reason == "tool_calls"
    with official.chat.completions.stream(model="demo", messages=ask("think"), tools=[TOOL]) as stream:
        final: Any = stream.get_final_completion().choices[0]
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    turns = [whole.message.to_dict(), {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "x"}]
    echo: Any = official.chat.completions.create(model="demo", messages=[*turns, *ask("echo")])
    assert json.loads(echo.choices[0].message.content)["messages"][0]["reasoning"] == THOUGHTS


def test_where_thoughts_are_left_in_the_text(server: Running, official: openai.OpenAI) -> None:
    message: Any = official.chat.completions.create(model="other", messages=ask("think")).choices[0].message
    assert message.content.startswith("<think>\nIs it") and "reasoning_content" not in message.to_dict()
    text = official.completions.create(model="demo", prompt="think").choices[0].text
    assert text.startswith("<think>") and text.endswith("</think>\n\nYes.")
    held = official.chat.completions.create(
        model="demo", messages=ask("think on"), response_format={"type": "json_object"}
    )
    assert (held.choices[0].message.content or "").startswith("Is it"), "a grammar holds all of the answer"
    assert server.client.get("/v1/models/demo").json()["spectral"]["thoughts"] is True


def test_a_response_has_an_item_of_thoughts(official: openai.OpenAI) -> None:
    tools: Any = [{**TOOL["function"], "type": "function"}]
    with official.responses.stream(model="demo", input="think", tools=tools) as stream:
        events: list[Any] = list(stream)
        final: Any = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    reasoning, message, call = final.output
    assert reasoning.content[0].text == THOUGHTS and reasoning.summary == [] and reasoning.status == "completed"
    assert message.content[0].text == ANSWER and json.loads(call.arguments) == {"city": "Oslo"}
    assert final.usage.output_tokens_details.reasoning_tokens == 6
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert len(deltas) > 1 and "".join(deltas) == THOUGHTS
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(pieces) > 1 and "".join(pieces) == call.arguments
    places = [(event.output_index, event.type) for event in events if hasattr(event, "output_index")]
    assert [index for index, _ in places] == sorted(index for index, _ in places)
    for index in range(3):
        kinds = [kind for at, kind in places if at == index]
        assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    back = official.responses.create(model="demo", input=[*final.output, output, *ask("echo")])
    text: Any = back.output[-1]
    turns = json.loads(text.content[0].text)["messages"]
    assert [turn["role"] for turn in turns] == ["assistant", "tool", "user"]
    assert turns[0]["reasoning"] == THOUGHTS and turns[0]["content"] == ANSWER and len(turns[0]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"encrypted_content": "x"}, "input[0].encrypted_content"),
        ({"content": [{"type": "output_text", "text": "x"}]}, "input[0].content"),
        ({"content": [{"type": "reasoning_text", "text": 5}]}, "input[0].content"),
        ({"role": "assistant"}, "input[0].role"),
        ({"summary": "x"}, "input[0].summary"),
    ],
)
def test_an_item_of_thoughts_is_checked(server: Running, item: dict[str, Any], param: str) -> None:
    thoughts = {"type": "reasoning", "id": "rs_1", "summary": [], **item}
    answer = server.client.post("/v1/responses", json={"model": "demo", "input": [thoughts, *ask("hello")]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_ollama_has_thinking(server: Running, client: ollama.Client) -> None:
    whole = client.chat(model="demo", messages=ask("think"), think=True)
    assert (whole.message.thinking, whole.message.content) == (THOUGHTS, ANSWER)
    pieces = list(client.chat(model="demo", messages=ask("think"), tools=[TOOL], stream=True))
    assert "".join(piece.message.thinking or "" for piece in pieces) == THOUGHTS
    assert "".join(piece.message.content or "" for piece in pieces) == ANSWER
    calls = [call for piece in pieces for call in piece.message.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Oslo"}]
    text = client.generate(model="demo", prompt="think")
    assert (text.thinking, text.response) == (THOUGHTS, ANSWER)
    assert client.generate(model="demo", prompt="think", raw=True).response.startswith("<think>")
    told = client.chat(model="demo", messages=[{"role": "assistant", "thinking": "Hm.", "content": "x"}, *ask("echo")])
    assert json.loads(told.message.content or "")["messages"][0]["reasoning"] == "Hm."
    assert "thinking" in (client.show("demo").capabilities or [])
    for asked in ({"think": "high"}, {"think": True, "raw": True}):
        answer = server.client.post("/api/generate", json={"model": "demo", "prompt": "x", **asked})
        assert answer.status_code == 400 and answer.json()["error"].startswith("think")


LANGCHAIN = """
import json, sys
from langchain_ollama import ChatOllama
model = ChatOllama(base_url=sys.argv[1], model="demo", reasoning=True, client_kwargs={"trust_env": False})
answer = model.invoke([("user", "think")])
print(json.dumps([answer.content, answer.additional_kwargs["reasoning_content"]]))
"""


@pytest.mark.skipif(importlib.util.find_spec("langchain_ollama") is None, reason="LangChain is not installed")
def test_langchain_reads_thinking(server: Running) -> None:
    env = {**os.environ, "NO_PROXY": "127.0.0.1"}  # a program of its own: LangChain keeps its connections open
    command = [sys.executable, "-c", LANGCHAIN, server.url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [ANSWER, THOUGHTS]

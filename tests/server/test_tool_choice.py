"""Which tools an answer may call: all forms of `tool_choice` in both of OpenAI's interfaces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Running

NAMES = ("a", "b", "c")
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def body(path: str, choice: Any) -> dict[str, Any]:
    """A request with three tools. `choice` is written as in a chat; functions lie flat in responses."""
    if path == CHAT:
        tools = [{"type": "function", "function": {"name": name}} for name in NAMES]
        turns = [{"role": "user", "content": "echo"}]
        return {"model": "demo", "messages": turns, "tools": tools, "tool_choice": choice}
    tools = [{"type": "function", "name": name} for name in NAMES]
    if isinstance(choice, dict):
        inner = choice.get("allowed_tools", {})
        flat = {"mode": inner.get("mode"), "tools": [_flat(one) for one in inner.get("tools", [])]}
        choice = {"type": "allowed_tools", **flat} if inner else _flat(choice)
    return {"model": "demo", "input": "echo", "tools": tools, "tool_choice": choice}


def _flat(one: dict[str, Any]) -> dict[str, Any]:
    return {"type": one["type"], **(one.get("function") or {})}


def told(running: Running, path: str, choice: Any) -> dict[str, Any]:
    """What the worker was told."""
    answer = running.client.post(path, json=body(path, choice))
    assert answer.status_code == 200, answer.text
    data = answer.json()
    text = data["choices"][0]["message"]["content"] if path == CHAT else data["output"][0]["content"][0]["text"]
    found: dict[str, Any] = json.loads(text)
    return found


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(
    ("choice", "shown", "callable_names"),
    [
        ("auto", NAMES, None),
        ("none", (), None),
        ("required", NAMES, NAMES),
        (named("b"), NAMES, ("b",)),
        (allowed("auto", "b", "c"), ("b", "c"), None),
        (allowed("required", "c"), ("c",), ("c",)),
    ],
)
def test_every_form_of_the_choice(
    server: Running, path: str, choice: Any, shown: tuple[str, ...], callable_names: tuple[str, ...] | None
) -> None:
    got = told(server, path, choice)
    assert tuple(tool["function"]["name"] for tool in got["tools"]) == shown
    grammar = got["sampling"]["grammar"]
    assert (grammar is None) == (callable_names is None)
    if callable_names is not None:
        assert tuple(name for name in NAMES if f'"const": "{name}"' in grammar["text"]) == callable_names


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("any", "'required'"),
        ({"type": "custom", "custom": {"name": "b"}}, "an object of the type function or allowed_tools"),
        (named("d"), "there is no tool 'd'"),
        (allowed("auto", "b", "d"), "there is no tool 'd'"),
        (allowed("none", "b"), ""),
        (allowed("auto"), ""),
    ],
)
def test_what_is_no_choice_is_refused_by_name(server: Running, path: str, choice: Any, words: str) -> None:
    answer = server.client.post(path, json=body(path, choice))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("tool_choice"), answer.text
    assert words in error["message"]


@pytest.mark.parametrize("empty", ["", []])
def test_a_response_to_nothing_is_refused_in_plain_words(server: Running, empty: Any) -> None:
    answer = server.client.post(RESPONSES, json={"model": "demo", "input": empty})
    assert answer.status_code == 400 and "that is not empty" in answer.json()["error"]["message"]


def test_an_option_that_nobody_has_is_not_blamed_on_the_configuration(server: Running) -> None:
    def said(option: str) -> str:
        data = {"model": "demo", "prompt": "x", "options": {option: 1}}
        return str(server.client.post("/api/generate", json=data).json()["error"])

    assert "configuration" in said("num_gpu") and "configuration" not in said("no_such")

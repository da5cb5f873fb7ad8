"""Calls of tools in a model's text, whole or in pieces of any size, in the forms that models use."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.toolcalls import Call, ToolParser

NAMES = ("weather", "weather_now", "add")
OSLO = {"city": "Oslo"}


def read(form: str, text: str, size: int = 1000, **options: Any) -> list[Any]:
    """Text joined, calls as (name, arguments), in order."""
    parser = ToolParser(form, NAMES, **options)
    found: list[Any] = []
    pieces = [parser.push(text[i : i + size]) for i in range(0, len(text), size)] + [parser.finish()]
    for item in (item for piece in pieces for item in piece):
        if isinstance(item, Call):
            found.append((item.name, json.loads(item.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
CASES = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", [("weather", OSLO)]),
    ("hermes", f"Let me see.\n<tool_call>{CALL}</tool_call>", ["Let me see.", ("weather", OSLO)]),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", [("weather", OSLO)] * 2),
    ("hermes", f"<tool_call>{CALL}", [("weather", OSLO)]),
    ("hermes", "<tool_call>nonsense</tool_call> x", ["<tool_call>nonsense</tool_call> x"]),
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None),
    ("hermes", "a < b and <tool_box>", None),
    ("hermes", "{} no call", None),
    (
        "hermes",
        "<tool_call><function=add>\n<parameter=a>\n1\n</parameter><parameter=b>x y</parameter></function></tool_call>",
        [("add", {"a": 1, "b": "x y"})],
    ),
    ("json", '{"name": "weather", "parameters": {"city": "Oslo"}}', [("weather", OSLO)]),
    ("json", f"<|python_tag|>{CALL}; {CALL}", [("weather", OSLO)] * 2),
    ("json", '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}', [("add", {"a": 1})]),
    ("json", '{"type": "function", "function": "add", "parameters": {}}', [("add", {})]),
    ("json", '{"answer": 42}', None),
    ("json", "It rains. " + CALL, None),
    ("json", '{"name": "weather", "arguments": [1]}', None),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", [("weather", OSLO)] * 2),
    ("mistral", f"[{CALL}]", [("weather", OSLO)]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}', [("weather", OSLO)]),
    ("mistral", 'weather_now{"city": "Oslo"}', [("weather_now", OSLO)]),
    ("mistral", "weather is a word", None),
    ("mistral", "[1] is a footnote", None),
    ("json", "", []),
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("form", "text", "wanted"), CASES)
def test_forms(form: str, text: str, wanted: list[Any] | None, size: int) -> None:
    assert read(form, text, size) == ([text] if wanted is None else wanted)


def test_one_call_where_no_more_are_wanted_and_forced_calls_are_plain_json() -> None:
    two = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert read("hermes", two, parallel=False) == [("weather", OSLO)]
    assert read("hermes", CALL, forced=True) == [("weather", OSLO)]
    ids = [item.id for form in ("hermes", "mistral") for item in ToolParser(form, NAMES, forced=True)._parse_all(CALL)]
    assert ids[0].startswith("call_") and len(ids[1]) == 9 and ids[1].isalnum()


def test_text_is_not_held_back_longer_than_it_must_be() -> None:
    assert ToolParser("hermes", NAMES).push("Hello <b") == ["Hello <b"]
    assert ToolParser("hermes", NAMES).push("Hello <too") == ["Hello"]
    assert ToolParser("json", NAMES).push("Hello") == ["Hello"]
    assert ToolParser("json", NAMES).push(" wea") == []


@given(st.text(alphabet='<>/{}[]":, tool_calweather\n', max_size=60), st.sampled_from(["hermes", "json", "mistral"]))
def test_any_text_without_a_call_comes_out_as_it_was(text: str, form: str) -> None:
    found = read(form, text, 3)
    if all(isinstance(item, str) for item in found):
        assert "".join(found).split() == text.split() or "<tool_call>" in text

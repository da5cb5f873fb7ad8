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
# As models of these families wrote them: with what they say before and after, their spacing and their own ends.
RECORDED = [
    (  # Qwen2.5 and Qwen3: several calls, each between tags of their own
        "hermes",
        "I'll look both up.\n\n<tool_call>\n"
        + '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>\n'
        + '{"name": "add", "arguments": {"a": 1, "b": -2.5}}\n</tool_call>',
        ["I'll look both up.", ("weather", OSLO), ("add", {"a": 1, "b": -2.5})],
    ),
    (  # Qwen3 thinks first
        "hermes",
        f"<think>\nThe user wants < 1 call.\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>",
        ["<think>\nThe user wants < 1 call.\n</think>", ("weather", OSLO)],
    ),
    (  # a small Qwen2.5 forgets the first tag
        "hermes",
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        None,
    ),
    ("hermes", '{ "name": "weather", "arguments": {"city": "Oslo"}}', [("weather", OSLO)]),
    ("hermes", '{"name": "Oslo", "population": 700000}', None),
    (  # Qwen3-Coder
        "hermes",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n[1, 2]\n"
        + "</parameter>\n</function>\n</tool_call>",
        [("weather", {"city": "Oslo", "days": [1, 2]})],
    ),
    (  # GLM-4.5
        "hermes",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
        + "<arg_value>3</arg_value>\n</tool_call>",
        [("weather", {"city": "Oslo", "days": 3})],
    ),
    ("json", '\n\n{"name": "weather", "parameters": {"city": "Oslo"}}', [("weather", OSLO)]),  # Llama 3.1
    ("json", '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}', [("weather", OSLO)]),
    ("json", f"Let me look.<|python_tag|>{CALL}", ["Let me look.", ("weather", OSLO)]),
    ("json", '<function=weather>{"city": "Oslo"}</function>', [("weather", OSLO)]),  # Llama 3.1's own functions
    (  # Llama 3.2 and 4, in Python
        "json",
        """[weather(city="Oslo"), add(a=1, b=-2.5, c={"d": [True, None, false]}), weather_now(city='K\\u00f8')]""",
        [
            ("weather", OSLO),
            ("add", {"a": 1, "b": -2.5, "c": {"d": [True, None, False]}}),
            ("weather_now", {"city": "Kø"}),
        ],
    ),
    ("json", '[weather("Oslo")]', None),
    ("json", '[weather(city=open("x"))]', None),
    ("json", "[other(city=1)]", None),
    ("json", "[weather(city=1e999)]", None),
    ("json", 'functools[{"name": "weather", "arguments": {"city": "Oslo"}}]', [("weather", OSLO)]),  # Phi-4-mini
    ("phi", f"<|tool_call|>[{CALL}, {CALL}]<|/tool_call|>", [("weather", OSLO)] * 2),
    ("phi", f"One moment.<|tool_call|>[{CALL}]<|/tool_call|>", ["One moment.", ("weather", OSLO)]),
    ("mistral", f" [TOOL_CALLS] [{CALL}]", [("weather", OSLO)]),  # Mistral 7B v0.3, Nemo
    ("mistral", f"I will look.[TOOL_CALLS] [{CALL}]", ["I will look.", ("weather", OSLO)]),
    (  # Mistral Small 3.2, Devstral
        "mistral",
        '[TOOL_CALLS]weather[CALL_ID]a1b2C3d4e[ARGS]{"city": "Oslo"}[TOOL_CALLS]add[ARGS]{"a": 1}',
        [("weather", OSLO), ("add", {"a": 1})],
    ),
    (  # FunctionGemma
        "gemma",
        "<start_function_call>call:weather{city:<escape>Oslo, {Norway}<escape>,days:3}<end_function_call>"
        + "<start_function_call>call:add{a:[1,2],b:{c:true,d:<escape><escape>}}<end_function_call>",
        [("weather", {"city": "Oslo, {Norway}", "days": 3}), ("add", {"a": [1, 2], "b": {"c": True, "d": ""}})],
    ),
    ("gemma", "call:weather{city:<escape>Oslo<escape>}", [("weather", OSLO)]),
    ("gemma4", '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>', [("weather", OSLO)]),
    ("gemma", "<start_function_call>call:other{}<end_function_call>", None),
    ("gemma", "<start_function_call>call:weather{city<end_function_call>", None),
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("form", "text", "wanted"), CASES + RECORDED)
def test_forms(form: str, text: str, wanted: list[Any] | None, size: int) -> None:
    assert read(form, text, size) == ([text] if wanted is None else wanted)


def test_one_call_where_no_more_are_wanted_and_forced_calls_are_plain_json() -> None:
    two = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert read("hermes", two, parallel=False) == [("weather", OSLO)]
    assert read("hermes", CALL, forced=True) == [("weather", OSLO)]
    ids = [item.id for form in ("hermes", "mistral") for item in ToolParser(form, NAMES, forced=True)._parse_all(CALL)]
    assert ids[0].startswith("call_") and len(ids[1]) == 9 and ids[1].isalnum()


def test_what_a_grammar_does_not_hold_is_no_strict_call() -> None:
    assert read("hermes", f"Sure.<tool_call>{CALL}</tool_call>", strict=True) == ["Sure.", ("weather", OSLO)]
    assert read("hermes", CALL, strict=True) == [CALL]
    assert read("json", CALL, strict=True) == [("weather", OSLO)]
    for text in ('weather{"city": "Oslo"}', f"<|python_tag|>{CALL}", '<function=weather>{"city": "Oslo"}</function>'):
        assert read("json", text, strict=True) == [text]
    assert ToolParser("json", NAMES, strict=True).push("wea") == ["wea"]


def test_text_is_not_held_back_longer_than_it_must_be() -> None:
    assert ToolParser("hermes", NAMES).push("Hello <b") == ["Hello <b"]
    assert ToolParser("hermes", NAMES).push("Hello <too") == ["Hello"]
    assert ToolParser("json", NAMES).push("Hello") == ["Hello"]
    assert ToolParser("json", NAMES).push(" wea") == []


@given(
    st.text(alphabet='<>/{}[]":, tool_calweather\n', max_size=60), st.sampled_from(["hermes", "json", "mistral", "phi"])
)
def test_any_text_without_a_call_comes_out_as_it_was(text: str, form: str) -> None:
    found = read(form, text, 3)
    if all(isinstance(item, str) for item in found):
        assert "".join(found).split() == text.split() or "<tool_call>" in text

"""Calls given out in parts: the same calls as whole ones, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.toolcalls import Call, CallPart, ToolParser
from tests.server.test_toolcalls import CALL, CASES, NAMES, OSLO, RECORDED

Calls = list[tuple[str, Any]]


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces that end at these places."""
    ends = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def read(form: str, pieces: list[str], **options: Any) -> tuple[str, Calls, Calls]:
    """Text joined; whole calls in order; and calls that broke off, with the text of their arguments."""
    parser = ToolParser(form, NAMES, **options)
    items = [item for piece in pieces for item in parser.push(piece)] + parser.finish()
    text, whole, broken = "", [], []
    open_call: list[str] = []
    for item in items:
        if isinstance(item, CallPart):
            open_call.append(item.arguments)
            if item.end and item.whole:
                whole.append((item.name, json.loads("".join(open_call))))
            elif item.end:
                broken.append((item.name, "".join(open_call)))
            open_call = [] if item.end else open_call
            continue
        assert not open_call, "nothing comes between the parts of a call"
        if isinstance(item, Call):
            whole.append((item.name, json.loads(item.arguments)))
        else:
            text += item
    assert not open_call and len(whole) == parser.calls
    return text, whole, broken


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.sampled_from(["a", 'q"', "b\\", "</tool", "}"]), json_values, max_size=4)
SURROUNDED = {
    "hermes": lambda calls: "Look. " + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
    "mistral": lambda calls: f"[TOOL_CALLS][{', '.join(calls)}]",
    "phi": lambda calls: f"One moment.<|tool_call|>[{', '.join(calls)}]<|/tool_call|>",
    "json": lambda calls: "<|python_tag|>" + "; ".join(calls),
}


@given(
    st.sampled_from(sorted(SURROUNDED)),
    st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3),
    st.lists(st.integers(0, 10_000), max_size=40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_calls_in_parts_are_the_calls(
    form: str, calls: list[tuple[str, Any]], places: list[int], indent: int | None, ascii_only: bool
) -> None:
    written = [
        json.dumps({"name": name, "arguments": given}, indent=indent, ensure_ascii=ascii_only) for name, given in calls
    ]
    text = SURROUNDED[form](written)
    pieces = cut(text, places)
    assert read(form, pieces, live=True) == (*read(form, [text])[:2], [])


@pytest.mark.parametrize(("form", "text", "wanted"), CASES + RECORDED)
@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_recorded_calls_in_parts(form: str, text: str, wanted: Any, places: list[int]) -> None:
    plain, whole, broken = read(form, cut(text, places), live=True)
    expected = read(form, [text])
    assert whole == expected[1]
    assert broken or plain == expected[0]


@given(
    st.sampled_from(["hermes", "json", "mistral", "phi"]),
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>", CALL,
             '{"name": "weather", "arguments": {', '"a": NaN', '"a": "', "}", "}}", "]", "[", '"', " text ", "\\", "\n",
             'weather[ARGS]{"city": 1}', ', "name": "add"}', "weather{", '"parameters": {}}'],
        ),
        max_size=12,
    ),
    st.lists(st.integers(0, 10_000), max_size=30),
    st.booleans(),
)  # fmt: skip
def test_what_is_no_call_is_none_in_parts_either(
    form: str, parts: list[str], places: list[int], parallel: bool
) -> None:
    text = "".join(parts)
    _, whole, broken = read(form, cut(text, places), live=True, parallel=parallel)
    assert whole == read(form, [text], parallel=parallel)[1]
    for _, given_out in broken:  # a client cannot take it for a call
        with pytest.raises(json.JSONDecodeError):
            json.loads(given_out)


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolParser("hermes", NAMES, live=True)
    assert parser.push('Sure. <tool_call>{"name": "weather", "argu') == ["Sure."]
    found = [parser.push(piece) for piece in ('ments": {"ci', 'ty": "Os', 'lo"}', "}</tool_call>")]
    texts = [[part.arguments for part in one if isinstance(part, CallPart)] for one in found]
    assert texts == [['{"ci'], ['ty": "Os'], ['lo"'], ["}"]]
    assert {part.id for one in found for part in one if isinstance(part, CallPart)} == {found[0][0].id}  # type: ignore[union-attr]


def test_an_untagged_answer_is_not_a_call_until_it_is_over() -> None:
    pieces = cut('{"name": "weather", "parameters": {"city": "Oslo"}} is what I would call', list(range(0, 60, 5)))
    assert read("json", pieces, live=True) == ("".join(pieces), [], [])
    held = ToolParser("json", NAMES, live=True, forced=True)
    assert any(isinstance(part, CallPart) for piece in cut(CALL, [40]) for part in held.push(piece))


@pytest.mark.parametrize("places", [[], [30], [45, 48], list(range(60))])
def test_a_call_that_is_cut_has_no_end(places: list[int]) -> None:
    text, whole, broken = read("hermes", cut("<tool_call>" + CALL[:-1], places), live=True)
    assert (text, whole) == ("", []) if broken else text == "<tool_call>" + CALL[:-1]
    assert all(given_out in json.dumps(OSLO) for _, given_out in broken)


def test_a_long_call_is_followed_in_the_time_of_its_length() -> None:
    parser = ToolParser("hermes", NAMES, live=True)
    size = 200_000
    parser.push('<tool_call>{"name": "add", "arguments": {"a": "')
    steps = sum(len(parser.push("x")) for _ in range(size))
    found = [*parser.push('"}}</tool_call>'), *parser.finish()]
    assert steps == size and isinstance(found[-1], CallPart) and found[-1].whole

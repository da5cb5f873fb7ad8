"""Structured output: whatever the model wants to say, the answer follows its grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spectral import hf
from spectral.engine.engine import Engine
from spectral.engine.grammar import GrammarCompiler
from spectral.engine.types import Delta, Failed, Finished, GenerateRequest, Grammar, Message, SamplingParams
from spectral.errors import RequestError


@pytest.fixture(scope="module")
def demo() -> Iterator[hf.LoadedModel]:
    yield hf.load_model("demo-7m", device="cpu")


def answers(engine: Engine, asked: dict[str, SamplingParams]) -> dict[str, tuple[str, str]]:
    """Text and reason of each request, all in one batch."""
    for name, params in asked.items():
        engine.submit(GenerateRequest(name, [Message("user", "Tell me about Norway.")], params))
    texts, reasons = dict.fromkeys(asked, ""), {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Delta):
                texts[event.request_id] += event.text
            elif isinstance(event, Finished):
                reasons[event.request_id] = event.reason
            assert not isinstance(event, Failed)
    return {name: (texts[name], reasons[name]) for name in asked}


def takes(demo: hf.LoadedModel, grammar: Grammar, text: str) -> bool:
    """Whether an answer could be this text, and end with it."""
    state = GrammarCompiler(demo.tokenizer, 8192, demo.eos_token_ids).start(grammar)
    for token in [*demo.tokenizer(text, add_special_tokens=False)["input_ids"], min(demo.eos_token_ids)]:
        logits = torch.zeros(8192)
        state.forbid(logits)
        if state.error is not None or logits[token] != 0:
            return False
        state.accept(token)
    return True


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 3, "maximum": 12}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


def test_answers_follow_their_grammars_and_end_with_them(demo: hf.LoadedModel) -> None:
    def params(kind: str, text: str, temperature: float) -> SamplingParams:
        return SamplingParams(max_tokens=200, temperature=temperature, seed=4, grammar=Grammar(kind, text))

    hot = 1.5
    got = answers(
        Engine(demo),
        {
            "schema": params("json_schema", json.dumps(SCHEMA), hot),
            "regex": params("regex", r"[0-9]{3}-(yes|no)", 0.0),
            "lark": params("lark", 'start: ("red" | "blue") " " /[a-f]{4}/', hot),
            "gbnf": params("gbnf", 'root ::= "x" [0-9] "y"', hot),
            "free": SamplingParams(max_tokens=5, temperature=0.0),
        },
    )
    document = json.loads(got["schema"][0])
    assert document["kind"] in ("cat", "dog") and 3 <= document["age"] <= 12 and len(document) == 2
    assert re.fullmatch(r"[0-9]{3}-(yes|no)", got["regex"][0])
    assert re.fullmatch(r"(red|blue) [a-f]{4}", got["lark"][0])
    assert re.fullmatch(r"x[0-9]y", got["gbnf"][0])
    assert {name: reason for name, (_, reason) in got.items() if name != "free"} == dict.fromkeys(
        ("schema", "regex", "lark", "gbnf"), "stop"
    )
    alone = answers(Engine(demo), {"free": SamplingParams(max_tokens=5, temperature=0.0)})
    assert alone["free"] == got["free"]


def test_a_json_object_is_one_from_its_first_token(demo: hf.LoadedModel) -> None:
    grammar = Grammar("json_object")
    asked = {f"r{seed}": SamplingParams(max_tokens=60, seed=seed, top_p=0.9, grammar=grammar) for seed in range(4)}
    for text, reason in answers(Engine(demo), asked).values():
        assert text.lstrip().startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"a":[1,{"b":null}]}', True),
        ('{"a": [1, {"b": null}]}', True),
        ('{\n  "a": [\n    1,\n    {\n      "b": null\n    }\n  ]\n}', True),
        ('{\n\t"a": 1\n}', True),
        ('{\n\n"a": 1}', False),
        ('{  "a": 1}', False),
        ('{"a": 1 \n}', False),
    ],
)
def test_json_may_be_indented_and_has_no_empty_lines(demo: hf.LoadedModel, text: str, taken: bool) -> None:
    assert takes(demo, Grammar("json_object"), text) == taken


CALL = '{"name": "weather", "arguments": {"days": 3}}'
WRONG = '{"name": "weather", "arguments": {"days": "three"}}'
LLAMA = "{% if tools %}<|python_tag|>{% endif %}"


@pytest.mark.parametrize(
    ("template", "text", "taken"),
    [
        (None, "No tool is needed, as 1 < 2.", True),
        (None, f"Sure.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call> Done.", True),
        (None, f"<tool_call>\n{WRONG}\n</tool_call>", False),
        (None, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', False),
        (None, f"<tool_call>\n{CALL}\n", False),
        (LLAMA, "No tool is needed.", True),
        (LLAMA, CALL.replace("arguments", "parameters") + "; " + CALL.replace("arguments", "parameters"), True),
        (LLAMA, CALL, False),
        (LLAMA, '[weather(days="three")]', False),
    ],
)
def test_strict_calls_are_held_among_free_text(
    demo: hf.LoadedModel, monkeypatch: pytest.MonkeyPatch, template: str | None, text: str, taken: bool
) -> None:
    if template is not None:
        monkeypatch.setattr(demo.tokenizer, "chat_template", template)
    arguments = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
    schema = {
        "type": "object",
        "properties": {"name": {"const": "weather"}, "arguments": {**arguments, "additionalProperties": False}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    assert takes(demo, Grammar("tool_calls", json.dumps(schema)), text) == taken


def test_strict_calls_in_a_form_that_no_grammar_holds_name_the_tools(
    demo: hf.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.tokenizer, "chat_template", "{{ tools }}[TOOL_CALLS]")
    with pytest.raises(RequestError, match="tool_choice") as refused:
        GrammarCompiler(demo.tokenizer, 8192, demo.eos_token_ids).start(Grammar("tool_calls", "{}"))
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "[a", "unclosed"),
        ("lark", "start: nothing", "unknown name"),
        ("json_schema", "{", "cannot be read"),
        ("json_schema", "[1]", "is an object"),
        ("json_schema", '{"type": "objec"}', "objec"),
        ("gbnf", "root = = =", "gbnf"),
        ("json_object", "{}", "none for json_object"),
        ("xml", "", "of a kind among json_object"),
        ("regex", "", "a text"),
    ],
)
def test_bad_grammars_are_refused_before_anything_starts(
    demo: hf.LoadedModel, kind: str, text: str, message: str
) -> None:
    engine = Engine(demo)
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        params = SamplingParams(grammar=Grammar(kind, text))
        engine.submit(GenerateRequest("a", [Message("user", "Hi")], params))
    assert caught.value.param == "grammar" and not engine.has_work


NEEDS_ITSELF = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"$ref": "#"}'),
        ("json_schema", '{"allOf": [{"$ref": "#"}]}'),
        ("regex", r"[^\s\S]"),
        ("gbnf", 'root ::= root "a"'),
        ("lark", 'start: a\na: a "b"'),
    ],
)
def test_a_grammar_that_nothing_satisfies_is_refused_at_once(demo: hf.LoadedModel, kind: str, text: str) -> None:
    engine = Engine(demo)
    with pytest.raises(RequestError, match="cannot be satisfied.*look for") as caught:
        engine.submit(GenerateRequest("a", "Hi", SamplingParams(grammar=Grammar(kind, text))))
    assert (caught.value.param, caught.value.code) == ("grammar", "grammar_unsatisfiable") and not engine.has_work


@pytest.mark.parametrize(
    ("kind", "text", "code"),
    [
        ("json_schema", json.dumps(NEEDS_ITSELF), "grammar_unsatisfiable"),
        ("lark", 'start: "a" b\nb: b "c"', "grammar_unsatisfiable"),
    ],
)
def test_an_answer_that_comes_to_a_dead_end_fails(demo: hf.LoadedModel, kind: str, text: str, code: str) -> None:
    events = run(Engine(demo, checked=True), SamplingParams(max_tokens=60, seed=4, n=2, grammar=Grammar(kind, text)))
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert isinstance(failed.error, RequestError) and (failed.error.param, failed.error.code) == ("grammar", code)
    assert "\n" not in str(failed.error) and not any(isinstance(event, Finished) for event in events)


def run(engine: Engine, params: SamplingParams) -> list[object]:
    engine.submit(GenerateRequest("a", "One", params))
    events: list[object] = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.mark.parametrize(
    ("pattern", "more", "reason"),
    [
        ("(abc)?", {}, "stop"),  # may be empty
        ("[0-9]{5}", {}, "stop"),
        ("[0-9]{500}", {}, "length"),
        ("a", {"max_tokens": 1}, "stop"),  # whole with its last token
        ("[a-d]*", {"stop": ("d",)}, "stop"),  # whole wherever it is cut
    ],
)
def test_an_answer_that_ends_with_stop_is_a_whole_sentence(
    demo: hf.LoadedModel, pattern: str, more: dict[str, Any], reason: str
) -> None:
    how = {"max_tokens": 40, "temperature": 1.0, "seed": 3, **more}
    events = run(Engine(demo), SamplingParams(**how, grammar=Grammar("regex", pattern)))
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert [event.reason for event in events if isinstance(event, Finished)] == [reason]
    assert (re.fullmatch(pattern, text) is not None) == (reason == "stop")


def test_a_stop_string_within_a_sentence_fails_and_does_not_end_it(demo: hf.LoadedModel) -> None:
    grammar = Grammar("regex", "[0-9]{3}-[0-9]{3}")
    events = run(Engine(demo), SamplingParams(max_tokens=40, stop=("-",), grammar=grammar))
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert isinstance(failed.error, RequestError) and failed.error.param == "stop"
    assert "leave stop out" in str(failed.error) and not any(isinstance(event, Finished) for event in events)


@pytest.mark.parametrize(
    ("schema", "places"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"properties": {"not": {"properties": {"a": {"not": {}}}}}}, "properties.not.properties.a.not"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "contains": {}}]}, r"anyOf\[1\].contains"),
        ({"$defs": {"x": {"if": {}}}, "properties": {"x": {"$ref": "#/$defs/x"}}}, r"\$defs.x.if"),
    ],
)
def test_a_key_that_no_grammar_holds_is_told_with_its_place_and_what_to_do(
    demo: hf.LoadedModel, schema: dict[str, Any], places: str
) -> None:
    with pytest.raises(RequestError, match=f"schema: {places}; say it with other keys.*leave it out") as caught:
        GrammarCompiler(demo.tokenizer, 8192, demo.eos_token_ids).start(Grammar("json_schema", json.dumps(schema)))
    assert caught.value.param == "grammar"


def test_long_reasons_are_cut(demo: hf.LoadedModel) -> None:
    compiler = GrammarCompiler(demo.tokenizer, 8192, demo.eos_token_ids)
    for kind, text in (("regex", "b" * 5000 + "("), ("gbnf", "root ::= " + "(" * 5000)):
        with pytest.raises(RequestError, match="correct the") as caught:
            compiler.start(Grammar(kind, text))
        assert len(str(caught.value)) < 700


def test_a_grammar_that_allows_nothing_fails_its_request_only(
    demo: hf.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral.engine import grammar as module

    engine = Engine(demo)
    engine.submit(GenerateRequest("bad", "One", SamplingParams(n=2, grammar=Grammar("regex", "abc"))))
    engine.submit(GenerateRequest("good", "One", SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)))

    def nothing(self: module.GrammarState, logits: torch.Tensor) -> None:
        self.error = RequestError("no token fits", param="grammar")

    monkeypatch.setattr(module.GrammarState, "forbid", nothing)
    events = []
    while engine.has_work:
        events += engine.step()
    assert [(e.request_id, str(e.error)) for e in events if isinstance(e, Failed)] == [("bad", "no token fits")]
    assert [e.request_id for e in events if isinstance(e, Finished)] == ["good"]
    engine.store.check()
    assert engine.store.rows == 0

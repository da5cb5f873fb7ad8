"""Tools, forms of answers, the responses API and tokens, through the official client where it has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.server.conftest import Running

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}}
FLAT = {"type": "function", "name": "weather", "description": "The weather.", "parameters": PARAMETERS}
SCHEMA = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}


@pytest.fixture()
def official(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_a_call_of_a_tool_and_its_answer(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(model="demo", messages=ask("call"), tools=[TOOL])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Sure.")
    calls = choice.message.tool_calls or []
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo", "Rome"]
    turns = [*ask("call"), choice.message, *({"role": "tool", "tool_call_id": c.id, "content": "wet"} for c in calls)]
    echo = official.chat.completions.create(model="demo", messages=[*turns, *ask("echo")], tools=[TOOL])
    got = json.loads(echo.choices[0].message.content or "")
    assert [turn["role"] for turn in got["messages"]] == ["user", "assistant", "tool", "tool", "user"]
    assert got["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert got["messages"][2]["tool_call_id"] == calls[0].id
    assert got["tools"] == [TOOL]


def test_calls_are_streamed_with_their_numbers(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(model="demo", messages=ask("call"), tools=[TOOL], stream=True, n=2)
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == 1]
    text = "".join(choice.delta.content or "" for choice in choices)
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert text == "Sure." and [call.index for call in calls] == [0, 0, 1]  # the first came in two pieces
    assert [call.id is None for call in calls] == [False, True, False]
    assert choices[-1].finish_reason == "tool_calls" and calls[0].function is not None
    pieces = [(call.function.arguments or "") for call in calls[:2] if call.function is not None]
    assert all(pieces) and json.loads("".join(pieces)) == {"city": "Oslo"}
    one = official.chat.completions.create(model="demo", messages=ask("call"), tools=[TOOL], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or []) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_held_to_the_schema_by_a_grammar(official: openai.OpenAI, choice: Any) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    answer = official.chat.completions.create(model="demo", messages=ask("grammar"), tools=[strict], tool_choice=choice)
    calls = answer.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Oslo"}]
    none = official.chat.completions.create(model="demo", messages=ask("call"), tools=[TOOL], tool_choice="none")
    assert "<tool_call>" in (none.choices[0].message.content or "")


def test_forms_of_answers_reach_the_worker_as_grammars(official: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    answer = official.chat.completions.create(model="demo", messages=ask("grammar"), response_format=form)
    grammar = json.loads(answer.choices[0].message.content or "")
    assert grammar["kind"] == "json_schema" and json.loads(grammar["text"]) == SCHEMA
    plain = official.chat.completions.create(
        model="demo", messages=ask("grammar"), response_format={"type": "json_object"}
    )
    assert json.loads(plain.choices[0].message.content or "")["kind"] == "json_object"

    class Grammar(pydantic.BaseModel):
        kind: str
        text: str

    parsed = official.chat.completions.parse(model="demo", messages=ask("grammar"), response_format=Grammar)
    assert parsed.choices[0].message.parsed is not None and parsed.choices[0].message.parsed.kind == "json_schema"


def test_definitions_of_two_tools_do_not_meet(official: openai.OpenAI) -> None:
    from server.schemas.tools import Function, Tool, ToolUse

    def tool(name: str, kind: str) -> Tool:
        parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": kind}}}
        return Tool(type="function", function=Function(name=name, parameters=parameters))

    grammar = ToolUse([tool("a", "string"), tool("b", "integer")], "required", True).grammar
    assert grammar is not None
    schema = json.loads(grammar.text)
    assert schema["$defs"] == {"0.X": {"type": "string"}, "1.X": {"type": "integer"}}
    assert schema["anyOf"][1]["properties"]["arguments"]["properties"]["x"] == {"$ref": "#/$defs/1.X"}


def test_a_tools_references_are_its_own() -> None:
    from server.schemas.tools import Function, Tool, ToolUse

    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "leaf": {"$ref": "#/definitions/Leaf"}}}
    tree |= {"definitions": {"Leaf": {"type": "integer"}}}
    tool = Tool(type="function", function=Function(name="a", parameters=tree))
    grammar = ToolUse([tool], "required", True).grammar
    assert grammar is not None
    schema = json.loads(grammar.text)
    arguments = schema["properties"]["arguments"]
    assert arguments["properties"] == {"next": {"$ref": "#/$defs/0."}, "leaf": {"$ref": "#/$defs/0.Leaf"}}
    assert schema["$defs"] == {"0.Leaf": {"type": "integer"}, "0.": arguments}


def test_strict_tools_hold_the_calls_among_free_text(official: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    answer = official.chat.completions.create(model="demo", messages=ask("echo"), tools=[strict])
    grammar = json.loads(answer.choices[0].message.content or "")["sampling"]["grammar"]
    assert grammar["kind"] == "tool_calls"
    assert json.loads(grammar["text"])["properties"]["name"] == {"const": "weather"}
    calls = official.chat.completions.create(model="demo", messages=ask("call"), tools=[strict]).choices[0].message
    assert len(calls.tool_calls or []) == 2
    flat: Any = {"type": "function", **strict["function"]}
    response = official.responses.create(model="demo", input="echo", tools=[flat])
    assert json.loads(response.output_text)["sampling"]["grammar"] == grammar


def test_what_the_client_parsed_may_be_sent_back_as_it_is(official: openai.OpenAI) -> None:
    class weather(pydantic.BaseModel):
        city: str

    tools: Any = [openai.pydantic_function_tool(weather)]
    with official.chat.completions.stream(model="demo", messages=ask("call"), tools=tools) as stream:
        message: Any = stream.get_final_completion().choices[0].message
    told: Any = [{"role": "tool", "tool_call_id": call.id, "content": "wet"} for call in message.tool_calls]
    turns = [*ask("call"), message, *told, *ask("echo")]
    got = json.loads(official.chat.completions.create(model="demo", messages=turns).choices[0].message.content or "")
    sent = [call["function"] for call in got["messages"][1]["tool_calls"]]
    assert sent == [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]

    class Answer(pydantic.BaseModel):
        kind: str
        text: str

    response: Any = official.responses.parse(model="demo", input="grammar", text_format=Answer)
    assert response.output_parsed is not None
    again = official.responses.create(model="demo", input=[*response.output, {"role": "user", "content": "echo"}])
    assert json.loads(again.output_text)["messages"][0]["content"] == response.output_text
    flat: Any = {"type": "function", **tools[0]["function"]}
    called: Any = official.responses.parse(model="demo", input="call", tools=[flat])
    items = [{"type": "function_call_output", "call_id": one.call_id, "output": "wet"} for one in called.output[1:]]
    final = official.responses.create(
        model="demo", input=[*called.output, *items, {"role": "user", "content": "echo"}]  # type: ignore[list-item]
    )
    assert [turn["role"] for turn in json.loads(final.output_text)["messages"]] == ["assistant", "tool", "tool", "user"]


async def test_the_asynchronous_client(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="demo", messages=ask("hello"), stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == "one two three "
        async with client.responses.stream(model="demo", input="hello") as events:
            assert (await events.get_final_response()).output_text == "one two three "


def test_a_response(official: openai.OpenAI) -> None:
    answer = official.responses.create(model="demo", input="hello", instructions="Be brief.", metadata={"a": "b"})
    assert (answer.output_text, answer.status, answer.model) == ("one two three ", "completed", "demo")
    assert answer.usage is not None and (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 3)
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief."
    echo = official.responses.create(
        model="demo", instructions="Be brief.", input=[*answer.output, *ask("echo")], max_output_tokens=9, temperature=0
    )
    got = json.loads(echo.output_text)
    assert [(turn["role"], turn["content"]) for turn in got["messages"]] == [
        ("system", "Be brief."),
        ("assistant", "one two three "),
        ("user", "echo"),
    ]
    assert (got["sampling"]["max_tokens"], got["sampling"]["temperature"]) == (9, 0.0)


def test_the_events_of_a_response(official: openai.OpenAI) -> None:
    events = list(official.responses.create(model="demo", input="hello", stream=True))
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with official.responses.stream(model="demo", input="hello") as stream:
        assert stream.get_final_response().output_text == "one two three "


def test_a_response_that_calls_a_tool(official: openai.OpenAI) -> None:
    with official.responses.stream(model="demo", input="call", tools=[FLAT]) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    call: Any = final.output[1]
    assert json.loads(call.arguments) == {"city": "Oslo"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    echo = official.responses.create(model="demo", input=[*final.output[:2], output, *ask("echo")], tools=[FLAT])
    turns = json.loads(echo.output_text)["messages"]
    assert [turn["role"] for turn in turns] == ["assistant", "tool", "user"]
    assert turns[0]["content"] == "Sure." and turns[0]["tool_calls"][0]["id"] == turns[1]["tool_call_id"]
    forced = official.responses.create(model="demo", input="grammar", tools=[FLAT], tool_choice="required")
    assert [item.type for item in forced.output] == ["function_call"]


def test_log_probabilities_and_forms_of_a_response(official: openai.OpenAI) -> None:
    answer = official.responses.create(
        model="demo", input="hello", include=["message.output_text.logprobs"], top_logprobs=1
    )
    part: Any = answer.output[0]
    assert [token.token for token in part.content[0].logprobs] == ["one ", "two ", "three "]
    form: Any = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}
    shaped = json.loads(official.responses.create(model="demo", input="grammar", text=form).output_text)
    assert json.loads(shaped["text"]) == SCHEMA


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"tool_choice": 5, "tools": [FLAT]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": "long"}, "input"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_a_response_cannot_be_is_named(server: Running, change: dict[str, Any], param: str) -> None:
    answer = server.client.post("/v1/responses", json={"model": "demo", "input": "x", **change})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param)


def test_a_response_that_fails_on_the_way(server: Running, official: openai.OpenAI) -> None:
    text = server.client.post("/v1/responses", json={"model": "demo", "input": "fail", "stream": True}).text
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["type"] == "response.failed" and last["response"]["error"]["message"] == "the cache is damaged"
    with pytest.raises(openai.InternalServerError):
        official.responses.create(model="demo", input="fail")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokens_and_back(server: Running, prefix: str) -> None:
    body = server.client.post(f"{prefix}/tokenize", json={"model": "d", "prompt": "abc"}).json()
    assert (body["count"], body["tokens"], body["text"]) == (3, [97, 98, 99], "abc")
    back = server.client.post(f"{prefix}/detokenize", json={"model": "demo", "tokens": [97, 98]}).json()
    assert back["text"] == "ab"
    chat = server.client.post(f"{prefix}/tokenize", json={"model": "demo", "messages": ask("x")}).json()
    assert chat["text"] == "user:x"
    for path, wrong, param in (
        ("tokenize", {"prompt": "a", "messages": ask("x")}, "prompt"),
        ("tokenize", {}, "prompt"),
        ("detokenize", {"tokens": [999]}, "tokens"),
        ("detokenize", {"tokens": []}, "tokens"),
    ):
        answer = server.client.post(f"{prefix}/{path}", json={"model": "demo", **wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_prompt_is_scored_and_shown(server: Running, official: openai.OpenAI) -> None:
    """As lm-eval asks: the log probabilities of a prompt's own tokens."""
    answer = official.completions.create(model="demo", prompt="hello", echo=True, logprobs=1, max_tokens=1)
    choice = answer.choices[0]
    assert choice.text == "helloone two three " and choice.logprobs is not None
    assert choice.logprobs.tokens == ["hel", "lo", "one ", "two ", "three "]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs is not None and choice.logprobs.top_logprobs[1] == {"lo": -0.25, "p": -2.0}
    assert choice.logprobs.text_offset == [0, 3, 5, 9, 13]
    only = official.completions.create(model="demo", prompt=[1, 2], echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == "hello" and only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.tokens == ["hel", "lo"]
    assert only.usage is not None and only.usage.completion_tokens == 0
    stream = official.completions.create(model="demo", prompt="hello", echo=True, logprobs=1, stream=True, n=2)
    pieces = [c for chunk in stream for c in chunk.choices if c.index == 1]
    assert "".join(c.text for c in pieces) == "helloone two three "
    assert [t for c in pieces if c.logprobs for t in c.logprobs.tokens or []][:3] == ["hel", "lo", "one "]
    plain = official.completions.create(model="demo", prompt="hello", echo=True)
    assert plain.choices[0].text == "helloone two three " and plain.choices[0].logprobs is None
    refused = server.client.post("/v1/completions", json={"model": "demo", "prompt": "hello", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_several_prompts_are_answered_in_their_order(server: Running, official: openai.OpenAI) -> None:
    answer = official.completions.create(model="demo", prompt=["hello", "echo", "hello"], n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == texts[4] == texts[5] == "one two three " and '"prompt":"echo"' in texts[2]
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (15, 14)
    stream = official.completions.create(
        model="demo", prompt=[[1, 2], [3]], n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(4):
        assert "".join(c.text for c in pieces if c.index == index) == "one two three "
        assert [c.finish_reason for c in pieces if c.index == index][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("bad", ["fail", "long", "full"])
@pytest.mark.parametrize("stream", [True, False])
def test_one_prompt_that_fails_ends_the_others(server: Running, bad: str, stream: bool) -> None:
    before = server.cancelled()
    body = {"model": "demo", "prompt": ["forever", bad, "forever"], "stream": stream}
    answer = server.client.post("/v1/completions", json=body)
    assert '"error"' in answer.text and "[DONE]" not in answer.text
    assert answer.status_code == {"fail": 200 if stream else 500, "long": 400, "full": 429}[bad]
    server.until(lambda: server.cancelled() == before + (2 if bad == "fail" else 1))
    assert server.slot().streams == {}


def test_a_client_of_several_prompts_that_goes_away_frees_all(server: Running) -> None:
    for stream in (True, False):
        before = server.cancelled()
        with server.connect("/v1/completions", {"model": "demo", "prompt": ["forever"] * 3, "stream": stream}):
            server.until(lambda: server.slot().stats.running == 3)
        server.until(lambda before=before: server.cancelled() == before + 3)
        assert server.slot().streams == {}


def test_quality_is_asked_for_and_told(server: Running, official: openai.OpenAI) -> None:
    fine = official.chat.completions.with_raw_response.create(
        model="demo", messages=ask("hello"), extra_body={"kv_quality": {"max_kl": 0.05}}
    )
    assert fine.headers["x-spectral-setting"] == "8x" and fine.headers["x-spectral-kl"] == "0.012"
    assert fine.headers["x-spectral-rank"] == "24" and fine.headers["x-spectral-bits"] == "1.9"
    body = {"model": "demo", "input": "x", "kv_quality": {"max_kl": 0.01}}
    finer = server.client.post("/v1/responses", json=body)
    assert finer.headers["x-spectral-setting"] == "4x" and finer.headers["x-spectral-kl"] == "0.001"
    told = finer.json()["spectral"]
    assert (told["setting"], told["ratio"], told["bytes_per_token"], told["cache_bytes"]) == ("4x", 4.0, 200.0, 640)
    answer = server.client.post("/v1/responses", json={**body, "kv_quality": {"max_kl": 0}})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "quality_unavailable", "kv_quality.max_kl")


def test_embeddings_are_refused_clearly(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        official.embeddings.create(model="demo", input="x")

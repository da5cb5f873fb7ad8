"""Clients of other projects, unmodified, against the real server: OpenAI's with its own parser, and `llm`.

Ollama's and LangChain's are in tests/server and among the examples; lm-eval's run is bench/lm_eval_run.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from harness import Server, running_server

from spectral import resources

pytestmark = pytest.mark.e2e
MODEL = "demo-7m"
QUESTION = "What is the capital of France?"


class City(pydantic.BaseModel):
    """The form of an answer."""

    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Paris", "Oslo"]


def test_openai_parses_a_structured_answer(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            response_format=City,
            max_tokens=64,
            temperature=0,
        )
        assert isinstance(answer.choices[0].message.parsed, City)
        response = client.responses.parse(
            model=MODEL, input=QUESTION, text_format=City, max_output_tokens=64, temperature=0
        )
        assert isinstance(response.output_parsed, City)


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Paris", "Oslo"]
    unit: Literal["C", "F"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
def test_openai_has_a_tool_called_and_sends_what_it_returned(server: Server, choice: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    turns: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": turns, "tools": tools, "temperature": 0}
        whole = client.chat.completions.parse(**asked, tool_choice=choice).choices[0]
        (call,) = whole.message.tool_calls or []
        assert whole.finish_reason == "tool_calls" and isinstance(call.function.parsed_arguments, Weather)
        with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_completion().choices[0].message.tool_calls or []
        assert "tool_calls.function.arguments.done" in kinds
        assert [one.function.parsed_arguments for one in streamed] == [call.function.parsed_arguments]
        turns += [whole.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        free = client.chat.completions.create(**{**asked, "messages": turns}, max_tokens=48)  # strict, and not forced
        assert free.choices[0].message.content or free.choices[0].message.tool_calls


def test_arguments_of_a_call_come_in_pieces(server: Server) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    turns: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        asked: dict[str, Any] = {"model": MODEL, "tools": tools, "tool_choice": "required", "temperature": 0}
        whole = client.chat.completions.create(messages=turns, **asked).choices[0].message.tool_calls or []
        chunks = list(client.chat.completions.create(messages=turns, stream=True, **asked))
        deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
        pieces = [delta.function.arguments or "" for delta in deltas if delta.function is not None]
        assert len(pieces) > 2 and json.loads("".join(pieces)) == json.loads(whole[0].function.arguments)
        assert [bool(delta.id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_model_whose_template_opens_thoughts(tmp_path: Path) -> None:
    source = Path(resources.model_path(MODEL))
    folder = tmp_path / "thinker"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "tokenizer_config.json").read_text())
    found = folder / "chat_template.jinja"
    template = found.read_text() if found.exists() else config["chat_template"]
    found.unlink(missing_ok=True)
    found.write_text(template + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}")
    (tmp_path / "config.yaml").write_text(
        f"models:\n  - {{name: thinker, path: {folder}}}\n  - {{name: open, path: {folder}, thoughts: in_text}}\n"
    )
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
    with running_server(tmp_path, "--config", str(tmp_path / "config.yaml")) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer: Any = client.chat.completions.create(model="thinker", **asked)
            message = answer.choices[0].message  # the embedded model knows no thoughts, so it never ends them
            assert message.reasoning_content and message.content == ""
            assert answer.usage.completion_tokens_details.reasoning_tokens > 0
            inside: Any = client.chat.completions.create(model="open", **asked).choices[0].message
            assert inside.content.strip() == message.reasoning_content and not hasattr(inside, "reasoning_content")
            plain: Any = client.chat.completions.create(model="thinker", reasoning_effort="none", **asked)
            assert "Paris" in plain.choices[0].message.content


async def test_openai_streams_many_at_once(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def one() -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": QUESTION}], stream=True, temperature=0, max_tokens=32
            )
            return "".join([c.delta.content or "" async for chunk in stream for c in chunk.choices])

        answers = await asyncio.gather(*(one() for _ in range(6)))
    assert len(set(answers)) == 1 and "Paris" in answers[0]


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_llm_command(server: Server, tmp_path: Path, options: tuple[str, ...]) -> None:
    program = shutil.which("llm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        pytest.skip("llm is not installed (it is in the extra dev)")
    models = f"- model_id: spectral\n  model_name: {MODEL}\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    keep = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env = {**keep, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [program, "-m", "spectral", "-o", "temperature", "0", "-o", "max_tokens", "48", "--no-log", *options]
    done = subprocess.run([*command, QUESTION], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout

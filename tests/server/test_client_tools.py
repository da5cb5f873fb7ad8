"""Tools through LangChain's clients, with a worker that calls them as a trained model would.

They run as a program of their own: LangChain keeps its connections open to the end of the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.server.conftest import Running

PROGRAM = """
import json, sys
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI

def weather(city: str) -> str:
    "The weather in a city."
    return f"rain in {city}"

url, found = sys.argv[1], {}
common = {"base_url": f"{url}/v1", "api_key": "none", "model": "demo"}
clients = {
    "openai": ChatOpenAI(**common),
    "responses": ChatOpenAI(**common, use_responses_api=True),
    "ollama": ChatOllama(base_url=url, model="demo", client_kwargs={"trust_env": False}),
}
for name, client in clients.items():
    model = client.bind_tools([weather])
    turns = [("user", "call")]
    whole = model.invoke(turns)
    pieces = list(model.stream(turns))
    streamed = pieces[0]
    for piece in pieces[1:]:
        streamed = streamed + piece
    told = [{"role": "tool", "tool_call_id": c["id"], "content": weather(**c["args"])} for c in whole.tool_calls]
    final = model.invoke([*turns, whole, *told, ("user", "hello")])
    calls = [[[c["name"], c["args"]] for c in answer.tool_calls] for answer in (whole, streamed, final)]
    found[name] = {"calls": calls, "text": final.text, "before": streamed.text}
print(json.dumps(found))
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("langchain_openai", "langchain_ollama")),
    reason="LangChain is not installed (it is in the extra dev)",
)
def test_langchain_calls_tools_and_sends_their_answers_back(server: Running) -> None:
    env = {**os.environ, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM, server.url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    calls = [["weather", {"city": "Oslo"}], ["weather", {"city": "Rome"}]]
    answer = {"calls": [calls, calls, []], "text": "one two three ", "before": "Sure."}
    found = json.loads(done.stdout)
    assert {name: {**one, "before": one["before"].strip()} for name, one in found.items()} == dict.fromkeys(
        ("openai", "responses", "ollama"), answer
    )

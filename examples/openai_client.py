"""The official OpenAI client: an answer, a stream, an answer in a given form, a tool, and a cache of a stated quality.

    pip install openai
    python examples/openai_client.py

SPECTRAL_URL names another server than http://127.0.0.1:8000, SPECTRAL_API_KEY a key where it asks for one.
"""

from __future__ import annotations

import os
from typing import Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel


class Answer(BaseModel):
    """What the model has to fill in."""

    city: Literal["Paris", "Oslo", "Rome"]


class Temperature(BaseModel):
    """How warm it is in a city."""

    city: Literal["Paris", "Oslo", "Rome"]
    unit: Literal["celsius", "fahrenheit"]


url = os.environ.get("SPECTRAL_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SPECTRAL_API_KEY", "none"))
model = client.models.list().data[0].id
question = "What is the capital of France?"

whole = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], temperature=0)
print("whole:   ", whole.choices[0].message.content)

print("streamed: ", end="")
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], temperature=0, stream=True
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()

parsed = client.chat.completions.parse(
    model=model, messages=[{"role": "user", "content": question}], response_format=Answer, temperature=0, max_tokens=64
)
print("in form: ", parsed.choices[0].message.parsed)

# A tool that the model has to call: its arguments are held to the schema. Without tool_choice it may, if it likes.
asked: list = [{"role": "user", "content": "How warm is it in Oslo?"}]
tools = [pydantic_function_tool(Temperature, name="temperature")]
called = client.chat.completions.parse(
    model=model, messages=asked, tools=tools, tool_choice="required", temperature=0
).choices[0].message
for call in called.tool_calls or []:
    print("tool:    ", call.function.name, call.function.parsed_arguments)
    asked += [called, {"role": "tool", "tool_call_id": call.id, "content": "-4"}]
final = client.chat.completions.create(model=model, messages=asked, tools=tools, temperature=0, max_tokens=32)
print("then:    ", final.choices[0].message.content)

# What this server adds: the cache may cost at most 0.01 nats per token, and the answer says what it did cost.
careful = client.chat.completions.with_raw_response.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    temperature=0,
    extra_body={"kv_quality": {"max_kl": 0.01}},
)
print("setting: ", careful.headers["x-spectral-setting"], "KL", careful.headers["x-spectral-kl"])
client.close()

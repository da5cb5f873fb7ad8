"""Request bodies: documents changed in structure, through the same schemas as the routes, and JSON in bytes.

A body is a message that a worker understands, or a 400 that names a field; never anything else.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgspec

from server import schemas
from server.errors import ApiError
from server.routes import admin_schemas
from server.schemas.ollama import OllamaChatRequest, OllamaGenerateRequest, ShowRequest
from server.toolcalls import Call, ToolParser
from server.worker import messages as wire
from spectral.tool_forms import TAGS
from tests.fuzz.mutate import json_bytes, mutate_bytes, mutate_document
from tests.fuzz.targets.base import Base

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "tool_call_id": "c1"},
    {"role": "user", "content": "go on"},
]
SAMPLING = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 2, "logit_bias": {"5": 1}}
SHAPE = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
OPENAI: list[tuple[Any, dict[str, Any]]] = [
    (schemas.ChatRequest, {"model": "m", "messages": TURNS, "tools": [TOOL], **SAMPLING, "tool_choice": "auto"}),
    (
        schemas.ChatRequest,
        {"model": "m", "messages": TURNS[:2], "response_format": SHAPE, "stream": True, "logprobs": True},
    ),
    (schemas.CompletionRequest, {"model": "m", "prompt": ["a", [1, 2]], **SAMPLING, "logprobs": 2, "echo": True}),
    (schemas.GenerateRequest, {"model": "m", "prompt": "p", "max_tokens": 3, "kv_quality": {"max_kl": 0.1}}),
    (schemas.GenerateRequest, {"model": "m", "prompt": "p", "structured_outputs": {"choice": ["a", "b/"]}}),
    (schemas.CompletionRequest, {"model": "m", "prompt": "p", "structured_outputs": {"grammar": 'root ::= "a"'}}),
    (
        schemas.ResponsesRequest,
        {"model": "m", "input": [{"role": "user", "content": "x"}], "instructions": "i", "max_output_tokens": 5},
    ),
    (schemas.TokenizeRequest, {"model": "m", "messages": TURNS[:2]}),
    (schemas.DetokenizeRequest, {"model": "m", "tokens": [1, 2, 3]}),
]
OPTIONS = {"num_predict": 5, "temperature": 1, "top_k": 3, "seed": 2, "stop": "x", "num_ctx": 64, "mirostat": 0}
OLLAMA_TURNS = [
    {"role": "user", "content": "x", "thinking": "", "images": []},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "7", "tool_name": "weather"},
]
OLLAMA: list[tuple[Any, dict[str, Any]]] = [
    (OllamaChatRequest, {"model": "m", "messages": OLLAMA_TURNS, "tools": [TOOL], "options": OPTIONS}),
    (OllamaChatRequest, {"model": "m", "messages": OLLAMA_TURNS[:1], "format": {"type": "object"}, "keep_alive": "5m"}),
    (OllamaGenerateRequest, {"model": "m", "prompt": "p", "system": "s", "options": OPTIONS, "format": "json"}),
    (OllamaGenerateRequest, {"model": "m", "prompt": "p", "raw": True, "stream": False, "keep_alive": -1}),
    (ShowRequest, {"model": "m", "verbose": True}),
]
ADMIN: list[tuple[Any, dict[str, Any]]] = [
    (admin_schemas.Unload, {"drain_seconds": 1.5, "force": True}),
    (admin_schemas.ChooseSetting, {"setting": "8x", "live": True}),
    (admin_schemas.Activate, {"profile": "shipped"}),
    (admin_schemas.Build, {"tokens": 65536, "seed": 1, "device": "cpu"}),
]
FIELDS = tuple(sorted({name for schema, _ in OPENAI + OLLAMA for name in (*schema.model_fields, *schema.harmless)}))


def check_body(schema: Any, body: Any) -> str:
    """Parse a body as its route does and take it to the worker's wire and back."""
    if schema in {kind for kind, _ in ADMIN}:
        return _refusal(lambda: admin_schemas.parse(schema, body))
    sent: list[Any] = []

    def go() -> None:
        asked = schemas.parse(schema, body)
        if schema in (schemas.TokenizeRequest, schemas.DetokenizeRequest):
            sent.append(asked.message("r"))
        elif schema is schemas.CompletionRequest:
            sent.extend(one.submit("r") for one in asked.split())
        elif schema is not ShowRequest:
            sent.append(asked.submit("r"))

    outcome = _refusal(go)
    for message in sent:
        assert wire.decode_to_worker(wire.encode(message)[4:]) == message
    return outcome


def _refusal(parse: Any) -> str:
    try:
        parse()
    except ApiError as error:
        assert error.status == 400 and error.message and len(error.message) < 1000, error.message[:1000]
        json.dumps(error.envelope, ensure_ascii=False).encode()  # as the response does
        return "refused"
    return "accepted"


class _Bodies(Base):
    kinds: list[tuple[Any, dict[str, Any]]] = []

    def make(self, random: Random) -> tuple[Any, Any]:
        """A schema and a decoded body."""
        schema, body = random.choice(self.kinds)
        return schema, mutate_document(body, random, FIELDS)

    def check(self, item: tuple[Any, Any]) -> str:
        """Parse it."""
        schema, body = item
        try:
            body = msgspec.json.decode(json_bytes(body))  # what cannot be said in JSON cannot come
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return "no JSON"
        return check_body(schema, body)


class Requests(_Bodies):
    """OpenAI's, the native and the administrator's bodies."""

    name = "requests"
    kinds = OPENAI + ADMIN


class Ollama(_Bodies):
    """The Ollama API's bodies."""

    name = "ollama"
    kinds = OLLAMA


class JsonBytes(_Bodies):
    """Bytes that should be JSON, decoded as the server does."""

    name = "json_bytes"
    kinds = OPENAI + OLLAMA

    def make(self, random: Random) -> tuple[Any, Any]:
        """A schema and bytes."""
        schema, body = random.choice(self.kinds)
        if random.random() < 0.5:
            body = mutate_document(body, random, FIELDS)
        return schema, mutate_bytes(json_bytes(body), random)

    def check(self, item: tuple[Any, Any]) -> str:
        """Decode and parse."""
        schema, data = item
        try:
            body = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return "no JSON"
        return check_body(schema, body)


PIECES = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    '{"name": "weather", "arguments": {}}',
    "weather",
)
PIECES += (
    "[",
    "{",
    "]",
    "}",
    '"',
    " ",
    "\n",
    ";",
    "<function=weather>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
)
PIECES += (
    '{"name": "weather", "arguments": {"a": "\\ud800"}}',
    '{"name": "weather", "parameters": {"a": NaN}}',
    "[ARGS]",
)
PIECES += (
    '{"name": "weather", "arguments": "{\\"a\\": 1e999}"}',
    "<",
    "é",
    "<tool",
    "_call>",
    "null",
    "1" * 5000,
    "text ",
)
PIECES += (
    "<|tool_call|>",
    "<|/tool_call|>",
    "functools",
    "<start_function_call>",
    "<end_function_call>",
    "<|tool_call>",
    "<tool_call|>",
    "call:weather{",
    "city:",
    "<escape>",
    '<|"|>',
    "weather(a=",
    '[weather(city="Oslo", days=[1, -2.5], deep={"a": None})]',
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "[CALL_ID]abc123def",
    "(",
    "-",
    "'",
    ".a",
    "\\d",
)


class ToolCalls(Base):
    """A model's answer in which calls of tools are sought: the same pieces however it comes, all of them encodable."""

    name = "tool_calls"

    def make(self, random: Random) -> tuple[str, bool, list[str]]:
        """The form, whether calls are forced, and the answer in pieces."""
        pieces: list[str] = []
        for _ in range(random.randrange(1, 9)):
            pieces += [random.choice(PIECES)] * random.choice((1, 1, 1, 1, 3, 300))
        return random.choice(tuple(TAGS)), random.random() < 0.2, pieces

    def check(self, item: tuple[str, bool, list[str]]) -> str:
        """Parse it in pieces and as a whole."""
        form, forced, pieces = item
        ways = []
        for given in (pieces, ["".join(pieces)]):
            parser = ToolParser(form, ["weather"], forced=forced)
            out = [part for piece in given for part in parser.push(piece)] + parser.finish()
            for part in out:
                if isinstance(part, Call):
                    assert isinstance(json.loads(part.arguments, parse_constant=_no_constant), dict)
                (part.arguments if isinstance(part, Call) else part).encode()
            calls = [(part.name, part.arguments) for part in out if isinstance(part, Call)]
            ways.append(("".join(part for part in out if isinstance(part, str)).strip(), calls))
        assert ways[0][1] == ways[1][1], "the calls depend on how the text came"
        return "calls" if ways[0][1] else "text"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


TARGETS = {"requests": Requests, "ollama": Ollama, "json_bytes": JsonBytes, "tool_calls": ToolCalls}

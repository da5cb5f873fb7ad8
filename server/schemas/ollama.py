"""Bodies of the Ollama API. Unlike OpenAI's it streams unless told otherwise, and options are a part of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.errors import bad_request, unsupported
from server.schemas.base import Harmless, JsonObject, Request, Strict, check_json
from server.schemas.fields import MAX_TOKEN_ID, MAX_TOKENS, MAX_TOOLS, FunctionName, ModelName, Probability, Stop
from server.schemas.tools import Tool, ToolUse, schema_grammar
from server.worker import messages as wire

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")


def duration(value: Any) -> float:
    """Seconds of "10m", "1h30m", 300 or "300"; negative: for ever. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e9 else -1.0
    if isinstance(value, str):
        text = value.strip().removeprefix("+")
        sign = -1.0 if text.startswith("-") else 1.0
        text = text.removeprefix("-")
        if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
            return sign * float(text)
        parts = _DURATION.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
    raise ValueError('must be a duration such as "10m", a number of seconds, 0, or -1 for ever')


def _format(value: Any) -> Any:
    if value == "json":
        return value
    if isinstance(value, dict):
        return check_json(value)
    raise ValueError('must be "json" or a JSON schema')


KeepAlive = Annotated[
    float, BeforeValidator(duration), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]
Format = Annotated[Any, BeforeValidator(_format), WithJsonSchema({"anyOf": [{"const": "json"}, {"type": "object"}]})]

# Options of Ollama that have no place here, and the values at which that changes nothing.
_HARMLESS_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "mirostat": lambda value: value == 0,
    "mirostat_eta": lambda value: True,  # these two belong to mirostat
    "mirostat_tau": lambda value: True,
    "tfs_z": lambda value: value == 1,
    "repeat_last_n": lambda value: value == -1,
    "num_keep": lambda value: value in (0, -1),
}
_OF_THE_SERVER = ("num_gpu", "main_gpu", "num_thread", "num_batch", "low_vram", "use_mmap", "use_mlock", "numa")
_NO_PENALTY = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_TEXT_ONLY = "models here read and write text only; remove it"
_HINTS = {
    "context": "send the conversation to /api/chat instead",
    "images": _TEXT_ONLY,
    "shift": "an answer ends where the context is full; remove it",
    "suffix": "models here go on from a prompt and fill no gaps; say in the prompt what comes after",
    "template": "the model's own chat template is used; with raw the prompt is taken as it is",
    "truncate": "a prompt is never cut; shorten it",
    **dict.fromkeys(("width", "height", "steps"), _TEXT_ONLY),
}
_PASSED_ON = ("temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "stop")


class Options(Strict):
    """How to choose tokens. Where an option is not given it has Ollama's default; repetition is not punished."""

    num_predict: int = Field(-1, ge=-2, le=MAX_TOKENS, description="Most tokens; -1 and -2: until the context is full.")
    num_ctx: int | None = Field(None, ge=1, le=MAX_TOKENS, description="Context that must be there, in tokens.")
    temperature: float = Field(0.8, ge=0, le=2)
    top_k: int = Field(40, ge=0, lt=MAX_TOKEN_ID)
    top_p: Probability = 0.9
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: Probability = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = ()
    repeat_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)

    def sampling(self, grammar: wire.Grammar | None, logprobs: int | None) -> wire.Sampling:
        """The sampling part of the message to the worker. `logprobs`: how many candidates of each token to tell."""
        return wire.Sampling(
            max_tokens=self.num_predict if self.num_predict > 0 else None,
            seed=self.seed,
            repetition_penalty=self.repeat_penalty,
            grammar=grammar,
            logprobs=logprobs,
            **{name: getattr(self, name) for name in _PASSED_ON},
        )


Think = Annotated[
    bool | str, WithJsonSchema({"type": "boolean", "description": "With thoughts before the answer, or without."})
]


class _Generating(Request):
    harmless: ClassVar[Harmless] = {
        "truncate": lambda value: value is False,
        "shift": lambda value: value is False,
    }
    hints: ClassVar[Mapping[str, str]] = _HINTS

    model: ModelName
    stream: bool = True
    options: Options = Options()
    format: Format | None = None
    keep_alive: KeepAlive | None = Field(None, description="The model stays at least so long (seconds).")
    think: Think | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Without options that are null or harmless. Raises ApiError 400 for one that is not supported."""
        if data.get("format") == "":
            data = {name: value for name, value in data.items() if name != "format"}
        options = data.get("options")
        if not isinstance(options, dict):
            return data
        kept = {name: value for name, value in options.items() if value is not None}
        if all(kept.get(name, value) == value for name, value in _NO_PENALTY.items()):
            kept.pop("repeat_last_n", None)  # how far back to look for what is not punished
        for name in list(kept):
            if name in Options.model_fields:
                continue
            if name not in _HARMLESS_OPTIONS:
                says = "it is the server's configuration that says this; remove it"
                raise unsupported(f"options.{name}", says if name in _OF_THE_SERVER else "remove it from the request")
            if not _HARMLESS_OPTIONS[name](kept.pop(name)):
                raise unsupported(f"options.{name}", "this server does not support this value; remove it")
        for name in ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty"):
            if type(kept.get(name)) is int:
                kept[name] = float(kept[name])
        if kept.get("num_predict") == 0:
            raise bad_request("options.num_predict: must not be 0", "options.num_predict")
        return {**data, "options": kept}

    def check(self, ready: wire.Ready) -> None:
        """Raises ApiError 400 where the model cannot do what is asked."""
        asked = self.options.num_ctx
        if asked is not None and asked > ready.context_length:
            message = f"options.num_ctx: this model's context is {ready.context_length} tokens, {asked} are asked for"
            raise bad_request(message, "options.num_ctx")
        if self.think and not ready.thought_format:
            raise bad_request("think: this model has no thoughts of its own; leave it out", "think")

    def _sampling(self) -> wire.Sampling:
        """Raises ApiError 400."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
        return self.options.sampling(self._grammar(), self.top_logprobs if self.logprobs else None)

    @property
    def _thinking(self) -> bool | None:
        """Raises ApiError 400."""
        if isinstance(self.think, str):
            raise unsupported("think", "there are no degrees of it here; true or false")
        return self.think

    def _grammar(self) -> wire.Grammar | None:
        if self.format is None:
            return None
        return wire.Grammar("json_object") if self.format == "json" else schema_grammar(self.format, "format")


class OllamaFunction(Strict):
    """A called function; its arguments are an object here."""

    name: FunctionName
    arguments: JsonObject = {}
    index: int | None = Field(None, ge=0, lt=MAX_TOOLS)


class OllamaCall(Strict):
    """A call in an assistant's message."""

    id: str | None = Field(None, min_length=1, max_length=200)
    type: Literal["function"] = "function"
    function: OllamaFunction


class OllamaMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[OllamaCall] = Field([], max_length=MAX_TOOLS)
    tool_name: str | None = Field(None, min_length=1, max_length=64)
    tool_call_id: str | None = Field(None, min_length=1, max_length=200)
    thinking: str = Field("", description="An assistant's thoughts before its answer, for templates that show them.")

    def to_wire(self, where: str, place: int) -> wire.Message:
        """The message to the worker. Raises ApiError 400."""
        allowed = {"tool": ("tool_name", "tool_call_id"), "assistant": ("tool_calls", "thinking")}.get(self.role, ())
        for name in ("tool_calls", "tool_name", "tool_call_id", "thinking"):
            if getattr(self, name) and name not in allowed:
                raise unsupported(f"{where}.{name}", f"a message of the role {self.role} cannot have it")
        calls = []
        for number, call in enumerate(self.tool_calls):
            # Ollama's clients send no ids, and templates that want them want nine letters and digits.
            ident = call.id or f"c{place % 10**5:05d}{number % 1000:03d}"
            function = {"name": call.function.name, "arguments": call.function.arguments}
            calls.append({"id": ident, "type": "function", "function": function})
        thoughts = self.thinking or None
        return wire.Message(self.role, self.content, calls, self.tool_call_id, self.tool_name, thoughts)


class OllamaChatRequest(_Generating):
    """POST /api/chat."""

    messages: list[OllamaMessage] = []
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Messages without fields that are null or empty."""
        data = super().prepare(data)
        turns = data.get("messages")
        if isinstance(turns, list):
            plain = [
                {k: v for k, v in turn.items() if v is not None and v != []}
                if isinstance(turn, dict)
                else turn
                for turn in turns
            ]
            data = {**data, "messages": plain}
        return data

    @cached_property
    def tool_use(self) -> ToolUse:
        """The tools that this request offers. Raises ApiError 400."""
        return ToolUse(self.tools, None, True)

    @property
    def loads_only(self) -> bool:
        """True where nothing is to be generated: the model is loaded, or let go."""
        return not self.messages

    def _grammar(self) -> wire.Grammar | None:
        return super()._grammar() or self.tool_use.grammar

    def submit(self, request_id: str) -> wire.Submit:
        """The message to the worker. Raises ApiError 400."""
        sampling = self._sampling()
        if self.format is not None and self.tool_use:
            raise unsupported("format", "an answer that may call tools cannot have another form; leave one out")
        turns = [turn.to_wire(f"messages[{place}]", place) for place, turn in enumerate(self.messages)]
        for place, turn in enumerate(turns):  # a tool's answer belongs to the calls before it, in their order
            if turn.role == "tool" and turn.tool_call_id is None:
                turns[place] = wire.Message(turn.role, turn.content, [], _call_before(turns, place), turn.name)
        return wire.Submit(
            request_id, "chat", sampling, turns, tools=self.tool_use.described, thinking=self._thinking
        )


def _call_before(turns: list[wire.Message], place: int) -> str | None:
    first = place
    while first > 0 and turns[first - 1].role == "tool":
        first -= 1
    calls = turns[first - 1].tool_calls if first > 0 else []
    number = place - first
    return str(calls[number]["id"]) if number < len(calls) else None


class OllamaGenerateRequest(_Generating):
    """POST /api/generate: one question through the chat template, or with `raw` a text to go on with."""

    harmless: ClassVar[Harmless] = {
        **_Generating.harmless,
        "suffix": lambda value: value == "",
        "images": lambda value: value == [],
        "template": lambda value: value == "",
        "context": lambda value: value == [],
    }

    prompt: str = ""
    system: str = ""
    raw: bool = False
    tool_use: ClassVar[None] = None

    @property
    def loads_only(self) -> bool:
        """True where nothing is to be generated: the model is loaded, or let go."""
        return not self.prompt

    def submit(self, request_id: str) -> wire.Submit:
        """The message to the worker. Raises ApiError 400."""
        sampling, thinking = self._sampling(), self._thinking
        if self.raw:
            if self.think:
                raise bad_request("think: has no place with a raw prompt; the model goes on with it as it is", "think")
            if self.system:
                raise bad_request("system: has no place in a raw prompt; write it into the prompt", "system")
            return wire.Submit(request_id, "completion", sampling, prompt=self.prompt)
        turns = [wire.Message("system", self.system)] if self.system else []
        turns = [*turns, wire.Message("user", self.prompt)]
        return wire.Submit(request_id, "chat", sampling, turns, thinking=thinking)


class ShowRequest(Request):
    """POST /api/show."""

    harmless: ClassVar[Harmless] = {"verbose": lambda value: isinstance(value, bool)}

    model: ModelName

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Old clients call the model `name`."""
        return data

"""Kinds of values that several bodies share, with their bounds, and their schemas for the documentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from server.schemas.base import Strict

# Every number and list that goes to the worker is bounded: nobody's hardware has more, and msgpack ends at 64 bits.
MAX_TOKENS = 2**24
MAX_TOKEN_ID = 2**31
MAX_BIASES = 1024
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 1024
MAX_TOOLS = 128
MAX_PROMPTS = 64
_TEXT_PARTS = ("text", "input_text", "output_text")


def join_parts(value: Any) -> str:
    """A string, or a list of text parts joined. Raises ValueError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    parts: list[str] = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise ValueError(f"part {place} is not a text part; this server takes text only")
        given = {name for name, content in part.items() if content not in (None, [])}  # annotations: [], logprobs: null
        if given - {"type", "text", "parsed"} or not isinstance(part.get("text"), str):
            raise ValueError(f'part {place} must be exactly {{"type": "{part["type"]}", "text": "..."}}')
        parts.append(part["text"])
    return "".join(parts)


def check_stop(value: Any) -> tuple[str, ...]:
    """One stop string or a few. Raises ValueError."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > MAX_STOPS or not all(isinstance(x, str) and x for x in items):
        raise ValueError(f"must be a non-empty string, or a list of at most {MAX_STOPS} of them")
    if any(len(item) > MAX_STOP_CHARACTERS for item in items):
        raise ValueError(f"must not be longer than {MAX_STOP_CHARACTERS} characters")
    return tuple(items)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"must be an object of token id to bias, with at most {MAX_BIASES} entries")
    bias: dict[int, float] = {}
    for token, weight in value.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        name_fits = isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 9
        if not (name_fits and number and -100 <= weight <= 100):
            raise ValueError("must map token ids (as strings) to numbers from -100 to 100")
        bias[int(token)] = float(weight)
    return bias


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(x) is int and 0 <= x < MAX_TOKEN_ID for x in value):
        return value
    raise ValueError("must be one non-empty string, or one non-empty list of token ids")


def _prompts(value: Any) -> list[str | list[int]]:
    many = isinstance(value, list) and bool(value) and all(isinstance(item, (str, list)) for item in value)
    prompts = value if many else [value]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must not be more than {MAX_PROMPTS} prompts")
    return [_prompt(prompt) for prompt in prompts]


_string: dict[str, Any] = {"type": "string"}
_ids: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID - 1},
}
_some: dict[str, Any] = {"type": "string", "minLength": 1}
_short: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_part: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": list(_TEXT_PARTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_parts: dict[str, Any] = {"type": "array", "minItems": 1, "items": _part}
_stops: dict[str, Any] = {"type": "array", "maxItems": MAX_STOPS, "items": _short}
_biases: dict[str, Any] = {
    "type": "object",
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

Text = Annotated[str, BeforeValidator(join_parts), WithJsonSchema({"anyOf": [_string, _parts]})]
Stop = Annotated[tuple[str, ...], BeforeValidator(check_stop), WithJsonSchema({"anyOf": [_short, _stops]})]
Bias = Annotated[dict[int, float], BeforeValidator(_bias), WithJsonSchema(_biases)]
_texts: dict[str, Any] = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _some}
_lists: dict[str, Any] = {**_texts, "items": _ids}
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [_some, _ids, _texts, _lists]}),
]
Prompt = Annotated[str | list[int], BeforeValidator(_prompt), WithJsonSchema({"anyOf": [_some, _ids]})]
ModelName = Annotated[str, Field(min_length=1, max_length=300, description="A configured model, or an alias of one.")]
Probability = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Limit = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class KvQuality(Strict):
    """What the request's KV cache must be: of this setting, or with a measured mean KL (nats) of at most `max_kl`.

    Both may be given; the setting must then be that close.
    """

    max_kl: float | None = Field(None, ge=0, le=100)
    setting: str | None = Field(None, min_length=1, max_length=64, description="exact, or a row of the ladder.")

    @model_validator(mode="after")
    def _says_something(self) -> KvQuality:
        if self.max_kl is None and self.setting is None:
            raise ValueError("must have max_kl or setting")
        return self


class StreamOptions(Strict):
    """Options of a stream. Obfuscation, which pads events against eavesdroppers, is not done here."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False

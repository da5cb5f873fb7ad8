"""Checking a decoded body against a strict schema: an unknown field, a wrong type or a value out of range is a 400."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from server.errors import ApiError, bad_request, shorten, unsupported
from spectral.text import encodable

MAX_DEPTH = 64
Harmless = Mapping[str, Callable[[Any], bool]]


class Strict(BaseModel):
    """A part of a request: no unknown fields, no conversions, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Request(Strict):
    """A whole body. `harmless`: fields that are not honoured, and the values at which that changes nothing.

    `hints`: what to do instead, for fields that are refused.
    """

    harmless: ClassVar[Harmless] = {}
    hints: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The body before it is checked; a place for what clients add without meaning anything by it."""
        return data


R = TypeVar("R", bound=Request)


def parse(schema: type[R], data: Any) -> R:
    """Check a decoded JSON body. Raises ApiError 400 that names the first field at fault."""
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    prepared = schema.prepare(_known(schema, data))
    try:
        return schema.model_validate(prepared)
    except ValidationError as error:
        raise explain(error, prepared) from error


def _known(schema: type[Request], data: dict[str, Any]) -> dict[str, Any]:
    """Without what is null (which means: the default) and without harmless fields. Raises ApiError 400."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in schema.model_fields:
            if value is not None:
                kept[name] = value
        elif name not in schema.harmless:
            raise unsupported(name, schema.hints.get(name, "remove it from the request"))
        elif value is not None and not schema.harmless[name](value):
            hint = "this server does not support this value; remove the field"
            raise unsupported(name, schema.hints.get(name, hint))
    return kept


def explain(error: ValidationError, data: Any) -> ApiError:
    """The 400 for one thing that is wrong: a wrong value before a missing one, which may only be its consequence."""
    found = error.errors()
    first = next((item for item in found if item["type"] != "missing"), found[0])
    param = ""
    for place, part in enumerate(first["loc"]):
        inside = data[part] if _has(data, part) else None
        if not _has(data, part) and not (first["type"] == "missing" and place == len(first["loc"]) - 1):
            continue  # the name of a type among several, which is no part of the body
        param += f"[{part}]" if isinstance(part, int) else (f".{part}" if param else str(part))
        data = inside
    if first["type"] == "extra_forbidden":
        return unsupported(param)
    if first["type"] == "missing":
        return bad_request(f"{param}: this field is required", param, "missing_required_parameter")
    param = param or str(first["loc"][0] if first["loc"] else "body")
    message = shorten(first["msg"].removeprefix("Value error, "), 300)  # some repeat what came
    return bad_request(f"{param}: {message[:1].lower()}{message[1:]}", shorten(param))


def _has(data: Any, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(data, list) and part < len(data)
    return isinstance(data, dict) and part in data


def json_object(text: str, param: str) -> dict[str, Any]:
    """A text that holds a JSON object. Raises ApiError 400 naming the field."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request(f"{param}: must be a text that holds a JSON object", param)
    try:
        return check_json(value)
    except ValueError as error:
        raise bad_request(f"{param}: {error}", param) from None


def check_json(value: dict[str, Any]) -> dict[str, Any]:
    """An object of the client's own, once it is known that it can go to a worker. Raises ValueError."""
    rest: list[tuple[Any, int]] = [(value, 1)]
    while rest:
        part, depth = rest.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
        if isinstance(part, dict):
            rest += [(item, depth + 1) for pair in part.items() for item in pair]
        elif isinstance(part, list):
            rest += [(item, depth + 1) for item in part]
        elif isinstance(part, int) and not -(2**63) <= part < 2**63:
            raise ValueError("must not hold whole numbers of more than 64 bits")
        elif isinstance(part, float) and not math.isfinite(part):
            raise ValueError("must not hold NaN or infinite numbers")
        elif isinstance(part, str) and not encodable(part):
            raise ValueError("must not hold half a surrogate pair")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]

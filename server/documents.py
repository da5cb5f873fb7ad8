"""What the OpenAPI document says about bodies and failures; the schemas are the ones that requests are checked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.schemas import Request

_MEANING = {
    400: "A field is wrong or not supported; `param` names it.",
    401: "An API key is needed, or this one is not valid.",
    403: "This API key may not do that.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    409: "It cannot be done as things are.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "This is no usable profile.",
    429: "A queue or a key's limit is full; see Retry-After.",
    500: "The generation failed.",
    503: "The model is not there at the moment; see Retry-After.",
    504: "The request did not finish in time.",
}


_FINE = {201: "It is new.", 202: "It has begun."}


class ErrorDetail(BaseModel):
    """What went wrong: `code` is stable, `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """Every error has this form."""

    error: ErrorDetail


class OllamaError(BaseModel):
    """Every error of the Ollama API has this form."""

    error: str


def body(schema: type[Request]) -> dict[str, Any]:
    """The request body of a route, for `openapi_extra`."""
    document = schema.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(document)}}}}


def optional_body(schema: type[BaseModel]) -> dict[str, Any]:
    """The same where a request without a body means one without fields."""
    document = inline(schema.model_json_schema())
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": document}}}}


def bytes_body(kinds: Sequence[str]) -> dict[str, Any]:
    """A body that is a file."""
    schema = {"type": "string", "format": "binary"}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Successful answers other than 200."""
    return {status: {"description": _FINE[status]} for status in statuses}


def _refusal(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorEnvelope"}
    return {"description": _MEANING[status], "content": {"application/json": {"schema": schema}}}


def describe(app: FastAPI) -> None:
    """Say how every administrator's route fails, and take out of the document what FastAPI supposes of every route with
    parameters: here a wrong one is a 400."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for name, path in document["paths"].items():
            for operation in path.values():
                if name.startswith("/admin"):  # those of every administrator's route, its own words first
                    for status in ADMIN:
                        operation["responses"].setdefault(str(status), _refusal(int(status)))
                supposed = operation["responses"].get("422", {})
                if "HTTPValidationError" in str(supposed):
                    del operation["responses"]["422"]
                    operation["responses"].setdefault("400", {"description": _MEANING[400]})
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def inline(document: dict[str, Any]) -> dict[str, Any]:
    """A schema without references to its own definitions (none of ours refers to itself)."""
    definitions = document.pop("$defs", {})

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return replaced(definitions[part["$ref"].rsplit("/", 1)[-1]])
            kept = {name: value for name, value in part.items() if name != "discriminator" or "oneOf" not in part}
            return {name: replaced(value) for name, value in kept.items()}
        return [replaced(item) for item in part] if isinstance(part, list) else part

    result = replaced(document)
    assert isinstance(result, dict)
    return result


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The failures of a route; a key may always be asked for."""
    return {
        status: {"description": _MEANING[status], "model": ErrorEnvelope} for status in sorted({*statuses, 401, 403})
    }


def ollama_failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for the Ollama API."""
    return {status: {"description": _MEANING[status], "model": OllamaError} for status in sorted({*statuses, 401, 403})}


ADMIN = failures(400, 404, 408, 409, 413, 415, 429, 500, 503)
"""How the administrator's requests fail."""

GENERATES = (400, 404, 408, 413, 415, 429, 500, 503, 504)


def streamed() -> dict[int | str, dict[str, Any]]:
    """The answers of a route that generates, whole or streamed."""
    return {**failures(*GENERATES), 200: _in_forms("application/json", "text/event-stream")}


def ollama_streamed() -> dict[int | str, dict[str, Any]]:
    """The same for the Ollama API."""
    return {**ollama_failures(*GENERATES), 200: _in_forms("application/json", "application/x-ndjson")}


def _in_forms(*kinds: str) -> dict[str, Any]:
    return {"description": "The answer, whole or in pieces.", "content": {kind: {} for kind in kinds}}

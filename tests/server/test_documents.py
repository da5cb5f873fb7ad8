"""The OpenAPI document: every client's route says what it takes and how it fails, and every number has bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Running

FREE = {"parameters", "schema", "arguments", "json_schema"}  # JSON schemas and values of the client's own
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate", "/generate_stream", "/api/chat"]
POSTS += ["/api/generate", "/api/show", "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"]


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return server.client.get("/openapi.json").json()


def unbounded(schema: Any, path: str) -> Iterator[str]:
    """Places of numbers without bounds, and of objects that take any field."""
    if isinstance(schema, list):
        for place, part in enumerate(schema):
            yield from unbounded(part, f"{path}[{place}]")
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number") and not path.endswith("keep_alive.anyOf[0]"):
            low, high = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
            if not (low & schema.keys() and high & schema.keys()):
                yield path
        if "properties" in schema and schema.get("additionalProperties") is not False:
            yield f"{path} takes any field"
        for name, part in schema.items():
            if name == "properties":
                for field, inner in part.items():
                    if field not in FREE:
                        yield from unbounded(inner, f"{path}.{field}")
            elif name in ("items", "anyOf", "oneOf", "additionalProperties"):
                yield from unbounded(part, path if name == "items" else f"{path}.{name}")


@pytest.mark.parametrize("path", POSTS)
def test_a_body_is_described_whole_and_within_bounds(document: Any, path: str) -> None:
    operation = document["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert "model" in schema["properties"] and "$ref" not in str(schema)
    assert list(unbounded(schema, path)) == []
    assert {"400", "401", "403", "404", "413", "415"} <= set(operation["responses"])


def test_streams_say_their_form(document: Any) -> None:
    for path, kind in (("/v1/responses", "text/event-stream"), ("/api/chat", "application/x-ndjson")):
        assert kind in document["paths"][path]["post"]["responses"]["200"]["content"]
    assert "text/plain" in document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]

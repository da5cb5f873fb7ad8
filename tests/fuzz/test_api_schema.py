"""Every route of the OpenAPI document under schemathesis, against fake workers: no answer that is not documented, no
5xx that is not explained, and every error in its envelope.

Without schemathesis (extra `dev`) this is skipped, with its reason.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase

from tests.server.conftest import Running, serving, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))  # for each route and mode: FUZZ_EXAMPLES=2000 runs for an hour
NEVER_ENDING = {"GET /admin/events/stream"}  # its answer is a stream of what happens; asked for below without reading
EXPLAINED = {503, 504}
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    models = [{"name": "demo", "aliases": ["d"]}, {"name": "later", "load": "on_demand"}]
    limits = {"request_timeout_seconds": 2.0, "load_wait_seconds": 2.0, "max_body_bytes": 1_000_000}
    with serving(settings(*models, ping_seconds=0.2, **limits)) as running:
        running.until(lambda: running.client.get("/ready").status_code == 200)
        yield running


@pytest.fixture(scope="module")
def operations(api: Running) -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(api.client.get("/openapi.json").json())
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def check(api: Running, operation: Any, case: Any) -> None:
    """Send a case; judge the answer."""
    if "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = "demo" if hash(str(case.body)) % 4 else case.path_parameters["name"]
    answer = case.call(base_url=api.url, timeout=20, stream=operation.label in NEVER_ENDING)
    said = "" if operation.label in NEVER_ENDING else answer.text
    answer.close() if hasattr(answer, "close") else None
    status = answer.status_code
    assert str(status) in operation.definition.raw["responses"], f"{status} is not documented: {said[:300]}"
    assert status < 500 or status in EXPLAINED, f"{status}: {said[:300]}"
    if status >= 400 and said:
        error = json.loads(said)["error"] if said.startswith("{") else None
        assert error, f"{status} without an error: {said[:300]}"
        if not operation.path.startswith("/api/"):
            assert error["message"] and error["code"] and len(error["message"]) < 1000


def run(api: Running, operation: Any, mode: Any) -> None:
    """All examples of one route."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        check(api, operation, case)

    each()


@pytest.mark.parametrize("mode", MODES)
def test_every_route_answers_as_documented(api: Running, operations: dict[str, Any], mode: Any) -> None:
    told: list[str] = []
    for label, operation in operations.items():
        if label in NEVER_ENDING:
            continue
        try:
            run(api, operation, mode)
        except AssertionError as error:
            told.append(f"{label}: {error}")
        except (schemathesis.errors.InvalidSchema, hypothesis.errors.Unsatisfiable):
            continue  # nothing can be wrong with what takes nothing
    assert told == []
    assert api.client.post("/generate", json={"model": "demo", "prompt": "hello"}).status_code in (200, 404, 503)


def test_the_document_is_whole(operations: dict[str, Any]) -> None:
    assert len(operations) > 45 and set(operations) >= NEVER_ENDING
    for label, operation in operations.items():
        responses = operation.definition.raw["responses"]
        assert "HTTPValidationError" not in json.dumps(responses)
        if "/admin/" in label:
            assert {"400", "401", "403", "404", "409"} <= set(responses)
        if label.startswith("POST /admin/models"):
            assert "requestBody" in operation.definition.raw

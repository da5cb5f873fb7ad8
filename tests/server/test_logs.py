"""What is logged, in which form, and what never is."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from server.config import LogSettings
from server.logs import ConsoleFormatter, JsonFormatter, configure, redact
from spectral.keyfile import new_secret
from tests.server.conftest import Running


@pytest.fixture()
def log() -> Any:
    """A logger of its own, its handler, and what was written."""
    logger, text = logging.getLogger("spectral.access"), io.StringIO()
    handler = logging.StreamHandler(text)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler, text
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize("form", [JsonFormatter, ConsoleFormatter])
def test_a_request_is_a_line_without_its_text(server: Running, log: Any, form: Any) -> None:
    handler, text = log
    handler.setFormatter(form())
    secret = new_secret()
    headers = {"X-Request-Id": "r-42", "Authorization": f"Bearer {secret}"}
    body = {"model": "d", "prompt": "hello"}
    assert server.client.post("/generate?token=abc", json=body, headers=headers).status_code == 200
    server.until(lambda: "r-42" in text.getvalue())
    line = text.getvalue().strip().splitlines()[-1]
    assert "hello" not in line and "one two three" not in line and secret not in line and "token=abc" not in line
    if form is JsonFormatter:
        entry = json.loads(line)
        assert (entry["method"], entry["path"], entry["status"], entry["model"]) == ("POST", "/generate", 200, "demo")
        assert entry["usage"]["total_tokens"] == 8 and entry["seconds"] > 0 and entry["level"] == "info"
    else:
        assert "POST /generate 200" in line and "request_id=r-42" in line and "model=demo" in line


def test_keys_are_cut_out_of_whatever_is_logged() -> None:
    secret = new_secret()
    for text in (f"odd header {secret}", f"Authorization: Bearer {secret}", "bearer abcdef"):
        assert "[redacted]" in redact(text) and secret not in redact(text) and "abcdef" not in redact(text)


def test_exceptions_are_part_of_the_entry() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",), info)
    entry = json.loads(JsonFormatter().format(record))
    assert entry["message"] == "it failed" and "ValueError: broken" in entry["exception"]
    record.facts = {"a": 1}
    assert ConsoleFormatter().format(record).splitlines()[0].endswith("it failed a=1")


def test_configure_sets_level_and_access() -> None:
    root, access = logging.getLogger(), logging.getLogger("spectral.access")
    handlers, level, before = root.handlers[:], root.level, access.level
    try:
        root.handlers[:] = []
        configure(LogSettings(format="json", level="warning", access=False))
        assert root.level == logging.WARNING and isinstance(root.handlers[0].formatter, JsonFormatter)
        assert access.level == logging.WARNING
        root.handlers[:] = []
        configure(LogSettings(), "debug")
        assert root.level == logging.DEBUG and isinstance(root.handlers[0].formatter, ConsoleFormatter)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        access.setLevel(before)


@pytest.mark.parametrize("form", [JsonFormatter, ConsoleFormatter])
def test_what_comes_from_outside_begins_no_line_and_steers_no_terminal(form: Any) -> None:
    nasty = "a\n2026-01-01 ERROR spectral.auth forged\r\x1b[2J\x9b\u2028\x00b"
    try:
        raise ValueError(nasty)
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "said %s", (nasty,), info)
    record.facts = {"model": nasty}
    text = form().format(record)
    assert not any(ord(letter) < 32 and letter != "\n" for letter in text)
    assert "\x9b" not in text and "\u2028" not in text
    assert "forged" in text and not any(line.startswith("2026-01-01") for line in text.splitlines())
    assert len(text.splitlines()) == 1 or all(line.startswith("    ") for line in text.splitlines()[1:])
    if form is JsonFormatter:
        assert json.loads(text)["message"] == f"said {nasty}"


@pytest.mark.parametrize("path", ["/a%0d%0aX: y", "/a%1b[31m", "/%e2%80%a8x", "/\u00ff"])
def test_a_path_is_logged_escaped(server: Running, log: Any, path: str) -> None:
    handler, text = log
    handler.setFormatter(ConsoleFormatter())
    server.client.get(path, headers={"X-Request-Id": "r-path"})
    server.until(lambda: "r-path" in text.getvalue())
    line = next(line for line in text.getvalue().splitlines() if "r-path" in line)
    assert " 404" in line and "\x1b" not in line and line.isascii()

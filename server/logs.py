"""The log on standard error: lines for people, or one JSON object per line; without prompts, and without keys.

The standard library's logging and one formatter each are all it takes, also for what uvicorn and the libraries say.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime, timezone
from typing import Any

from server.config import LogSettings
from spectral.keyfile import PREFIX

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_SECRET = re.compile(rf"(?i)({re.escape(PREFIX)}|bearer\s+)[^\s'\",;]+")


def configure(settings: LogSettings, level: str | None = None) -> None:
    """Send everything that is logged to standard error in the configured form. `level` wins over the settings'."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else ConsoleFormatter())
    logging.basicConfig(level=(level or settings.level).upper(), handlers=[handler])
    if not settings.access:
        logging.getLogger("spectral.access").setLevel(logging.WARNING)


def redact(text: str) -> str:
    """The text without API keys, should one ever get into it."""
    return _SECRET.sub(r"\1[redacted]", text)


def one_line(text: str) -> str:
    """The text with control characters as escapes: what came from outside begins no line of its own and steers no
    terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class ConsoleFormatter(logging.Formatter):
    """`time level logger message fact=value ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """One entry; an exception's lines follow it, moved to the right."""
        record.message = one_line(record.getMessage())
        first = f"{self.formatTime(record)} {record.levelname} {record.name} {record.message}"
        facts = {name: value for name, value in _facts(record).items() if name not in ("method", "path", "status")}
        shown = "".join(f" {name}={one_line(_short(value))}" for name, value in facts.items())
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        lines = [f"    {one_line(line)}" for line in trace.split("\n") if line]
        return redact("\n".join([first + shown, *lines]))


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message", ...facts, "exception"}; times in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        entry |= {"message": record.getMessage(), **_facts(record)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        text = json.dumps(entry, ensure_ascii=False, default=str)
        return redact(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts = getattr(record, "facts", None)
    return facts if isinstance(facts, dict) else {}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{item}" for name, item in value.items())
    return str(value)

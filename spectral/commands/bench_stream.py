"""What a streamed answer says: server-sent events out of bytes, and the meaning of one. Pure: no clock, no network.

Servers that speak OpenAI's interface differ in what the standards leave open, so that much is accepted here; what
cannot be read raises ValueError with the reason, whatever it is made of.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

from spectral.commands.bench_load import MOST_TOKENS

MOST_EVENT = 2**24
"""Characters of one event; a stream that never ends its event must not fill the memory."""

BROKEN_REASONS = ("error", "abort")
"""Values of finish_reason by which servers say that an answer is not whole."""

_LINE_END = re.compile(r"\r\n|\n|\r")
_SHOWN = 200


class Events:
    """Cuts a stream into events as the SSE standard has it: comments are ignored, data lines of an event are joined."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._line: list[str] = []  # pieces of a line whose end has not come
        self._data: list[str] = []
        self._size = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[str]:
        """The data of every event that ends in these bytes; empty ones are left out. Raises ValueError."""
        text = self._decoder.decode(data)
        if not text:
            return []
        if self._after_cr and text[0] == "\n":  # the second half of a line's end
            text = text[1:]
        self._after_cr = text[-1:] == "\r"
        self._size += len(text)
        if self._size > MOST_EVENT:
            raise ValueError(f"an event of more than {MOST_EVENT} characters")
        out: list[str] = []
        first, *others = _LINE_END.split(text)
        self._line.append(first)
        for other in others:
            self._end_line(out)
            self._line.append(other)
        return out

    def rest(self) -> list[str]:
        """At the end of the stream: the event whose empty line did not come, if there is one."""
        out: list[str] = []
        self._end_line(out)
        self._end_line(out)
        return out

    def _end_line(self, out: list[str]) -> None:
        line = "".join(self._line)
        self._line.clear()
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        elif not line:
            data = "\n".join(self._data)
            self._data.clear()
            self._size = 0
            if data.strip():
                out.append(data)


@dataclass(frozen=True)
class Said:
    """One event. `done`: it is [DONE]; `text`: it has text; `reason`: its finish_reason, "" for none; `counts`: tokens
    of prompt and answer, None where it does not tell; `error`: the server's message, "" for none."""

    done: bool = False
    text: bool = False
    reason: str = ""
    counts: tuple[int, int] | None = None
    error: str = ""


def read_event(data: str) -> Said:
    """What an event's data means. Raises ValueError."""
    if data.strip() == "[DONE]":
        return Said(done=True)
    event = document(data)
    if error := error_of(event):
        return Said(error=error)
    text, reason = False, ""
    choices = event.get("choices") or []
    for choice in choices if isinstance(choices, list) else [choices]:
        if not isinstance(choice, dict):
            raise ValueError(f"a choice must be an object, got {shown(choice)}")
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise ValueError(f"a delta must be an object, got {shown(delta)}")
        text = text or any((choice.get("text"), *map(delta.get, ("content", "reasoning_content", "reasoning"))))
        if choice.get("finish_reason") is not None:
            reason = shown(choice["finish_reason"])
    return Said(text=bool(text), reason=reason, counts=counts_of(event))


def document(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError, also for what is nested too deep to be read."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error}): {shown(text)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"must be an object, got {shown(found)}")
    return found


def error_of(found: dict[str, Any]) -> str:
    """The message of a document that tells of an error, "" for any other; `"error": null` is none."""
    error = found.get("error")
    if not error and found.get("object") == "error":  # older servers: the document is the error
        error = found
    if not error:
        return ""
    if isinstance(error, dict):
        error = error.get("message") or error
    return shown(error)


def counts_of(found: dict[str, Any]) -> tuple[int, int] | None:
    """Tokens of prompt and answer by a document's `usage`; None where there is none. Raises ValueError."""
    usage = found.get("usage")
    if not usage:
        return None
    if not isinstance(usage, dict):
        raise ValueError(f"usage must be an object, got {shown(usage)}")
    return _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")


def _count(usage: dict[str, Any], name: str) -> int:
    """Raises ValueError: JSON has numbers such as 1e999, which Python reads as infinite."""
    count = usage.get(name)
    if count is None:
        return 0
    if isinstance(count, (int, float)) and 0 <= count <= MOST_TOKENS and count == int(count):
        return int(count)
    raise ValueError(f"usage.{name} must be a whole number of tokens, got {shown(count)}")


def refusal(text: str) -> str:
    """The message of an answer that is no success: of its JSON, else its beginning."""
    try:
        found = document(text)
    except ValueError:
        return shown(text)
    return error_of(found) or shown(found.get("message") or found.get("detail") or text)


def unfinished(start: bytes) -> str:
    """Why an answer has no end, of which `start` is what came without one event: a document in the stream's place?"""
    try:
        document(start.decode(errors="replace"))
    except ValueError:
        return "broke off: the connection was closed with neither finish_reason nor [DONE]"
    return f"not an OpenAI stream, but one document: {refusal(start.decode(errors='replace'))}"


def shown(value: Any) -> str:
    """Anything from a server, fit for one line of a terminal: the beginning, without what controls or cannot be
    written."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # nested nearly too deep to be read, or digits without end
        text = f"a {type(value).__name__} that cannot be shown"
    text = " ".join(text[: 2 * _SHOWN].split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:_SHOWN]

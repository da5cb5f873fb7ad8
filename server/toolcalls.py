"""Finding a model's calls of tools in its text, as the text comes.

Forms: "hermes": <tool_call>{"name", "arguments"}</tool_call> anywhere in the text (Hermes, Qwen; also Qwen's
<function=name><parameter=key>value</parameter></function> inside); "mistral" and "json": the whole answer is calls:
[TOOL_CALLS][{...}, ...], name{...}, or {"name", "parameters"} objects one after another (Llama 3). Markers that are
special tokens are not part of the text, so they may be missing. What is no call of an offered function stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKERS = ("[TOOL_CALLS]", "<|python_tag|>")
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Call:
    """A call: its id, the function's name, and its arguments as the text of a JSON object."""

    id: str
    name: str
    arguments: str


class ToolParser:
    """One choice's text in, pieces of text and calls out, in order. `names`: functions that may be called."""

    def __init__(self, form: str, names: Sequence[str], *, parallel: bool = True, forced: bool = False) -> None:
        self._form = "json" if forced else form  # a forced call is nothing but its JSON
        self._short_ids = form == "mistral"  # its templates take ids of nine letters and digits and no others
        self._names = tuple(names)
        self._parallel = parallel
        self._text = ""
        self._plain = False  # decided: this answer is text
        self.calls = 0

    def push(self, text: str) -> list[str | Call]:
        """Take new text; give out what is decided."""
        if self._plain:
            return [text] if text else []
        self._text += text
        return list(self._tagged(last=False) if self._form == "hermes" else self._leading())

    def finish(self) -> list[str | Call]:
        """Give out the rest."""
        if self._form == "hermes":
            return list(self._tagged(last=True))
        calls = None if self._plain else self._parse_all(self._text)
        rest, self._text = self._text, ""
        if calls is None:
            return [rest] if rest else []
        return [call for call in map(self._allowed, calls) if call is not None]

    # -- calls between tags -----------------------------------------------------------------------------------------

    def _tagged(self, *, last: bool) -> Iterator[str | Call]:
        while self._text:
            start = self._text.find(_OPEN)
            if start < 0:
                keep = 0 if last else _held(self._text)
                ready, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
                if ready and not (self.calls and not ready.strip()):
                    yield ready
                return
            before = self._text[:start].rstrip()
            end = self._text.find(_CLOSE, start)
            if end < 0 and not last:
                if before:
                    yield before
                self._text = self._text[start:]
                return
            stop = end if end >= 0 else len(self._text)
            inner = self._text[start + len(_OPEN) : stop]
            whole, self._text = self._text[start : stop + len(_CLOSE)], self._text[stop + len(_CLOSE) :]
            calls = self._parse_function(inner) or self._parse_all(inner)
            if before:
                yield before
            if calls is None:
                yield whole
            for call in calls or []:
                allowed = self._allowed(call)
                if allowed is not None:
                    yield allowed

    def _parse_function(self, text: str) -> list[Call] | None:
        match = _FUNCTION.fullmatch(text)
        if match is None or match[1] not in self._names:
            return None
        return [self._call(match[1], {key: _value(value) for key, value in _PARAMETER.findall(match[2])})]

    # -- answers that are calls from their first character ------------------------------------------------------------

    def _leading(self) -> Iterator[str | Call]:
        start = self._text.lstrip()
        if not start or start[0] in "{[":
            return
        if any(_overlaps(start, known) for known in (*_MARKERS, *self._names)):
            return
        self._plain = True
        text, self._text = self._text, ""
        yield text

    def _parse_all(self, text: str) -> list[Call] | None:
        """All of a text as calls; None where any of it is something else."""
        calls: list[Call] = []
        rest = _skip(text)
        while rest:
            if rest[0] in "{[":
                value, rest = _json(rest)
                items = value if isinstance(value, list) else [value]
                found = [self._from_object(item) for item in items]
            else:
                name = next((n for n in sorted(self._names, key=len, reverse=True) if rest.startswith(n)), None)
                if name is None:
                    return None
                rest = rest[len(name) :].lstrip()
                value, rest = _json(rest[len("[ARGS]") :].lstrip() if rest.startswith("[ARGS]") else rest)
                found = [self._call(name, value)] if isinstance(value, dict) else [None]
            for call in found:
                if call is None:
                    return None
                calls.append(call)
            rest = _skip(rest)
        return calls or None

    def _from_object(self, item: Any) -> Call | None:
        if not isinstance(item, dict):
            return None
        function = item.get("function")
        if isinstance(function, dict):
            item = function
        name = item.get("name", function)
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):
            arguments, rest = _json(arguments)
            arguments = None if rest else arguments
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return self._call(name, arguments)

    def _call(self, name: str, arguments: dict[str, Any]) -> Call:
        ident = secrets.token_hex(5)[:9] if self._short_ids else "call_" + secrets.token_hex(12)
        return Call(ident, name, json.dumps(arguments, ensure_ascii=False))

    def _allowed(self, call: Call) -> Call | None:
        """The call, or None where the request wants one call and has it."""
        if self.calls and not self._parallel:
            return None
        self.calls += 1
        return call


def _json(text: str) -> tuple[Any, str]:
    """The JSON value at the start of a text and what follows it; (None, the text) where there is none."""
    try:
        value, end = _decode(text)
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:].lstrip()


def _skip(text: str) -> str:
    """Without space, separators and markers in front."""
    text = text.lstrip(" \t\r\n;,")
    for marker in _MARKERS:
        if text.startswith(marker):
            return _skip(text[len(marker) :])
    return text


def _overlaps(text: str, known: str) -> bool:
    """True where one is the beginning of the other."""
    return text.startswith(known) or known.startswith(text)


def _held(text: str) -> int:
    """Characters at the end that may belong to a tag: the beginning of one, and space in front of it."""
    size = next((n for n in range(min(len(text), len(_OPEN) - 1), 0, -1) if _OPEN.startswith(text[-n:])), 0)
    rest = text[: len(text) - size]
    return size + len(rest) - len(rest.rstrip())


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is JSON, else the text itself."""
    value, rest = _json(text)
    return text if rest or value is None and text != "null" else value

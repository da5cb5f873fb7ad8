"""Finding a model's calls of tools in its text, as the text comes.

Forms: "hermes": <tool_call>{"name", "arguments"}</tool_call> anywhere in the text (Hermes, Qwen; also Qwen's
<function=name><parameter=key>value</parameter></function> inside); "mistral" and "json": the whole answer is calls:
[TOOL_CALLS][{...}, ...], name{...}, or {"name", "parameters"} objects one after another (Llama 3). Markers that are
special tokens are not part of the text, so they may be missing. What is no call of an offered function stays text.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKERS = ("[TOOL_CALLS]", "<|python_tag|>")
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_LONGEST_NAME = 256
_GAP = re.compile(r"[ \t\r\n;,]*")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON")
    return value


# What a model writes is read as JSON says and not as Python does: NaN, Infinity and 1e999 are no numbers.
_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).raw_decode


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
        self._later: list[str] = []  # what came after `_text` while nothing new could be decided
        self._tail = ""  # the end of it, where the beginning of a closing tag may be
        self._held = False  # everything is held until the closing tag, or the end
        self._plain = False  # decided: this answer is text
        self.calls = 0

    def push(self, text: str) -> list[str | Call]:
        """Take new text; give out what is decided."""
        if self._plain:
            return [text] if text else []
        if self._held:  # looking at all of it for every token would take the square of its length
            self._later.append(text)
            self._tail = self._tail[-len(_CLOSE) :] + text
            if self._form != "hermes" or _CLOSE not in self._tail:
                return []
        self._gather()
        self._text += text if not self._held else ""
        self._held = False
        return list(self._tagged(last=False) if self._form == "hermes" else self._leading())

    def _gather(self) -> None:
        if self._later:
            self._text = "".join([self._text, *self._later])
        self._later, self._tail = [], ""

    def finish(self) -> list[str | Call]:
        """Give out the rest."""
        self._gather()
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
                self._held, self._tail = True, self._text[-len(_CLOSE) :]
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
        # By hand: a regular expression for this takes the cube of the length on the wrong text.
        text = text.strip()
        name, end, body = text.removeprefix(_FUNCTION)[:_LONGEST_NAME].partition(">")
        if not (text.startswith(_FUNCTION) and text.endswith(_FUNCTION_END) and end and name in self._names):
            return None
        body = text[len(_FUNCTION) + len(name) + 1 : -len(_FUNCTION_END)]
        return [self._call(name, dict(_parameters(body)))]

    # -- answers that are calls from their first character ------------------------------------------------------------

    def _leading(self) -> Iterator[str | Call]:
        start = self._text.lstrip()
        if not start or start[0] in "{[":
            self._held = bool(start)
            return
        known = (*_MARKERS, *self._names)
        if any(map(start.startswith, known)):
            self._held = True
            return
        if any(word.startswith(start) for word in known):
            return
        self._plain = True
        text, self._text = self._text, ""
        yield text

    def _parse_all(self, text: str) -> list[Call] | None:
        """All of a text as calls; None where any of it is something else."""
        calls: list[Call] = []
        at = _skip(text, 0)
        while at < len(text):
            if text[at] in "{[":
                value, at = _json(text, at)
                found = [self._from_object(item) for item in (value if isinstance(value, list) else [value])]
            else:
                name = next((n for n in sorted(self._names, key=len, reverse=True) if text.startswith(n, at)), None)
                if name is None:
                    return None
                at = _skip_space(text, at + len(name))
                at = _skip_space(text, at + len("[ARGS]")) if text.startswith("[ARGS]", at) else at
                value, at = _json(text, at)
                found = [self._call(name, value)] if isinstance(value, dict) else [None]
            for call in found:
                if call is None:
                    return None
                calls.append(call)
            at = _skip(text, at)
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
            given = arguments
            arguments, end = _json(given)
            arguments = arguments if end == len(given) else None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return self._call(name, arguments)

    def _call(self, name: str, arguments: dict[str, Any]) -> Call:
        ident = secrets.token_hex(5)[:9] if self._short_ids else "call_" + secrets.token_hex(12)
        try:
            text = json.dumps(arguments, ensure_ascii=False)
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair can only be sent as its escape
            text = json.dumps(arguments)
        return Call(ident, name, text)

    def _allowed(self, call: Call) -> Call | None:
        """The call, or None where the request wants one call and has it."""
        if self.calls and not self._parallel:
            return None
        self.calls += 1
        return call


def _json(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value at a place of a text and where what follows it begins; (None, that place) where there is none."""
    try:
        value, end = _decode(text, at)
    except (ValueError, RecursionError):
        return None, at
    return value, _skip_space(text, end)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _skip(text: str, at: int) -> int:
    """Behind space, separators and markers."""
    while True:
        found = _GAP.match(text, at)
        at = found.end() if found is not None else at
        marker = next((m for m in _MARKERS if text.startswith(m, at)), None)
        if marker is None:
            return at
        at += len(marker)


def _parameters(text: str) -> Iterator[tuple[str, Any]]:
    """<parameter=key>value</parameter>, one after another; a line's end after and before the tags is theirs."""
    at = text.find(_PARAMETER)
    while at >= 0:
        at += len(_PARAMETER)
        end = text.find(">", at, at + _LONGEST_NAME)
        name = text[at:end]
        if end > at and not any(letter.isspace() for letter in name):
            close = text.find(_PARAMETER_END, end)
            if close < 0:
                return
            yield name, _value(text[end + 1 : close].removeprefix("\n").removesuffix("\n"))
            at = close + len(_PARAMETER_END)
        at = text.find(_PARAMETER, at)


def _held(text: str) -> int:
    """Characters at the end that may belong to a tag: the beginning of one, and space in front of it."""
    size = next((n for n in range(min(len(text), len(_OPEN) - 1), 0, -1) if _OPEN.startswith(text[-n:])), 0)
    rest = text[: len(text) - size]
    return size + len(rest) - len(rest.rstrip())


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is JSON, else the text itself."""
    value, end = _json(text)
    return text if end < len(text) or (value is None and text != "null") else value

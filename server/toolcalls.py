"""Finding a model's calls of tools in its text, as the text comes.

A form (spectral/tool_forms.py) says with which tags a model's family surrounds a call; where the closing one is "", the
end of the answer closes it. In some families the whole answer is calls and tags are missing: then its first characters
tell. How the calls themselves are written: server/call_syntax.py. What is no call of an offered function stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.call_syntax import SKIPPED, STARTS, read_calls
from spectral.tool_forms import TAGS

_FORGOTTEN = re.compile(r'\{\s*("(n(a(m(e(".*)?)?)?)?)?)?', re.DOTALL)
"""The beginning of {"name": small models of the tagged forms forget the tag before it."""


@dataclass(frozen=True)
class Call:
    """A call: its id, the function's name, and its arguments as the text of a JSON object."""

    id: str
    name: str
    arguments: str


class ToolParser:
    """One choice's text in, pieces of text and calls out, in order. `names`: functions that may be called.

    `forced`: the answer is nothing but a call's JSON. `strict`: a grammar holds calls in the one way in which it lets
    them be written, so that what looks like a call otherwise is none.
    """

    def __init__(
        self, form: str, names: Sequence[str], *, parallel: bool = True, forced: bool = False, strict: bool = False
    ) -> None:
        self._open, self._close = TAGS[form]
        self._untagged = form in STARTS or forced
        self._starts = () if strict else (*SKIPPED, *STARTS.get(form, ()), *names)
        self._short_ids = form == "mistral"  # its templates take ids of nine letters and digits and no others
        self._names = tuple(names)
        self._parallel = parallel
        self._text = ""
        self._later: list[str] = []  # what came after `_text` while nothing new could be decided
        self._tail = ""  # the end of it, where the beginning of a closing tag may be
        self._held = False  # everything is held until the closing tag, or the end
        self._begun = strict and not self._untagged  # decided: the answer does not begin with a call without a tag
        self._plain = strict and self._untagged  # once it has begun, there are no more calls
        self.calls = 0

    def push(self, text: str) -> list[str | Call]:
        """Take new text; give out what is decided."""
        if self._held:  # looking at all of it for every token would take the square of its length
            self._later.append(text)
            if not self._begun or not self._close:
                return []
            self._tail = self._tail[-len(self._close) :] + text
            if self._close not in self._tail:
                return []
        self._gather()
        self._text += text if not self._held else ""
        self._held = False
        if not self._begun and not self._leads():
            return []
        return list(self._tagged(last=False))

    def _gather(self) -> None:
        if self._later:
            self._text = "".join([self._text, *self._later])
        self._later, self._tail = [], ""

    def finish(self) -> list[str | Call]:
        """Give out the rest."""
        self._gather()
        if not self._begun:
            calls = self._parse_all(self._text)
            if calls is not None:
                self._text = ""
                return [call for call in map(self._allowed, calls) if call is not None]
            self._begun = True
        return list(self._tagged(last=True))

    def _leads(self) -> bool:
        """Whether it is decided that the answer begins with text, or with a tag."""
        start = self._text.lstrip()
        if not start:
            return False
        if not self._untagged:
            self._begun = _FORGOTTEN.fullmatch(start) is None
            return self._begun
        if start[0] in "{[" or any(map(start.startswith, self._starts)):
            self._held = True
        elif not any(word.startswith(start) for word in self._starts):
            self._begun = True
        return self._begun

    def _tagged(self, *, last: bool) -> Iterator[str | Call]:
        while self._text:
            start = -1 if self._plain else self._text.find(self._open)
            if start < 0:
                keep = 0 if last or self._plain else _held(self._text, self._open)
                ready, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
                if ready and not (self.calls and not ready.strip()):
                    yield ready
                return
            before = self._text[:start].rstrip()
            end = self._text.find(self._close, start + len(self._open)) if self._close else -1
            if end < 0 and not last:
                if before:
                    yield before
                self._text = self._text[start:]
                self._held, self._tail = True, self._text[-len(self._close) :] if self._close else ""
                return
            stop = end if end >= 0 else len(self._text)
            after = stop + len(self._close)
            inner = self._text[start + len(self._open) : stop]
            whole, self._text = self._text[start:after], self._text[after:]
            calls = self._parse_all(inner)
            if before:
                yield before
            if calls is None:
                yield whole
            for call in calls or []:
                allowed = self._allowed(call)
                if allowed is not None:
                    yield allowed

    def _parse_all(self, text: str) -> list[Call] | None:
        """All of a text as calls; None where any of it is something else."""
        found = read_calls(text, self._names)
        return None if found is None else [self._call(name, arguments) for name, arguments in found]

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


def _held(text: str, tag: str) -> int:
    """Characters at the end that may belong to a tag: the beginning of one, and space in front of it."""
    size = next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
    rest = text[: len(text) - size]
    return size + len(rest) - len(rest.rstrip())

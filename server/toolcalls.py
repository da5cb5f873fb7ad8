"""Finding a model's calls of tools in its text, as the text comes.

A form (spectral/tool_forms.py) says with which tags a model's family surrounds a call; where the closing one is "", the
end of the answer closes it. In some families the whole answer is calls and tags are missing: then its first characters
tell. How the calls themselves are written: server/call_syntax.py. What is no call of an offered function stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.call_syntax import SKIPPED, STARTS, read_calls
from server.live_call import CallPart, LiveCall
from spectral.tool_forms import TAGS

_FORGOTTEN = re.compile(r'\{\s*("(n(a(m(e(".*)?)?)?)?)?)?', re.DOTALL)
"""The beginning of {"name": small models of the tagged forms forget the tag before it."""
_SYNTAX = " \t\r\n;,{}[]"
"""What may be left of a call that broke off, and is no text."""


@dataclass(frozen=True)
class Call:
    """A call: its id, the function's name, and its arguments as the text of a JSON object."""

    id: str
    name: str
    arguments: str


Found = str | Call | CallPart


class ToolParser:
    """One choice's text in, pieces of text and calls out, in order. `names`: functions that may be called.

    `forced`: the answer is nothing but a call's JSON. `strict`: a grammar holds calls in the one way in which it lets
    them be written, so that what looks like a call otherwise is none. `live`: give out the first call between two
    marks in parts, as it is written, where a mark or a grammar says that it is one. The calls are the same; one that
    breaks off, which is text otherwise, is then a call whose arguments have no end.
    """

    def __init__(
        self,
        form: str,
        names: Sequence[str],
        *,
        parallel: bool = True,
        forced: bool = False,
        strict: bool = False,
        live: bool = False,
    ) -> None:
        self._open, self._close = TAGS[form]
        self._untagged = form in STARTS or forced
        self._starts = () if strict else (*SKIPPED, *STARTS.get(form, ()), *names)
        self._short_ids = form == "mistral"  # its templates take ids of nine letters and digits and no others
        self._names = tuple(names)
        self._parallel = parallel
        self._held_by_grammar = forced or strict
        self._lively = live
        self._live: LiveCall | None = None
        self._live_id = ""
        self._text = ""
        self._later: list[str] = []  # what came after `_text` while nothing new could be decided
        self._tail = ""  # the end of it, where the beginning of a closing tag may be
        self._held = False  # everything is held until the closing tag, or the end
        self._begun = strict and not self._untagged  # decided: the answer does not begin with a call without a tag
        self._plain = strict and self._untagged  # once it has begun, there are no more calls
        self.calls = 0

    def push(self, text: str) -> list[Found]:
        """Take new text; give out what is decided."""
        found: list[Found] = []
        if self._held:  # looking at all of it for every token would take the square of its length
            self._later.append(text)
            found += self._part(text)
            if not self._begun or not self._close:
                return found
            self._tail = self._tail[-len(self._close) :] + text
            if self._close not in self._tail:
                return found
        self._gather()
        self._text += text if not self._held else ""
        self._held = False
        if not self._begun and not self._leads():
            return self._first_part() if self._held else found
        return found + list(self._tagged(last=False))

    def _gather(self) -> None:
        if self._later:
            self._text = "".join([self._text, *self._later])
        self._later, self._tail = [], ""

    def finish(self) -> list[Found]:
        """Give out the rest."""
        self._gather()
        if not self._begun:
            calls = self._parse_all(self._text)
            if calls is not None:
                self._text = ""
                return list(self._settled(calls))
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

    def _tagged(self, *, last: bool) -> Iterator[Found]:
        while self._text:
            start = -1 if self._plain else self._text.find(self._open)
            if start < 0:
                if last and self._live is not None:
                    self._text = yield from self._broken(self._text)
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
                yield from self._first_part()
                return
            stop = end if end >= 0 else len(self._text)
            after = stop + len(self._close)
            inner = self._text[start + len(self._open) : stop]
            whole, self._text = self._text[start:after], self._text[after:]
            calls = self._parse_all(inner)
            if before:
                yield before
            if calls is not None:
                yield from self._settled(calls)
            elif self._live is not None and self._live.name:
                rest = yield from self._broken(inner)
                if rest:
                    yield rest
            else:
                self._live = None
                yield whole

    # -- a call in parts

    def _first_part(self) -> list[Found]:
        """Where everything is held from here on: begin to look for a call that can be given out as it comes."""
        marked = self._held_by_grammar or self._text.lstrip().startswith(self._open)
        if not self._lively or not marked or (self.calls and not self._parallel):
            return []
        self._live, self._live_id = LiveCall(self._names), self._ident()
        return self._part(self._text.lstrip().removeprefix(self._open))

    def _part(self, text: str) -> list[Found]:
        live = self._live
        if live is None:
            return []
        arguments = live.push(text)
        if live.hopeless:
            self._live = None
        return [CallPart(self._live_id, live.name, arguments)] if arguments else []

    def _settled(self, calls: list[Call]) -> Iterator[Found]:
        """Whole calls; the end of the first where it was given out in parts."""
        live, self._live = self._live, None
        if live is not None and live.name:
            first = calls[0]
            same = live.whole and first.name == live.name
            if same and json.loads(first.arguments) == json.loads(live.arguments):
                self.calls += 1
                calls = calls[1:]
                yield CallPart(self._live_id, live.name, "}", end=True, whole=True)
            else:
                yield CallPart(self._live_id, live.name, "", end=True)
        for call in calls:
            allowed = self._allowed(call)
            if allowed is not None:
                yield allowed

    def _broken(self, text: str) -> Generator[Found, None, str]:
        """What was given out in parts is no call after all. Returns what comes after it and is text."""
        live, self._live = self._live, None
        if live is None or not live.name:
            return text
        yield CallPart(self._live_id, live.name, "", end=True)
        return text.partition(live.arguments)[2].lstrip(_SYNTAX)

    # -- whole calls

    def _parse_all(self, text: str) -> list[Call] | None:
        """All of a text as calls; None where any of it is something else."""
        found = read_calls(text, self._names)
        return None if found is None else [self._call(name, arguments) for name, arguments in found]

    def _ident(self) -> str:
        return secrets.token_hex(5)[:9] if self._short_ids else "call_" + secrets.token_hex(12)

    def _call(self, name: str, arguments: dict[str, Any]) -> Call:
        try:
            text = json.dumps(arguments, ensure_ascii=False)
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair can only be sent as its escape
            text = json.dumps(arguments)
        return Call(self._ident(), name, text)

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

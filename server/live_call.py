"""A call of a function given out while it is written: its name as soon as it is known, then its arguments as they come.

Only calls that begin as a JSON object ({"name": ..., "arguments": {...) or as name{...: there the text of the arguments
is JSON already. The object's last brace is held back until the call is known to be whole and right, so that arguments
of a call that is none never parse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from server.call_syntax import skip_marks

_LONGEST_HEAD = 1024
_OBJECT = re.compile(
    r'\[?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
    r"(?=\{)"
)
_AFTER_NAME = r")\s*(?:\[CALL_ID\][A-Za-z0-9]{1,64}\s*)?(?:\[ARGS\]\s*)?(?=\{)"
_SIGN = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True)
class CallPart:
    """More of a call. The first part has its id and name; `arguments`: text to be added to what came before.

    `end`: it is over; `whole`: as a call that a client may carry out.
    """

    id: str
    name: str
    arguments: str
    end: bool = False
    whole: bool = False


class LiveCall:
    """The first call of a text that is still coming. `names`: functions that may be called.

    Attributes: name: the function's, "" until it is known; hopeless: it is no call of this kind, or none at all.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._named = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + _AFTER_NAME)
        self._head = ""
        self._pieces: list[str] = []
        self._open: list[str] = []  # brackets
        self._in_text = self._escaped = self._ended = False
        self.name = ""
        self.hopeless = not names

    def push(self, text: str) -> str:
        """Take more of the text; the arguments that come of it, without their last brace."""
        if self.hopeless or self._ended:
            return ""
        if not self.name:
            text = self._begin(text)
        end = self._follow(text)
        self._pieces.append(text[:end])
        return text[: end - self._ended]

    @property
    def arguments(self) -> str:
        """All of the arguments, as far as they have come."""
        return "".join(self._pieces)

    @property
    def whole(self) -> bool:
        """Whether the arguments have come to their last brace."""
        return self._ended

    def _begin(self, text: str) -> str:
        """Look for the name; the text from the arguments' first brace on, "" while that has not come."""
        self._head += text
        start = skip_marks(self._head)
        found = _OBJECT.match(self._head, start) or self._named.match(self._head, start)
        if found is not None and found[1] in self._names:
            self.name = found[1]
            return self._head[found.end() :]
        self.hopeless = found is not None or len(self._head) > _LONGEST_HEAD
        return ""

    def _follow(self, text: str) -> int:
        """Where the arguments end in this text; its length where they go on."""
        at = 0
        if self._escaped and text:
            at, self._escaped = 1, False
        while (found := _SIGN.search(text, at)) is not None:
            at, sign = found.end(), found[0]
            if sign == "\\":
                self._escaped = at == len(text)
                at += 1
            elif sign == '"':
                self._in_text = not self._in_text
            elif not self._in_text and sign in "{[":
                self._open.append(sign)
            elif not self._in_text:
                self._open.pop()
                if not self._open:
                    self._ended = True
                    return at
        return len(text)

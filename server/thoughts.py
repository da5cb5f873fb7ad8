"""A model's thoughts told apart from its answer, as the text comes. The marks: spectral/thought_forms.py.

Thoughts stand before the answer and nowhere else: a mark later on is text. Space around them belongs to neither.
"""

from __future__ import annotations

from spectral.thought_forms import TAGS


class ThoughtReader:
    """One choice's text in, (thoughts, answer) out. `begun`: the prompt ended within thoughts, so no mark begins them.

    Attributes: thinking: whether what came last was within thoughts; over: whether the rest is the answer.
    """

    def __init__(self, form: str, *, begun: bool = False) -> None:
        self._open, self._close = TAGS[form]
        self._held = ""
        self._at_start = True  # nothing but space has come
        self._leading = self._at_answer = False  # space that comes now stands around thoughts
        self.thinking = begun
        self.over = False

    def push(self, text: str) -> tuple[str, str]:
        """Take new text; give out what is decided."""
        if self.over:
            return "", self._answer(text)
        self._held += text
        if self._at_start and not self._begins():
            return "", ""
        return self._split() if self.thinking else ("", self._end(self._held))

    def finish(self) -> tuple[str, str]:
        """Give out the rest: what may have been the beginning of a mark is text."""
        rest, self._held = self._held, ""
        if self.thinking and not self.over:
            return rest.rstrip(), ""
        return "", rest

    def _begins(self) -> bool:
        """Whether it is decided what the answer begins with. A mark is taken also where the prompt had one."""
        start = self._held.lstrip()
        if len(start) < len(self._open) and self._open.startswith(start):
            return False
        self._at_start = False
        if start.startswith(self._open):
            self.thinking, self._held = True, start[len(self._open) :]
        self._leading = True
        return True

    def _split(self) -> tuple[str, str]:
        text = self._held.lstrip() if self._leading else self._held
        self._leading = self._leading and not text
        thoughts, mark, answer = text.partition(self._close)
        if mark:
            return thoughts.rstrip(), self._end(answer)
        keep = _begun_at_end(text, self._close)
        ready = text[: len(text) - keep].rstrip()  # space may be the end of the thoughts
        self._held = text[len(ready) :]
        return ready, ""

    def _end(self, answer: str) -> str:
        self._at_answer = self.thinking  # what follows thoughts begins with its first letter
        self.thinking, self.over, self._held = False, True, ""
        return self._answer(answer)

    def _answer(self, text: str) -> str:
        if self._at_answer:
            text = text.lstrip()
            self._at_answer = not text
        return text


def _begun_at_end(text: str, mark: str) -> int:
    """Characters at the end of a text with which a mark may begin."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)

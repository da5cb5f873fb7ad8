"""Chat templates, rendered in a process of their own (`template_child.py`), bounded in time, memory and output.

One process serves everything in this one; it is started by the first rendering (or by `start`), ended when a template
takes too long, and started again by the next. A rendering costs 0.1 to 0.2 ms more than in the process itself.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from spectral.engine.child_process import ChildFailed, ChildProcess

SECONDS = 5.0
"""Longest time of one rendering, on the wall."""
SLOW_SECONDS = 0.05
"""From here on a template's prompts are better prepared beside the engine than between its steps."""
MOST_TEXT, MOST_GROWTH = 1 << 20, 8
"""A template may write this many characters, and so many for each character of its input beyond them."""


class TemplateFailed(Exception):
    """A template that raised, or took more than it may. `kind`: the exception's name, "Timeout", "TooLong", "Died"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Renderer:
    """Owns the process. Threads may share it: they are served one after another."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._child = ChildProcess("template_child.py", ("jinja2", "markupsafe"), seconds)
        self._recent_s = 0.0  # of a rendering lately; a slow one is forgotten after a few dozen fast ones

    @property
    def slow(self) -> bool:
        """True while renderings take longer than a step of the engine should wait."""
        return self._recent_s > SLOW_SECONDS

    def start(self) -> None:
        """Start the process, if it does not run; it is ready a tenth of a second later."""
        self._child.start()

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text. `variables`: plain JSON values. Raises TemplateFailed."""
        shown = json.dumps(variables)
        most = MOST_TEXT + MOST_GROWTH * len(shown)
        asked = f'{{"template": {json.dumps(template)}, "most": {most}, "variables": {shown}}}'.encode("ascii")
        started = True
        try:
            answer = self._child.ask(asked)
        except ChildFailed as error:
            started = error.kind != "NotStarted"
            raise TemplateFailed("Died" if error.kind == "Died" else "Timeout", str(error)) from None
        finally:
            if started:
                self._recent_s = max(self._child.last_s, 0.9 * self._recent_s)
        if "text" not in answer:
            raise TemplateFailed(str(answer.get("error")), str(answer.get("message")))
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        self._child.close()


RENDERER = Renderer()
"""The process's own."""
atexit.register(RENDERER.close)


def render_chat(
    tokenizer: Any,
    turns: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    switches: Mapping[str, bool] = MappingProxyType({}),
) -> str:
    """A conversation as the tokenizer's template writes it, with the opening of the answer. `switches`: variables that
    some templates ask for. Raises TemplateFailed, or what a tokenizer raises that has no template of its own kind."""
    template = tokenizer.get_chat_template(None, tools)
    plain = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
    variables = {"messages": plain, "tools": tools, "documents": None, "add_generation_prompt": True}
    return RENDERER.render(template, {**variables, **switches, **tokenizer.special_tokens_map})


def is_jinja(tokenizer: Any) -> bool:
    """True where the tokenizer renders by transformers' own method (others, such as Mistral's, have no template)."""
    method = getattr(type(tokenizer), "apply_chat_template", None)
    return getattr(method, "__module__", "") == "transformers.tokenization_utils_base"

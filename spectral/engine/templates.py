"""Chat templates, rendered in a process of their own (`template_child.py`), bounded in time, memory and output.

One process serves everything in this one; it is started by the first rendering (or by `start`), ended when a template
takes too long, and started again by the next. A rendering costs 0.1 to 0.2 ms more than in the process itself.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spectral.engine.template_child import LENGTH

log = logging.getLogger("spectral.templates")

SECONDS = 5.0
"""Longest time of one rendering, on the wall."""
START_SECONDS = 30.0
"""Longest time that the process may take to say that it has begun: on a busy machine that is no template's doing."""
SLOW_SECONDS = 0.05
"""From here on a template's prompts are better prepared beside the engine than between its steps."""
MOST_TEXT, MOST_GROWTH = 1 << 20, 8
"""A template may write this many characters, and so many for each character of its input beyond them."""
_CHILD = Path(__file__).with_name("template_child.py")
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")
_READ = 1 << 20


class TemplateFailed(Exception):
    """A template that raised, or took more than it may. `kind`: the exception's name, "Timeout", "TooLong", "Died"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Renderer:
    """Owns the process. Threads may share it: they are served one after another."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._said_ready = False
        self._recent_s = 0.0  # of a rendering lately; a slow one is forgotten after a few dozen fast ones

    @property
    def slow(self) -> bool:
        """True while renderings take longer than a step of the engine should wait."""
        return self._recent_s > SLOW_SECONDS

    def start(self) -> None:
        """Start the process, if it does not run; it is ready a tenth of a second later."""
        with self._lock:
            self._running()

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text. `variables`: plain JSON values. Raises TemplateFailed."""
        shown = json.dumps(variables)
        most = MOST_TEXT + MOST_GROWTH * len(shown)
        asked = f'{{"template": {json.dumps(template)}, "most": {most}, "variables": {shown}}}'.encode("ascii")
        with self._lock:
            answer = self._ask(asked)
        if "text" not in answer:
            raise TemplateFailed(str(answer.get("error")), str(answer.get("message")))
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, asked: bytes) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        source, target = process.stdout.fileno(), process.stdin.fileno()
        late, began = f"its process did not start within {START_SECONDS:g} s", None
        try:
            if not self._said_ready:
                self._read(source, LENGTH.size, time.monotonic() + START_SECONDS)
                self._said_ready = True
            late, began = f"it took more than {self._seconds:g} s", time.monotonic()
            self._write(target, LENGTH.pack(len(asked)) + asked, began + self._seconds)
            size = LENGTH.unpack(self._read(source, LENGTH.size, began + self._seconds))[0]
            found: dict[str, Any] = json.loads(self._read(source, size, began + self._seconds))
            return found
        except TimeoutError:
            self._end()
            raise TemplateFailed("Timeout", late) from None
        except OSError:
            self._end()
            raise TemplateFailed("Died", "the process that rendered it ended") from None
        finally:
            if began is not None:
                self._recent_s = max(time.monotonic() - began, 0.9 * self._recent_s)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            spec = importlib.util.find_spec("jinja2"), importlib.util.find_spec("markupsafe")
            places = {str(Path(s.origin).parents[1]) for s in spec if s is not None and s.origin is not None}
            # Isolated, and without this process's environment: a template has nothing to find there.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), *sorted(places)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
            )
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        self._said_ready = False
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # bytes that it never read
                    log.debug("the rendering process left bytes unread")

    def _write(self, descriptor: int, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            _wait([], [descriptor], until)
            view = view[os.write(descriptor, view[:_READ]) :]

    def _read(self, descriptor: int, size: int, until: float) -> bytes:
        pieces, left = [], size
        while left:
            _wait([descriptor], [], until)
            piece = os.read(descriptor, min(left, _READ))
            if not piece:
                raise BrokenPipeError("the rendering process closed its end")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def _wait(reading: list[int], writing: list[int], until: float) -> None:
    poll = select.poll()
    for descriptor in reading:
        poll.register(descriptor, select.POLLIN)
    for descriptor in writing:
        poll.register(descriptor, select.POLLOUT)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


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

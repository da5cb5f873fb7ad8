"""The other side of `child_main.py`: a process for one job, which is ended when an answer takes too long.

It is started by the first question (or by `start`), and again by the next one after it was ended.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectral.engine.child_main import LENGTH

log = logging.getLogger("spectral.child")

START_SECONDS = 30.0
"""Longest time that the process may take to say that it has begun: on a busy machine that is no question's doing."""
_CHILD = Path(__file__).with_name("child_main.py")
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")
_READ = 1 << 20


class ChildFailed(Exception):
    """No answer. `kind`: "NotStarted", "Timeout" (it was ended), or "Died"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChildProcess:
    """Owns the process. Threads may share it: they are served one after another.

    Args:
        job: the file's name; modules: libraries that it imports; seconds: for an answer, on the wall.
        setup: bytes that it reads before it says that it has begun.
    """

    def __init__(
        self, job: str, modules: tuple[str, ...], seconds: float, setup: Callable[[], bytes] | None = None
    ) -> None:
        self.seconds, self.last_s = seconds, 0.0
        """`last_s`: what the last answer took, without the process's start."""
        self._job, self._modules, self._setup = job, modules, setup
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._said_ready = False

    def start(self) -> None:
        """Start the process, if it does not run, and do not wait for it."""
        with self._lock:
            self._running()

    def ask(self, asked: bytes) -> dict[str, Any]:
        """The answer to a message of JSON. Raises ChildFailed."""
        with self._lock:
            return self._ask(asked)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, asked: bytes) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        source, target = process.stdout.fileno(), process.stdin.fileno()
        kind, late, began = "NotStarted", f"its process did not start within {START_SECONDS:g} s", None
        try:
            if not self._said_ready:
                until = time.monotonic() + START_SECONDS
                if self._setup is not None:
                    self._write(target, self._setup(), until)
                self._read(source, LENGTH.size, until)
                self._said_ready = True
            kind, late, began = "Timeout", f"it took more than {self.seconds:g} s", time.monotonic()
            self._write(target, asked, began + self.seconds)
            size = LENGTH.unpack(self._read(source, LENGTH.size, began + self.seconds))[0]
            found: dict[str, Any] = json.loads(self._read(source, size, began + self.seconds))
            return found
        except TimeoutError:
            self._end()
            raise ChildFailed(kind, late) from None
        except OSError:
            self._end()
            raise ChildFailed("Died" if began is not None else kind, "its process ended") from None
        finally:
            if began is not None:
                self.last_s = time.monotonic() - began

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            spec = [importlib.util.find_spec(name) for name in self._modules]
            places = {str(Path(s.origin).parents[1]) for s in spec if s is not None and s.origin is not None}
            # Isolated, and without this process's environment: a stranger's program has nothing to find there.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), self._job, *sorted(places)],
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
                    log.debug("the process of %s left bytes unread", self._job)

    def _write(self, descriptor: int, data: bytes, until: float) -> None:
        for part in (LENGTH.pack(len(data)), data):
            view = memoryview(part)
            while view:
                _wait([], [descriptor], until)
                view = view[os.write(descriptor, view[:_READ]) :]

    def _read(self, descriptor: int, size: int, until: float) -> bytes:
        pieces, left = [], size
        while left:
            _wait([descriptor], [], until)
            piece = os.read(descriptor, min(left, _READ))
            if not piece:
                raise BrokenPipeError("the process closed its end")
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

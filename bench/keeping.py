"""What benches share that may be cut off: a limit of seconds, and a file that always holds what was measured so far."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral.files import write_atomically


class Cut(Exception):
    """The limit has passed."""


class Limit:
    """Seconds that a whole run may take; None: as many as it wants. They count from when this is made."""

    def __init__(self, seconds: float | None) -> None:
        self._began, self.seconds = time.monotonic(), seconds

    @property
    def used(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds that are left, 0 where the limit has passed; None without one."""
        return None if self.seconds is None else max(0.0, self.seconds - self.used)

    @property
    def passed(self) -> bool:
        """Whether nothing more may begin."""
        return self.left == 0.0

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Within: Cut is raised in the main thread when the limit passes, whatever runs there."""
        if self.seconds is None:
            yield
            return
        if self.passed:
            raise Cut

        def cut(number: int, frame: Any) -> None:
            raise Cut

        before = signal.signal(signal.SIGALRM, cut)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, self.left or 0.0))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def write_json(path: Path | None, document: dict[str, Any], indent: int = 1) -> None:
    """Write a document in one move: whoever ends the run meanwhile finds the one before. None: nowhere."""
    if path is None:
        return
    write_atomically(path, (json.dumps(document, indent=indent) + "\n").encode(), mode=0o644)

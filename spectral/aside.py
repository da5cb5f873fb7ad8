"""Work on a GPU beside what another thread runs there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def aside(devices: Iterable[torch.device]) -> Iterator[None]:
    """What this thread launches and copies inside does not wait for what other threads have launched since, and is done
    at the end. (On the usual stream every small copy from the host waits for the step that runs.)

    What is made inside may be used anywhere after that. Nothing that is freed meanwhile by another thread may have been
    made in here before: its memory could be taken while a step still reads it. On other devices nothing changes.
    """
    with ExitStack() as stack:
        streams = [_stream(device) for device in dict.fromkeys(devices) if device.type == "cuda"]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            stack.enter_context(torch.cuda.stream(stream))
        yield
        for stream in streams:
            stream.synchronize()

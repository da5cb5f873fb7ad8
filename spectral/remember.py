"""Results of pure functions, kept by what they were made from.

What the kernels and codecs of a setting need on the host is arithmetic on its widths, a second or two for a large
model: too long when memory is short. It is made ahead (spectral.foresight) and found here. Keys are content, so
nothing here can be out of date; the least recently used goes first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

MAX_BYTES = 512 << 20


def digest(*arrays: np.ndarray) -> bytes:
    """Shapes, types and contents of arrays, in 16 bytes."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.digest()


def nbytes_of(value: Any) -> int:
    """Bytes of the arrays in a result: an array, a dataclass, or a list, tuple or dictionary of such."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(nbytes_of(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return sum(map(nbytes_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(nbytes_of, value))
    return 0


class Memory:
    """At most `max_bytes` of results. Any thread may ask; two that ask for the same at once may both make it."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.nbytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under this key, or is made now. Nobody may change it."""
        with self._lock:
            known = self._found.get(key)
            if known is not None:
                self.hits += 1
                self._found.move_to_end(key)
                found: T = known[0]
                return found
            self.misses += 1
        found = make()
        size = nbytes_of(found)
        with self._lock:
            if key not in self._found and size <= self.max_bytes:
                self._found[key] = found, size
                self.nbytes += size
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._found.popitem(last=False)[1][1]
        return found


memory = Memory()
"""The process's."""

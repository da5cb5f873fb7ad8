"""Ways to damage inputs: bytes, and values of JSON-like documents."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

INTERESTING = (0, 1, -1, 7, 8, 16, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64)
NUMBERS = (0.0, -0.0, 0.5, 1e-308, 5e-324, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "a",
    "exact",
    "auto",
    "8x",
    "\x00",
    "\r\nX: y",
    "\x1b[31m",
    "é",
    "日本",
    "\ud800",
    "\u202e",
    "<script>",
    "{{7*7}}",
)
TEXTS += ("../../etc/passwd", "%s%n", "1e999", "-0", "NaN", "true", "null", "0x10", "A" * 300, "1" * 5000)
BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc1", b"\n", b'"', b"{", b"[", b"}", b"]", b"\xed\xa0\x80", b"\xf4\x90")


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """A few changes of bytes: flips, cuts, repeats, insertions, and 8-byte numbers that readers take for lengths."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(8)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = random.randrange(256)
        elif kind == 2:
            del found[at : at + random.choice((1, 2, 8, 64))]
        elif kind == 3:
            found[at:at] = random.choice(BYTES) * random.choice((1, 1, 2, 50))
        elif kind == 4:
            found[at:at] = found[at : at + random.choice((1, 4, 32))]
        elif kind == 5:
            size = random.choice((1, 2, 4, 8))
            value = (random.choice(INTERESTING) + random.choice((-1, 0, 1))) % (1 << (8 * size))
            found[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))
        elif kind == 6:
            del found[at:]
        else:
            found += bytes(random.randrange(256) for _ in range(random.randrange(16)))
    return bytes(found)


def any_value(random: Random, depth: int = 0) -> Any:
    """A value of any kind, with a preference for edges."""
    kind = random.randrange(12 if depth < 3 else 8)
    if kind < 2:
        return random.choice(INTERESTING) * random.choice((1, 1, 1, -1))
    if kind == 2:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(TEXTS)
    if kind < 8:
        return random.choice((None, True, False, 0, 10**30, [], {}))
    if kind < 10:
        return [any_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 10:
        return {random.choice(TEXTS): any_value(random, depth + 1) for _ in range(random.randrange(4))}
    nested: Any = 1
    for _ in range(random.choice((5, 70, 300))):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    return nested


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a document."""
    found = [path] if path else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            found += places(value, (*path, index))
    return found


def mutate_document(document: Any, random: Random, words: tuple[str, ...] = ()) -> Any:
    """A copy with a few values replaced, removed, repeated, moved or added. `words`: names of fields to add."""
    found = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        where = places(found)
        if not where:
            return any_value(random)
        *above, last = random.choice(where)
        holder = found
        for step in above:
            holder = holder[step]
        kind = random.randrange(7)
        if kind < 3:
            holder[last] = any_value(random)
        elif kind == 3:
            del holder[last]
        elif kind == 4 and isinstance(holder, list):
            holder[last:last] = [copy.deepcopy(holder[last]) for _ in range(random.choice((1, 2, 40)))]
        elif kind == 5 and isinstance(holder, dict):
            holder[random.choice((*words, *TEXTS))] = any_value(random)
        elif isinstance(holder[last], (int, float)) and not isinstance(holder[last], bool):
            holder[last] += random.choice((-1, 1, 0.5, 2**31))
        else:
            holder[last] = copy.deepcopy(_at(found, random.choice(where)))
    return found


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    try:
        for step in path:
            document = document[step]
    except (KeyError, IndexError, TypeError):
        return None
    return document


def json_bytes(document: Any) -> bytes:
    """JSON as an attacker writes it: NaN and halves of surrogate pairs included."""
    return json.dumps(document, default=str).encode("utf-8", "surrogatepass")

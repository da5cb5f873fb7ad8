"""The JSON document of a profile file, checked field by field before anything is built or shown from it.

A checksum only says that a file is whole: whoever makes a profile makes its checksum as well. So every number has
bounds, every text a length and no control characters, and what is free (provenance) is bounded as a whole. Imports
nothing heavy: the gateway reads ladders with it.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from spectral.errors import ProfileError
from spectral.text import encodable

MAX_TEXT = 1000
MAX_LAYERS, MAX_SETTINGS, MAX_HEADS = 4096, 256, 65536
MAX_UNIT = 4096
"""Numbers of a unit: its basis is inverted, which takes the cube of it."""
MAX_PAGE, MAX_WINDOW, MAX_SINKS, MAX_BLOCK = 256, 1 << 16, 1 << 12, 1 << 20
MAX_BYTES = 1 << 50
MAX_FREE_NODES, MAX_FREE_DEPTH, MAX_FREE_TEXT = 20_000, 16, 20_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_COUNTS = {"sinks": MAX_SINKS, "window": MAX_WINDOW, "window_bits": 64, "page_nbytes": MAX_BYTES}
_COUNTS |= {"window_nbytes": MAX_BYTES}
_FIGURES = ("energy", "kl_mean", "kl_p99", "top1", "top5", "perplexity", "exact_perplexity", "recall")
_ROW = {"name", "bits_per_element", "rank", "page_tokens", *_COUNTS}
_LAYER = {"key_dim", "value_dim", "heads"}
_SIDES = ("both", "key", "value")


def parse_document(text: str) -> Any:
    """The JSON value of a text; NaN and infinities, which JSON does not have, are refused. Raises ProfileError."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProfileError(f"its document is no JSON: {str(error)[:200]}") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def check_document(meta: Any) -> dict[str, Any]:
    """The document, if every field has its type and is within its bounds. Raises ProfileError naming the field."""
    found = _object(meta, "the document")
    for name in ("model", "fingerprint", "default"):
        _text(found, name)
    _count(found, "token_nbytes", 0, MAX_BYTES)
    _count(found, "block_tokens", 0, MAX_BLOCK)
    layers = _list(found, "layers", 1, MAX_LAYERS)
    for index, layer in enumerate(layers):
        if layer is not None:
            _check_layer(layer, f"layers[{index}]")
    if found.get("transform", "none") != "none":
        raise ProfileError('transform: must be "none", or left out where pages are transformed')
    if "sliding" in found:
        for index, window in enumerate(_list(found, "sliding", 0, MAX_LAYERS)):
            if window is not None and not _is_count(window, 1, MAX_BYTES):
                raise ProfileError(f"sliding[{index}]: must be null or a number of tokens")
    check_ladder(found)
    _check_free(_object(found.get("provenance"), "provenance"))
    return found


def check_ladder(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The ladder's rows, checked. Raises ProfileError naming the field."""
    rows = _list(found, "ladder", 1, MAX_SETTINGS)
    for index, row in enumerate(rows):
        where = f"ladder[{index}]"
        facts = _object(row, where)
        unknown = sorted(str(name)[:40] for name in facts.keys() - _ROW - set(_FIGURES))
        if unknown:
            raise ProfileError(f"{where}: unknown field {unknown[0]!r}")
        if not isinstance(facts.get("name"), str) or _NAME.fullmatch(facts["name"]) is None:
            raise ProfileError(f"{where}.name: must be a word of letters, digits and . _ + - (at most 64)")
        for name, most in _COUNTS.items():
            _count(facts, name, 0, most, where)
        _count(facts, "page_tokens", 8, MAX_PAGE, where)
        for name, largest in (("bits_per_element", 64.0), ("rank", 1e9)):
            if not _is_number(facts.get(name), 0.0, largest):
                raise ProfileError(f"{where}.{name}: must be a number from 0 to {largest:g}")
        for name in _FIGURES:
            if facts.get(name) is not None and not _is_number(facts[name], -1e6, 1e300):
                raise ProfileError(f"{where}.{name}: must be a finite number, or null where it was not measured")
    return rows


def check_sizes(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The ladder's rows, of which only what a planner counts with is looked at: name, KL and sizes. Raises ProfileError
    naming the field."""
    rows = _list(found, "ladder", 1, MAX_SETTINGS)
    for index, row in enumerate(rows):
        where = f"ladder[{index}]"
        facts = _object(row, where)
        if not isinstance(facts.get("name"), str) or _NAME.fullmatch(facts["name"]) is None:
            raise ProfileError(f"{where}.name: must be a word of letters, digits and . _ + - (at most 64)")
        _count(facts, "page_tokens", 1, MAX_PAGE, where)
        for name in ("page_nbytes", "window_nbytes"):
            if not _is_number(facts.get(name), 0.0, MAX_BYTES):
                raise ProfileError(f"{where}.{name}: must be a number of bytes")
        if facts.get("kl_mean") is not None and not _is_number(facts["kl_mean"], 0.0, 1e300):
            raise ProfileError(f"{where}.kl_mean: must be a number of nats, or null")
    return rows


def _check_layer(layer: Any, where: str) -> None:
    facts = _object(layer, where)
    if facts.keys() - {"sides"} != _LAYER:
        raise ProfileError(f"{where}: must have {', '.join(sorted(_LAYER))}, may have sides, and nothing else")
    for name in ("key_dim", "value_dim"):
        _count(facts, name, 1, MAX_UNIT, where)
    for number, pair in enumerate(_list(facts, "heads", 1, MAX_HEADS, where)):
        place = f"{where}.heads[{number}]"
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_count(x, 0, MAX_HEADS) for x in pair):
            raise ProfileError(f"{place}: must be the first head and the one behind the last")
        if (pair[1] - pair[0]) * (facts["key_dim"] + facts["value_dim"]) > MAX_UNIT:
            raise ProfileError(f"{place}: a unit has at most {MAX_UNIT} numbers")
    if "sides" in facts:
        sides = _list(facts, "sides", 1, MAX_HEADS, where)
        if len(sides) != len(facts["heads"]) or any(side not in _SIDES for side in sides):
            raise ProfileError(f"{where}.sides: must say {', '.join(_SIDES[:2])} or {_SIDES[2]} for every unit")


def _check_free(value: dict[str, Any]) -> None:
    """What may hold anything is bounded as a whole."""
    rest: list[tuple[Any, int]] = [(value, 1)]
    seen = 0
    while rest:
        part, depth = rest.pop()
        seen += 1
        if depth > MAX_FREE_DEPTH or seen > MAX_FREE_NODES:
            raise ProfileError(f"provenance: more than {MAX_FREE_NODES} values, or deeper than {MAX_FREE_DEPTH} levels")
        if isinstance(part, dict):
            rest += [(item, depth + 1) for pair in part.items() for item in pair]
        elif isinstance(part, list):
            rest += [(item, depth + 1) for item in part]
        elif isinstance(part, str):
            if len(part) > MAX_FREE_TEXT or not encodable(part):
                raise ProfileError(f"provenance: a text is over {MAX_FREE_TEXT} characters, or no Unicode text")
        elif isinstance(part, float):
            if not math.isfinite(part):
                raise ProfileError("provenance: a number is not finite")
        elif isinstance(part, int) and not -(2**63) <= part < 2**63:
            raise ProfileError("provenance: a number has more than 64 bits")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProfileError(f"{where}: must be an object")
    return value


def _list(facts: dict[str, Any], name: str, least: int, most: int, where: str = "") -> list[Any]:
    value = facts.get(name)
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ProfileError(f"{_path(where, name)}: must be a list of {least} to {most} entries")
    return value


def _text(facts: dict[str, Any], name: str) -> None:
    value = facts.get(name)
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ProfileError(f"{name}: must be a text of at most {MAX_TEXT} characters without control characters")


def _count(facts: dict[str, Any], name: str, least: int, most: int, where: str = "") -> None:
    if not _is_count(facts.get(name), least, most):
        raise ProfileError(f"{_path(where, name)}: must be a whole number from {least} to {most}")


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name

"""The texts in which models name a function and its arguments; what stands around them: server/toolcalls.py.

Read are JSON objects ({"name", "arguments"} and their relatives), name{...} and name[ARGS]{...} (Mistral), XML (Qwen's
coders, GLM, Llama 3's own functions), call:name{key:value} (Gemma) and [name(key=value)] (Llama 3.2 and 4). A call is
the function's name and an object; whatever is none of this gives None.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

Found = tuple[str, dict[str, Any]]

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_GEMMA = "call:"
_QUOTES = ("<escape>", '<|"|>')
_PHI = "functools"
STARTS = {"mistral": (), "json": (_FUNCTION, _PHI), "phi": (_PHI,), "gemma": (_GEMMA,), "gemma4": (_GEMMA,)}
"""Forms in which an answer may be calls from its first character on, without a tag; and what it begins with then,
beside { and [ and the functions' names."""
SKIPPED = ("[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>", "<|/tool_call|>", _PHI)
"""Marks between calls that say nothing."""
_LONGEST_NAME, _LONGEST_PYTHON, _DEEPEST = 256, 1 << 14, 32
_GAP = re.compile(r"[ \t\r\n;,]*")
_CALL_ID = re.compile(r"\[CALL_ID\][A-Za-z0-9]{1,64}")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,255}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON")
    return value


# What a model writes is read as JSON says and not as Python does: NaN, Infinity and 1e999 are no numbers.
_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).raw_decode


def read_calls(text: str, names: Sequence[str]) -> list[Found] | None:
    """All of a text as calls of functions with these names; None where any of it is something else."""
    calls: list[Found] = []
    at = skip_marks(text, 0)
    while at < len(text):
        found, at = _next(text, at, names)
        if not found:
            return None
        calls += found
        at = skip_marks(text, at)
    return calls or None


def _next(text: str, at: int, names: Sequence[str]) -> tuple[list[Found] | None, int]:
    """The calls that begin at a place, and where they end; None where there is none, or one that is not allowed."""
    if text.startswith(_FUNCTION, at):
        return _tagged(text, at, names)
    if text.startswith(_GEMMA, at):
        return _gemma(text, at + len(_GEMMA), names)
    if text[at] not in "{[":
        return _named(text, at, names)
    value, end = _json(text, at)
    items = value if isinstance(value, list) else [value]
    found = [_from_object(item, names) for item in items]
    if value is None and text[at] == "[":
        return _python(text, at, names)
    return (None if None in found else [call for call in found if call is not None]), end


def _from_object(item: Any, names: Sequence[str]) -> Found | None:
    if not isinstance(item, dict):
        return None
    function = item.get("function")
    if isinstance(function, dict):
        item = function
    name = item.get("name", function)
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        given = arguments
        arguments, end = _json(given)
        arguments = arguments if end == len(given) else None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, arguments


def _named(text: str, at: int, names: Sequence[str]) -> tuple[list[Found] | None, int]:
    """name{...}, name[ARGS]{...}, name[CALL_ID]id[ARGS]{...}, and GLM's name with its keys and values."""
    name = next((n for n in sorted(names, key=len, reverse=True) if text.startswith(n, at)), None)
    if name is None:
        return None, at
    at = _skip_space(text, at + len(name))
    if text.startswith(_KEY, at):
        pairs, at = _keys(text, at)
        return [(name, pairs)], at
    ident = _CALL_ID.match(text, at)
    at = _skip_space(text, ident.end()) if ident is not None else at
    at = _skip_space(text, at + len("[ARGS]")) if text.startswith("[ARGS]", at) else at
    value, at = _json(text, at)
    return ([(name, value)] if isinstance(value, dict) else None), at


# -- XML: by hand, since a regular expression for this takes the cube of the length on the wrong text ------------------


def _tagged(text: str, at: int, names: Sequence[str]) -> tuple[list[Found] | None, int]:
    """<function=name>, then Qwen's parameters or Llama 3's JSON, and </function>."""
    begin = at + len(_FUNCTION)
    name, mark, _ = text[begin : begin + _LONGEST_NAME].partition(">")
    end = text.find(_FUNCTION_END, begin)
    if not mark or name not in names or end < 0:
        return None, at
    body, after = text[begin + len(name) + 1 : end], end + len(_FUNCTION_END)
    value, stop = _json(body, _skip_space(body, 0))
    if isinstance(value, dict):
        return ([(name, value)] if stop == len(body) else None), after
    return [(name, dict(_parameters(body)))], after


def _parameters(text: str) -> Iterator[tuple[str, Any]]:
    """<parameter=key>value</parameter>, one after another; a line's end after and before the tags is theirs."""
    at = text.find(_PARAMETER)
    while at >= 0:
        at += len(_PARAMETER)
        end = text.find(">", at, at + _LONGEST_NAME)
        name = text[at:end]
        if end > at and not any(letter.isspace() for letter in name):
            close = text.find(_PARAMETER_END, end)
            if close < 0:
                return
            yield name, _value(text[end + 1 : close].removeprefix("\n").removesuffix("\n"))
            at = close + len(_PARAMETER_END)
        at = text.find(_PARAMETER, at)


def _keys(text: str, at: int) -> tuple[dict[str, Any], int]:
    """<arg_key>key</arg_key><arg_value>value</arg_value>, one after another, and where they end."""
    pairs: dict[str, Any] = {}
    while text.startswith(_KEY, at):
        end = text.find(_KEY_END, at)
        begin = _skip_space(text, end + len(_KEY_END)) if end >= 0 else -1
        stop = text.find(_VALUE_END, begin) if begin >= 0 and text.startswith(_VALUE, begin) else -1
        if stop < 0:
            break
        pairs[text[at + len(_KEY) : end].strip()] = _value(text[begin + len(_VALUE) : stop])
        at = _skip_space(text, stop + len(_VALUE_END))
    return pairs, at


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is JSON, else the text itself."""
    value, end = _json(text)
    return text if end < len(text) or (value is None and text != "null") else value


# -- Gemma -------------------------------------------------------------------------------------------------------------


def _gemma(text: str, at: int, names: Sequence[str]) -> tuple[list[Found] | None, int]:
    name = next((n for n in sorted(names, key=len, reverse=True) if text.startswith(n + "{", at)), None)
    if name is None:
        return None, at
    value, at = _gemma_value(text, at + len(name), 0)
    return ([(name, value)] if isinstance(value, dict) else None), at


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Objects have bare keys, texts stand between two quotes of Gemma's own; the value and where it ends."""
    if depth > _DEEPEST or at >= len(text):
        return None, at
    if text[at] in "{[":
        return _gemma_items(text, at, depth)
    for quote in _QUOTES:
        if text.startswith(quote, at):
            end = text.find(quote, at + len(quote))
            return (None, at) if end < 0 else (text[at + len(quote) : end], end + len(quote))
    end = at
    while end < len(text) and text[end] not in ",}]":
        end += 1
    return _value(text[at:end].strip()), end


def _gemma_items(text: str, at: int, depth: int) -> tuple[Any, int]:
    named = text[at] == "{"
    closing = "}" if named else "]"
    pairs: dict[str, Any] = {}
    items: list[Any] = []
    at = skip_marks(text, at + 1)
    while at < len(text) and text[at] != closing:
        key = _WORD.match(text, at) if named else None
        if named:
            if key is None or not text.startswith(":", key.end()):
                return None, at
            at = key.end() + 1
        value, end = _gemma_value(text, at, depth + 1)
        if end == at:
            return None, at
        if key is not None:
            pairs[key[0]] = value
        else:
            items.append(value)
        at = skip_marks(text, end)
    return (pairs if named else items) if at < len(text) else None, at + 1


# -- Python ------------------------------------------------------------------------------------------------------------


def _python(text: str, at: int, names: Sequence[str]) -> tuple[list[Found] | None, int]:
    """[name(key=value), ...] to the end of the text."""
    if len(text) - at > _LONGEST_PYTHON:
        return None, at
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes in texts, which nobody here can mend
            parsed = ast.parse(text[at:].strip(), mode="eval").body
        found = [_python_call(item, names) for item in parsed.elts] if isinstance(parsed, ast.List) else [None]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, at
    return (None if None in found else [call for call in found if call is not None]), len(text)


def _python_call(item: ast.expr, names: Sequence[str]) -> Found | None:
    """Arguments must have names, and values that JSON has too. Raises ValueError for others."""
    if not isinstance(item, ast.Call) or item.args:
        return None
    name = ast.unparse(item.func) if isinstance(item.func, (ast.Name, ast.Attribute)) else ""
    if name not in names:
        return None
    arguments = {str(word.arg): _python_value(word.value) for word in item.keywords}
    json.dumps(arguments, allow_nan=False)
    return name, arguments


def _python_value(item: ast.expr) -> Any:
    if isinstance(item, ast.Name):
        return {"true": True, "false": False, "null": None}[item.id] if item.id in ("true", "false", "null") else _no()
    if isinstance(item, ast.List):
        return [_python_value(part) for part in item.elts]
    if isinstance(item, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in item.keys]
        if not all(isinstance(key, str) for key in keys):
            _no()
        return {key: _python_value(part) for key, part in zip(keys, item.values, strict=True)}
    value = ast.literal_eval(item)
    return value if value is None or isinstance(value, (str, int, float)) else _no()


def _no() -> Any:
    raise ValueError("not a value that JSON has")


# -- parts -------------------------------------------------------------------------------------------------------------


def _json(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value at a place of a text and where what follows it begins; (None, that place) where there is none."""
    try:
        value, end = _decode(text, at)
    except (ValueError, RecursionError):
        return None, at
    return value, _skip_space(text, end)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def skip_marks(text: str, at: int = 0) -> int:
    """Behind space, separators and marks."""
    while True:
        found = _GAP.match(text, at)
        at = found.end() if found is not None else at
        mark = next((m for m in SKIPPED if text.startswith(m, at)), None)
        if mark is None:
            return at
        at += len(mark)

"""Triton's interpreter, without what it does for nothing: half of the time of the kernels' tests.

A launch replaces the functions of `triton.language` by interpreted ones and puts the old ones back at its end. Every
call of a device function within it goes through all members of the language again, to replace what is replaced already.
Here only the launch does. And every sum and product of integers is made again in 64 bits to see whether it overflows,
for an assertion that is then left out unless the interpreter's option `debug` is set.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import suppress
from functools import cache
from types import FunctionType
from typing import Any


def make_quick(interpreter: Any) -> None:
    """Change the module triton.runtime.interpreter for this process. What a release of Triton does in another way
    stays as it is."""
    builder = getattr(interpreter, "interpreter_builder", None)
    with suppress(AttributeError, TypeError):  # other options
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        _replace_once(interpreter)


def _replace_once(interpreter: Any) -> None:
    replace, scope_of, launch = interpreter._patch_lang, interpreter._LangPatchScope, interpreter.GridExecutor.__call__
    names = (interpreter.tl, interpreter.tl.core)
    launches: list[set[int]] = []  # those that run: what each has replaced

    @cache
    def seen_by(fn: FunctionType) -> frozenset[int]:
        """What a kernel's module knows of the language."""
        return frozenset(id(x) for x in fn.__globals__.values() if inspect.ismodule(x) and x in names)

    def once(fn: FunctionType) -> Any:
        if launches and seen_by(fn) <= launches[-1]:
            return scope_of()
        scope = replace(fn)
        if launches:  # functions of the language are also called by the host
            launches[-1].update(seen_by(fn))
        return scope

    def launched(executor: Any, *arguments: Any, **named: Any) -> None:
        launches.append(set())
        try:
            launch(executor, *arguments, **named)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched

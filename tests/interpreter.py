"""Triton's interpreter, without what it does over and over: a third of the time of the kernels' tests.

A launch replaces the functions of `triton.language` by interpreted ones and puts the old ones back at its end. Every
call of a device function within it goes through all members of the language again, to replace what is replaced already.
Here only the launch does.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any


def replace_once(interpreter: Any) -> None:
    """Within a launch the language is replaced once. `interpreter`: the module triton.runtime.interpreter. Nothing is
    changed where a release of Triton goes about it in another way."""
    replace, scope_of = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if replace is None or scope_of is None:
        return
    names = (interpreter.tl, interpreter.tl.core)
    replaced: list[frozenset[int]] = []  # of the launch that runs: what it has replaced

    @cache
    def seen_by(fn: FunctionType) -> frozenset[int]:
        """What a kernel's module knows of the language."""
        return frozenset(id(x) for x in fn.__globals__.values() if inspect.ismodule(x) and x in names)

    class Launch(scope_of):  # type: ignore[misc, valid-type]
        """What is put back when the launch has ended."""

        def restore(self) -> None:
            replaced.clear()
            super().restore()

    def once(fn: FunctionType) -> Any:
        if replaced and seen_by(fn) <= replaced[-1]:
            return scope_of()
        scope = replace(fn)
        if not replaced:
            scope.__class__ = Launch
            replaced.append(seen_by(fn))
        return scope

    interpreter._patch_lang = once

"""Triton's interpreter, without what it does for nothing: two thirds of the time of the kernels' tests.

A launch replaces the functions of `triton.language` by interpreted ones and puts the old ones back at its end. Every
call of a device function within it goes through all members of the language again, to replace what is replaced already.
Here only the launch does. And every sum and product of integers is made again in 64 bits to see whether it overflows,
for an assertion that is then left out unless the interpreter's option `debug` is set. And every value gets a type and a
shape of its own, put together from many objects, where a program has a handful of them: here the same are used again.
And two operands of one shape go a long way to find that neither has to be broadcast.
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
    with suppress(AttributeError):
        _share_types(interpreter)
    with suppress(AttributeError):
        _keep_what_fits(type(interpreter.interpreter_semantic))


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


def _share_types(interpreter: Any) -> None:
    core, numpy_type = interpreter.tl.core, interpreter._get_np_dtype
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    if [list(inspect.signature(made).parameters) for made in (numpy_type, make_block, make_tensor)] != [
        ["tt_dtype"], ["self", "element_ty", "shape"], ["self", "handle", "type"],
    ]:  # fmt: skip
        return
    numpy_types: dict[str, Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, int]] = {}
    sides: dict[tuple[int, ...], tuple[Any, Any]] = {}
    names: dict[tuple[str, tuple[int, ...]], str] = {}

    def shared_numpy_type(tt_dtype: Any) -> Any:
        scalar = tt_dtype.element_ty if tt_dtype.is_block() else tt_dtype
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(tt_dtype)
        return numpy_types[scalar.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([size if type(size) is int else core._unwrap_if_constexpr(size) for size in shape])
        if key not in shapes:  # also what cannot be a shape
            make_block(self, element_ty, shape)
            shapes[key] = self.shape, self.numel
            return
        self.element_ty = element_ty
        self.shape, self.numel = shapes[key]
        name = element_ty.name, key
        if name not in names:
            names[name] = f"<{self.shape}, {element_ty}>"
        self.name = names[name]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in sides:
            make_tensor(self, handle, type)
            sides[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sides[key]

    interpreter._get_np_dtype = shared_numpy_type
    core.block_type.__init__, core.tensor.__init__ = block, tensor


def _keep_what_fits(semantic: Any) -> None:
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value

"""The interpreter that tests/interpreter.py has made quick is Triton's still."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a GPU here")


@triton.jit
def _doubled(x):
    return x + x


@triton.jit
def _kernel(source, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.sum(_doubled(_doubled(tl.load(source + place))), 0) + place)


def test_device_functions_compute_and_a_launch_leaves_the_language_as_it_was() -> None:
    from triton.runtime import interpreter

    assert interpreter._patch_lang.__module__ == "tests.interpreter", "this release of Triton is as slow as ever"
    source, out = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    found = []
    for _ in range(3):
        _kernel[(1,)](source, out, SIZE=8)
        assert out.tolist() == [4 * 28 + i for i in range(8)]
        found.append((dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))))
    assert found[1] == found[0] == found[2]  # the first launch of all leaves inherited members as the class's own


def test_types_and_shapes_that_are_used_again_are_those_that_triton_makes() -> None:
    from triton.runtime import interpreter

    assert tl.block_type.__init__.__module__ == "tests.interpreter", "this release of Triton is as slow as ever"
    numpy_types = {tl.int1: "bool", tl.int32: "int32", tl.bfloat16: "uint16", tl.float8e5: "uint8"}
    for element, numpy_type in [*numpy_types.items(), (tl.pointer_type(tl.float32), "uint64")]:
        first, second = (tl.block_type(element, [4, tl.constexpr(8)]) for _ in range(2))
        assert first == second and first.shape.values == [4, 8] and first.numel == 32
        assert first.name == second.name == f"<{first.shape}, {element}>" and first.shape is second.shape
        assert interpreter._get_np_dtype(first) == interpreter._get_np_dtype(element) == np.dtype(numpy_type)
        values = [tl.tensor(f"handle {i}", kind) for i, kind in enumerate((first, second, element))]
        assert [value.handle for value in values] == ["handle 0", "handle 1", "handle 2"]
        assert [value.dtype for value in values] == [element] * 3 and values[1].type is second
        assert [len(value.shape) for value in values] == [2, 2, 0]
        assert [value.numel.value for value in values] == [32, 32, 1]
        assert [size.value for size in values[1].shape] == [4, 8]
    for _ in range(2):  # what is refused is refused every time
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.int32, [3])
        with pytest.raises(TypeError, match="0d"):
            tl.block_type(tl.int32, [])


def test_operands_of_one_shape_stay_and_others_are_broadcast() -> None:
    from triton.runtime import interpreter

    def value(*sizes):
        data = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
        return tl.tensor(interpreter.TensorHandle(data, tl.int32), tl.block_type(tl.int32, list(sizes)))

    spread = interpreter.interpreter_semantic.broadcast_impl_value
    left, right = value(4, 2), value(4, 2)
    assert [id(side) for side in spread(left, right)] == [id(left), id(right)]
    for one, other in ((value(4, 1), value(1, 2)), (value(2), value(4, 2)), (value(4, 2), value(1, 1))):
        for side in spread(one, other):
            assert side.type.shape.values == [4, 2] and side.handle.data.shape == (4, 2)
    with pytest.raises(ValueError, match="incompatible dimensions"):
        spread(value(4), value(2))


def test_a_launch_replaces_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    kinds = []
    once = interpreter._patch_lang

    def counted(fn):
        scope = once(fn)
        kinds.append(bool(scope._changes))
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    out = torch.zeros(8, dtype=torch.int32)
    _kernel[(1,)](torch.arange(8, dtype=torch.int32), out, SIZE=8)
    assert len(kinds) > 3 and kinds[0] and sum(kinds) <= 2  # the language's own functions know it by another name
    broken = torch.zeros(8)
    with pytest.raises(Exception, match="arange"):
        _kernel[(1,)](broken, out, SIZE=7)
    _kernel[(1,)](torch.arange(8, dtype=torch.int32), out, SIZE=8)
    assert out.tolist() == [4 * 28 + i for i in range(8)]

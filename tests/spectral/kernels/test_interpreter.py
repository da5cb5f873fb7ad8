"""The interpreter that tests/interpreter.py has made quick is Triton's still."""

from __future__ import annotations

import os

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

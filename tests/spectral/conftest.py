"""Where there is no GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import pytest

from tests.interpreter import make_quick

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # Triton is for Linux alone
        from triton.runtime import interpreter

        make_quick(interpreter)


@pytest.fixture
def restored() -> Any:
    """transformers' own rotary functions, while a test runs (engines of other tests replace them), and after it."""
    found = [(name, m) for name, m in list(sys.modules.items()) if ".modeling_" in name]
    homes = {name: m for name, m in found if "apply_rotary_pos_emb" in vars(m)}
    kept = {name: module.apply_rotary_pos_emb for name, module in homes.items()}
    for name, module in homes.items():
        module.apply_rotary_pos_emb = getattr(kept[name], "original", kept[name])
    yield
    for name, module in homes.items():
        module.apply_rotary_pos_emb = kept[name]


@pytest.fixture
def kernels_here(monkeypatch: pytest.MonkeyPatch, restored: None) -> None:
    """Kernels of products of a few rows serve this device, and nothing is held against them."""
    from spectral import few_rows, lean, overlap

    monkeypatch.setattr(few_rows, "_here", lambda x: True)
    monkeypatch.setattr(lean, "_here", lambda x: True)
    monkeypatch.setattr(few_rows, "_distrusted", [])
    monkeypatch.setattr(overlap, "early_launches", few_rows.EarlyLaunches())

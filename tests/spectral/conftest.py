"""Where there is no GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os

from tests.interpreter import make_quick

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # Triton is for Linux alone
        from triton.runtime import interpreter

        make_quick(interpreter)

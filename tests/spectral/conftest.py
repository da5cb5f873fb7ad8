"""Where there is no GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os

from tests.interpreter import replace_once

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # Triton is for Linux alone
        from triton.runtime import interpreter

        replace_once(interpreter)

"""A real Chromium for tests; without one they are skipped, unless the run has installed it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip, or fail where the run has installed what is missing."""
    if os.environ.get("SPECTRAL_REQUIRE_TOOLS"):
        pytest.fail(f"{what} is missing although this run installs it")
    pytest.skip(f"{what} is not installed (pip: playwright; Debian's package: chromium)")


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser."""
    program = shutil.which("chromium")
    if program is None:
        missing("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    with sync_playwright() as playwright:
        # Root needs --no-sandbox; a container's /dev/shm may be too small for a browser.
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        try:
            yield browser
        finally:
            browser.close()

"""How long a browser takes from the console's address to the live map of memory, with nothing in its cache.

    python bench/console_load.py [--loads 10] [--json FILE]

Starts the real server with the shipped configuration and Debian's Chromium (playwright drives it); both share the
machine's cores. Each load is in a context of its own. Printed: the median, the longest, and the machine's load.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

from harness import running_server  # noqa: E402

from bench.report import deliver, run_facts  # noqa: E402
from tests.chromium import chromium  # noqa: E402


def first_map(browser: Any, url: str) -> float:
    """Seconds from the address to the first bar of the map."""
    context = browser.new_context()
    page = context.new_page()
    page.goto("about:blank")
    began = time.monotonic()
    page.goto(url, wait_until="commit")
    page.locator("#devices .bar").first.wait_for()
    took = time.monotonic() - began
    context.close()
    return took


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=10, help="how often the page is loaded")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server, chromium() as browser:
        before = os.getloadavg()
        took = [first_map(browser, server.url) for _ in range(arguments.loads)]
        version = browser.version
    figures = {
        "median_s": round(statistics.median(took), 3),
        "longest_s": round(max(took), 3),
        "loads_s": [round(one, 3) for one in took],
        "chromium": version,
        "load_average": {"before": before, "after": os.getloadavg()},
    }
    deliver({**run_facts(), "first_map": figures}, arguments.json)


if __name__ == "__main__":
    main()

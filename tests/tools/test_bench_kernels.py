"""What bench/kernels.py tells of times against lengths."""

from __future__ import annotations

from typing import Any

from bench.report import time_per_byte


def row(rows: int, context: int, us: float, setting: str = "8x", prefer: str = "speed") -> dict[str, Any]:
    found = {"rows": rows, "context": context, "us": us, "setting": setting, "prefer": prefer}
    return {**found, "codes_and_window_bytes": rows * context * 100}


def test_time_per_byte_is_of_cases_that_hold_as_much() -> None:
    rows = [row(4, 1000, 50.0), row(1, 4000, 40.0), row(2, 2000, 44.0), row(1, 1000, 90.0)]
    rows += [row(4, 1000, 30.0, "16x"), row(4, 1000, 70.0, prefer="quality"), row(1, 4000, 77.0, prefer="quality")]
    first, second = time_per_byte(rows)
    assert (first["setting"], first["prefer"], first["tokens"]) == ("8x", "speed", 4000)
    assert first["ns_per_kb"] == {"1000": 125.0, "2000": 110.0, "4000": 100.0} and first["spread"] == 1.25
    assert second["prefer"] == "quality" and abs(second["spread"] - 1.1) < 1e-9
    assert time_per_byte(rows[3:5]) == [], "one length of each says nothing"

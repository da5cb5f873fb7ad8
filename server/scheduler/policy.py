"""When to try again. Pure: no clock, no I/O."""

from __future__ import annotations

MAX_DELAY_S = 30.0
STABLE_AFTER_S = 60.0
RETRY_PERMANENT_S = 30.0
KILLED_MAX_DELAY_S = 4.0
"""Who was killed from outside did nothing wrong; but it may have been the kernel, out of memory."""
KILLED = ("signal 9", "signal 15")


def restart_delay(failures_in_a_row: int, *, killed: bool = False) -> float:
    """Seconds before the next start: at once after the first failure, then 1, 2, 4, ... up to half a minute, or up
    to KILLED_MAX_DELAY_S where somebody else has killed the worker."""
    if failures_in_a_row <= 1:
        return 0.0
    return float(min(KILLED_MAX_DELAY_S if killed else MAX_DELAY_S, 2.0 ** (min(failures_in_a_row, 32) - 2)))


def failures_after(previous: int, hot_for_s: float | None, load_s: float = STABLE_AFTER_S) -> int:
    """Failures in a row, one more having happened. A worker that was hot for as long as its load took, or for a
    minute, clears the count: restarting it at once costs at most as much as it gives."""
    enough = min(max(1.0, load_s), STABLE_AFTER_S)
    return 1 if hot_for_s is not None and hot_for_s >= enough else previous + 1


def retry_after(state: str, seconds_to_next_start: float) -> int:
    """Whole seconds for the Retry-After header."""
    if state == "failed":
        return max(1, min(int(MAX_DELAY_S), round(seconds_to_next_start) + 1))
    return 2

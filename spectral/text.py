"""Text from elsewhere (pure: no I/O, no clock, no logging)."""

from __future__ import annotations


def encodable(text: str) -> bool:
    """Whether a text has UTF-8: JSON's escapes can write half a surrogate pair, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

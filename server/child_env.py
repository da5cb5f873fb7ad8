"""The environment of the processes that the server starts: its own, without the configuration, which may hold keys."""

from __future__ import annotations

import os
from collections.abc import Mapping

PREFIX, DELIMITER = "SPECTRAL_", "__"
_WHOLE = ("SPECTRAL_MODELS", "SPECTRAL_API_KEY")


def child_environment(**more: str) -> dict[str, str]:
    """What a child gets, and `more`."""
    return {**without_configuration(os.environ), **more}


def without_configuration(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are not the configuration's."""
    return {name: value for name, value in environment.items() if not _is_configuration(name.upper())}


def _is_configuration(name: str) -> bool:
    return name in _WHOLE or (name.startswith(PREFIX) and DELIMITER in name)

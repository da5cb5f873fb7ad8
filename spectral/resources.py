"""Where the files shipped with Spectral are: embedded models, profiles and the default configuration.

Torch-free on purpose: the gateway and the command line import it. In a checkout the data lie at the root of the
repository; in an installed wheel they lie under ``spectral/_data``.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ALIASES = {"demo": "demo-7m", "demo-7m": "demo-7m"}


def data_root() -> Path:
    """The folder that holds ``models``, ``profiles`` and ``config.yaml``."""
    checkout = _PACKAGE.parent
    # Both marks are asked for: a stray pyproject.toml in site-packages must not pass for a checkout.
    if (checkout / "pyproject.toml").is_file() and (checkout / "models").is_dir():
        return checkout
    return _PACKAGE / "_data"


def data_path(*parts: str) -> Path:
    """The path of a shipped file; it need not exist."""
    return data_root().joinpath(*parts)


def cache_home() -> Path:
    """The folder for what was measured or made on this machine: $XDG_CACHE_HOME/spectral or ~/.cache/spectral; it need
    not exist. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectral"


def config_path() -> Path:
    """The configuration that is used when none is named."""
    return data_path("config.yaml")


def model_path(name: str | Path) -> str:
    """What to hand to a loader for a model's name.

    An existing folder and a hub name come back unchanged; ``demo`` and ``demo-7m`` become the embedded model's folder.
    """
    text = str(name)
    if Path(text).is_dir() or text not in _ALIASES:
        return text
    return str(data_path("models", _ALIASES[text]))


def profile_path(name: str | Path) -> Path | None:
    """The shipped profile of a model, found by the last part of its name; None when there is none."""
    text = str(name)
    last = _ALIASES.get(text, text.rstrip("/").rsplit("/", 1)[-1])
    if last in {"", ".", ".."}:
        return None
    path = data_path("profiles", f"{last}.safetensors")
    return path if path.is_file() else None

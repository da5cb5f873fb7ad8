"""The targets by name, and their shares of a run."""

from __future__ import annotations

import importlib

from tests.fuzz.harness import Target

SHARES = {
    "profile": 0.13,
    "profile_bytes": 0.12,
    "requests": 0.18,
    "ollama": 0.14,
    "json_bytes": 0.12,
    "tool_calls": 0.03,
    "frames": 0.155,
    "config": 0.005,
    "keys": 0.05,
    "headers": 0.05,
    "sessions": 0.015,
    "templates": 0.003,
    "grammars": 0.002,
}
"""Of all inputs: cheap ones get more."""

_WHERE = {
    "self_test": "self_test",
    "profile": "profiles",
    "profile_bytes": "profiles",
    "requests": "bodies",
    "ollama": "bodies",
    "json_bytes": "bodies",
    "tool_calls": "bodies",
    "frames": "frames",
    "config": "configs",
    "keys": "configs",
    "headers": "configs",
    "sessions": "sessions",
    "templates": "templates",
    "grammars": "grammars",
}


def load(name: str) -> Target:
    """A target, ready to run."""
    module = importlib.import_module(f"tests.fuzz.targets.{_WHERE[name]}")
    target: Target = module.TARGETS[name]()
    return target

"""Shared by all tests: quiet threads, the path to evaluation data beside the checkout, and honest skips."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch: spinning OpenMP threads make small matmuls up to hundreds of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.chromium import chromium

# What is imported stays: looking at it again and again takes a quarter of the time in which tests are collected, and
# pytest looks five times more at the end (see the hook below). Then it is looked at once: some libraries say what they
# still hold.
gc.disable()
atexit.register(gc.unfreeze)

if not torch.cuda.is_available():  # before anything imports kernels: they run in Triton's interpreter then
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """From now on garbage is what the tests leave."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium, or a skip that says what is missing."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def demo_path(root: Path) -> Path:
    """The embedded model's folder."""
    return root / "models" / "demo-7m"


@pytest.fixture(scope="session")
def shared_dir(root: Path) -> Path:
    """Data that lie beside the checkout. Absent: the test is skipped, except with SPECTRAL_CI=1, where it fails."""
    path = root.parent / "shared"
    if path.is_dir():
        return path
    if os.environ.get("SPECTRAL_CI") == "1":
        pytest.fail(f"SPECTRAL_CI=1 and {path} is missing: put the shared data beside the clone")
    pytest.skip(f"no {path.name} folder beside the checkout")

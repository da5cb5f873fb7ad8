"""Libraries are imported without the garbage collector, and afterwards it works as before."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectral.importing import uncollected

ROOT = Path(__file__).resolve().parents[2]


class Loop:
    """Garbage that only the collector finds."""

    def __init__(self, gone: list[int]) -> None:
        self.own, self.gone = self, gone

    def __del__(self) -> None:
        self.gone.append(1)


@pytest.fixture
def enabled() -> Iterator[None]:
    """The collector is on, and is afterwards what it was."""
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


@pytest.mark.usefixtures("enabled")
def test_nothing_is_collected_within_and_everything_afterwards() -> None:
    gone: list[int] = []
    with uncollected():
        assert not gc.isenabled()
        Loop(gone)
        kept = [[number] for number in range(5000)]  # many times the first generation's threshold
        assert not gone and len(kept) == 5000
    assert gc.isenabled()
    gc.collect()
    assert gone == [1]


@pytest.mark.usefixtures("enabled")
def test_it_is_as_before_after_an_error_within_another_one_and_in_another_thread() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled(), "the inner one found it off"
        thread = threading.Thread(target=uncollected().__enter__)
        thread.start()
        thread.join()
    assert gc.isenabled()
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_what_others_have_frozen_stays_frozen() -> None:
    count = gc.get_freeze_count()
    assert count > 0, "tests/conftest.py has frozen what it imported"
    with uncollected():
        kept = [[number] for number in range(1000)]
    assert gc.get_freeze_count() >= 0.9 * count and kept  # some of it ends by itself


def test_a_models_code_is_imported_without_collections_of_what_is_old() -> None:
    """Plainly, importing what transformers has around a model takes some fifty."""
    code = (
        "import gc, torch, numpy\nfound = []\n"
        "gc.callbacks.append(lambda phase, info: found.extend([1] * (phase == 'start' and info['generation'] > 0)))\n"
        "import spectral.hf\nprint(len(found), gc.isenabled(), gc.get_freeze_count())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    found, on, frozen = done.stdout.split()
    assert int(found) <= 5 and (on, frozen) == ("True", "0")

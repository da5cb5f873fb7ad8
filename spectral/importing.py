"""Importing a large library without the garbage collector, which would look again and again at what stays anyway."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing is collected, in any thread; afterwards as before. For imports alone: a model that is loaded
    may leave gigabytes to the collector.

    A fifth of what torch and transformers take to import goes into collections that find nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_freeze_count() == 0:  # all is old now, and is looked at with the old: otherwise twice before that
                gc.freeze()
                gc.unfreeze()
            gc.enable()

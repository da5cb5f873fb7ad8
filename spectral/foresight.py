"""What other settings will need on the host, made before they are asked for.

A squeeze comes when memory is short; then bytes must be back in a moment. Of a change of setting the arithmetic on
widths takes longest by far, and it needs no device: it is made here, a layer at a time, and found again by content
(spectral.remember).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from spectral.basis import holding
from spectral.kernels.quads import code_parcels, squeeze_parcels
from spectral.kernels.tables import layer_tables
from spectral.remember import memory
from spectral.unit_codec import class_deviation, unit_layout

if TYPE_CHECKING:
    from spectral.codec import LayerCodec
    from spectral.layout import PageLayout
    from spectral.profile import SpectralProfile

log = logging.getLogger("spectral.engine")

SHARE, KEEP_SHARE = 0.2, 0.5
"""Of one thread's time that is spent on this, and on copies: these are the GPU's work, and the next change may come."""
KEEP_AFTER_S = 1.0
"""Seconds between a load, a wake-up or a change and these copies: first prompts, and steps to capture, come before."""


@dataclass
class _Unit:
    """What tables depend on of a `UnitCodec`."""

    layout: PageLayout
    latents: np.ndarray
    channels: int
    class_deviation: np.ndarray
    steps: dict[int, float]
    side: str

    @property
    def rank(self) -> int:
        return self.latents.size


@dataclass
class _Layer:
    """What tables depend on of a `LayerCodec`."""

    units: list[_Unit]
    page_tokens: int

    @property
    def key_units(self) -> list[int]:
        return holding((unit.side for unit in self.units), "key")

    @property
    def value_units(self) -> list[int]:
        return holding((unit.side for unit in self.units), "value")

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(unit.layout.nbytes for unit in self.units)]


def _layer(profile: SpectralProfile, setting: str, number: int) -> LayerCodec | None:
    layer, widths = profile.layers[number], profile.bits[setting][number]
    if layer is None or widths is None:
        return None
    page_tokens, units = profile.row(setting).page_tokens, []
    steps = {w: table.step for w, table in profile.tables.items()}
    for unit, table in zip(layer.units, widths, strict=True):
        used = np.flatnonzero(np.asarray(table).any(0))
        layout = unit_layout(np.asarray(table)[:, used], page_tokens)
        units.append(_Unit(layout, used, unit.decode.shape[1], class_deviation(unit, used), steps, unit.side))
    return cast("LayerCodec", cast(Any, _Layer(units, page_tokens)))


def foresee(profile: SpectralProfile, setting: str) -> Iterator[str]:
    """Make what a cache at `setting` needs to be squeezed to each coarser rung of the profile's ladder, the nearest
    first; yields the rung's name after every layer. Ends when the memory for such things is full."""
    names = [row.name for row in profile.ladder]
    for name in names[names.index(setting) + 1 :] if setting in names else names:
        for number in range(len(profile.layers)):
            layer = _layer(profile, name, number)
            if layer is None:
                continue
            code_parcels(layer)
            layer_tables(layer)
            before = _layer(profile, setting, number) if setting in names else None
            if before is not None:
                with suppress(ValueError):  # the kernel cannot map them, and the reference will
                    squeeze_parcels(before, layer)
            if memory.nbytes > 0.9 * memory.max_bytes:
                return
            yield name


class Foresight:
    """`foresee` on a thread of its own that leaves most of the time to others; a new setting begins anew. Soon after
    that `keep` is called, which copies what the setting in use has on the device for its next time (spectral.shelf)."""

    def __init__(self, profile: SpectralProfile, keep: Callable[[], Iterable[object]] = tuple) -> None:
        self.profile, self._keep = profile, keep
        self._wanted: str | None = None
        self._ended = False
        self._news = threading.Condition()
        threading.Thread(target=self._run, name="foresight", daemon=True).start()

    def begin(self, setting: str) -> None:
        """The cache is at this setting now."""
        with self._news:
            self._wanted = setting
            self._news.notify()

    def end(self) -> None:
        """Nothing more is to be made."""
        with self._news:
            self._ended = True
            self._news.notify()

    def _work(self, setting: str) -> Iterator[float]:
        """All of it; yields the seconds to pause after every part."""
        due, kept = time.monotonic() + KEEP_AFTER_S, False
        for pause in paced(foresee(self.profile, setting), SHARE):
            yield pause
            if not kept and time.monotonic() >= due:
                kept = True
                yield from paced(self._kept(setting), KEEP_SHARE)
        if not kept:
            yield max(0.0, due - time.monotonic())
            yield from paced(self._kept(setting), KEEP_SHARE)

    def _kept(self, setting: str) -> Iterator[object]:
        """What `keep` does; without it everything works, more slowly."""
        try:
            yield from self._keep()
        except Exception as error:
            log.warning("tables of setting %s are not kept: %s", setting, error)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._wanted is not None or self._ended)
                if self._ended:
                    return
                setting, self._wanted = self._wanted, None
            assert setting is not None
            for pause in self._work(setting):
                with self._news:
                    if self._news.wait_for(lambda: self._wanted is not None or self._ended, pause):
                        break


def paced(work: Iterable[object], share: float) -> Iterator[float]:
    """Do some work part by part; yields the seconds to pause, so that it takes this share of the time."""
    began = time.monotonic()
    for _ in work:
        yield (time.monotonic() - began) * (1 / share - 1)
        began = time.monotonic()

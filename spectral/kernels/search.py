"""The search for choices: one after another from the defaults, in a stated time. Knows nothing of GPUs.

1. what there is is timed, and every other value of a choice while it fits into the time that is left
2. the answers of the fastest are compared with the reference's, and a wrong one is discarded
3. it is timed again, in turns with what there is: only who gains twice gains
4. the next choice begins from there
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GAIN = 0.02
"""Of a step's time: what is less may be noise."""

LOSS = 0.05
"""Most that one step may lose for what the others gain."""

FASTER = "faster"

Times = dict[str, float]
"""Microseconds by step."""


@dataclass
class Trial:
    """One value of one choice. gain: of the mean of all steps' relative times, None where it did not run; verdict: what
    became of it; seconds: that it took, compiling included."""

    name: str
    value: Any
    gain: float | None
    verdict: str
    seconds: float
    times: Times = field(default_factory=dict)


@dataclass
class Found:
    """What a search ended with. before, after: times of the defaults and of the choices, as they were when they were
    compared; left_out: "choice=value" for which no time was left."""

    choices: Any
    before: Times
    after: Times
    trials: list[Trial]
    left_out: list[str]
    seconds: float

    @property
    def changed(self) -> dict[str, Any]:
        """Choices that are not the defaults, and their values."""
        default = type(self.choices)()
        names = [one.name for one in dataclasses.fields(default)]
        return {n: getattr(self.choices, n) for n in names if getattr(self.choices, n) != getattr(default, n)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


class Search:
    """One search.

    Args:
        measure: times of all steps with some choices, in microseconds; may raise what a compiler or launch raises.
        wrong: what is wrong with the answers with some choices, in words; "" if nothing.
        seconds: in which the search ends, but for a trial that takes longer than such a trial is known to.
        progress: told what is tried, and how much of the time has passed.
    """

    def __init__(
        self,
        measure: Callable[[Any], Times],
        wrong: Callable[[Any], str],
        *,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self._measure, self._wrong, self._seconds, self._clock = measure, wrong, seconds, clock
        self._progress = progress or (lambda what, passed: None)
        self._trials: list[Trial] = []
        self._left_out: list[str] = []
        self._usual = 0.0
        """Seconds that timing all steps takes where nothing is compiled."""

    def run(self, start: Any) -> Found:
        """Search from `start`. Raises what `measure` raises with it."""
        self._begin = self._clock()
        best, after = start, self._measure(start)
        self._usual = self._clock() - self._begin
        gained = dict.fromkeys(after, 1.0)
        for choice in dataclasses.fields(start):
            if self._left() > 2 * self._usual:
                after = self._measure(best)  # a GPU that was idle is slow at first, and one that is warm later
            new = self._one(choice, best, after)
            if new is not None:
                (best, after), against = new
                gained = {step: gained[step] * after[step] / against[step] for step in gained}
        # Clocks change within a search; what was compared in turns says more than its first and last times.
        before = {step: after[step] / gained[step] for step in gained}
        return Found(best, before, after, self._trials, self._left_out, self._clock() - self._begin)

    def _one(self, choice: Any, best: Any, times: Times) -> tuple[tuple[Any, Times], Times] | None:
        """Try all values of one choice. The choices that take the place of `best` with their times, and those of `best`
        beside them; None where it stays."""
        ahead: list[tuple[float, Trial, Any]] = []
        takes = choice.metadata["seconds"]
        for value in choice.metadata["values"]:
            if value == getattr(best, choice.name):
                continue
            name = f"{choice.name}={value}"
            if self._left() < takes + self._usual:
                self._left_out.append(name)
                continue
            self._progress(name, self._clock() - self._begin)
            candidate = dataclasses.replace(best, **{choice.name: value})
            trial = self._try(choice.name, value, candidate, times)
            takes = max(0.0, trial.seconds - self._usual)
            if trial.gain is not None and trial.verdict == FASTER:
                ahead.append((trial.gain, trial, candidate))
        for _, trial, candidate in sorted(ahead, key=lambda one: -one[0]):
            if self._left() < 5 * self._usual:
                trial.verdict = "no time was left to time it again"
                self._left_out.append(f"{trial.name}={trial.value}")
                continue
            found = self._again(trial, best, candidate)
            if found is not None:
                return (candidate, found[1]), found[0]
        return None

    def _try(self, name: str, value: Any, candidate: Any, times: Times) -> Trial:
        begin = self._clock()
        try:
            new = self._measure(candidate)
        except Exception as error:  # more registers or shared memory than there is, most likely
            trial = Trial(name, value, None, f"does not run: {error}".split("\n")[0], self._clock() - begin)
        else:
            verdict = FASTER if _faster(times, new) else "not faster"
            trial = Trial(name, value, _gain(times, new), verdict, self._clock() - begin, new)
            self._usual = min(self._usual, trial.seconds)
        self._trials.append(trial)
        return trial

    def _again(self, trial: Trial, best: Any, candidate: Any) -> tuple[Times, Times] | None:
        """Times of `best` and of a candidate, in turns, where it is right and gains again."""
        begin = self._clock()
        try:
            fault = self._wrong(candidate)
            if fault:
                trial.verdict = f"wrong: {fault}"
                return None
            pairs = [(self._measure(best), self._measure(candidate)) for _ in range(2)]
        except Exception as error:
            trial.verdict = f"does not run: {error}".split("\n")[0]
            return None
        finally:
            trial.seconds += self._clock() - begin
        old, new = (
            {step: min(first[step], second[step]) for step in first} for first, second in zip(*pairs, strict=True)
        )
        trial.gain = _gain(old, new)
        if not _faster(old, new):
            trial.verdict = "not faster when timed again"
            return None
        trial.verdict, trial.times = "taken", new
        return old, new

    def _left(self) -> float:
        return self._seconds - (self._clock() - self._begin)


def _gain(old: Times, new: Times) -> float:
    """What part of the mean of relative times is won; less than nothing for times that are none."""
    ratios = [new[step] / old[step] for step in old]
    mean = sum(ratios) / len(ratios)
    return 1 - mean if math.isfinite(mean) else -math.inf


def _faster(old: Times, new: Times) -> bool:
    """Whether all steps together are faster, those that differ by more than noise by more than noise (most choices
    matter to a few sizes only), and none pays much for the others."""
    gains = [1 - new[step] / old[step] for step in old]
    differ = [gain for gain in gains if abs(gain) > GAIN]
    return _gain(old, new) > 0 and bool(differ) and sum(differ) / len(differ) > GAIN and min(gains) > -LOSS

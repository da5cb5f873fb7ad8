"""Prompts whose greedy answers are known, so that an answer that belongs to somebody else is recognised."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

_PLACES = (
    *("France", "Norway", "Japan", "Brazil", "Kenya", "Canada", "Chile", "Egypt", "India", "Italy", "Spain", "Greece"),
    *("Poland", "Peru", "Cuba", "Ghana", "Nepal", "Iran", "Iraq", "Laos", "Mali", "Malta", "Oman", "Qatar", "Syria"),
    *("Togo", "Yemen", "Tonga", "Fiji", "Chad", "Benin", "Belgium"),
)
_WORDS = ("river", "stone", "light", "paper", "garden", "winter", "music", "table", "city", "bread", "horse", "cloud")


@dataclass(frozen=True)
class Prompt:
    """A chat message, alone of its kind."""

    number: int
    text: str


def make_prompts(count: int, seed: int, long_every: int = 4, long_words: int = 500) -> list[Prompt]:
    """`count` different messages. Every `long_every`-th has about `long_words` words, so that whole pages are packed
    and prefixes are shared: pairs of long ones begin alike."""
    drawn = random.Random(seed)
    shared = [" ".join(drawn.choices(_WORDS, k=long_words)) for _ in range(max(1, count // (2 * max(1, long_every))))]
    found = []
    for number in range(count):
        place = _PLACES[number % len(_PLACES)]
        text = f"Tell me about number {number * 37 + 11}: what is the capital of {place}?"
        if long_every and number % long_every == long_every - 1:
            text = f"{shared[(number // long_every) % len(shared)]}. {text}"
        found.append(Prompt(number, text))
    return found


@dataclass
class References:
    """The right answers: by model, setting of the cache, and prompt."""

    answers: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def judge(self, model: str, setting: str, number: int, text: str, *, whole: bool) -> str:
        """"right", "unknown" (no reference at this setting), "crossed" (it is the answer to another prompt, or begins
        like one beyond where its own ends to agree) or "other". `whole`: False for an answer that was cut off."""
        expected = self.answers.get((model, setting, number))
        if expected is None:
            return "unknown"
        if text == expected or (not whole and expected.startswith(text)):
            return "right"
        same = agreement(text, expected)
        for (_, _, other), answer in self.answers.items():
            if other != number and answer != expected and agreement(text, answer) > same + 8:
                return "crossed"
        return "other"


def agreement(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))

"""Recall over distance: facts hidden in a text and asked at its end, answered through the cache.

A sequence is filler with facts such as "The secret number of amber is 48213." at random places; at the end about half
of them are asked, the others only distract. Scoring is teacher-forced: a fact counts as recalled when every token of
its number is the most likely one. So one forward answers all questions, and no answer depends on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spectral.errors import ModelError

KEYS: tuple[str, ...] = (
    *("amber", "anchor", "apple", "basil", "beacon", "birch", "bronze", "candle", "canyon", "cedar", "cherry"),
    *("cobalt", "copper", "coral", "crystal", "dagger", "delta", "eagle", "ember", "falcon", "flint", "forest"),
    *("garnet", "ginger", "glacier", "granite", "harbor", "hazel", "indigo", "ivory", "jasmine", "jungle", "kettle"),
    *("lantern", "lemon", "lilac", "lotus", "maple", "marble", "meadow", "mirror", "nectar", "olive", "onyx"),
    *("orchid", "pearl", "pepper", "quartz", "raven", "river", "saffron", "sapphire", "shadow", "silver", "slate"),
    *("sparrow", "thunder", "timber", "topaz", "tulip", "velvet", "violet", "walnut", "willow"),
)

TOKENS_PER_FACT = 128
"""One fact in so many tokens of context, KEYS at most."""

MOST_ASKED = 16
NEAREST = 256
"""The first bucket of distances ends here, each later one at twice the distance."""


@dataclass(frozen=True)
class Fact:
    """One asked fact: where its number begins when it is asked, how many tokens it has, how far back it was told."""

    key: str
    number: str
    begin: int
    length: int
    distance: int


@dataclass(frozen=True)
class RecallSequence:
    """Token ids, the asked facts in order, and how many more facts only distract."""

    ids: list[int]
    facts: list[Fact]
    distractors: int

    @property
    def first(self) -> int:
        """The first position whose prediction is needed."""
        return min(fact.begin for fact in self.facts) - 1


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def split_number(tokenizer: Any, key: str, number: str) -> tuple[list[int], list[int]]:
    """Tokens of "The secret number of KEY is NUMBER", cut where the number begins to show."""
    stem = f"The secret number of {key} is"
    whole, bare = _tokens(tokenizer, f"{stem} {number}"), _tokens(tokenizer, stem)
    shared = 0
    while shared < min(len(bare), len(whole) - 1) and bare[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def recall_sequence(tokenizer: Any, filler: Sequence[int], seed: int) -> RecallSequence:
    """A sequence of about the filler's length (never longer), the same for a seed. The filler's end is cut off.

    Raises ModelError when the filler is too short for two facts and a question.
    """
    rng = np.random.default_rng(seed)
    count = max(2, min(len(KEYS), len(filler) // TOKENS_PER_FACT))
    asked = max(1, min(MOST_ASKED, count // 2))
    keys = [KEYS[i] for i in rng.permutation(len(KEYS))[:count]]
    numbers = [str(n) for n in rng.choice(90_000, count, replace=False) + 10_000]
    halves = [split_number(tokenizer, key, number) for key, number in zip(keys, numbers, strict=True)]
    newline, stop = _tokens(tokenizer, "\n"), _tokens(tokenizer, ".\n")
    told = [newline + stem + number + stop for stem, number in halves]
    order = rng.permutation(count)[:asked]
    questions = [_tokens(tokenizer, f"What is the secret number of {keys[i]}? ") + halves[i][0] for i in order]
    tail = sum(len(q) + len(halves[i][1]) + len(stop) for q, i in zip(questions, order, strict=True)) + len(newline)
    room = len(filler) - tail - sum(len(x) for x in told)
    if room < count:
        raise ModelError(f"recall needs more than {len(filler)} tokens of context; raise --context or add --no-recall")
    cuts = np.sort(rng.integers(0, room + 1, count))
    ids: list[int] = []
    places: list[int] = []
    before = 0
    for statement, cut, (stem, _) in zip(told, cuts, halves, strict=True):
        ids += filler[before:cut]
        before = int(cut)
        places.append(len(ids) + len(newline) + len(stem))
        ids += statement
    ids += [*filler[before:room], *newline]
    facts = []
    for question, i in zip(questions, order, strict=True):
        number = halves[i][1]
        begin = len(ids) + len(question)
        facts.append(Fact(keys[i], numbers[i], begin, len(number), begin - places[i]))
        ids += [*question, *number, *stop]
    return RecallSequence(ids, facts, count - asked)


def recalled(sequence: RecallSequence, blocks: Iterable[tuple[int, torch.Tensor]]) -> list[bool]:
    """Which facts are recalled by a contender's logits (blocks that cover the positions from `first` on)."""
    guesses: dict[int, int] = {}
    for begin, logits in blocks:
        for offset, token in enumerate(logits.argmax(-1).tolist()):
            guesses[begin + offset] = token
    return [
        all(guesses[at - 1] == sequence.ids[at] for at in range(fact.begin, fact.begin + fact.length))
        for fact in sequence.facts
    ]


def recall_figures(results: Sequence[tuple[RecallSequence, list[bool]]]) -> dict[str, Any]:
    """Share of recalled facts over all sequences, and by distance in buckets that double."""
    pairs = [(f.distance, hit) for sequence, hits in results for f, hit in zip(sequence.facts, hits, strict=True)]
    buckets = []
    low, high = 0, NEAREST
    while pairs and low <= max(distance for distance, _ in pairs):
        inside = [hit for distance, hit in pairs if low <= distance < high]
        if inside:
            buckets.append({"from": low, "to": high, "facts": len(inside), "recall": sum(inside) / len(inside)})
        low, high = high, high * 2
    return {
        "recall": sum(hit for _, hit in pairs) / len(pairs) if pairs else None,
        "recall_by_distance": buckets,
    }


def paired_figures(exact: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """What a contender recalls less or more than the exact cache of the same facts.

    Args:
        exact, other: per sequence, which of its facts were recalled.

    Returns:
        `lost`, `won`: facts; `difference`: of the shares, other - exact; `interval`: its 95 % confidence interval, by
        the normal approximation with sequences as the independent draws (facts of one sequence share its text and each
        other), None with fewer than two sequences.
    """
    gains = [[int(b) - int(a) for a, b in zip(*pair, strict=True)] for pair in zip(exact, other, strict=True)]
    facts = sum(len(gain) for gain in gains)
    difference = sum(map(sum, gains)) / facts if facts else 0.0
    interval = None
    if len(gains) > 1 and facts:
        spread = sum((sum(gain) - len(gain) * difference) ** 2 for gain in gains) * len(gains) / (len(gains) - 1)
        half = 1.96 * spread**0.5 / facts
        interval = [difference - half, difference + half]
    flat = [gain for part in gains for gain in part]
    return {"lost": flat.count(-1), "won": flat.count(1), "difference": difference, "interval": interval}

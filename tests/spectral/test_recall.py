"""Facts hidden in a text: how sequences are built, how answers are judged, and what a window alone cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral.baselines import get
from spectral.comparison import collect_stats, comparison_shape, method_blocks
from spectral.errors import ModelError
from spectral.hf import load_model
from spectral.recall import (
    KEYS,
    RecallSequence,
    paired_figures,
    recall_figures,
    recall_sequence,
    recalled,
    split_number,
)
from spectral.scoring import ExactPass


class Characters:
    """One token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class Merging(Characters):
    """Joins a space and the digit after it, so that a number's first token depends on what stands before."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        ids: list[int] = []
        for char in text:
            if char.isdigit() and ids and ids[-1] == 32:
                ids[-1] = 1000 + int(char)
            else:
                ids.append(ord(char))
        return {"input_ids": ids}


FILLER = [ord("~")] * 1500


def text_of(ids: list[int]) -> str:
    return "".join(f" {i - 1000}" if i >= 1000 else chr(i) for i in ids)


@pytest.mark.parametrize("tokenizer", [Characters(), Merging()])
def test_every_asked_fact_is_told_once_before(tokenizer: Characters) -> None:
    sequence = recall_sequence(tokenizer, FILLER, seed=3)
    text = text_of(sequence.ids)
    assert len(sequence.ids) == len(FILLER) and len(sequence.facts) == 5 and sequence.distractors == 6
    asked_at = text.index("What is")
    assert len(KEYS) == len(set(KEYS))
    for fact in sequence.facts:
        told = f"The secret number of {fact.key} is {fact.number}.\n"
        assert text[:asked_at].count(told) == 1 and text[asked_at:].count(told) == 1
        span = sequence.ids[fact.begin : fact.begin + fact.length]
        assert text_of(span).strip() == fact.number
        back = fact.begin - fact.distance
        assert sequence.ids[back : back + fact.length] == span and fact.distance > 0
    assert text[:asked_at].count("The secret number of") == 11, "distractors are told and not asked"
    assert sequence.first < min(fact.begin for fact in sequence.facts)


def test_sequences_are_seeded() -> None:
    one, same, other = (recall_sequence(Characters(), FILLER, seed) for seed in (1, 1, 2))
    assert one == same and one.ids != other.ids and one.facts[0] != other.facts[0]


def test_numbers_are_cut_where_they_begin() -> None:
    stem, number = split_number(Merging(), "amber", "48213")
    assert text_of(stem).endswith("amber is") and text_of(number) == " 48213" and number[0] == 1004


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ModelError, match="--no-recall"):
        recall_sequence(Characters(), FILLER[:100], seed=0)


def perfect(sequence: RecallSequence) -> torch.Tensor:
    """Logits of every position that predict the next token."""
    logits = torch.zeros(len(sequence.ids), 2000)
    logits[torch.arange(len(sequence.ids) - 1), torch.tensor(sequence.ids[1:])] = 1.0
    return logits


def test_one_wrong_token_is_not_recalled() -> None:
    sequence = recall_sequence(Characters(), FILLER, seed=0)
    logits = perfect(sequence)
    first = sequence.first
    assert recalled(sequence, [(first, logits[first:])]) == [True] * 5
    fact = sequence.facts[2]
    logits[fact.begin + fact.length - 2] = 0.0  # the last digit is not predicted any more
    blocks = [(at, logits[at : at + 7]) for at in range(0, len(logits), 7)]
    assert recalled(sequence, blocks) == [True, True, False, True, True]
    got = recall_figures([(sequence, [True, True, False, True, True]), (sequence, [True] * 5)])
    assert got["recall"] == 0.9 and sum(part["facts"] for part in got["recall_by_distance"]) == 10
    inside = next(p for p in got["recall_by_distance"] if p["from"] <= fact.distance < p["to"])
    assert inside["recall"] < 1.0
    assert recall_figures([]) == {"recall": None, "recall_by_distance": []}


def test_a_window_alone_fails_where_the_exact_cache_passes(shared_dir: Path, tmp_path: Path) -> None:
    """A trained model that can: exact recalls, sinks and window do not, an 8-bit cache does."""
    unpack = [sys.executable, str(shared_dir / "models" / "unpack.py"), str(shared_dir / "models" / "lab-32m-qwen3")]
    subprocess.run([*unpack, str(tmp_path)], check=True, capture_output=True)
    loaded = load_model(str(tmp_path))
    text = (shared_dir / "data" / "text" / "heldout-fiction_eltec_eng.txt").read_text(encoding="utf-8")[20_000:30_000]
    filler = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:1024]
    sequence = recall_sequence(loaded.tokenizer, filler, seed=0)
    exact = ExactPass.run(loaded, sequence.ids)
    stats = collect_stats(loaded, [filler], context=1024, sample=64)
    shares = {"exact": recalled(sequence, [(sequence.first, exact.log_probs(sequence.first, len(sequence.ids)))])}
    for method in get("window-only,llamacpp-q8_0"):
        method.fit(stats, comparison_shape(loaded))
        shares[method.name] = recalled(sequence, method_blocks(exact, method, sequence.first))
    assert all(shares["exact"]) and all(shares["llamacpp-q8_0"]) and not any(shares["window-only"])


def test_paired_figures_know_what_chance_moves() -> None:
    exact = [[True, True, False, True], [True, False, True, True]]
    one_lost = [[True, False, False, True], [True, False, True, True]]
    got = paired_figures(exact, one_lost)
    assert (got["lost"], got["won"], got["difference"]) == (1, 0, -0.125)
    # Sequences' gains are -1 and 0 of 4 facts: their mean's standard error is 1/8, in either way of counting.
    assert got["interval"] == pytest.approx([-0.125 - 1.96 * 0.125, -0.125 + 1.96 * 0.125])
    swapped = paired_figures([[True, False]] * 9, [[False, True]] * 9)
    assert swapped["lost"] == swapped["won"] == 9 and swapped["interval"] == [0.0, 0.0], "sequences are the draws"
    assert paired_figures([[True]], [[False]])["interval"] is None and paired_figures([], [])["difference"] == 0.0
    with pytest.raises(ValueError):
        paired_figures([[True]], [[True, False]])

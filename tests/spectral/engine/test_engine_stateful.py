"""The engine under 10,000 random operations: whatever is submitted, cancelled, parked, squeezed or starved, pages,
bytes and answers add up. The model is a formula: a step costs what the bookkeeping costs, and every answer is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from spectral.codec import Codebook
from spectral.engine.engine import Engine
from spectral.engine.runner import Runner
from spectral.engine.types import Delta, EngineLimits, Event, Failed, Finished, GenerateRequest, SamplingParams
from spectral.errors import QueueFull, RequestError
from tests.spectral.engine.engine_helpers import Letters
from tests.spectral.helpers import random_codebook, random_model

LOADED = random_model("qwen3")
LOADED.eos_token_ids, LOADED.tokenizer = set(), Letters()
VOCABULARY = 96
WIDTHS = {"fine": [6, 4, 2, 0], "middle": [4, 2, 1, 0], "coarse": [2, 1, 0, 0]}
KL = {"fine": 0.001, "middle": 0.01, "coarse": 0.1}


@dataclass(frozen=True)
class Step:
    """A ladder's row as far as the engine asks."""

    name: str
    kl_mean: float

    def bytes_per_token(self, context: int) -> float:
        return sum(WIDTHS[self.name])


class Ladder:
    """A profile as far as the engine asks."""

    content_hash = "hash"  # as its books have it, so that their tables are remembered
    ladder = [Step(name, kl) for name, kl in KL.items()]
    books = {
        name: random_codebook(LOADED.shape, widths, sinks=4, window=16, page=8, window_bits=8)
        for name, widths in WIDTHS.items()
    }

    def resolve(self, setting: str) -> str:
        return setting

    def row(self, setting: str) -> Step:
        return next(step for step in self.ladder if step.name == setting)

    def codebook(self, setting: str, *, device: Any = None, finer: Codebook | None = None) -> Codebook:
        self.books[setting].setting = setting
        return self.books[setting]


def following(token: int, position: int) -> int:
    """What comes after a token at a position."""
    return 3 + (token * 31 + position * 17) % (VOCABULARY - 3)


class Formula(Runner):
    """In the runner's place: the next token of every row that reaches its end."""

    def run(self, part: Any) -> tuple[list[Any], torch.Tensor]:
        ready = [s for s, count in part.work if s.row.length + count == len(s.tokens)]
        logits = torch.zeros((len(ready), VOCABULARY))
        for place, sequence in enumerate(ready):
            logits[place, following(sequence.tokens[-1], len(sequence.tokens))] = 1.0
        return ready, logits


MOST = 170
TOTAL: dict[str, int] = {}


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.profile: Any = Ladder()
        book = self.profile.codebook("middle")
        probe = Engine(LOADED, codebook=book, setting="middle")
        limits = EngineLimits(
            max_concurrency=4, max_queue=6, context_length=150, prefill_chunk=16, token_budget=40,
            max_kv_bytes=int(probe.store.bytes_per_token(150) * 150 * 3.2), max_host_bytes=60_000,
        )  # fmt: skip
        self.engine = Engine(LOADED, codebook=book, setting="middle", limits=limits, profile=self.profile)
        self.engine.runner = Formula(LOADED)
        self.wanted: dict[str, tuple[int, list[int]]] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}
        self.cancelled: set[str] = set()
        self.exact: set[str] = set()  # requests of a quality that only the exact cache has
        self.number = 0

    def count(self, what: str) -> None:
        TOTAL[what] = TOTAL.get(what, 0) + 1

    @rule(
        begin=st.sampled_from([0, 20, 33, 70]),
        like=st.integers(0, 2),
        length=st.integers(1, 40),
        answer=st.integers(1, 25),
        n=st.sampled_from([1, 1, 1, 2]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        who=st.sampled_from(["", "alice", "bob"]),
        floor=st.sampled_from([None, None, None, 0.02, 1e-9]),
        session=st.sampled_from([None, None, "chat"]),
    )
    def submit(
        self, begin: int, like: int, length: int, answer: int, n: int, priority: int, who: str, floor: Any, session: Any
    ) -> None:
        self.count("submit")
        self.number += 1
        name = f"r{self.number}"
        prompt = [3 + (like * 7 + i) % 90 for i in range(begin)] + [3 + (self.number + i) % 90 for i in range(length)]
        params = SamplingParams(max_tokens=answer, temperature=0.0, n=1 if session else n)
        request = GenerateRequest(
            name, prompt, params, priority=priority, tenant=who, cache_salt=who, max_kl=floor, session=session
        )
        try:
            self.engine.submit(request)
        except QueueFull:
            self.count("queue full")
            return
        except RequestError as error:
            too_long = len(prompt) >= self.engine.context_length and error.code == "context_length_exceeded"
            assert too_long or (floor == 1e-9 and error.code == "quality_unavailable")  # of so many exact tokens
            return
        tokens = [*prompt]
        for _ in range(answer):
            tokens.append(following(tokens[-1], len(tokens)))
        if floor == 1e-9:
            self.exact.add(name)
        self.wanted[name] = params.n, tokens[len(prompt) :]

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.count("step")
            self.take(self.engine.step())

    @rule(
        what=st.sampled_from(["cancel", "park", "set_setting", "trim"]),
        pick=st.integers(0, 9),
        setting=st.sampled_from([*WIDTHS]),
    )
    def disturb(self, what: str, pick: int, setting: str) -> None:
        self.count(what)
        name = self.engine.live[pick % len(self.engine.live)] if self.engine.live else "nobody"
        if what == "cancel":
            self.cancelled.add(name)
            self.engine.cancel(name)
        elif what == "park":
            self.engine.park(name)
        elif what == "set_setting":
            self.engine.set_setting(setting)
            assert self.engine.setting == setting
        else:
            self.engine.trim(prefixes=pick > 6)
            assert self.engine.lanes.nbytes == sum(lane.store.held_nbytes for lane in self.engine.lanes.all)

    def take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Delta):
                self.got.setdefault((event.request_id, event.index), []).extend(event.token_ids)
            elif isinstance(event, Finished):
                key = event.request_id, event.index
                assert key not in self.ended
                self.ended[key] = event.reason
                if event.reason != "cancelled":
                    wanted, got = self.wanted[event.request_id][1], self.got[key]
                    full = event.request_id in self.exact and event.usage.setting == "exact"  # it holds fewer tokens
                    assert got == (wanted[: len(got)] if full else wanted), "another answer than it must be"
            assert not isinstance(event, Failed), event

    @invariant()
    def adds_up(self) -> None:
        self.engine.check()
        stats = self.engine.stats()
        assert stats.kv_bytes_used <= stats.kv_bytes_allocated <= (self.engine.limits.max_kv_bytes or 0)
        assert stats.parked_bytes <= 60_000 + 60_000

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
        assert not self.engine.has_work, "the engine does not come to an end"
        self.engine.check()
        assert self.engine.store.rows == 0 and len(self.engine.lanes.all) == 1
        for name, (n, _) in self.wanted.items():
            for index in range(n):
                reason = self.ended[name, index]
                assert reason == "length" or (reason == "cancelled" and name in self.cancelled)
        for what, value in (("preemptions", self.engine.stats().preemptions), ("reused", self.engine.lanes.reuse[1])):
            TOTAL[what] = TOTAL.get(what, 0) + value
        self.engine.trim(prefixes=True)
        assert self.engine.lanes.nbytes == 0


def test_ten_thousand_random_operations() -> None:
    TOTAL.clear()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=MOST, stateful_step_count=50, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    operations = sum(TOTAL[what] for what in ("submit", "step", "cancel", "park", "set_setting", "trim"))
    assert operations >= 10_000, TOTAL
    assert min(TOTAL["preemptions"], TOTAL["reused"], TOTAL["park"], TOTAL["set_setting"]) > 100, TOTAL

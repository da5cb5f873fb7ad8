from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spectral.engine.scheduler import Scheduler, chunk_length
from spectral.engine.sequence import Sequence
from spectral.engine.types import EngineLimits
from spectral.errors import OutOfPages


@dataclass(eq=False)
class FakeRow:
    length: int = 0


@dataclass
class FakeBatch:
    aborted: bool = False

    def abort(self) -> None:
        self.aborted = True


@dataclass(eq=False)
class FakeLanes:
    """Lanes, their one lane and its store in one: a byte per token; `tokens`: how many fit; `rows`: rows at once."""

    rows: int = 1000
    tokens: int = 100_000
    open_rows: list[FakeRow] = field(default_factory=list)
    computing: set[str] = field(default_factory=set)
    idle_nbytes: int = 0
    parked: list[str] = field(default_factory=list)
    batches: list[FakeBatch] = field(default_factory=list)

    @property
    def store(self) -> FakeLanes:
        return self

    def join(self, sequence: Sequence) -> FakeLanes:
        sequence.lane = self
        return self

    def leave(self, sequence: Sequence) -> None:
        sequence.lane = None

    def waits(self, sequence: Sequence) -> bool:
        return sequence.request_id in self.computing

    def need(self, sequence: Sequence) -> tuple[int, int]:
        return len(sequence.tokens) + 1 - (sequence.row.length if sequence.row else 0), 0

    def open(self, sequence: Sequence) -> None:
        if len(sequence.lane.open_rows) >= self.rows:
            raise OutOfPages(1, 0)
        sequence.row = FakeRow(sequence.parked or 0)
        sequence.parked = None
        sequence.lane.open_rows.append(sequence.row)

    def park(self, sequence: Sequence) -> None:
        self.parked.append(sequence.request_id)
        sequence.parked = sequence.row.length
        sequence.lane.close(sequence)

    def close(self, sequence: Sequence) -> None:
        self.open_rows.remove(sequence.row)
        sequence.row = None

    def begin(self, work: list[tuple[Any, int]]) -> FakeBatch:
        if sum(r.length for r in self.open_rows) + sum(count for _, count in work) > self.tokens:
            raise OutOfPages(1, 0)
        self.batches.append(FakeBatch())
        return self.batches[-1]

    def spare(self) -> int:
        return self.tokens - sum(r.length for r in self.open_rows)

    def make_room(self, error: OutOfPages) -> bool:
        return False


def sequence(name: str, order: int, length: int, **more: Any) -> Sequence:
    return Sequence(name, 0, order, list(range(length)), length, **more)


def make(names: str, length: int, lanes: FakeLanes | None = None, **limits: int) -> tuple[Scheduler, list[Sequence]]:
    scheduler = Scheduler(lanes or FakeLanes(), EngineLimits(**limits))
    sequences = [sequence(name, i, length) for i, name in enumerate(names)]
    for each in sequences:
        scheduler.add(each)
    return scheduler, sequences


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Schedule a step, and do to rows and tokens what running it does."""
    work = [item for part in scheduler.schedule() for item in part.work]
    for each, count in work:
        each.started = True
        each.row.length += count
        if each.pending == 0:
            each.tokens.append(7)
    return [(each.request_id, count) for each, count in work]


def test_prompts_are_chunked_and_mixed_with_decodes() -> None:
    scheduler, _ = make("ab", 9, max_concurrency=2, prefill_chunk=6, token_budget=12)
    assert step(scheduler) == [("a", 6), ("b", 6)]
    assert step(scheduler) == [("a", 3), ("b", 3)]
    assert step(scheduler) == [("a", 1), ("b", 1)]


def test_chunks_end_at_the_same_places_whatever_else_runs() -> None:
    def ends(crowd: int) -> list[int]:
        scheduler = Scheduler(FakeLanes(), EngineLimits(max_concurrency=6, prefill_chunk=8, token_budget=16))
        for i in range(crowd):
            scheduler.add(sequence(f"o{i}", i, 3 + 5 * i))
        me = sequence("me", 99, 37)
        scheduler.add(me)
        places: list[int] = []
        while me.pending != 1 or not places:
            step(scheduler)
            if me.row is not None and me.row.length and me.row.length not in places:
                places.append(me.row.length)
        return places

    assert ends(0) == ends(3) == ends(5) == [8, 16, 24, 32, 37]


def test_the_chunk_leaves_room_for_all_decodes_in_a_step() -> None:
    assert chunk_length(EngineLimits(max_concurrency=8, prefill_chunk=256, token_budget=512)) == 256
    assert chunk_length(EngineLimits(max_concurrency=8, prefill_chunk=256, token_budget=100)) == 93
    assert chunk_length(EngineLimits(max_concurrency=8, prefill_chunk=256, token_budget=2)) == 1


def test_decodes_run_in_every_step_while_a_prompt_is_computed() -> None:
    scheduler, (first, _) = make("ab", 3, prefill_chunk=4, token_budget=12)
    scheduler.add(sequence("long", 9, 20))
    step(scheduler)
    for _ in range(3):
        assert ("a", 1) in step(scheduler)
    assert first.row is not None


def test_the_budget_holds_and_admission_is_in_order_of_arrival() -> None:
    scheduler, _ = make("abcde", 4, max_concurrency=3, prefill_chunk=8, token_budget=7)
    for _ in range(6):
        assert 0 < sum(count for _, count in step(scheduler)) <= 7
    assert [s.request_id for s in scheduler.running] == ["a", "b", "c"]
    scheduler.remove(scheduler.running[1])
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["a", "c", "d"]


def test_room_counts_free_places_and_queue() -> None:
    scheduler, _ = make("abc", 2, max_concurrency=2, max_queue=2)
    assert scheduler.room() == 1
    step(scheduler)
    assert len(scheduler.running) == 2 and scheduler.room() == 1


def test_the_newest_is_parked_and_comes_back_where_it_was() -> None:
    lanes = FakeLanes(tokens=11)
    scheduler, (a, b) = make("ab", 3, lanes)
    assert step(scheduler) == [("a", 3), ("b", 3)]
    assert step(scheduler) == [("a", 1), ("b", 1)] and step(scheduler) == [("a", 1), ("b", 1)]
    assert step(scheduler) == [("a", 1)]  # both would need 12
    assert scheduler.preemptions == 1 and b.row is None and lanes.parked == ["b"]
    scheduler.add(sequence("c", 2, 1))
    assert step(scheduler) == [("a", 1)]  # nobody comes in while memory is short
    scheduler.remove(a)
    assert step(scheduler)[0] == ("b", 1)  # nothing is computed again


def test_nobody_is_admitted_whose_tokens_do_not_fit() -> None:
    lanes = FakeLanes(tokens=20)
    scheduler, _ = make("ab", 9, lanes, prefill_chunk=2, token_budget=16)
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["a", "b"]
    lanes = FakeLanes(tokens=19)
    scheduler, _ = make("ab", 9, lanes, prefill_chunk=2, token_budget=16)
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["a"] and not lanes.parked


def test_priority_goes_first_and_takes_the_place_of_the_newest_of_the_lowest() -> None:
    lanes = FakeLanes()
    scheduler, (a, b) = make("ab", 3, lanes, max_concurrency=2)
    step(scheduler)
    scheduler.add(sequence("c", 2, 3))
    scheduler.add(sequence("d", 3, 3, priority=5))
    assert ("d", 3) in step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["a", "d"] and lanes.parked == ["b"]
    scheduler.remove(a)
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["d", "b"]  # what ran already, before what has not


def test_tenants_share_fairly_whatever_one_of_them_queues() -> None:
    scheduler = Scheduler(FakeLanes(), EngineLimits(max_concurrency=1, max_queue=100))
    for i in range(8):
        scheduler.add(sequence(f"many{i}", i, 10, tenant="many"))
    for i in range(3):
        scheduler.add(sequence(f"few{i}", 50 + i, 10, tenant="few"))
    order = []
    while scheduler.waiting:
        step(scheduler)
        order.append(scheduler.running[0].request_id)
        scheduler.remove(scheduler.running[0])
    assert {name[:3] for name in order[:2]} == {"man", "few"} and {name[:3] for name in order[2:4]} == {"man", "few"}
    assert sum(name.startswith("few") for name in order[:6]) == 3


def test_who_was_away_has_no_claim_to_what_others_had() -> None:
    scheduler = Scheduler(FakeLanes(), EngineLimits(max_concurrency=1, max_queue=100))
    for i in range(6):
        scheduler.add(sequence(f"a{i}", i, 10, tenant="a"))
    for _ in range(3):
        step(scheduler)
        scheduler.remove(scheduler.running[0])
    for i in range(3):
        scheduler.add(sequence(f"b{i}", 50 + i, 10, tenant="b"))
    order = []
    while scheduler.waiting:
        step(scheduler)
        order.append(scheduler.running[0].tenant)
        scheduler.remove(scheduler.running[0])
    assert sorted(order[:2]) == ["a", "b"] and sorted(order[2:4]) == ["a", "b"]


def test_who_shares_a_prefix_waits_for_it_and_others_pass() -> None:
    lanes = FakeLanes(computing={"b"})
    scheduler, _ = make("abc", 3, lanes)
    assert step(scheduler) == [("a", 3), ("c", 3)]
    lanes.computing.clear()
    assert ("b", 3) in step(scheduler)


def test_a_lone_sequence_that_never_fits_fails() -> None:
    scheduler, (a,) = make("a", 10, FakeLanes(tokens=5))
    assert step(scheduler) == []
    assert [s for s, _ in scheduler.failed] == [a] and not scheduler.running and not scheduler.waiting


def test_without_a_row_a_sequence_waits_while_others_run_and_fails_when_nothing_does() -> None:
    lanes = FakeLanes(rows=1)
    scheduler, (a, b) = make("ab", 2, lanes)
    assert step(scheduler) == [("a", 2)] and scheduler.waiting == [b]
    lanes.rows = 0
    scheduler.remove(a)
    assert step(scheduler) == [] and [s for s, _ in scheduler.failed] == [b]


def test_when_one_lane_is_out_of_pages_the_others_reservations_are_given_back() -> None:
    first, second = FakeLanes(), FakeLanes(tokens=5)
    scheduler = Scheduler(first, EngineLimits())
    a, b = sequence("a", 0, 3), sequence("b", 1, 3)
    for each, lane in ((a, first), (b, second)):
        scheduler.add(each)
        each.lane = lane
    first.join = lambda s: s.lane or first  # type: ignore[method-assign]
    assert sorted(step(scheduler)) == [("a", 3), ("b", 3)]
    b.tokens += [1, 1, 1]
    assert step(scheduler) == [("a", 1)]
    assert [batch.aborted for batch in first.batches] == [False, True, False] and first.parked == ["b"]


def test_a_search_for_memory_that_finds_the_same_bytes_again_and_again_ends() -> None:
    for lanes in (FakeLanes(rows=0), FakeLanes(tokens=0)):
        lanes.make_room = lambda error: True  # type: ignore[method-assign]
        scheduler, (a,) = make("a", 2, lanes)
        assert step(scheduler) == [] and [s for s, _ in scheduler.failed] == [a]

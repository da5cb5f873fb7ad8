"""How many replicas traffic needs: foreseen, and not moved by chance or by a burst that is soon over."""

from __future__ import annotations

import random

from server.cluster.scaling import CATCH_UP_S, SHRINK_S, Traffic

EACH = 8 * 0.7


class Model:
    """Requests of a constant length on as many replicas as are wanted, in steps of a second; loads take `load_s`."""

    def __init__(self, service_s: float = 4.0, load_s: float = 8.0, seed: int = 1) -> None:
        self.traffic, self.now = Traffic(), 0.0
        self.service, self.load, self.random = service_s, load_s, random.Random(seed)
        self.ends: list[float] = []
        self.queue = 0
        self.hot_at: list[float] = []
        self.counts: list[int] = []
        self.loads = 0

    def run(self, seconds: int, rate: float) -> None:
        for _ in range(seconds):
            self.now += 1.0
            came = sum(self.random.random() < rate / 1000 for _ in range(1000))
            over = [end for end in self.ends if end <= self.now]
            self.ends = [end for end in self.ends if end > self.now]
            self.traffic.came(came, self.now)
            self.traffic.ended(len(over))
            self.queue += came
            places = 8 * sum(at <= self.now for at in self.hot_at)
            begin = min(self.queue, max(0, places - len(self.ends)))
            self.ends += [self.now + self.service] * begin
            self.queue -= begin
            live = len(self.hot_at)
            wanted = max(1, self.traffic.wanted(self.now, len(self.ends), self.queue, EACH, live))
            self.loads += max(0, wanted - live)
            self.hot_at = [*self.hot_at, *[self.now + self.load] * (wanted - live)][:wanted]
            self.counts.append(wanted)


def test_a_new_model_with_much_traffic_grows_at_once_and_not_beyond_what_it_needs() -> None:
    model = Model()
    model.run(20, rate=70.0)
    needed = 70 * 4 / EACH
    assert 0.6 * needed <= model.counts[3] <= needed * 1.3, "it does not wait for its queue"
    model.run(200, rate=70.0)
    assert needed <= model.counts[-1] <= needed * 1.3 and model.queue == 0
    assert model.loads <= needed * 1.5


def test_steady_traffic_loads_nothing_again() -> None:
    model = Model()
    model.run(300, rate=20.0)
    loads = model.loads
    model.run(1800, rate=20.0)
    assert model.loads - loads <= 3, "chance alone does not move replicas"


def test_it_shrinks_to_what_the_last_minutes_needed_and_not_before() -> None:
    model = Model()
    model.run(300, rate=60.0)
    high = model.counts[-1]
    model.run(int(SHRINK_S) - 30, rate=6.0)
    assert model.counts[-1] >= 0.9 * high
    model.run(int(SHRINK_S) + 60, rate=6.0)
    assert model.counts[-1] <= 3 * 6 * 4 / EACH


def test_a_burst_that_is_soon_worked_off_loads_few() -> None:
    model = Model()
    model.run(300, rate=10.0)
    before = model.counts[-1]
    model.queue += 40
    model.run(30, rate=10.0)
    assert model.counts[-1] <= before + 3, f"its queue is a burst, worth {CATCH_UP_S:.0f} s of {before} replicas"


def test_long_requests_are_seen_to_be_long() -> None:
    model = Model(service_s=40.0)
    model.run(400, rate=2.0)
    assert 2 * 40 / EACH * 0.8 <= model.counts[-1] <= 2 * 40 / EACH * 1.6


def test_who_has_just_begun_to_look_takes_nothing_away() -> None:
    traffic = Traffic()
    assert traffic.wanted(1000.0, running=0, backlog=0, each=EACH, live=6) == 6
    assert traffic.wanted(1000.0 + SHRINK_S + 1, running=0, backlog=0, each=EACH, live=6) <= 1

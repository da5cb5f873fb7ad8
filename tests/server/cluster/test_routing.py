"""The router: prefixes, queues, pressure, quality, and agreement between gateways."""

from __future__ import annotations

from server.cluster.routing import MAX_BLOCKS, Candidate, Router, blocks_of, rendezvous, shares

SYSTEM = "You answer in verse. " * 200


def test_blocks_are_a_chain() -> None:
    one, two = blocks_of([SYSTEM, "first question " * 100]), blocks_of([SYSTEM, "another one " * 100])
    same = sum(a == b for a, b in zip(one, two, strict=False))
    assert 3 <= same < len(one)
    assert blocks_of([SYSTEM], "tenant")[0] != blocks_of([SYSTEM])[0], "a salt of its own has prefixes of its own"
    assert len(blocks_of(["x" * 10_000_000])) == MAX_BLOCKS
    assert len(blocks_of(["short"])) == 1 and blocks_of(["short"]) != blocks_of(["other"])
    assert blocks_of(["\ud800 lone surrogate"])


def test_a_chat_stays_until_its_replica_is_too_busy() -> None:
    router, turn = Router(), blocks_of([SYSTEM] * 4)
    idle = [Candidate("a"), Candidate("b"), Candidate("c")]
    first = router.choose(turn, 4000, idle)
    router.sent(turn, first.replica)
    longer = blocks_of([SYSTEM] * 5)
    assert router.choose(longer, 5000, idle).replica == first.replica
    busy = [Candidate(c.replica, running=6) if c.replica == first.replica else c for c in idle]
    assert router.choose(longer, 5000, busy).replica == first.replica, "reading it again would take longer"
    full = [Candidate(c.replica, running=8, queued=8) if c.replica == first.replica else c for c in idle]
    assert router.choose(longer, 5000, full).replica != first.replica


def test_gateways_agree_on_new_prompts_and_spread_them() -> None:
    idle = [Candidate(name) for name in "abcd"]
    chosen = set()
    for number in range(50):
        blocks = blocks_of([f"prompt {number} " * 200])
        one, two = Router().choose(blocks, 700, idle), Router().choose(blocks, 700, list(reversed(idle)))
        assert one == two and one.replica == rendezvous(blocks[0], "abcd")
        chosen.add(one.replica)
    assert chosen == set("abcd")


def test_pressure_quality_and_sleep_count() -> None:
    router, blocks = Router(), blocks_of(["q"])
    choose = lambda *rows: router.choose(blocks, 10, rows).replica  # noqa: E731
    assert choose(Candidate("a", kv_share=0.99), Candidate("b", kv_share=0.5)) == "b"
    assert choose(Candidate("a", kl=0.05), Candidate("b", kl=0.001)) == "b"
    assert choose(Candidate("a", asleep=True), Candidate("b", running=3)) == "b"
    assert choose(Candidate("a", running=7), Candidate("b", running=1)) == "b"


def test_lost_replicas_and_old_blocks_are_forgotten() -> None:
    router = Router(known_blocks=10)
    blocks = blocks_of([SYSTEM] * 2)
    router.sent(blocks, "a")
    assert router.known(blocks, "a") == len(blocks)
    router.lost(["a"])
    assert router.known(blocks, "a") == 0
    router.sent(blocks_of(["x" * 1024 * 20]), "b")
    assert len(router._where) == 10


def test_queues_are_evened_out_for_a_replica_that_becomes_hot() -> None:
    assert shares({"a": 3}, 8) == {"a": 3}, "all of them have a place there"
    assert shares({"a": 28, "b": 0}, 8) == {"a": 18}, "8 run there and 10 wait, as with the first"
    assert shares({"a": 0, "b": 0}, 8) == {} == shares({}, 8)
    for queues in ({"a": 100, "b": 40, "c": 3}, {"a": 17, "b": 18}, {"a": 9}):
        given = shares(queues, 8)
        left = {name: count - given.get(name, 0) for name, count in queues.items()}
        assert max(0, sum(given.values()) - 8) <= max(left.values()), "whoever goes waits behind no more than before"

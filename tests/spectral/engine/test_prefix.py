"""Prefix reuse: the same answers as without it, computed once, shared by those who may, bounded in bytes."""

from __future__ import annotations

import pytest
import torch

from spectral.engine.engine import Engine
from spectral.engine.prefix import block_length, chain
from tests.spectral.engine.engine_helpers import answer, ask, drive, request, tiny_engine

KINDS = [
    ("qwen3", "exact"),
    ("qwen3", "test"),
    ("mistral-sliding", "exact"),
    ("gemma2", "test"),
    ("gemma2", "apart"),
    ("gemma2", "flat"),
    ("llama", "test"),
]


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("family", "setting"), KINDS)
def test_a_reused_prefix_gives_the_same_answer(family: str, setting: str) -> None:
    prefix, ends = prompt(150), [prompt(n, n) for n in (1, 9, 40, 70)]
    wanted = [ask(tiny_engine(family, setting=setting), request("x", prefix + end, 40))["x"] for end in ends]
    engine = tiny_engine(family, setting=setting)
    got = [ask(engine, request(f"r{i}", prefix + end, 40))[f"r{i}"] for i, end in enumerate(ends)]
    assert got == wanted and len({tuple(tokens) for tokens in got}) > 1
    assert engine.stats().prefix_reused == 3 * 128  # four blocks of 32 tokens, by all but the first
    engine.store.check()
    assert engine.store.rows == 0


def count_prompt_tokens(engine: Engine) -> list[int]:
    """Collects the number of tokens of every forward's rows that have more than one."""
    computed: list[int] = []
    run = engine.runner.run

    def counting(part):  # type: ignore[no-untyped-def]
        computed.extend(count for _, count in part.work if count > 1)
        return run(part)

    engine.runner.run = counting  # type: ignore[method-assign]
    return computed


def test_requests_that_come_together_compute_a_shared_prefix_once() -> None:
    prefix = prompt(130)
    engine = tiny_engine()
    computed = count_prompt_tokens(engine)
    got = ask(engine, *[request(f"r{i}", prefix + prompt(5, i), 10) for i in range(4)])
    assert sum(computed) == 128 + 4 * (2 + 5)
    alone = ask(tiny_engine(), request("x", prefix + prompt(5, 2), 10))["x"]
    assert got["r2"] == alone


def test_choices_of_one_request_share_their_prompt() -> None:
    engine = tiny_engine()
    computed = count_prompt_tokens(engine)
    engine.submit(request("a", prompt(100), 10, sampling={"n": 3, "temperature": 1.5, "seed": 3}))
    events = drive(engine)
    assert sum(computed) == 96 + 3 * 4
    assert len({tuple(answer(events, "a", i)) for i in range(3)}) == 3


def test_other_salts_share_nothing() -> None:
    engine = tiny_engine()
    same = prompt(100)
    first = ask(engine, request("a", same, cache_salt="alice"))["a"]
    assert ask(engine, request("b", same, cache_salt="bob"))["b"] == first
    assert engine.stats().prefix_reused == 0
    ask(engine, request("c", same, cache_salt="alice"))
    assert engine.stats().prefix_reused == 96


def test_keys_depend_on_all_that_comes_before() -> None:
    tokens = prompt(96)
    keys = chain(b"model", "", tokens, 32)
    assert len(set(keys)) == 3 and chain(b"model", "", tokens[:70], 32) == keys[:2]
    changed = [*tokens]
    changed[40] += 1
    assert [a == b for a, b in zip(keys, chain(b"model", "", changed, 32), strict=True)] == [True, False, False]
    assert not {*keys} & {*chain(b"other", "", tokens, 32), *chain(b"model", "salt", tokens, 32)}
    assert [block_length(n) for n in (1, 20, 32, 256)] == [32, 40, 32, 256]


def test_prefixes_stay_within_their_bytes_and_the_least_used_go_first() -> None:
    probe = tiny_engine()
    ask(probe, request("a", prompt(100, 1)))
    size = probe.stats().prefix_bytes
    assert size > 0
    engine = tiny_engine(prefix_bytes=2 * size)
    for seed in (1, 2, 1, 3):  # 2 is the least recently used when 3 comes
        ask(engine, request("a", prompt(100, seed)))
        assert engine.stats().prefix_bytes <= 2 * size
    assert engine.stats().prefix_reused == 96
    ask(engine, request("a", prompt(100, 1)))
    assert engine.stats().prefix_reused == 2 * 96
    ask(engine, request("a", prompt(100, 2)))
    assert engine.stats().prefix_reused == 2 * 96


def test_without_bytes_for_them_there_are_none_and_nobody_waits() -> None:
    engine = tiny_engine(prefix_bytes=0)
    same = prompt(70)
    ask(engine, request("a", same, 4), request("b", same, 4))
    assert engine.stats().prefix_reused == 0 and engine.stats().prefix_bytes == 0
    assert engine.store.held_nbytes == 0


def test_idle_prefixes_give_way_to_sequences_that_need_the_bytes() -> None:
    free = tiny_engine()
    room = int(free.store.bytes_per_token(200) * 200 * 1.3)
    engine = tiny_engine(max_kv_bytes=room, prefix_bytes=1 << 30, context_length=200)
    for seed in range(6):
        got = ask(engine, request("a", prompt(150, seed), 40))["a"]
        assert got == ask(free, request("a", prompt(150, seed), 40))["a"]
        assert engine.lanes.nbytes <= room
    assert engine.stats().preemptions == 0
    freed = engine.trim(prefixes=True)
    assert freed > 0 and engine.store.nbytes == 0 and engine.stats().prefix_bytes == 0


def test_a_cancelled_request_does_not_keep_others_waiting() -> None:
    engine = tiny_engine()
    same = prompt(200)
    engine.submit(request("a", same))
    engine.step()
    engine.submit(request("b", same))
    engine.step()
    engine.cancel("a")
    got = answer(drive(engine), "b")
    assert got == ask(tiny_engine(), request("x", same))["x"]
    assert engine.stats().prefix_reused >= 32  # what a had finished

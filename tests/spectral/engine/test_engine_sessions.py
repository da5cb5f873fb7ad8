"""Sessions: a chat that pauses goes on from its cache, also after a restart, and only its owner's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectral.engine.engine import Engine
from spectral.engine.types import SamplingParams
from spectral.errors import OutOfPages, RequestError, SessionError
from tests.spectral.engine.engine_helpers import ask, request, tiny_engine
from tests.spectral.engine.test_prefix import KINDS, count_prompt_tokens, prompt


def turns(engine: Engine, **more: Any) -> tuple[list[int], list[int], list[int]]:
    """A first turn that is kept; its prompt, its answer, and the next turn's prompt."""
    first = prompt(70)
    got = ask(engine, request("one", first, 30, session="chat", **more))["one"]
    return first, got, [*first, *got, *prompt(12, 5)]


@pytest.mark.parametrize(("family", "setting"), KINDS)
def test_the_next_turn_computes_only_what_is_new(family: str, setting: str, tmp_path: Path) -> None:
    engine = tiny_engine(family, setting=setting)
    _, _, second = turns(engine)
    assert engine.stats().sessions == 1 and engine.stats().parked_bytes > 0 and engine.store.rows == 0
    path = engine.save_session("chat", tmp_path / "chat.session")
    computed = count_prompt_tokens(engine)
    here = ask(engine, request("two", second, 20, session="chat"))["two"]
    assert sum(computed) <= 12 + 1 and len(here) == 20  # the last token of the answer had not been fed yet

    again = tiny_engine(family, setting=setting)  # a restart
    assert again.resume_session("chat", path) == 100
    computed = count_prompt_tokens(again)
    assert ask(again, request("two", second, 20, session="chat"))["two"] == here
    assert sum(computed) <= 12 + 1
    again.check()


def test_a_turn_that_goes_another_way_is_answered_as_without_a_session() -> None:
    engine = tiny_engine()
    turns(engine)
    other = prompt(80, 9)
    assert ask(engine, request("x", other, session="chat"))["x"] == ask(tiny_engine(), request("x", other))["x"]


def test_a_turn_that_changes_the_end_keeps_the_beginning() -> None:
    engine = tiny_engine(setting="exact", prefix_bytes=0)
    first, got, _ = turns(engine)
    changed = [*first, *got[:20], *prompt(15, 8)]
    computed = count_prompt_tokens(engine)
    with_session = ask(engine, request("x", changed, session="chat"))["x"]
    assert sum(computed) == 15
    assert with_session == ask(tiny_engine(setting="exact"), request("x", changed))["x"]


def test_sessions_have_owners_and_limits(tmp_path: Path) -> None:
    engine = tiny_engine()
    turns(engine, cache_salt="alice")
    with pytest.raises(SessionError, match="no paused session 'chat'"):
        engine.save_session("chat", tmp_path / "x")
    assert engine.save_session("chat", tmp_path / "x", cache_salt="alice").is_file()
    size = engine.stats().parked_bytes
    small = tiny_engine(max_host_bytes=int(size * 1.5))
    for name in "abc":
        ask(small, request(name, prompt(70), 30, session=name))
        assert small.stats().sessions == 1 and small.stats().parked_bytes <= size * 1.5
    with pytest.raises(RequestError, match="n must be 1"):
        request("n", prompt(5), sampling={"n": 2}, session="a")
    assert SamplingParams().n == 1


def test_saving_and_reading_take_nothing_from_a_full_store(tmp_path: Path) -> None:
    """They happen in host memory: requests that run may have all that the cache may hold."""
    engine = tiny_engine()
    _, _, second = turns(engine)
    engine.trim(prefixes=True)
    engine.store.max_bytes = engine.store.nbytes
    with pytest.raises(OutOfPages):
        engine.store.admit(10_000, 1000)
    path = engine.save_session("chat", tmp_path / "chat.session")
    assert engine.resume_session("chat", path) == 100 and engine.sessions.load_aside(path, ["test"]) is not None
    assert engine.store.rows == 0 and engine.store.nbytes == engine.store.max_bytes
    engine.store.max_bytes = None
    computed = count_prompt_tokens(engine)
    assert ask(engine, request("two", second, 20, session="chat"))["two"] and sum(computed) <= 12 + 1


def test_a_file_of_a_setting_that_is_not_wanted_is_refused(tmp_path: Path) -> None:
    engine = tiny_engine()
    turns(engine)
    path = engine.save_session("chat", tmp_path / "chat.session")
    with pytest.raises(SessionError, match=r"saved at setting 'test', and it may have exact here"):
        engine.sessions.load_aside(path, ["exact"])
    exact = tiny_engine(setting="exact")
    assert exact.sessions.load_aside(path, ["exact", "test"]) is None, "no lane has that setting"


def test_a_damaged_or_foreign_file_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    engine = tiny_engine()
    turns(engine)
    path = engine.save_session("chat", tmp_path / "chat.session")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fresh = tiny_engine()
    with pytest.raises(SessionError, match="damaged"):
        fresh.resume_session("chat", path)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SessionError, match="another"):
        tiny_engine("llama").resume_session("chat", path)
    assert len(fresh.sessions) == 0 and fresh.store.rows == 0
    fresh.check()

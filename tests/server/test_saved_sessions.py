"""A worker's sessions outlive it, with the embedded model: one worker after another over the same folder."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import queue
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.worker import child_saved
from server.worker import messages as wire
from server.worker.child_engines import Engines
from server.worker.child_memory import MemoryControl
from server.worker.child_saved import SavedChats
from server.worker.child_wire import to_request
from server.worker.main import Inbox, Worker
from server.worker.session_messages import SavedSessions
from spectral.engine.build import Built, build_engine, find_profile
from spectral.engine.sessions import Sessions
from spectral.hf import LoadedModel, load_model
from spectral.profile import SpectralProfile

Message = wire.ToParent


class Said:
    """Stands for the writer."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, *messages: Message) -> None:
        self.messages += messages


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo-7m", device="cpu")


@pytest.fixture(scope="module")
def profile(loaded: LoadedModel) -> SpectralProfile:
    found = find_profile(loaded, None)
    assert found is not None
    return found


@dataclasses.dataclass
class Life:
    """Lives of one model's worker."""

    loaded: LoadedModel
    profile: SpectralProfile
    bounds: SavedSessions

    def of(
        self, *asked: wire.Submit, setting: str = "8x", name: str = "demo", profile: SpectralProfile | None = None
    ) -> list[tuple[list[int], wire.Usage]]:
        """One life: these requests, one after another, then its end; their tokens and usage."""
        built = build_engine(self.loaded, profile or self.profile, setting=setting)
        return [self._answer(message) for message in self._run(built, asked, name)]

    @staticmethod
    def _answer(messages: list[Message]) -> tuple[list[int], wire.Usage]:
        tokens = [token for m in messages if isinstance(m, wire.Delta) for token in m.token_ids]
        (end,) = (m for m in messages if isinstance(m, wire.Finished))
        return tokens, end.usage

    def _run(self, built: Built, asked: tuple[wire.Submit, ...], name: str) -> list[list[Message]]:
        engines, found = Engines(built), []
        saved = SavedChats(engines, self.bounds, name)
        for number, message in enumerate(asked):
            said, inbox = Said(), queue.SimpleQueue()  # type: Said, Inbox
            inbox.put(message)
            inbox.put(wire.Shutdown(60.0))
            worker = Worker(engines, inbox, said, saved if number == len(asked) - 1 else Quiet(saved))  # type: ignore[arg-type]
            worker.run()
            found.append([m for m in said.messages if getattr(m, "request_id", "") == message.request_id])
        return found

    @property
    def files(self) -> list[Path]:
        return sorted(Path(self.bounds.folder).glob("*.session"))


class Quiet:
    """Saved sessions of a life that goes on."""

    def __init__(self, saved: SavedChats) -> None:
        self.waits, self.read, self.begin = saved.waits, saved.read, saved.begin

    def save(self, *, asleep: bool = False) -> None:
        """Not yet."""


@pytest.fixture
def life(loaded: LoadedModel, profile: SpectralProfile, tmp_path: Path) -> Life:
    return Life(loaded, profile, SavedSessions(str(tmp_path / "sessions"), 1 << 30, 3600.0, 60.0))


FIRST = [5 + i * 37 % 4000 for i in range(300)]


def turn(ident: str, prompt: list[int], session: str | None = "t1", tokens: int = 12, **more: Any) -> wire.Submit:
    # Token 2 ends a text; it is forbidden, so that the answer has its full length.
    sampling = wire.Sampling(max_tokens=tokens, temperature=0.0, logit_bias={2: -100.0})
    return wire.Submit(ident, "completion", sampling, prompt=prompt, session=session, **more)


def second(first: list[int]) -> list[int]:
    return [*FIRST, *first, *range(100, 110)]


def test_a_chat_goes_on_in_the_next_life_without_prefill_and_says_the_same(life: Life) -> None:
    (said, _), (here, usage) = life.of(turn("a", FIRST), turn("b", second(life.of(turn("x", FIRST, None))[0][0])))
    assert usage.cached_tokens == len(FIRST) + len(said) - 1
    (said_again, _), *_ = life.of(turn("c", FIRST, "t2"))
    assert said_again == said and len(life.files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in life.files} == {0o600}
    ((there, usage),) = life.of(turn("d", second(said), "t2"))
    assert there == here and usage.cached_tokens == len(FIRST) + len(said) - 1 and usage.setting == "8x"
    assert len(life.files) == 2, "read, deleted, and written again at the end"


def test_a_session_is_in_one_place_and_one_that_nobody_names_stays(life: Life) -> None:
    ((said, _),) = life.of(turn("a", FIRST))
    (file,) = life.files
    before = file.stat().st_mtime_ns
    life.of(turn("b", FIRST, "t2"))
    assert file.stat().st_mtime_ns == before and len(life.files) == 2
    built = build_engine(life.loaded, life.profile, setting="8x")
    engines = Engines(built)
    saved = SavedChats(engines, life.bounds, "demo")
    inbox: Inbox = queue.SimpleQueue()
    inbox.put(turn("c", second(said)))
    inbox.put(wire.Shutdown(60.0))
    Worker(engines, inbox, Said(), Quiet(saved)).run()  # type: ignore[arg-type]
    assert not file.exists() and len(engines.current.sessions) == 1


def test_a_key_never_goes_on_from_anothers_session(life: Life) -> None:
    alice, mallory = {"cache_salt": "a" * 64}, {"cache_salt": "b" * 64}
    ((said, _),) = life.of(turn("a", FIRST, **alice))
    ((other, usage),) = life.of(turn("b", FIRST, **mallory))
    assert other == said and usage.cached_tokens == 0 and len(life.files) == 2
    ((_, usage),) = life.of(turn("c", second(said)))  # nobody's key
    assert usage.cached_tokens == 0
    for mine in (alice, mallory):
        ((_, usage),) = life.of(turn("d", second(said), **mine))
        assert usage.cached_tokens == len(FIRST) + len(said) - 1


def test_another_models_name_and_an_old_file_find_nothing(life: Life) -> None:
    ((said, _),) = life.of(turn("a", FIRST))
    ((_, usage),) = life.of(turn("b", second(said)), name="other")
    assert usage.cached_tokens == 0
    for file in life.files:
        os.utime(file, (1.0, 1.0))
    ((_, usage),) = life.of(turn("c", second(said)))
    assert usage.cached_tokens == 0


def test_a_damaged_file_is_passed_over_with_one_line(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    ((said, _),) = life.of(turn("a", FIRST))
    (file,) = life.files
    ((fresh, _),) = life.of(turn("x", second(said), None))
    whole = file.read_bytes()
    middle = len(whole) // 2
    for bad in (whole[:middle] + b"\x00\x01" + whole[middle + 2 :], whole[:-100], whole[:10], b"", b"no session"):
        file.write_bytes(bad)
        caplog.clear()
        told = life.of(turn("b", second(said), tokens=3), turn("c", second(said), tokens=12))
        assert [usage.cached_tokens for _, usage in told][0] == 0 and told[1][0] == fresh
        passed = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
        assert len(passed) == 1 and file.stem[:12] in passed[0] and "t1" not in passed[0]


def test_another_profile_is_passed_over_and_the_file_waits_for_its_own(
    life: Life, caplog: pytest.LogCaptureFixture
) -> None:
    ((said, _),) = life.of(turn("a", FIRST))
    other = dataclasses.replace(life.profile, provenance={"corpus": "another"})
    other = SpectralProfile.load(other.save(Path(life.bounds.folder).parent / "other.safetensors"))
    ((_, usage),) = life.of(turn("b", second(said), tokens=1), profile=other)
    assert usage.cached_tokens == 0 and "another profile" in caplog.text


def test_a_coarser_setting_is_passed_over_and_a_finer_one_is_squeezed(
    life: Life, caplog: pytest.LogCaptureFixture
) -> None:
    ((said, _),) = life.of(turn("a", FIRST), setting="16x")
    asked = turn("b", second(said), tokens=1)
    ((_, usage),) = life.of(asked, setting="8x")
    assert usage.cached_tokens == 0 and "saved at setting '16x'" in caplog.text
    # What it went on as was saved at 8x; at 16x that is squeezed, and the answer is 16x's.
    ((_, usage),) = life.of(asked, setting="16x")
    assert usage.cached_tokens > len(FIRST) and usage.setting == "16x"


def test_a_chat_at_a_setting_of_its_own_comes_back_at_it(life: Life) -> None:
    ((said, _),) = life.of(turn("a", FIRST, setting="4x"))
    ((_, usage),) = life.of(turn("b", second(said), setting="4x"))
    assert usage.setting == "4x" and usage.cached_tokens == len(FIRST) + len(said) - 1


def test_a_full_disk_costs_the_sessions_and_nothing_else(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def full(self: Sessions, name: tuple[str, str], path: Path, level: str | None = None) -> Path:
        tried.append(name)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Sessions, "save", full)
    life.of(turn("a", FIRST, "t1", 2), turn("b", FIRST, "t2", 2))
    assert tried == [("", "t2")], "the disk is full for the next one too"
    assert "lost: 2 ([Errno 28]" in caplog.text and list(Path(life.bounds.folder).iterdir()) == []


def test_one_that_cannot_be_saved_does_not_cost_the_others(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = Sessions.save

    def broken(self: Sessions, name: tuple[str, str], path: Path, level: str | None = None) -> Path:
        if name[1] == "t2":
            raise RuntimeError("an internal error")
        return save(self, name, path, level)

    monkeypatch.setattr(Sessions, "save", broken)
    life.of(*(turn(name, FIRST, name, 2) for name in ("t1", "t2", "t3")))
    assert len(life.files) == 2 and "lost: 1 (RuntimeError: an internal error)" in caplog.text


def test_what_was_used_last_is_saved_first_while_there_is_time(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life.bounds = msgspec.structs.replace(life.bounds, save_s=2.0)

    class Clock:
        """A second for every look."""

        seconds = 0.0
        time = staticmethod(lambda: 1e9)

        def monotonic(self) -> float:
            self.seconds += 1.0
            return self.seconds

    monkeypatch.setattr(child_saved, "time", Clock())
    caplog.set_level(logging.INFO)
    life.of(*(turn(name, FIRST, name, 2) for name in ("t1", "t2", "t3")))
    monkeypatch.undo()
    assert "sessions saved: 1," in caplog.text and "lost: 2 (sessions.save_seconds, 2, were over)" in caplog.text
    life.bounds = msgspec.structs.replace(life.bounds, max_age_s=-1.0)
    ((_, usage),) = life.of(turn("a", FIRST, "t3", 1))
    assert usage.cached_tokens == len(FIRST) - 1


def test_the_bound_of_bytes_keeps_what_was_used_last(life: Life) -> None:
    life.of(turn("a", FIRST, "t1", 2))
    size = life.files[0].stat().st_size
    life.bounds = msgspec.structs.replace(life.bounds, max_bytes=int(2.5 * size))
    life.of(*(turn(name, FIRST, name, 2) for name in ("t2", "t3", "t4")))
    assert len(life.files) == 2
    cached = [life.of(turn("x", FIRST, name, 1))[0][1].cached_tokens for name in ("t4", "t3", "t2")]
    assert cached == [len(FIRST) - 1, len(FIRST) - 1, 0]


@pytest.mark.parametrize(("sleeps", "level"), [(True, "fast"), (False, None)])
def test_a_model_that_sleeps_saves_without_its_tables(
    life: Life, monkeypatch: pytest.MonkeyPatch, sleeps: bool, level: str | None
) -> None:
    levels, save = [], Sessions.save

    def watched(self: Sessions, name: tuple[str, str], path: Path, level: str | None = None) -> Path:
        levels.append(level)
        return save(self, name, path, level)

    monkeypatch.setattr(Sessions, "save", watched)
    monkeypatch.setattr(MemoryControl, "asleep", property(lambda self: sleeps and not self._engines.has_work))
    engines = Engines(build_engine(life.loaded, life.profile, setting="8x"))
    inbox: Inbox = queue.SimpleQueue()
    worker = Worker(engines, inbox, Said(), SavedChats(engines, life.bounds, "demo"))  # type: ignore[arg-type]
    engines.current.submit(to_request(turn("a", FIRST)))
    inbox.put(wire.Shutdown(60.0))
    worker.run()
    assert levels == [level] and len(life.files) == 1


def test_switched_off_nothing_is_written(life: Life) -> None:
    engines = Engines(build_engine(life.loaded, life.profile, setting="8x"))
    inbox: Inbox = queue.SimpleQueue()
    inbox.put(turn("a", FIRST))
    inbox.put(wire.Shutdown(60.0))
    Worker(engines, inbox, Said()).run()  # type: ignore[arg-type]
    assert len(engines.current.sessions) == 1 and not Path(life.bounds.folder).exists()

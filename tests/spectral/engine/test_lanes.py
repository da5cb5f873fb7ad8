"""Live squeeze and relax, quality floors, and what several settings share: one budget."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from spectral.engine.build import build_engine, find_profile
from spectral.engine.engine import Engine
from spectral.engine.types import EngineLimits, Finished
from spectral.errors import ProfileError, RequestError, SettingError
from spectral.hf import LoadedModel, load_model
from spectral.profile import SpectralProfile
from spectral.residency import storages_of
from tests.spectral.engine.engine_helpers import answer, ask, drive, request, squeeze_twice, tiny_engine

PROMPT = [50 + i % 900 for i in range(0, 3000, 7)][:300]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo-7m", device="cpu")


def demo(loaded: LoadedModel, setting: str, **limits: Any) -> Engine:
    values = {"prefill_chunk": 64, "token_budget": 128, **limits}
    engine = build_engine(loaded, find_profile(loaded), setting=setting, limits=EngineLimits(**values)).engine
    engine._checked = True
    return engine


def test_a_squeeze_frees_bytes_and_streams_go_on(loaded: LoadedModel) -> None:
    engine = demo(loaded, "4x", max_host_bytes=None, max_concurrency=2)
    for i in range(3):
        engine.submit(request(f"r{i}", [7 + i, *PROMPT], 60))
    squeeze_twice(engine, "8x", "16x")
    assert engine.setting == "16x"
    # A request that begins now is answered as by an engine that never had another setting.
    assert ask(engine, request("x", PROMPT, 30)) == ask(demo(loaded, "16x"), request("x", PROMPT, 30))


def test_a_setting_that_was_left_keeps_no_tables(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are hundreds of megabytes a setting, and nothing there calls the garbage collector."""
    monkeypatch.setenv("SPECTRAL_ATTENTION", "triton")
    engine, left = demo(loaded, "4x"), []
    gc.collect()
    gc.disable()
    try:
        for setting in ("8x", "16x", "4x", "10x"):  # squeezed, squeezed, another lane, squeezed
            engine.lanes.prepare(setting)
            left += [weakref.ref(codec) for codec in engine.store.codebook.layers]
            engine.set_setting(setting)
            held = engine.store.codebook.layers
            assert all({"_kernels", "_code_layer"} <= vars(codec).keys() for codec in held)
            del held
            assert not [1 for codec in left if codec() is not None], f"tables are kept after {setting}"
    finally:
        gc.enable()


def test_tables_of_a_setting_that_was_used_are_not_made_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams go on through settings whose tables come back from host memory; a parked row needs those that it left."""
    monkeypatch.setattr("spectral.shelf.LEAST_BYTES", 1)
    made: list[str] = []
    make = SpectralProfile.codebook

    def counted(profile: SpectralProfile, setting: str = "auto", **how: Any) -> Any:
        made.append(setting)
        return make(profile, setting, **how)

    engine = demo(loaded, "4x", max_host_bytes=None, max_concurrency=2)
    list(engine.lanes.keep())
    monkeypatch.setattr(SpectralProfile, "codebook", counted)
    settings = iter(["8x", "16x", "4x", "8x", "16x", "4x"])

    def each(step: int) -> None:
        if step == 12:
            engine.park("r0")
        if step % 13 == 12 and (setting := next(settings, None)):
            resting = [layer for layer in engine.store.codebook.layers if layer is not None]
            engine.lanes.prepare(setting)
            engine.set_setting(setting)
            list(engine.lanes.keep())
            left.append(sum(s.nbytes() for layer in resting for s in storages_of(layer, "cpu")))

    left: list[int] = []
    for i in range(3):
        engine.submit(request(f"r{i}", [7 + i, *PROMPT], 60))
    events = drive(engine, each)
    assert all(len(answer(events, f"r{i}")) == 60 for i in range(3))
    assert made == ["8x", "16x"] and len(left) == 6
    assert left[0] > 0, "a row that is parked at 4x needs its tables"
    assert 0 in left[1:], "nobody uses 8x after the squeeze to 16x"
    assert engine.setting == "4x"
    assert ask(engine, request("x", PROMPT, 30)) == ask(demo(loaded, "4x"), request("x", PROMPT, 30))


def test_a_lane_that_has_ended_is_forgotten_by_steps_over_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_DECODE", "static")
    engine, kept = demo(loaded, "16x"), []
    old = weakref.ref(engine.store)
    engine.submit(request("old", PROMPT[:200], 12))
    gc.collect()
    gc.disable()

    def each(step: int) -> None:
        if step == 6:
            engine.set_setting("4x")
            engine.submit(request("new", PROMPT[:200], 24))
        if step > 6:
            kept.append((len(engine.lanes.all), old() is not None))

    try:
        events = drive(engine, each)
    finally:
        gc.enable()
    assert len(answer(events, "old")) == 12 and len(answer(events, "new")) == 24
    assert (2, True) in kept and kept[-1] == (1, False) and kept.count((1, True)) <= 2


def test_relaxing_is_for_those_who_begin_then(loaded: LoadedModel) -> None:
    engine = demo(loaded, "16x")
    engine.submit(request("old", PROMPT, 40))
    lanes: list[int] = []

    def each(step: int) -> None:
        if step == 10:
            engine.set_setting("4x")
            engine.submit(request("new", PROMPT, 20))
        lanes.append(len(engine.lanes.all))

    events = drive(engine, each)
    assert max(lanes) == 2 and len(engine.lanes.all) == 1 and engine.setting == "4x"
    assert answer(events, "old") == ask(demo(loaded, "16x"), request("x", PROMPT, 40))["x"]
    assert answer(events, "new") == ask(demo(loaded, "4x"), request("x", PROMPT, 20))["x"]


def test_from_exact_to_a_setting_and_back(loaded: LoadedModel) -> None:
    engine = demo(loaded, "exact")
    exact = ask(engine, request("a", PROMPT, 20))["a"]
    engine.submit(request("live", PROMPT, 20))
    events = engine.step()
    engine.set_setting("8x")
    assert answer(events + drive(engine), "live") == exact
    assert ask(engine, request("b", PROMPT, 20))["b"] == ask(demo(loaded, "8x"), request("x", PROMPT, 20))["x"]
    engine.set_setting("exact")
    assert ask(engine, request("c", PROMPT, 20))["c"] == exact
    assert engine.set_setting("exact") == 0


def test_a_floor_chooses_a_setting_and_keeps_it_through_a_squeeze(loaded: LoadedModel) -> None:
    profile = find_profile(loaded)
    assert profile is not None
    limit = profile.row("4x").kl_mean
    engine = demo(loaded, "8x")
    engine.submit(request("careful", PROMPT, 40, max_kl=limit))
    engine.submit(request("any", PROMPT, 40))

    def each(step: int) -> None:
        if step == 12:
            assert {lane.setting for lane in engine.lanes.all} == {"4x", "8x"}
            engine.set_setting("16x")
            assert {lane.setting for lane in engine.lanes.all} == {"4x", "16x"}

    events = drive(engine, each)
    assert answer(events, "careful") == ask(demo(loaded, "4x"), request("x", PROMPT, 40))["x"]
    assert [lane.setting for lane in engine.lanes.all] == ["16x"]


def test_a_floor_that_no_row_of_the_ladder_meets_is_met_by_the_exact_cache(loaded: LoadedModel) -> None:
    engine = demo(loaded, "8x")
    engine.submit(request("close", PROMPT, 30, max_kl=1e-9))
    engine.submit(request("usual", PROMPT, 30))

    def each(step: int) -> None:
        if step == 8:  # a squeeze leaves it alone
            engine.set_setting("16x")
            assert {lane.setting for lane in engine.lanes.all} == {"exact", "16x"}

    events = drive(engine, each)
    assert answer(events, "close") == ask(demo(loaded, "exact"), request("x", PROMPT, 30))["x"]
    told = {e.request_id: e.usage.setting for e in events if isinstance(e, Finished)}
    assert told == {"close": "exact", "usual": "16x"} and [lane.setting for lane in engine.lanes.all] == ["16x"]
    assert len(ask(demo(loaded, "exact"), request("a", PROMPT, 5, max_kl=0.0))["a"]) == 5


def test_a_codebook_that_nobody_has_measured_meets_no_floor_but_the_exact_cache_does() -> None:
    prompt = [3 + token % 90 for token in PROMPT[:60]]
    got = {name: ask(tiny_engine(setting=name), request("a", prompt, 8, max_kl=0.1))["a"] for name in ("test", "exact")}
    assert got["test"] == got["exact"]


def test_bytes_that_hold_less_at_a_finer_setting_bound_its_requests(loaded: LoadedModel) -> None:
    free = demo(loaded, "16x")
    most = int(free.store.bytes_per_token(400) * 400)
    engine = demo(loaded, "16x", max_kv_bytes=most)
    exact = next(n for n in range(400, 0, -1) if free.lanes.bytes_per_token("exact")(n) * n <= most)
    assert 20 < exact < 300 <= engine.context_length
    for asked, param in (({"max_kl": 0.0}, "max_kl"), ({"setting": "exact"}, "setting")):
        with pytest.raises(RequestError, match=f"setting exact.*hold {exact} tokens.*shorten the prompt") as caught:
            engine.submit(request("a", PROMPT, 5, **asked))
        assert (caught.value.param, caught.value.code) == (param, "quality_unavailable") and not engine.has_work
    engine.submit(request("a", PROMPT[:20], 500, max_kl=0.0))
    events = drive(engine)
    (ended,) = [event for event in events if isinstance(event, Finished)]
    assert (ended.reason, ended.usage.setting) == ("length", "exact")
    assert 20 + len(answer(events, "a")) == exact


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(RequestError, match="0 or more"):
        request("a", PROMPT, 5, max_kl=-1.0)


def test_a_request_has_a_setting_of_its_own(loaded: LoadedModel) -> None:
    engine = demo(loaded, "8x")
    for name, setting in (("a", "16x"), ("b", "exact"), ("c", None)):
        engine.submit(request(name, PROMPT, 20, setting=setting))
    events = drive(engine)
    for name, setting in (("a", "16x"), ("b", "exact"), ("c", "8x")):
        assert answer(events, name) == ask(demo(loaded, setting), request("x", PROMPT, 20))["x"]
        assert [e.usage.setting for e in events if isinstance(e, Finished) and e.request_id == name] == [setting]
    assert engine.setting == "8x" and [lane.setting for lane in engine.lanes.all] == ["8x"]
    with pytest.raises(RequestError, match="'7x' is none of this model's: exact, 3.5x") as caught:
        engine.submit(request("d", PROMPT, 5, setting="7x"))
    assert (caught.value.param, caught.value.code) == ("setting", "quality_unavailable")
    with pytest.raises(RequestError, match="more than max_kl") as caught:
        engine.submit(request("d", PROMPT, 5, setting="16x", max_kl=1e-9))
    assert caught.value.param == "max_kl" and not engine.has_work


@pytest.mark.parametrize("asked", [{"setting": "4x"}, {"max_kl": 0.0002}])
def test_a_chat_at_a_finer_setting_than_the_model_goes_on_at_it(loaded: LoadedModel, asked: dict[str, Any]) -> None:
    engine = demo(loaded, "8x")
    first = ask(engine, request("a", PROMPT, 10, session="s", **asked))["a"]
    engine.submit(request("b", [*PROMPT, *first, 5, 6, 7], 10, session="s", **asked))
    (end,) = (event for event in drive(engine) if isinstance(event, Finished))
    assert end.usage.setting == "4x" and end.usage.cached_tokens == len(PROMPT) + len(first) - 1


def test_a_session_at_another_setting_is_computed_anew(loaded: LoadedModel) -> None:
    engine = demo(loaded, "8x")
    first = ask(engine, request("a", PROMPT, 10, session="s"))["a"]
    longer = [*PROMPT, *first, 5, 6, 7]
    again = ask(engine, request("b", longer, 10, session="s", setting="16x"))["b"]
    assert again == ask(demo(loaded, "16x"), request("x", longer, 10))["x"]


def test_all_settings_share_one_budget(loaded: LoadedModel) -> None:
    profile = find_profile(loaded)
    assert profile is not None
    free = demo(loaded, "4x")
    room = int(free.store.bytes_per_token(400) * 400 * 1.6)
    engine = demo(loaded, "8x", max_kv_bytes=room, context_length=400)
    names = [f"r{i}" for i in range(4)]
    for i, name in enumerate(names):
        engine.submit(request(name, [9 + i, *PROMPT[:200]], 50, max_kl=profile.row("4x").kl_mean if i % 2 else None))
    events = drive(engine)
    assert engine.lanes.nbytes <= room
    for i, name in enumerate(names):
        alone = demo(loaded, "4x" if i % 2 else "8x")
        assert answer(events, name) == ask(alone, request("x", [9 + i, *PROMPT[:200]], 50))["x"]


def test_unknown_settings_change_nothing(loaded: LoadedModel) -> None:
    engine = demo(loaded, "8x")
    with pytest.raises(SettingError, match="ladder"):
        engine.set_setting("7x")
    assert engine.setting == "8x"
    with pytest.raises(ProfileError, match="without one"):
        tiny_engine().set_setting("8x")

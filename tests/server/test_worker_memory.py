"""A real worker's loop under memory commands: leases, a squeeze while requests run, sleep and wake-up."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from server.worker import child_wire
from server.worker import messages as wire
from server.worker.child_engines import NO_WORK, Engines
from server.worker.child_memory import MemoryControl
from server.worker.main import Inbox, Reader, Worker
from spectral.engine.build import Built, build_engine, find_profile
from spectral.engine.types import EngineLimits
from spectral.hf import LoadedModel, load_model
from tests.server.test_worker_loop import Said, ask


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo-7m", device="cpu")


def build(loaded: LoadedModel, setting: str = "4x") -> Built:
    return build_engine(loaded, find_profile(loaded), setting=setting, limits=EngineLimits(max_concurrency=4))


def work(built: Built, *messages: Any) -> Said:
    inbox: Inbox = queue.SimpleQueue()
    for message in (*messages, wire.Shutdown(60.0)):
        inbox.put(message)
    said = Said()
    Worker(Engines(built), inbox, said).run()  # type: ignore[arg-type]
    return said


def done(said: Said, command: str) -> wire.Done:
    return next(m for m in said.messages if isinstance(m, wire.Done) and m.command_id == command)


def footprints(said: Said) -> list[wire.Footprint]:
    return [m for m in said.messages if isinstance(m, wire.Footprint)]


def test_a_squeeze_between_requests_changes_the_setting_and_says_so(loaded: LoadedModel) -> None:
    built = build(loaded)
    said = work(built, ask("a", max_tokens=6), wire.SetSetting("s", "8x"), ask("b"))
    assert done(said, "s").error == ""
    [ready] = [m for m in said.messages if isinstance(m, wire.Ready)]
    assert ready.setting == "8x" and ready.kl_mean > 0.001
    assert built.engine.setting == "8x" and built.engine.store.codebook.setting == "8x"
    ends = [m for m in said.messages if isinstance(m, wire.Finished)]
    assert [end.reason for end in ends] == ["length", "length"]


class Channel:
    """Stands for the socket, whose other end says nothing after these messages."""

    def __init__(self) -> None:
        self.coming: queue.SimpleQueue[wire.ToWorker] = queue.SimpleQueue()

    def receive(self) -> wire.ToWorker:
        return self.coming.get()


def test_a_setting_is_prepared_while_a_step_runs_and_the_answer_says_what_took_the_time(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, said, channel, prepared = build(loaded), Said(), Channel(), threading.Event()
    lanes, engine = built.engine.lanes, built.engine
    prepare, step, waits = lanes.prepare, engine.step, []

    def preparing(setting: str) -> None:
        prepare(setting)
        prepared.set()

    def stepping() -> list[Any]:
        if len(waits) == 2:  # requests run: the command comes in the middle of a step, which does not end before
            channel.coming.put(wire.SetSetting("s", "8x"))
            waits.append(prepared.wait(30.0))
        else:
            waits.append(True)
        return step()

    monkeypatch.setattr(lanes, "prepare", preparing)
    monkeypatch.setattr(engine, "step", stepping)
    reader = Reader(channel, said)  # type: ignore[arg-type]
    worker = Worker(Engines(built), reader.inbox, said)  # type: ignore[arg-type]
    reader.early = worker.prepare
    channel.coming.put(ask("a", max_tokens=20))
    channel.coming.put(wire.Shutdown(60.0))
    worker.run()
    assert all(waits) and len(waits) > 3, "what a setting needs must not wait for the end of a step"
    assert done(said, "s").error == "" and engine.setting == "8x"
    [print_] = footprints(said)
    assert min(print_.tables_s, print_.waited_s, print_.encoded_s) > 0
    assert print_.encoded_s + print_.given_back_s <= print_.seconds
    assert next(m for m in said.messages if isinstance(m, wire.Finished)).usage.completion_tokens == 20


def test_what_a_command_took_is_its_own(loaded: LoadedModel) -> None:
    control = MemoryControl(Engines(build(loaded)), None, lambda *messages: None)
    _, squeezed, _ = control.handle(wire.SetSetting("s", "8x"))
    leased, _ = control.handle(wire.SetLease("l", 3_000_000))
    assert isinstance(squeezed, wire.Footprint) and isinstance(leased, wire.Footprint)
    assert squeezed.encoded_s > 0 and squeezed.tables_s == squeezed.waited_s == 0  # nothing ran: it was made at once
    assert (leased.tables_s, leased.waited_s, leased.encoded_s, leased.given_back_s) == (0, 0, 0, 0)


def test_a_lease_is_taken_reported_and_bounded_by_the_configuration(loaded: LoadedModel) -> None:
    built = build(loaded)
    said = work(built, wire.SetLease("l", 2_000_000), ask("a"), wire.SetLease("free", None))
    first, second = footprints(said)
    assert (first.lease, second.lease) == (2_000_000, None)
    assert first.context_length < second.context_length and first.weights_bytes == loaded.weights_nbytes
    said = work(build(loaded), wire.SetLease("tiny", 5))
    assert "max_kv_bytes" in done(said, "tiny").error


def test_a_lease_leaves_the_allocator_what_it_has_unless_that_is_wanted_back(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr("spectral.residency.give_back", given.append)
    control = MemoryControl(Engines(build(loaded)), None, lambda *messages: None)
    for size, settle in ((3_000_000, True), (2_000_000, False), (None, True)):
        before = len(given)
        print_, _ = control.handle(wire.SetLease("l", size, settle=settle))
        assert isinstance(print_, wire.Footprint) and print_.lease == size
        assert (len(given) - before, print_.settled) == (int(settle), settle)


def test_what_cannot_be_done_is_refused_and_nothing_ends(loaded: LoadedModel) -> None:
    exact = build_engine(loaded, None, setting="exact")
    said = work(exact, wire.SetSetting("s", "8x"), ask("a"))
    assert "needs a spectral profile" in done(said, "s").error
    said = work(build(loaded), wire.SetSetting("s", "77x"), ask("a", max_tokens=400), wire.Sleep("z"))
    assert "77x" in done(said, "s").error and "cannot sleep" in done(said, "z").error
    assert any(isinstance(m, wire.Finished) for m in said.messages)


def test_sleep_and_wake_of_a_model_on_a_cpu_move_nothing(loaded: LoadedModel) -> None:
    said = work(build(loaded), wire.Sleep("z"), wire.Wake("w"), ask("a"))
    assert done(said, "z").error == done(said, "w").error == ""
    assert footprints(said)[0].host_bytes == 0
    assert any(isinstance(m, wire.Finished) for m in said.messages)


def test_the_most_beside_weights_and_cache_is_told_without_what_a_growing_cache_takes(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([900, 500, 5000, 700, 300])
    monkeypatch.setattr("spectral.residency.peak_nbytes", lambda device, anew: loaded.weights_nbytes + next(peaks))
    monkeypatch.setattr("spectral.residency.reserved_nbytes", lambda device: 42)
    control = MemoryControl(Engines(build(loaded)), None, lambda *_: None)
    for kv in (100, 100, 400, 400, 400):  # the third look sees old and new pools together
        found = control.watch(kv)
    assert found == (42, max(500 - 100, 700 - 400, 300 - 400))


def test_what_torch_holds_goes_with_every_report() -> None:
    told = child_wire.stats(NO_WORK, 77, 7)
    assert (told.reserved_bytes, told.beside_bytes) == (77, 7)

"""The search for choices on made-up GPUs, and when it runs: once, before a worker is ready, never within a request."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectral.engine import upkeep
from spectral.kernels import choices, first_use
from spectral.kernels import tune as tuner
from spectral.kernels.choice_files import entry_path, make_entry, write_entry
from spectral.kernels.choices import CodeChoices, DecodeChoices, Shape, chosen, known
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.decode import LayerKernels
from spectral.kernels.first_use import tune_at_first_use
from spectral.kernels.search import GAIN, Found, Search, Times
from spectral.kernels.tune import CodeBench, DecodeBench, entry_of, summary, tune
from tests.spectral.engine.engine_helpers import drive, request, tiny_engine
from tests.spectral.helpers import random_codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = torch.device("cuda", 3)
SHAPE = Shape(32, 8, 128, 128, 16, 32)
NAME = "NVIDIA Test 90"
BEST = DecodeChoices(shared_blocks=16, mix_programs=256, hold=False, window_tile=32)


class Landscape:
    """A GPU on which every choice costs by how far it is from the best one, compiling what it has not seen.

    Attributes:
        now: the clock, in seconds.
    """

    def __init__(self, best: Any = BEST) -> None:
        self.best = best
        self.now, self.calls = 0.0, 0
        self.compiled: set[tuple[str, Any]] = set()
        self.device, self.shape = torch.device("cpu"), SHAPE

    def clock(self) -> float:
        return self.now

    def start(self) -> Any:
        return type(self.best)()

    def times(self, found: Any) -> Times:
        self.calls += 1
        self.now += 0.1
        cost = 1.0
        for choice in dataclasses.fields(found):
            values, value = choice.metadata["values"], getattr(found, choice.name)
            if value != choice.default and (choice.name, value) not in self.compiled:
                self.compiled.add((choice.name, value))
                self.now += choice.metadata["seconds"]
            cost += 0.1 * abs(values.index(value) - values.index(getattr(self.best, choice.name)))
        return {"short": 50 * cost, "long": 800 * cost}

    def wrong(self, found: Any) -> str:
        self.now += 0.2
        return ""

    def search(self, seconds: float, progress: Callable[[str, float], None] | None = None) -> Found:
        search = Search(self.times, self.wrong, seconds=seconds, clock=self.clock, progress=progress)
        return search.run(self.start())


def test_the_best_of_a_landscape_is_found() -> None:
    gpu, told = Landscape(), []
    found = gpu.search(500, lambda what, passed: told.append((what, passed)))
    assert found.choices == BEST and not found.left_out
    assert found.changed == {"shared_blocks": 16, "mix_programs": 256, "hold": False, "window_tile": 32}
    taken = [trial for trial in found.trials if trial.verdict == "taken"]
    assert [(trial.name, trial.value) for trial in taken] == list(found.changed.items())
    assert all(trial.gain is not None and trial.gain > GAIN for trial in taken)
    assert found.after["short"] == pytest.approx(50) and found.before["short"] == pytest.approx(50 * 1.6)
    assert found.seconds == pytest.approx(gpu.now)
    assert told[0] == ("shared_blocks=0", pytest.approx(0.2)) and len(told) == len(found.trials)
    best = CodeChoices(slice_tokens=2048, pack_pages=16)
    assert Landscape(best).search(500).choices == best


@pytest.mark.parametrize("seconds", [1.0, 8.0, 30.0, 50.0])
def test_a_search_ends_in_time_and_says_what_it_left_out(seconds: float) -> None:
    gpu = Landscape()
    found = gpu.search(seconds)
    assert gpu.now <= seconds + 1
    tried = {f"{trial.name}={trial.value}" for trial in found.trials}
    everything = {
        f"{choice.name}={value}"
        for choice in dataclasses.fields(DecodeChoices)
        for value in choice.metadata["values"]
        if value != choice.default
    }
    left = {name for name in found.left_out if name not in tried}
    assert left | tried >= everything - {"shared_blocks=48", "mix_programs=1024"} and left
    assert "value_warps=2" in left  # what comes last
    assert (found.choices.shared_blocks == 16) == (seconds > 1)


def test_a_choice_that_compiles_longer_than_is_known_is_not_tried_with_its_other_values() -> None:
    gpu = Landscape()
    plain = gpu.times

    def slow(found: Any) -> Times:
        gpu.now += 20 if found.combine_warps != 1 else 0
        return plain(found)

    found = Search(slow, gpu.wrong, seconds=60, clock=gpu.clock).run(DecodeChoices())
    assert [trial.value for trial in found.trials if trial.name == "combine_warps"] == [2]
    assert {"combine_warps=4", "combine_warps=8"} <= set(found.left_out)


@pytest.mark.parametrize("swing", [0.015, 0.1])
def test_noise_is_no_gain(swing: float) -> None:
    """Nothing is faster here. A swing below what counts is not looked at again; a larger one does not come twice."""
    counts = iter(range(10_000))
    fast = {3, 4, 5}  # three of the trials of the first choice

    def times(found: Any) -> Times:
        return {"step": 100 * (1 - swing if next(counts) in fast else 1)}

    found = Search(times, lambda found: "", seconds=500).run(DecodeChoices())
    assert found.choices == DecodeChoices() and found.before == found.after
    again = [trial for trial in found.trials if trial.verdict == "not faster when timed again"]
    assert len(again) == (3 if swing > GAIN else 0)


@pytest.mark.parametrize(("long", "taken"), [(1.0, True), (1.01, True), (1.04, True), (1.13, False)])
def test_what_matters_to_one_size_of_steps_is_found(long: float, taken: bool) -> None:
    """A tenth of one step of seven, though another one may lose as much as is left of it."""

    def times(found: Any) -> Times:
        other = found.shared_blocks == 64
        same = dict.fromkeys("abcde", 70.0)
        return {"1 x 16384": 90 if other else 100, "8 x 32768": 800 * (long if other else 1), **same}

    found = Search(times, lambda found: "", seconds=500).run(DecodeChoices())
    assert found.changed == ({"shared_blocks": 64} if taken else {})


@pytest.mark.parametrize(("loss", "taken"), [(1.04, True), (1.06, False)])
def test_no_step_pays_much_for_what_others_gain(loss: float, taken: bool) -> None:
    def times(found: Any) -> Times:
        gain, loses = (0.7, loss) if found.mix_programs == 512 else (1.0, 1.0)
        return {"short": 60 * gain, "middle": 90 * gain, "long": 800 * loses}

    found = Search(times, lambda found: "", seconds=100, clock=lambda: 0.0).run(DecodeChoices())
    assert found.changed == ({"mix_programs": 512} if taken else {})


def test_a_gpu_that_becomes_slower_meanwhile_hides_nothing() -> None:
    """A third slower by the end: what is timed before a choice is what its values are held against."""
    gpu = Landscape(DecodeChoices(value_warps=2))
    plain = gpu.times

    def times(found: Any) -> Times:
        return {step: value * (1 + 0.4 * gpu.now / 60) for step, value in plain(found).items()}

    gpu.times = times  # type: ignore[method-assign]
    assert gpu.search(500).choices == gpu.best


def test_what_makes_answers_wrong_is_discarded_and_the_next_best_serves() -> None:
    gpu = Landscape(DecodeChoices(shared_blocks=0))
    gpu.wrong = lambda found: "they are wrong by 1" if found.shared_blocks == 0 else ""  # type: ignore[method-assign]
    found = gpu.search(500)
    assert found.choices == DecodeChoices(shared_blocks=8)
    verdicts = {trial.value: trial.verdict for trial in found.trials if trial.name == "shared_blocks"}
    assert verdicts[0] == "wrong: they are wrong by 1" and verdicts[8] == "taken"


def test_what_does_not_run_is_discarded() -> None:
    gpu = Landscape()
    plain = gpu.times

    def times(found: Any) -> Times:
        if not found.hold:
            raise RuntimeError("out of resources: shared memory\nmore")
        return {step: float("nan") if found.query_warps == 4 else value for step, value in plain(found).items()}

    gpu.times = times  # type: ignore[method-assign]
    found = gpu.search(500)
    assert found.choices == dataclasses.replace(BEST, hold=True)
    assert "does not run: out of resources: shared memory" in [trial.verdict for trial in found.trials]


def test_defaults_that_are_wrong_are_not_tuned() -> None:
    gpu = Landscape()
    gpu.wrong = lambda found: "they are wrong by 1"  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="wrong by 1"):
        tune(gpu, 30)
    assert not gpu.calls


def test_what_was_found_is_told_in_a_line_and_kept_whole() -> None:
    found = Landscape().search(8)
    line = summary("decode", found)
    assert "shared_blocks 16" in line and "% less time" in line and "value_warps=2" in line and "\n" not in line
    entry = json.loads(json.dumps(entry_of(NAME, SHAPE, found)))
    assert choices.read_choices(DecodeChoices, entry["choices"]) == found.choices
    assert entry["relative_times"]["long"] < 1 and entry["left_out"] == found.left_out
    nothing = summary("decode", Landscape(DecodeChoices()).search(500))
    assert nothing.endswith("the defaults are as fast as anything tried")


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Steps run in Triton's interpreter and take as long as a counter says."""
    taken: list[float] = []

    def once(call: Callable[[], Any], seconds: float, *, before: Callable[[], Any], fall_back: bool) -> float:
        before()
        call()
        taken.append(float(len(taken) + 1))
        return taken[-1]

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(tuner, "free_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(tuner, "microseconds", once)
    monkeypatch.setattr(tuner, "STEPS", ((1, 150), (2, 140), (8, 1 << 20)))
    monkeypatch.setattr(tuner, "ENCODED", (1, 3))
    monkeypatch.setattr(tuner, "OPENED", (2,))
    monkeypatch.setattr(tuner, "MOST_PAGES", 3)
    return taken


def test_a_real_layer_is_measured_and_compared(
    no_gpu_needed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only a GPU times, on a small layer: the right launches, as much as there is memory for."""
    codec = random_codec(1, 16, [2, 1, 0], block=256, device=DEVICE)
    layer = LayerKernels(codec)
    steps = DecodeBench(layer, 2, torch.float32)
    assert steps.shape == Shape(2, 1, 16, 16, 16, 16) == layer.shape(2)
    assert steps.times(steps.start()) == {"1 x 150": 1.0, "2 x 140": 2.0}
    codes = CodeBench(CodeLayer(codec), torch.float32)
    assert codes.shape == Shape(0, 1, 16, 16, 16, 16)
    assert codes.times(codes.start()) == {"encode 1": 3.0, "encode 3": 4.0, "open 2": 5.0}
    assert codes.wrong(codes.start()) == ""
    monkeypatch.setattr(tuner, "wrong", lambda kernels, group, dtype: f"with {kernels.choices(group).mix_programs}")
    assert steps.wrong(DecodeChoices(mix_programs=512)) == "with 512"


def test_a_gpu_without_memory_is_not_tuned(no_gpu_needed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "free_bytes", lambda device: 100)
    with pytest.raises(RuntimeError, match="0 MiB of memory are too few"):
        DecodeBench(LayerKernels(random_codec(1, 16, [2, 1, 0], block=256, device=DEVICE)), 2, torch.float32)


# When it runs


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A made-up GPU with a model of one layer: `warm` is a process's warming up, `bench` what would be measured."""
    codec = SimpleNamespace(kv_heads=8, units=[SimpleNamespace(mean=SimpleNamespace(device=GPU))])
    book = SimpleNamespace(window=64, layers=[None, codec, codec])
    made = SimpleNamespace(decode=0, codes=0, bench=Landscape())
    codes_shape = SHAPE._replace(query_heads=0)

    def bench(kind: str) -> Callable[..., Any]:
        def make(*arguments: Any) -> Any:
            setattr(made, kind, getattr(made, kind) + 1)
            return made.bench if kind == "decode" else Landscape(CodeChoices(pack_pages=16))

        return make

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPECTRAL_TUNE", raising=False)
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(choices, "shipped_entries", list)
    for module in (choices, first_use):
        monkeypatch.setattr(module, "gpu_name", lambda device: NAME)
    monkeypatch.setattr(first_use, "interpreted", lambda: False)
    monkeypatch.setattr(first_use, "LayerCodec", SimpleNamespace)
    monkeypatch.setattr(first_use, "kernels_for", lambda *_: SimpleNamespace(shape=lambda group: SHAPE))
    monkeypatch.setattr(first_use, "codes_for", lambda _: SimpleNamespace(shape=codes_shape))
    monkeypatch.setattr(first_use, "DecodeBench", bench("decode"))
    monkeypatch.setattr(first_use, "CodeBench", bench("codes"))

    def warm(*, anew: bool = True) -> tuple[int, int]:
        if anew:
            choices.forget()
        tune_at_first_use(book, 32, torch.bfloat16)  # type: ignore[arg-type]
        return made.decode, made.codes

    made.warm = warm
    yield made


def path_of(kind: str = "decode") -> Path:
    path = entry_path(NAME, kind, str(SHAPE))
    assert path is not None
    return path


def test_the_first_worker_measures_and_later_ones_know(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert machine.warm() == (1, 1)  # two layers of one shape
    assert known(DecodeChoices, GPU, SHAPE) == (BEST, "measured")
    assert known(CodeChoices, GPU, SHAPE._replace(query_heads=0)).choices == CodeChoices(pack_pages=16)
    assert "tuning decode of 32x8x128x128-16x32 on NVIDIA Test 90, this once, for up to 20 s" in caplog.text
    assert "tuned decode" in caplog.text and "shared_blocks 16" in caplog.text
    assert machine.warm(anew=False) == (1, 1)
    assert machine.warm() == (1, 1)  # another process
    assert known(DecodeChoices, GPU, SHAPE) == (BEST, "measured")


def test_what_is_shipped_is_not_measured(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_entry(NAME, "decode", str(SHAPE), {"mix_programs": 512})
    monkeypatch.setattr(choices, "shipped_entries", lambda: [ours])
    assert machine.warm() == (0, 1)
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(mix_programs=512), "shipped")


def test_tuning_can_be_switched_off(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_TUNE", "off")
    assert machine.warm() == (0, 0)
    assert known(DecodeChoices, GPU, SHAPE).origin == "default"
    monkeypatch.delenv("SPECTRAL_TUNE")
    monkeypatch.setattr(first_use, "interpreted", lambda: True)
    assert machine.warm() == (0, 0)


def test_layers_that_the_reference_reads_are_not_tuned(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "kernels_for", lambda *_: None)
    assert machine.warm() == (0, 1)
    monkeypatch.setattr(first_use, "codes_for", lambda *_: None)
    assert machine.warm() == (0, 1)


def test_a_failure_is_a_warning_and_the_defaults_until_the_next_start(
    machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    machine.bench.wrong = lambda found: "they are wrong by 1"
    assert machine.warm() == (1, 1)
    assert "could not be tuned and has the defaults: they are wrong by 1" in caplog.text
    assert known(DecodeChoices, GPU, SHAPE).choices == DecodeChoices()
    assert machine.warm(anew=False) == (1, 1) and not path_of().exists()
    machine.bench = Landscape()
    assert machine.warm() == (2, 1)
    assert known(DecodeChoices, GPU, SHAPE) == (BEST, "measured")


def test_a_measurement_that_takes_its_process_down_is_not_begun_again(
    machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, Any]] = []
    plain = machine.bench.times

    def times(found: Any) -> Times:
        seen.append(json.loads(path_of().read_text()))
        return plain(found)

    machine.bench.times = times
    machine.warm()
    assert seen[0]["unfinished"] and "unfinished" not in json.loads(path_of().read_text())
    write_entry(path_of(), seen[0])  # as the process would leave it
    assert machine.warm() == (1, 1)
    assert "did not end" in caplog.text and "spectral tune" in caplog.text
    assert known(DecodeChoices, GPU, SHAPE).choices == DecodeChoices()


def test_beside_another_worker_its_result_serves_or_the_defaults(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_entry(NAME, "decode", str(SHAPE), dataclasses.asdict(DecodeChoices(mix_programs=2048)))

    @contextmanager
    def waits(path: Path, patience: float) -> Iterator[bool]:
        assert patience <= first_use.SECONDS
        if "decode" in path.name:
            write_entry(path, other)  # it ends while this one waits
        yield "decode" in path.name

    monkeypatch.setattr(first_use, "only_one", waits)
    assert machine.warm() == (0, 0)
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(mix_programs=2048), "measured")
    assert known(CodeChoices, GPU, SHAPE._replace(query_heads=0)).choices == CodeChoices()


def test_a_cache_that_cannot_be_written_is_a_warning(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.warm() == (0, 0)
    assert "set XDG_CACHE_HOME to a folder that can be written" in caplog.text


def test_a_disk_that_fills_up_costs_the_next_start_another_measurement(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, entry: dict[str, Any]) -> None:
        if not entry.get("unfinished"):
            raise OSError(28, "No space left on device")
        write_entry(path, entry)

    monkeypatch.setattr(first_use, "write_entry", full)
    assert machine.warm() == (1, 1) and not path_of().exists()
    assert known(DecodeChoices, GPU, SHAPE) == (BEST, "measured")
    assert "serves this process only" in caplog.text
    monkeypatch.setattr(first_use, "write_entry", write_entry)
    assert machine.warm() == (2, 2) and path_of().exists()


def test_warming_up_tunes_first_and_requests_never_do(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    launched: list[DecodeChoices] = []

    def warmed(engine: Any, length: int, steps: int, chunk: int = 1) -> None:
        done.append("step")
        launched.append(chosen(DecodeChoices, torch.device("cpu"), SHAPE))

    monkeypatch.setattr(first_use, "tune_at_first_use", lambda *found: done.append(("tune", *found)))
    monkeypatch.setattr(upkeep, "_warm", warmed)
    monkeypatch.setattr("spectral.code_dispatch.warm_codes", lambda book: done.append("codes"))
    engine = tiny_engine()
    book, dtype = engine.store.codebook, next(engine.loaded.model.parameters()).dtype
    gpu = SimpleNamespace(device=GPU, codebook=book)
    stand_in = SimpleNamespace(
        store=gpu, loaded=engine.loaded, runner=SimpleNamespace(trim=lambda everything: done.append("trim"))
    )
    steps = ["step", "trim", "step", "trim", "step", "step", "codes"]
    upkeep.warm_up(stand_in)  # type: ignore[arg-type]
    assert done == [("tune", book, engine.loaded.shape.query_heads, dtype), *steps]
    # Parts of a row are put together by 8, by 32 and by 4, one block's query is turned alone and with others, and one
    # program has all pieces of a unit and some of them.
    together = [4 if one.few_splits else 32 if one.most_splits == 1 else 8 for one in launched]
    assert together == [8, 32, 4, 4] and [one.piece_programs for one in launched] == [1, 1, 512, 512]
    assert [one.many_queries > 0 for one in launched] == [True, False, True, True]
    assert [one.shared_blocks > 0 for one in launched] == [False, False, True, True]
    done.clear()
    upkeep.warm_up(stand_in, tune=False)  # type: ignore[arg-type]
    assert done == steps
    monkeypatch.undo()

    def never(*found: Any) -> None:
        raise AssertionError("tuned within a request")

    monkeypatch.setattr(first_use, "tune_at_first_use", never)
    monkeypatch.setattr(Search, "run", never)
    engine.warm_up()  # on a CPU
    engine.submit(request("a", list(range(3, 60))))
    assert drive(engine)

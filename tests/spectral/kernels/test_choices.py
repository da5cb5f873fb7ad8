"""What launches choose: looked up in order, kept in files, and never visible in an answer."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral.errors import SettingError
from spectral.kernels import choice_files, choices
from spectral.kernels.check import TOLERANCE, Case
from spectral.kernels.check_codes import code_error
from spectral.kernels.choice_files import EntryError, add_to_table, entry_path, make_entry, only_one, write_entry
from spectral.kernels.choices import CodeChoices, DecodeChoices, Shape, chosen, forced, known, settle
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.decode import LayerKernels
from tests.spectral.helpers import random_codec

ROOT = Path(__file__).resolve().parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = torch.device("cuda", 3)
SHAPE = Shape(32, 8, 128, 128, 16, 32)
NAME = "NVIDIA Test 90"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and a GPU that there is not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "gpu_name", lambda device: NAME)
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(choices, "shipped_entries", list)
    yield tmp_path


def path_of(shape: Shape = SHAPE, kind: str = "decode") -> Path:
    path = entry_path(NAME, kind, str(shape))
    assert path is not None
    return path


def keep(**values: Any) -> Path:
    """Measured choices in the user's cache."""
    entry = make_entry(NAME, "decode", str(SHAPE), dataclasses.asdict(DecodeChoices(**values)))
    write_entry(path_of(), entry)
    return path_of()


def test_measured_choices_come_before_shipped_ones_and_these_before_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(), "default")
    ours = make_entry(NAME, "decode", str(SHAPE), {"mix_programs": 512})
    others = [make_entry("NVIDIA Other", "decode", str(SHAPE), {}), make_entry(NAME, "codes", str(SHAPE), {})]
    monkeypatch.setattr(choices, "shipped_entries", lambda: [*others, ours])
    assert known(DecodeChoices, GPU, SHAPE).origin == "default"  # fixed for the process once read
    choices.forget()
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(mix_programs=512), "shipped")
    assert known(DecodeChoices, GPU, SHAPE._replace(kv_heads=4)).origin == "default"
    path = keep(shared_blocks=16)
    choices.forget()
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(shared_blocks=16), "measured")
    path.unlink()
    assert chosen(DecodeChoices, GPU, SHAPE).shared_blocks == 16
    settle(GPU, SHAPE, DecodeChoices(shared_blocks=32), "measured")
    assert chosen(DecodeChoices, GPU, SHAPE).shared_blocks == 32


def test_a_cpu_has_the_defaults_and_reads_no_file() -> None:
    keep(shared_blocks=16)
    assert known(DecodeChoices, torch.device("cpu"), SHAPE) == (DecodeChoices(), "default")


def test_forced_choices_hold_inside_and_in_this_thread() -> None:
    def now() -> tuple[int, int]:
        return (
            chosen(DecodeChoices, GPU, SHAPE).mix_programs,
            chosen(CodeChoices, GPU, SHAPE._replace(query_heads=0)).pack_pages,
        )

    with forced(mix_programs=256, pack_pages=16):
        assert now() == (256, 16)
        with forced(mix_programs=512):
            assert now() == (512, 16)
        seen: list[tuple[int, int]] = []
        thread = threading.Thread(target=lambda: seen.append(now()))
        thread.start()
        thread.join()
        assert seen == [(DecodeChoices().mix_programs, CodeChoices().pack_pages)]
    assert now() == (DecodeChoices().mix_programs, CodeChoices().pack_pages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"format": 1', "no JSON"),
        ("[]", "no JSON object"),
        ('{"format": 7}', "its format is 7"),
        ('{"format": 1, "gpu": "x"}', "kind must be str"),
    ],
)
def test_a_damaged_file_is_a_warning_and_the_defaults(
    text: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = keep(shared_blocks=16)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(), "default")
    assert words in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA Other"}, "it is for decode of"),
        ({"shape": "1x1"}, "it is for decode of 1x1"),
        ({"choices": {"warps": 4}}, "no choice 'warps'"),
        ({"choices": {"mix_programs": 1000}}, "mix_programs must be one of 256, 512"),
        ({"choices": {"hold": 1}}, "hold must be one of True, False, got 1"),
        ({"choices": {"query_warps": True}}, "query_warps must be one of 1, 2, 4, got True"),
        ({"choices": []}, "choices must be dict"),
    ],
)
def test_a_foreign_file_is_a_warning_and_the_defaults(
    change: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = keep(shared_blocks=16)
    write_entry(path, json.loads(path.read_text()) | change)
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(), "default")
    assert words in caplog.text


def test_a_folder_in_a_files_place_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    path_of().mkdir(parents=True)
    assert known(DecodeChoices, GPU, SHAPE).origin == "default"
    assert "cannot be read" in caplog.text or "no regular file" in caplog.text


def test_other_kernels_or_another_triton_are_measured_anew_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    path = keep(shared_blocks=16)
    for name in ("kernels", "triton"):
        entry = json.loads(path.read_text())
        entry["versions"] = {**choice_files.versions(), name: "0"}
        write_entry(path, entry)
        choices.forget()
        assert known(DecodeChoices, GPU, SHAPE).origin == "default"
    assert not caplog.records


def test_what_a_process_that_died_has_left_is_no_choice() -> None:
    write_entry(path_of(), make_entry(NAME, "decode", str(SHAPE), {}, unfinished=True))
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(), "default")


def test_an_entry_takes_a_files_place_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up leaves the old entry, and nothing beside it."""
    path = keep(shared_blocks=16)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        keep(shared_blocks=32)
    assert known(DecodeChoices, GPU, SHAPE).choices.shared_blocks == 16
    assert list(path.parent.iterdir()) == [path]


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    assert entry_path(NAME, "decode", str(SHAPE)) is None
    assert known(DecodeChoices, GPU, SHAPE).origin == "default"


def test_names_of_gpus_and_shapes_make_different_files() -> None:
    paths = {
        entry_path(gpu, kind, str(shape))
        for gpu in (NAME, "NVIDIA/../H200")
        for kind in ("decode", "codes")
        for shape in (SHAPE, SHAPE._replace(query_heads=0), SHAPE._replace(block_pages=16))
    }
    assert len(paths) == 12 and len({path.parent for path in paths if path}) == 1


def test_the_shipped_table_is_whole_and_has_the_h200() -> None:
    found = choice_files.read_table(choice_files.TABLE)
    kinds = {name: kind for kind, name in choices.KINDS.items()}
    for entry in found:
        read = choices.read_choices(kinds[entry["kind"]], entry["choices"])
        assert set(entry["choices"]) == set(dataclasses.asdict(read)), "a shipped entry says all of them"
    shapes = {(entry["gpu"], entry["kind"], entry["shape"]) for entry in found}
    assert len(shapes) == len(found)
    assert ("NVIDIA H200", "decode", str(SHAPE)) in shapes
    assert ("NVIDIA H200", "codes", str(SHAPE._replace(query_heads=0))) in shapes


def test_a_table_takes_entries_in_the_place_of_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    add_to_table(path, [make_entry(NAME, "decode", "b", {"mix_programs": 512}), make_entry(NAME, "codes", "c", {})])
    add_to_table(path, [make_entry(NAME, "decode", "b", {"mix_programs": 256})])
    found = choice_files.read_table(path)
    assert [(e["kind"], e["choices"]) for e in found] == [("codes", {}), ("decode", {"mix_programs": 256})]
    path.write_text("{}")
    with pytest.raises(EntryError, match="table.json is no table of choices"):
        add_to_table(path, [])


def test_a_wrong_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, wanted in (("", True), ("auto", True), ("off", False)):
        monkeypatch.setenv("SPECTRAL_TUNE", word)
        assert choices.tuning_wanted() is wanted
    monkeypatch.setenv("SPECTRAL_TUNE", "on")
    with pytest.raises(SettingError, match="SPECTRAL_TUNE must be auto or off"):
        choices.tuning_wanted()


HOLD = """
import sys
from pathlib import Path
from spectral.kernels.choice_files import only_one
with only_one(Path(sys.argv[1]), 0.0) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
"""


def test_one_of_several_processes_measures_and_the_others_do_not_wait_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "entry.json"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with only_one(path, 0.0) as mine:
            assert not mine
        paused: list[float] = []

        def pause(seconds: float) -> None:
            if not paused:
                other.communicate("end\n", timeout=30)  # it ends while we wait
            paused.append(seconds)

        with only_one(path, 30.0, pause) as mine:
            assert mine and paused
    assert other.returncode == 0


OTHERS: list[dict[str, Any]] = [
    {"mix_programs": 256, "few_splits": 0, "window_tile": 16, "hold": False, "hold_share": False},
    {"mix_programs": 4096, "split_blocks": 1, "most_splits": 32, "combine_warps": 8, "shared_blocks": 0},
]


@pytest.mark.parametrize("values", OTHERS)
def test_decoding_gives_the_references_answer_whatever_is_chosen(values: dict[str, Any]) -> None:
    layer = LayerKernels(random_codec(1, 16, [4, 2, 1, 0], block=256, device=DEVICE))
    with forced(**values):
        assert layer.choices(4) == DecodeChoices(**values)
        assert Case(layer, 1, 116 + 24 * 16, 4, torch.float32).error() < TOLERANCE


@pytest.mark.parametrize(
    "values",
    [
        {"open_lanes": 64, "open_pages": 16, "restore_rounds": 1, "pack_lanes": 256, "pack_pages": 4},
        {"open_lanes": 256, "open_pages": 4, "restore_rounds": 8, "pack_lanes": 64, "pack_pages": 16},
    ],
)
def test_codes_are_made_and_opened_alike_whatever_is_chosen(values: dict[str, Any]) -> None:
    codec = random_codec(1, 16, [6, 3, 1, 0], block=256, seed=1, device=DEVICE)
    layer = CodeLayer(codec)
    with forced(**values):
        assert layer.choices() == CodeChoices(**values)
        assert code_error(layer) == ""

"""`spectral tune`: what it says and keeps, on a made-up GPU, and how it refuses without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectral.cli import app
from spectral.commands import tune as command
from spectral.errors import SpectralError
from spectral.kernels import choices
from spectral.kernels.choices import CodeChoices, DecodeChoices, Shape, known

GPU = torch.device("cuda", 0)
SHAPE = Shape(4, 2, 64, 64, 16, 32)
runner = CliRunner()


class Stub:
    """Steps that are fastest with some choices."""

    device = torch.device("cpu")

    def __init__(self, best: Any, shape: Shape) -> None:
        self.best, self.shape = best, shape

    def start(self) -> Any:
        return type(self.best)()

    def times(self, found: Any) -> dict[str, float]:
        return {"1 x 1024": 50.0 if found == self.best else 100.0}

    def wrong(self, found: Any) -> str:
        return ""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU that is fastest with other choices; where they are kept."""
    benches = [
        Stub(DecodeChoices(mix_programs=2048), SHAPE),
        Stub(CodeChoices(open_pages=16), SHAPE._replace(query_heads=0)),
    ]
    asked: list[tuple[int, ...]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "gpu_name", lambda device: "NVIDIA Test 90")
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(command, "_gpu", lambda device: GPU)
    monkeypatch.setattr(command, "_benches", lambda gpu, *sizes: asked.append(sizes) or benches)
    yield tmp_path
    assert set(asked) <= {(4, 2, 64)}


def test_choices_are_measured_told_and_kept(gpu: Path) -> None:
    result = runner.invoke(app, ["tune", "--shape", "4x2x64", "--seconds", "60"])
    assert result.exit_code == 0, result.output
    assert "tuning decode of 4x2x64x64-16x32 on NVIDIA Test 90: compiling, then up to 40 s" in result.stderr
    assert "decode of 4x2x64x64-16x32 on NVIDIA Test 90" in result.stdout
    assert "mix_programs 2048" in result.stdout and "chosen: mix_programs 2048; kept in" in result.stdout
    assert str(gpu / "spectral" / "kernels") in result.stdout and "not faster" in result.stdout
    assert known(DecodeChoices, GPU, SHAPE) == (DecodeChoices(mix_programs=2048), "measured")
    assert known(CodeChoices, GPU, SHAPE._replace(query_heads=0)).choices == CodeChoices(open_pages=16)


def test_json_has_every_trial_and_what_was_left_out(gpu: Path) -> None:
    result = runner.invoke(app, ["tune", "--shape", "4x2x64", "--seconds", "5", "--json"])
    told = json.loads(result.stdout)
    decode, codes = told["tuned"]
    assert told["gpu"] == "NVIDIA Test 90" and set(told["versions"]) == {"kernels", "triton"}
    assert (decode["kind"], codes["kind"], codes["shape"]) == ("decode", "codes", "2x64x64-16x32")
    assert decode["choices"]["mix_programs"] == 2048
    assert decode["before"] == {"1 x 1024": 100.0} and decode["after"] == {"1 x 1024": 50.0}
    verdicts = {(trial["name"], trial["value"]): trial["verdict"] for trial in decode["trials"]}
    assert verdicts["mix_programs", 2048] == "taken" and verdicts["shared_blocks", 0] == "not faster"
    assert "hold=False" in decode["left_out"] and "combine_warps=8" not in decode["left_out"]


def test_a_table_to_ship_is_written_beside_what_it_has(gpu: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    for _ in range(2):
        assert runner.invoke(app, ["tune", "--shape", "4x2x64", "--output", str(table)]).exit_code == 0
    entries = json.loads(table.read_text())["entries"]
    assert [entry["kind"] for entry in entries] == ["codes", "decode"]
    assert entries[1]["choices"] == {**vars(DecodeChoices()), "mix_programs": 2048}
    assert not (gpu / "spectral").exists()
    table.write_text("[]")
    wrong = runner.invoke(app, ["tune", "--shape", "4x2x64", "--output", str(table)])
    assert isinstance(wrong.exception, SpectralError) and "is no table of choices" in str(wrong.exception)
    lost = runner.invoke(app, ["tune", "--shape", "4x2x64", "--output", str(table / "under.json")])
    assert isinstance(lost.exception, SpectralError) and "--output" in str(lost.exception)


def test_defaults_that_do_not_run_are_one_line(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "wrong", lambda self, found: "they are wrong by 1")
    result = runner.invoke(app, ["tune", "--shape", "4x2x64"])
    with pytest.raises(SpectralError, match="decode of 4x2x64x64-16x32 cannot be .*Error: they are wrong by 1"):
        raise result.exception or AssertionError
    assert not list((gpu / "spectral").glob("**/*.json"))


@pytest.mark.parametrize("shape", ["32x8", "32x8xa", "32x0x128", "30x8x128", "32x8x12", "32x8x1024"])
def test_shapes_that_are_none_are_refused(shape: str) -> None:
    result = runner.invoke(app, ["tune", "--shape", shape], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "--shape" in result.output


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "torch sees 0 NVIDIA GPUs.*nvidia-smi"),
        ("cuda:1", "torch sees 0 NVIDIA GPUs"),
        ("cpu", "--device must be cuda or cuda:N, got 'cpu'"),
        ("gpu", "--device must be cuda or cuda:N, got 'gpu'"),
    ],
)
def test_without_a_gpu_it_says_so_and_what_to_do(
    device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = runner.invoke(app, ["tune", "--device", device])
    assert result.exit_code == 1
    with pytest.raises(SpectralError, match=words):
        raise result.exception or AssertionError


def test_gpus_that_the_kernels_do_not_run_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("spectral.dispatch.able", lambda device: device.index == 1)
    assert command._gpu("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(SpectralError, match=r"compute capability 8\.0"):
        command._gpu("cuda")
    monkeypatch.setattr("spectral.dispatch.installed", lambda: False)
    with pytest.raises(SpectralError, match=r"spectral-serve\[gpu\]"):
        command._gpu("cuda:1")

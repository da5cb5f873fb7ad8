"""`spectral profile link`: from the command to sessions that are saved small and go on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectral import InferenceEngine
from spectral.cli import app, main
from spectral.errors import RequestError, SessionError
from spectral.resources import profile_path
from spectral.sessions import session_facts

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["--text", str(ROOT / "README.md"), "--text", str(ROOT / "docs" / "cold-tier.md")]
STORY = "The harbour was quiet when the first boats came back. " * 16
runner = CliRunner()


def shipped_to(folder: Path) -> Path:
    """A copy of the demo's profile in a folder of the test's own."""
    shipped = profile_path("demo")
    assert shipped is not None
    file = folder / "mine.safetensors"
    file.write_bytes(shipped.read_bytes())
    return file


def link(profile: Path, *more: str) -> dict[str, Any]:
    command = ["profile", "link", "demo", "--profile", str(profile), "--device", "cpu", "--tokens", "1024", "--json"]
    result = runner.invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file = shipped_to(tmp_path_factory.mktemp("linked"))
    return file, link(file, *TEXTS, "--settings", "16x")


def demo(profile: Path) -> InferenceEngine:
    return InferenceEngine("demo", profile=profile, setting="16x", device="cpu")


def test_sessions_are_saved_small_and_go_on_bit_for_bit(linked: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    profile, facts = linked
    (report,) = facts["settings"]
    assert report["file"] == str(profile.with_name("mine.16x.links")) and Path(report["file"]).is_file()
    assert report["small"] > report["fast"] > 1
    with demo(profile) as engine:
        first = engine.generate(STORY, 20, session="a", temperature=0, ignore_eos=True)
        files = {c: engine.save_session("a", tmp_path / c, cold_level=c) for c in ("auto", "fast", "small")}
        kept = engine._ready.engine.sessions._shelf["", "a"].parked
        more = engine.generate(STORY + first, 20, session="a", temperature=0, ignore_eos=True)
        with pytest.raises(RequestError, match="cold_level must be one of auto, fast, small"):
            engine.save_session("a", tmp_path / "x", cold_level="tiny")
    assert {c: session_facts(f).links for c, f in files.items()} == {
        "auto": report["digest"], "fast": "", "small": report["digest"]
    }  # fmt: skip
    assert files["auto"].read_bytes() == files["small"].read_bytes()
    assert files["small"].stat().st_size < files["fast"].stat().st_size < kept.nbytes
    with demo(profile) as engine:
        for file in files.values():  # either level, whatever this engine would save at
            assert engine.resume_session("a", file) == len(engine._ready.engine.sessions._shelf["", "a"].tokens)
            back = engine._ready.engine.sessions._shelf["", "a"].parked
            assert back.check == kept.check and back.length == kept.length
            same = [torch.equal(x, y) for x, y in zip(back.pages, kept.pages, strict=True) if x is not None]
            assert same == [True] * 6
            assert engine.generate(STORY + first, 20, session="a", temperature=0, ignore_eos=True) == more


def test_sessions_saved_with_other_links_are_refused_with_the_remedy(
    linked: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    profile, facts = linked
    with demo(profile) as engine:
        engine.generate(STORY, 4, session="a")
        small = engine.save_session("a", tmp_path / "small", cold_level="small")
        fast = engine.save_session("a", tmp_path / "fast", cold_level="fast")
    elsewhere = shipped_to(tmp_path)
    with demo(elsewhere) as engine:
        with pytest.raises(SessionError, match=r"saved at level small.*mine\.16x\.links are not there; copy the file"):
            engine.resume_session("a", small)
        tokens = engine.resume_session("a", fast)
        with pytest.raises(SessionError, match="level small needs the links.*spectral profile link"):
            engine.save_session("a", tmp_path / "y", cold_level="small")
        assert session_facts(engine.save_session("a", tmp_path / "y")).links == ""
        other = link(elsewhere, "--text", str(ROOT / "CHANGELOG.md"), "--settings", "16x")
        assert other["settings"][0]["digest"] != facts["settings"][0]["digest"]
        with pytest.raises(SessionError, match="saved at level small.* are others"):
            engine.resume_session("b", small)
        assert engine._ready.engine.sessions.names == [("", "a")] and engine.kv_bytes == 0
        elsewhere.with_name("mine.16x.links").write_bytes(profile.with_name("mine.16x.links").read_bytes())
        assert engine.resume_session("b", small) == tokens


def test_a_report_for_a_person(linked: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file = shipped_to(tmp_path)
    command = ["profile", "link", "demo", "--profile", str(file), "--tokens", "1024", "--settings", "16x,12x", *TEXTS]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    head, *rows = [line for line in result.stdout.splitlines() if line]
    assert head.split()[:3] == ["setting", "seconds", "links,"]
    assert [row.split()[0] for row in rows] == ["16x", "12x"]
    assert [row.split()[-1] for row in rows] == [str(file.with_name(f"mine.{x}.links")) for x in ("16x", "12x")]
    first = linked[1]["settings"][0]
    assert rows[0].split()[3:5] == [f"{first['fast']:.3f}", f"{first['small']:.3f}"]  # the same text, the same links


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: ["--settings", "7x"], "setting '7x' is not in this profile's ladder"),
        (lambda file: ["--settings", "exact"], "--settings: the exact setting has no codes"),
        (lambda file: ["--settings", "3.5x", "--tokens", "1024"], "--tokens 1024: pages of"),
        (lambda file: ["--profile", str(file.with_name("absent"))], "cannot be read"),
        (lambda file: ["--text", str(file.with_name("absent.txt"))], "--text"),
    ],
)
def test_what_is_wrong_is_one_line(
    change: Callable[[Path], list[str]],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = shipped_to(tmp_path)
    monkeypatch.setattr("sys.argv", ["spectral", "profile", "link", "demo", "--profile", str(file), *change(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]

"""A worker changes its profile and its setting while requests run, with the embedded model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from server.worker import messages as wire
from spectral.hf import load_model
from spectral.link_profile import link_profile
from spectral.profile import SpectralProfile
from spectral.sessions import session_facts
from tests.server.test_worker_main import ROOT, Parent, parent

__all__ = ["parent"]
SHIPPED = ROOT / "profiles" / "demo-7m.safetensors"


def ask(name: str, tokens: int) -> wire.Submit:
    # Token 2 ends a text; it is forbidden, so that the answer has its full length.
    sampling = wire.Sampling(max_tokens=tokens, temperature=0.0, logit_bias={2: -100.0})
    return wire.Submit(name, "completion", sampling, prompt="Once upon a time there was a river")


def test_new_requests_take_the_new_profile_and_running_ones_end_as_they_began(parent: Parent, tmp_path: Path) -> None:
    profile = SpectralProfile.load(SHIPPED)
    other = dataclasses.replace(profile, provenance={"corpus": "another"}).save(tmp_path / "other")
    wrong = dataclasses.replace(profile, fingerprint="f" * 64).save(tmp_path / "wrong")
    parent.send(wire.Load("demo", "demo-7m", device="cpu", setting="exact"))
    _, ready = parent.until(wire.Ready)
    assert isinstance(ready, wire.Ready) and ready.fingerprint == profile.fingerprint
    parent.send(ask("old", 400))
    parent.until(wire.Delta, "old")
    parent.send(wire.SetProfile("bad", str(wrong), "8x"), wire.SetProfile("good", str(other), "16x"))
    answers: dict[str, str] = {}
    while len(answers) < 2:
        before, done = parent.until(wire.Done)
        assert isinstance(done, wire.Done)
        answers[done.command_id] = done.error
        changed = [message for message in before if isinstance(message, wire.Ready)]
        assert not any(isinstance(message, wire.Finished) for message in before)  # "old" runs all the while
        assert [m.setting for m in changed] == (["16x"] if done.command_id == "good" else [])
    assert "fingerprint" in answers["bad"] and answers["good"] == ""
    parent.send(ask("new", 400))
    finished: dict[str, wire.Finished] = {}
    while len(finished) < 2:
        _, message = parent.until(wire.Finished)
        assert isinstance(message, wire.Finished)
        finished[message.request_id] = message
    usage = {name: message.usage for name, message in finished.items()}
    assert usage["old"].completion_tokens == usage["new"].completion_tokens == 400
    assert usage["new"].kv_bytes < usage["old"].kv_bytes / 3
    while True:  # the counters go on over the change
        _, stats = parent.until(wire.Stats)
        assert isinstance(stats, wire.Stats)
        if stats.running == 0 and stats.generated_tokens >= 800:
            break
    assert stats.finished == {"length": 2} and stats.kv_bytes_used == 0


def test_a_setting_changes_alone_and_an_impossible_one_is_refused(parent: Parent) -> None:
    parent.send(wire.Load("demo", "demo-7m", device="cpu", setting="8x"))
    parent.until(wire.Ready)
    parent.send(wire.SetProfile("a", setting="999x", reload=False))
    before, done = parent.until(wire.Done)
    assert isinstance(done, wire.Done) and "ladder" in done.error
    assert not any(isinstance(message, wire.Ready) for message in before)
    parent.send(wire.SetProfile("b", setting="16x", reload=False))
    before, done = parent.until(wire.Done)
    (ready,) = [message for message in before if isinstance(message, wire.Ready)]
    assert ready.setting == "16x" and done == wire.Done("b")


def test_chats_are_written_at_the_level_that_the_configuration_says(parent: Parent, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(SHIPPED.read_bytes())
    texts = [(ROOT / "README.md").read_text(encoding="utf-8")]
    model = load_model("demo-7m", device="cpu")
    (report,) = link_profile(model, SpectralProfile.load(file), ["16x"], texts=texts, tokens=1024)
    load = wire.Load("demo", "demo-7m", device="cpu", setting="16x", profile=str(file), cold_level="auto")
    parent.send(load, msgspec.structs.replace(ask("a", 160), session="chat"))
    parent.until(wire.Finished, "a")
    parent.send(wire.SaveSession("save", str(tmp_path / "chat"), "chat"))
    assert parent.until(wire.Done)[1] == wire.Done("save")
    assert session_facts(tmp_path / "chat").links == report.digest
    parent.send(wire.ResumeSession("resume", str(tmp_path / "chat"), "again"))
    assert parent.until(wire.Done)[1] == wire.Done("resume")
    Path(str(report.file)).unlink()
    parent.send(wire.ResumeSession("lost", str(tmp_path / "chat"), "lost"))
    _, done = parent.until(wire.Done)
    assert isinstance(done, wire.Done) and "mine.16x.links are not there; copy the file" in done.error
    assert wire.Load("demo", "demo-7m").cold_level == "fast"  # nobody waits for the small level unasked

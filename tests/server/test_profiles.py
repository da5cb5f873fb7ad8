"""The profile store and profiling jobs, with real profiles, real checking processes and fake workers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
import torch

from server import jobs, profiles
from server.config import load_settings
from server.profiles import differences
from server.routes.admin_schemas import Build
from spectral.fit import PREFERENCES
from spectral.from_tensors import profile_from_tensors
from spectral.profile import SpectralProfile
from tests.server.conftest import HERE, ROOT, Running, alive, serving, settings

SHIPPED = ROOT / "profiles" / "demo-7m.safetensors"
BYTES = {"Content-Type": "application/octet-stream"}
PATH = "/admin/profiles/demo-7m"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Profiles for the demo that differ from the shipped one, and one for another model."""
    folder, profile = tmp_path_factory.mktemp("variants"), SpectralProfile.load(SHIPPED)
    made = {}
    for name, changes in {
        "one": {"provenance": {**profile.provenance, "corpus": "one"}},
        "two": {"default": "16x"},
        "other": {"fingerprint": "f" * 64, "model": "another"},
    }.items():
        made[name] = dataclasses.replace(profile, **changes).save(folder / name).read_bytes()
    return made


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("FAKE_FINGERPRINT", SpectralProfile.load(SHIPPED).fingerprint)
    models = [{"name": "demo-7m"}, {"name": "org/cold", "path": "demo-7m", "load": "on_demand"}]
    config = settings(*models, state_dir=str(tmp_path / "state"), max_profile_bytes=8 * 2**20)
    with serving(config) as running:
        running.until_state("demo-7m", "hot")
        yield running


def put(store: Running, data: bytes, path: str = PATH, query: str = "") -> httpx.Response:
    return store.client.put(path + query, content=data, headers=BYTES)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "state" / "profiles").iterdir())


def test_upload_activate_roll_back_compare_delete(store: Running, variants: dict[str, bytes], tmp_path: Path) -> None:
    client = store.client
    one = put(store, variants["one"])
    assert one.status_code == 201 and one.json()["default"] == "8x", one.text
    first = one.json()["sha256"]
    assert put(store, variants["one"]).status_code == 200  # the same content is the same profile
    assert files(tmp_path) == [f"{first}.safetensors"]
    second = put(store, variants["two"], query="?activate=true").json()["sha256"]
    listing = client.get(PATH).json()
    assert (listing["active"], listing["running"]) == (second, second)
    assert {row["sha256"] for row in listing["profiles"]} == {first, second}

    activated = client.post(PATH + "/activate", json={"profile": first[:10]}).json()
    assert activated["running"] == first
    difference = client.get(f"{PATH}/diff", params={"a": first, "b": second}).json()["differences"]
    assert {row["field"] for row in difference} == {"content_hash", "default", "provenance.corpus"}
    facts = client.get(f"{PATH}/versions/shipped").json()
    assert [row["name"] for row in facts["ladder"]][0] == "3.5x" and facts["spectrum"][0]["heads 0-1"]["latents"] == 256

    in_use = client.delete(f"{PATH}/versions/{first}")
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "in_use")
    assert client.post(PATH + "/rollback").json()["running"] == second
    for sha256 in (first, second):  # links go with their profile
        Path(tmp_path, "state", "profiles", f"{sha256}.8x.links").touch()
    assert client.delete(f"{PATH}/versions/{first}").json() == {"model": "demo-7m", "deleted": first}
    assert files(tmp_path) == [f"{second}.8x.links", f"{second}.safetensors"]
    assert client.post(PATH + "/rollback").json()["active"] is None
    nothing = client.post(PATH + "/rollback")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "no_history")


def test_what_is_no_profile_leaves_no_trace(store: Running, variants: dict[str, bytes], tmp_path: Path) -> None:
    good = variants["one"]
    flipped = bytearray(good)
    flipped[-1000] ^= 1
    header = (2**63).to_bytes(8, "little") + good[8:]
    for data, status, word in (
        (b"", 400, "empty"),
        (b"hello", 422, "not a safetensors file"),
        (bytes(flipped), 422, "checksum"),
        (header, 422, "not a safetensors file"),
        (good[:-10], 422, "valid safetensors"),
        (b"\0" * (9 * 2**20), 413, "limit"),
        (variants["other"], 409, "fingerprint"),
    ):
        answer = put(store, data)
        assert answer.status_code == status and word in answer.json()["error"]["message"], answer.text
        assert str(tmp_path) not in answer.text
    chunked = store.client.put(PATH, content=iter([b"\0" * 2**20] * 9), headers=BYTES)
    assert chunked.status_code == 413
    assert store.client.put(PATH, content=good, headers={"Content-Type": "text/html"}).status_code == 415
    assert put(store, good, "/admin/profiles/nobody").status_code == 404
    assert files(tmp_path) == [] and store.client.get(PATH).json()["profiles"] == []
    audit = store.client.get("/admin/audit?limit=1").json()["actions"][0]
    assert (audit["action"], audit["outcome"]) == ("upload_profile", "refused")


def test_a_checking_process_that_hangs_or_takes_too_much_is_ended(
    store: Running, variants: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profiles, "BASE_MEMORY", 1 << 24)
    monkeypatch.setattr(profiles, "MEMORY_PER_BYTE", 0)
    assert put(store, variants["one"]).status_code == 422
    assert files(tmp_path) == []


async def test_the_check_has_a_time_limit(variants: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(variants["one"])
    with pytest.raises(Exception, match=r"within 0\.01 s"):
        await profiles.inspect_file(file, 0.01)


def test_what_was_activated_is_used_after_a_restart_and_damage_is_noticed(
    variants: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings({"name": "demo-7m"}, state_dir=str(tmp_path / "state"))
    with serving(config) as running:
        running.until_state("demo-7m", "hot")
        sha256 = put(running, variants["one"], query="?activate=1").json()["sha256"]
        other = put(running, variants["two"]).json()["sha256"]
        damaged = tmp_path / "state" / "profiles" / f"{other}.safetensors"
        damaged.chmod(0o600)
        damaged.write_bytes(variants["one"])
        refused = running.client.post(PATH + "/activate", json={"profile": other})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "damaged")
    (tmp_path / "state" / "profiles" / "incoming-x.safetensors").write_bytes(b"half an upload")
    with serving(config) as running:
        running.until_state("demo-7m", "hot")
        assert running.client.get(PATH).json()["running"] == sha256
    assert "incoming-x.safetensors" not in files(tmp_path)


@pytest.mark.parametrize(("prefer", "transform"), [("balanced", None), ("speed", "none")])
def test_a_profile_with_sides_apart_is_taken_and_shown(
    store: Running, tmp_path: Path, prefer: str, transform: str | None
) -> None:
    shipped = SpectralProfile.load(SHIPPED)
    rng = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, 512, 64, generator=rng) * 0.95 ** torch.arange(64) for _ in range(12)]
    made = profile_from_tensors(
        list(zip(sides[::2], sides[1::2], strict=True)), ratios=(4, 8), recent=32, prefer=prefer,
        model=shipped.model, fingerprint=shipped.fingerprint,
    )  # fmt: skip
    answer = put(store, made.save(tmp_path / "apart").read_bytes(), query="?activate=true")
    assert answer.status_code == 201, answer.text
    facts = store.client.get(f"{PATH}/versions/{answer.json()['sha256']}").json()
    assert list(facts["spectrum"][0]) == ["keys of heads 0-1", "values of heads 0-1"]
    assert facts["spectrum"][0]["values of heads 0-1"]["latents"] == 128
    assert facts["layers"][5]["sides"] == ["key", "value"] and facts.get("transform") == transform
    query = {"a": "shipped", "b": answer.json()["sha256"]}
    difference = store.client.get(f"{PATH}/diff", params=query).json()["differences"]
    assert any(row["field"] == "layers" for row in difference)


def test_a_worker_that_refuses_a_profile_changes_nothing(store: Running, variants: dict[str, bytes]) -> None:
    sha256 = put(store, variants["one"]).json()["sha256"]
    store.slot("demo-7m").setting = "impossible"
    refused = store.client.post(PATH + "/activate", json={"profile": sha256})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "refused_by_worker")
    listing = store.client.get(PATH).json()
    assert (listing["active"], listing["running"], listing["history"]) == (None, "", [])


def test_a_cold_model_with_a_slash_in_its_name(store: Running, variants: dict[str, bytes]) -> None:
    sha256 = put(store, variants["one"], "/admin/profiles/org/cold").json()["sha256"]
    answer = store.client.post("/admin/profiles/org/cold/activate", json={"profile": sha256})
    assert answer.json()["active"] == sha256 and answer.json()["running"] is None
    store.client.post("/admin/models/org/cold/load")
    store.until_state("org/cold", "hot")
    assert store.client.get("/admin/profiles").json()["models"]["org/cold"]["running"] == sha256


# ---------------------------------------------------------------------------------------------- jobs


@pytest.fixture
def builder(store: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variants: dict[str, bytes]) -> Running:
    monkeypatch.setattr(jobs, "BUILD_COMMAND", (sys.executable, str(HERE / "fake_builder.py")))
    (tmp_path / "built").write_bytes(variants["two"])
    monkeypatch.setenv("FAKE_PROFILE", str(tmp_path / "built"))
    return store


def follow(store: Running, ident: str) -> list[dict[str, Any]]:
    """A job's progress until it is over."""
    with store.client.stream("GET", f"/admin/jobs/{ident}/events") as stream:
        data = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data:")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def test_a_build_is_followed_and_its_profile_published(builder: Running) -> None:
    answer = builder.client.post(PATH + "/build", json={"tokens": 4096})
    assert answer.status_code == 202 and answer.json()["state"] in ("queued", "running")
    views = follow(builder, answer.json()["id"])
    assert views[-1]["state"] == "done" and (views[-1]["stage"], views[-1]["fraction"]) == ("publishing", 1.0)
    assert jobs.progress_of('{"stage": "measuring", "fraction": 0.25}\n') == ("measuring", 0.25)
    assert jobs.progress_of('{"stage": "measuring"') is None and jobs.progress_of("error: no") is None
    rows = builder.client.get(PATH).json()["profiles"]
    assert [(row["sha256"], row["origin"]) for row in rows] == [(views[-1]["sha256"], "build")]
    assert views[-1]["options"]["prefer"] == "quality"
    refused = builder.client.post(PATH + "/build", json={"prefer": "fast"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prefer"


def test_a_job_may_prefer_what_the_library_knows() -> None:
    """The gateway loads no torch, so it has the words by itself."""
    assert get_args(Build.model_fields["prefer"].annotation) == tuple(PREFERENCES)


@pytest.mark.parametrize(("seed", "why"), [(2, "cannot be calibrated"), (3, "not a safetensors file")])
def test_a_build_that_fails_says_why(builder: Running, seed: int, why: str) -> None:
    ident = builder.client.post(PATH + "/build", json={"seed": seed}).json()["id"]
    last = follow(builder, ident)[-1]
    assert last["state"] == "failed" and why in last["message"]


def test_a_build_can_be_cancelled_and_one_runs_at_a_time(builder: Running, tmp_path: Path) -> None:
    first, second = (builder.client.post(PATH + "/build", json={"seed": 1, "tokens": n}).json() for n in (5000, 6000))
    builder.until(lambda: list((tmp_path / "state" / "builds").glob("*.pid")) != [])
    states = {job["id"]: job["state"] for job in builder.client.get("/admin/jobs").json()["jobs"]}
    assert states == {first["id"]: "running", second["id"]: "queued"}
    pid = int(next((tmp_path / "state" / "builds").glob("*.pid")).read_text())
    assert builder.client.post(f"/admin/jobs/{second['id']}/cancel").json()["state"] == "cancelled"
    assert builder.client.post(f"/admin/jobs/{first['id']}/cancel").json()["state"] == "cancelled"
    assert not alive(pid) and follow(builder, first["id"])[-1]["state"] == "cancelled"
    assert builder.client.post("/admin/jobs/none/cancel").status_code == 404


def test_a_build_ends_with_the_server_and_is_reported_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "BUILD_COMMAND", (sys.executable, str(HERE / "fake_builder.py")))
    config = settings({"name": "demo-7m", "load": "on_demand"}, state_dir=str(tmp_path / "state"))
    with serving(config) as running:
        running.client.post(PATH + "/build", json={"seed": 1})
        running.until(lambda: list((tmp_path / "state" / "builds").glob("*.pid")) != [])
    pid = int(next((tmp_path / "state" / "builds").glob("*.pid")).read_text())
    assert not alive(pid)
    with serving(config) as running:
        (job,) = running.client.get("/admin/jobs").json()["jobs"]
    assert job["state"] == "interrupted" and "server ended" in job["message"]


async def test_the_real_command_takes_these_arguments_and_ends_with_its_parent() -> None:
    import asyncio

    model = load_settings(ROOT / "config.yaml").models[0].model_copy(update={"path": "no-such-folder/x"})
    options = {"tokens": 4096, "seed": 3, "device": "cpu", "prefer": "speed"}
    command = [*jobs.BUILD_COMMAND, *jobs.build_arguments(model, options), "--output", "x.safetensors"]
    child = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    _, said = await child.communicate(b"")
    assert child.returncode in (1, 2) and "Usage" not in said.decode(), said


def test_differences_name_fields_and_compare_ladders_by_name() -> None:
    old = {"ladder": [{"name": "4x", "kl": 1}, {"name": "8x", "kl": 2}], "spectrum": [1], "same": {"x": [1, 2]}}
    new = {"ladder": [{"name": "8x", "kl": 3}], "spectrum": [2], "same": {"x": [1, 2]}}
    found = {row["field"]: (row["old"], row["new"]) for row in differences(old, new)}
    assert found == {"ladder.4x": ({"name": "4x", "kl": 1}, None), "ladder.8x.kl": (2, 3)}


def test_a_spectrum_is_thinned_to_a_bounded_number_of_points() -> None:
    from server.profile_child import SPECTRUM_POINTS, _thinned

    shares = list(np.linspace(1, 0, 2049))
    unit = _thinned({"heads 0-7": shares})["heads 0-7"]
    assert unit["latents"] == 2049 and len(unit["shares"]) <= SPECTRUM_POINTS
    assert unit["shares"][1] == shares[unit["step"]]

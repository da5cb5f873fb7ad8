"""/admin: who may, models, configuration, events and the audit trail, against fake workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.config import load_settings
from server.state import State
from tests.server.conftest import Running, serving, settings

FOREVER = {"model": "demo", "prompt": "forever", "stream": True}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def admin() -> Iterator[Running]:
    with serving(settings({"name": "demo", "aliases": ["d"]}, {"name": "a/b", "load": "on_demand"})) as running:
        running.until_state("demo", "hot")
        yield running


def test_without_a_key_only_this_machine_may(admin: Running) -> None:
    assert admin.client.get("/admin/status").status_code == 200
    own = {"Origin": admin.url}
    assert admin.client.post("/admin/models/demo/pin", headers=own).status_code == 200
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
    ):
        answer = admin.client.post("/admin/models/demo/unload", headers=headers)
        code = "host_not_allowed" if "Host" in headers else "admin_forbidden"
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, code), headers
    assert admin.ready()["demo"]["state"] == "hot"
    admin.client.post("/admin/models/demo/unpin")


def test_with_a_key_nobody_else_may() -> None:
    with serving(settings(admin_key="correct horse")) as running:
        for given in (None, "Bearer wrong", "Basic correct horse", "Bearer", "correct horse"):
            headers = {} if given is None else {"Authorization": given}
            answer = running.client.get("/admin/status", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_key")
        right = running.client.get("/admin/status", headers={"Authorization": "Bearer correct horse"})
        assert right.status_code == 200 and right.json()["actor"].startswith("admin key")
        assert "correct horse" not in right.text


def test_load_unload_and_pin(admin: Running) -> None:
    client = admin.client
    assert client.post("/admin/models/a/b/load").status_code == 202
    admin.until_state("a/b", "hot")
    assert client.post("/admin/models/a/b/pin").json() == {"model": "a/b", "pinned": True}
    refused = client.post("/admin/models/a/b/unload", json={})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pinned")
    answer = client.post("/admin/models/a/b/unload", json={"force": True, "drain_seconds": 0})
    assert answer.json() == {"model": "a/b", "state": "cold"}
    admin.until_state("a/b", "cold")
    # An unloaded model comes back when it is asked for.
    whole = client.post("/v1/chat/completions", json={**CHAT, "model": "a/b"})
    assert whole.status_code == 200 and admin.ready()["a/b"]["state"] == "hot"
    assert client.post("/admin/models/nobody/load").status_code == 404
    wrong = client.post("/admin/models/demo/unload", json={"drain_secs": 1})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "drain_secs"
    client.post("/admin/models/a/b/unpin")


def test_an_unload_ends_what_runs_after_its_time(admin: Running) -> None:
    body = {"model": "demo", "prompt": "forever", "stream": True}
    with admin.client.stream("POST", "/v1/completions", json=body) as on:
        lines = on.iter_lines()
        assert any("tick" in line for line in lines)
        assert admin.client.post("/admin/models/demo/unload", json={"drain_seconds": 0}).json()["state"] == "cold"
        assert "error" in [line for line in lines if line.startswith("data:")][-1]
    admin.client.post("/admin/models/demo/load")
    admin.until_state("demo", "hot")


def test_a_setting_chosen_by_hand(admin: Running) -> None:
    answer = admin.client.post("/admin/models/demo/setting", json={"setting": "4x"})
    assert answer.status_code == 200 and answer.json()["setting"]["setting"] == "4x", answer.text
    assert admin.client.post("/v1/chat/completions", json=CHAT).headers["X-Spectral-Setting"] == "4x"
    for name, message in (("5x", "choose one of auto, exact, 4x, 8x"), ("", "setting")):
        refused = admin.client.post("/admin/models/demo/setting", json={"setting": name})
        assert refused.status_code == 400 and message in refused.json()["error"]["message"]
    back = admin.client.post("/admin/models/demo/setting", json={"setting": "auto"}).json()
    assert back["setting"]["setting"] == "8x" and back["chosen_setting"] is None


def test_the_map_is_whole(admin: Running) -> None:
    (cpu,) = admin.client.get("/admin/vram").json()["devices"]
    held = sum(part["bytes"] for part in cpu["segments"])
    rest = sum(cpu[f"{kind}_bytes"] for kind in ("foreign", "free"))
    assert cpu["device"] == "cpu" and held + rest == cpu["total_bytes"]
    kinds = {(part["model"], part["kind"]) for part in cpu["segments"]}
    assert kinds >= {("demo", "weights"), ("demo", "kv"), ("demo", "workspace")}


def test_a_cache_is_in_the_map_with_its_setting(admin: Running) -> None:
    def caches() -> list[dict[str, object]]:
        (cpu,) = admin.client.get("/admin/vram").json()["devices"]
        return [part for part in cpu["segments"] if part["kind"] == "kv" and part["bytes"]]

    with admin.client.stream("POST", "/v1/completions", json=FOREVER) as on:
        lines = on.iter_lines()
        assert any("tick" in line for line in lines)
        admin.until(lambda: caches() != [])
        assert caches() == [{"model": "demo", "kind": "kv", "bytes": 100, "setting": "8x"}]


def test_sleep_and_wake(admin: Running) -> None:
    admin.client.post("/admin/models/a/b/unload")
    cold = admin.client.post("/admin/models/a/b/sleep")
    assert (cold.status_code, cold.json()["error"]["code"]) == (409, "not_hot")
    assert admin.client.post("/admin/models/demo/sleep").json() == {"model": "demo", "slept": True}
    events = admin.client.get("/admin/events?model=demo&limit=20").json()["events"]
    assert ("sleep", "by hand") in [(event["kind"], event["reason"]) for event in events]
    admin.app.state.scheduler.memory.steward.changed()  # nor does the next plan wake it, or end it
    seen = admin.app.state.scheduler.memory.steward._planned_at
    admin.until(lambda: admin.app.state.scheduler.memory.steward._planned_at > seen)
    assert admin.ready()["demo"]["state"] == "asleep"
    assert admin.client.post("/admin/models/demo/wake").status_code == 202
    admin.until_state("demo", "hot")
    admin.client.post("/admin/models/demo/pin")
    pinned = admin.client.post("/admin/models/demo/sleep")
    assert (pinned.status_code, pinned.json()["error"]["code"]) == (409, "pinned")
    admin.client.post("/admin/models/demo/unpin")
    with admin.client.stream("POST", "/v1/completions", json=FOREVER) as on:
        lines = on.iter_lines()
        assert any("tick" in line for line in lines)
        busy = admin.client.post("/admin/models/demo/sleep")
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "not_asleep")
        assert "requests came meanwhile" in busy.json()["error"]["message"]
    assert admin.client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_model_on_the_cpu_is_in_the_map_while_it_sleeps_and_when_it_is_awake(admin: Running) -> None:
    def weights() -> list[int]:
        (device,) = admin.client.get("/admin/vram").json()["devices"]
        return [s["bytes"] for s in device["segments"] if (s["model"], s["kind"]) == ("demo", "weights")]

    assert weights() == [1000]
    assert admin.client.post("/admin/models/demo/sleep").status_code == 200
    assert weights() == [1000], "they stay where they are"
    assert admin.client.post("/admin/models/demo/wake").status_code == 202
    admin.until_state("demo", "hot")
    assert weights() == [1000]


def test_every_action_is_in_the_audit_trail_and_events_have_reasons(admin: Running) -> None:
    admin.client.post("/admin/models/demo/pin")
    admin.client.post("/admin/models/demo/unload")
    admin.client.post("/admin/models/demo/unpin")
    rows = admin.client.get("/admin/audit?limit=3").json()["actions"]
    assert [(row["action"], row["target"], row["outcome"]) for row in rows] == [
        ("unpin", "demo", "done"), ("unload", "demo", "refused"), ("pin", "demo", "done"),
    ]  # fmt: skip
    assert "pinned" in rows[1]["message"] and rows[0]["actor"] == "local from 127.0.0.1"
    older = admin.client.get(f"/admin/audit?limit=1&before={rows[-1]['id']}").json()["actions"]
    assert older[0]["id"] < rows[-1]["id"]
    pins = admin.client.get("/admin/events?kind=pin&model=demo&limit=2").json()["events"]
    assert [event["reason"] for event in pins] == ["unpinned", "pinned"]
    refused = admin.client.get("/admin/events?limit=0")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")


def test_events_can_be_followed(admin: Running) -> None:
    with admin.client.stream("GET", "/admin/events/stream") as stream:
        lines = stream.iter_lines()
        seen = json.loads(next(line for line in lines if line.startswith("data:")).removeprefix("data:"))
        assert seen["kind"] == "state" and "cold -> loading" in seen["reason"]
        with httpx.Client(base_url=admin.url, trust_env=False) as other:
            other.post("/admin/models/d/pin")
            other.post("/admin/models/d/unpin")
        assert any('"unpinned"' in line for line in lines)


def test_choices_outlive_the_server(tmp_path: Path) -> None:
    config = settings(state_dir=str(tmp_path / "state"))
    with serving(config) as running:
        running.until_state("demo", "hot")
        running.client.post("/admin/models/demo/pin")
        running.client.post("/admin/models/demo/setting", json={"setting": "4x"})
    with serving(config) as running:
        running.until_state("demo", "hot")
        status = running.client.get("/admin/status").json()
        assert status["durable"] and status["models"]["demo"]["pinned"]
        assert status["models"]["demo"]["setting"]["setting"] == "4x"
        assert len(running.client.get("/admin/audit").json()["actions"]) == 2


def test_a_faulty_configuration_changes_nothing_and_a_good_one_is_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    head = f"server: {{state_dir: '{tmp_path / 'state'}'}}\n"
    file.write_text(head + "models: [{name: demo}, {name: old, load: on_demand}]")
    with serving(load_settings(file), config_file=file) as running:
        running.until_state("demo", "hot")
        file.write_text(head + "models: [{name: demo, treads: 2}]")
        refused = running.client.post("/admin/config/reload")
        assert refused.status_code == 400 and "models.0.treads" in refused.json()["error"]["message"]
        assert set(running.ready()) == {"demo", "old"}
        lines = "models: [{name: demo, threads: 2, aliases: [d]}, {name: new}]"
        file.write_text(head.replace("}", ", port: 9, ping_seconds: 3}") + lines)
        found = running.client.post("/admin/config/reload").json()
        assert (found["added"], found["removed"], found["needs_load"]) == (["new"], ["old"], ["demo"])
        assert found["changed"] == {"demo": ["threads", "aliases"]}
        assert (found["server"], found["needs_server_restart"]) == (["ping_seconds"], ["server.port"])
        running.until_state("new", "hot")
        assert running.client.post("/v1/chat/completions", json={**CHAT, "model": "d"}).status_code == 200
        assert set(running.ready()) == {"demo", "new"}


def test_a_state_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    from server.app import create_app
    from server.state_schema import StateError

    holder = State.open(str(tmp_path))
    with pytest.raises(StateError, match="another server"):
        create_app(settings(state_dir=str(tmp_path)))
    holder.close()

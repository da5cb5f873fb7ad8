"""The metrics against their table, a real Prometheus and the dashboards and alerts that use them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import SPECS, Metrics, table
from server.worker import messages
from tests.server.conftest import ROOT, Running, serving, settings, until

FOLDER = ROOT / "dashboards"
DASHBOARDS = sorted((FOLDER / "grafana").glob("*.json"))
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


def tool(name: str) -> str:
    """A program's path; without it the test is skipped, unless the run has installed it."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("SPECTRAL_REQUIRE_TOOLS"):
            pytest.fail(f"{name} is missing although this run installs it")
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return found


@pytest.fixture(scope="module")
def used() -> Iterator[Running]:
    """A server that has answered, refused, lost a worker, and been administered."""
    with serving(settings({"name": "demo"}, {"name": "later", "load": "on_demand"})) as running:
        running.until_state("demo", "hot")
        running.client.post("/v1/chat/completions", json=CHAT)
        running.client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": "long"}]})
        running.client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": "garbage"}]})
        running.until_state("demo", "hot")
        running.client.post("/admin/models/demo/setting", json={"setting": "4x"})
        running.client.post("/admin/models/demo/pin")
        yield running


def samples(running: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = running.client.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_what_happened_is_counted(used: Running) -> None:
    found = samples(used)

    def value(name: str, **labels: str) -> float:
        return found[(f"spectral_{name}", tuple(sorted({"model": "demo", **labels}.items())))]

    assert value("requests_total", status="200") == 1
    assert value("request_errors_total", code="context_length_exceeded") == 1
    assert value("request_errors_total", code="worker_lost") == 1
    assert value("answers_total", reason="stop") == 1 and value("answer_duration_seconds_count") == 1
    assert value("model_loads_total", outcome="hot") == 2 == value("model_load_duration_seconds_count")
    assert value("worker_restarts_total") == 1 and value("events_total", kind="worker_lost") == 1
    assert value("events_total", kind="setting") == 1 and value("model_pinned") == 1
    assert value("setting_info", setting="4x", profile="") == 1
    assert ("spectral_setting_info", (("model", "demo"), ("profile", ""), ("setting", "8x"))) not in found
    memory = {dict(labels)["kind"]: v for (name, labels), v in found.items() if name == "spectral_device_memory_bytes"}
    assert {"weights", "workspace", "kv", "foreign", "free"} <= memory.keys()
    whole = sum(v for (name, _), v in found.items() if name == "spectral_device_memory_bytes")
    assert whole == found[("spectral_device_memory_total_bytes", (("device", "cpu"),))]


def test_the_documented_table_is_current() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == table(), "run: python -m server metrics > docs/metrics.md"
    printed = subprocess.run([sys.executable, "-m", "server", "metrics"], capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode == 0 and printed.stdout == table()


def test_every_metric_that_is_exposed_is_in_the_table_and_the_other_way_round(used: Running) -> None:
    text = used.client.get("/metrics").text
    exposed = {family.name for family in text_string_to_metric_families(text)}
    documented = {f"spectral_{spec.name}" for spec in SPECS}
    assert {name for name in exposed if name.startswith("spectral_")} == documented
    assert not any(":" in name for name in exposed)
    ends = "bytes|seconds|nats|tokens|info|requests|sequences|sessions|state|pinned|rank|element|token|total|nodes"
    units = re.compile(rf"_({ends})$")
    assert all(units.search(spec.full_name) for spec in SPECS)


def test_a_model_that_is_gone_leaves_no_series() -> None:
    metrics = Metrics()
    for model in ("a", "b"):
        metrics.set_state(model, "hot")
        metrics.set_ready(model, messages.Ready(context_length=1, setting="8x"))
        metrics.set_stats(model, messages.Stats())
        metrics.ttft.labels(model).observe(1)
    metrics.forget("a")
    text = metrics.render().decode()
    assert 'model="a"' not in text and 'model="b"' in text


def test_a_workers_counters_go_on_over_its_restarts() -> None:
    metrics = Metrics()
    for count in (5, 8, 0, 2, 2):
        metrics.set_stats("a", messages.Stats(prefix_reused=count))
    assert 'spectral_prefix_reused_tokens_total{model="a"} 10.0' in metrics.render().decode()


def test_promtool_finds_nothing_to_complain_of(used: Running) -> None:
    promtool = tool("promtool")
    text = used.client.get("/metrics").content
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, cwd=FOLDER / "prometheus")
        assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------- dashboards


def queries(dashboard: dict[str, Any]) -> list[str]:
    """Every expression of a dashboard, annotations included."""
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    for query in variables:  # Grafana's own function, of a metric and a label
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
        found.append(f"count by ({label}) ({metric})")
    return found + [item["expr"] for item in dashboard["annotations"]["list"]]


def rules() -> list[str]:
    groups = yaml.safe_load((FOLDER / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def plain(expr: str) -> str:
    """A query with Grafana's variables filled in."""
    return expr.replace("$__rate_interval", "1m").replace("$model", ".*")


ALL = [(path.name, expr) for path in DASHBOARDS for expr in queries(json.loads(path.read_text()))]
ALL += [("alerts.yml", expr) for expr in rules()]


def test_the_dashboards_are_as_they_are_made_and_sound() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from dashboards import files
    finally:
        sys.path.pop(0)
    assert {path.name: path.read_text() for path in DASHBOARDS} == files(), "run: python tools/dashboards.py"
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        ids = [panel["id"] for panel in dashboard["panels"]]
        for panel in dashboard["panels"]:  # each has something to ask, and all of it is in ALL
            assert panel["targets"] and all(target["expr"] for target in panel["targets"]), panel["title"]
        assert len(set(ids)) == len(ids) and dashboard["uid"]
        assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])


@pytest.mark.parametrize(("where", "expr"), ALL, ids=[f"{where}-{i}" for i, (where, _) in enumerate(ALL)])
def test_every_query_names_metrics_and_labels_that_exist(used: Running, where: str, expr: str) -> None:
    live: dict[str, set[str]] = {"up": {"job", "instance"}}
    for name, labels in samples(used):
        live.setdefault(name, set()).update(dict(labels))
    names = re.findall(r"\b(?:spectral|process)_\w+|\bup\b", expr)
    assert names, expr
    assert set(names) <= live.keys(), set(names) - live.keys()
    known = set().union(*(live[name] for name in names))
    used_labels = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expr))
    used_labels |= {label for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expr) for label in group.split(", ")}
    assert used_labels <= known, used_labels - known


@pytest.fixture(scope="module")
def prometheus(used: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A real Prometheus with the shipped configuration, except for the address of the server."""
    program, folder = tool("prometheus"), tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [used.url.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "prometheus" / "alerts.yml", folder)
    address = f"127.0.0.1:{_free_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", trust_env=False) as client:
            until(lambda: _answers(client, "up") == [1.0], 30)
            yield client
    finally:
        process.terminate()
        process.wait(20)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _answers(client: httpx.Client, query: str) -> list[float]:
    try:
        answer = client.get("/query", params={"query": query})
    except httpx.TransportError:
        return []
    if answer.status_code != 200:
        return []
    return [float(row["value"][1]) for row in answer.json()["data"]["result"]]


def test_a_real_prometheus_scrapes_it_and_every_query_is_answered(used: Running, prometheus: httpx.Client) -> None:
    until(lambda: _answers(prometheus, 'count_over_time(up{job="spectral"}[1m]) >= 3') != [], 20)
    used.client.post("/v1/chat/completions", json=CHAT)
    until(lambda: _answers(prometheus, "increase(spectral_answers_total[1m]) > 0") != [], 20)
    for where, expr in ALL:
        answer = prometheus.get("/query", params={"query": plain(expr)})
        assert answer.status_code == 200, (where, expr, answer.text)
    for expr in queries(json.loads((FOLDER / "grafana" / "memory.json").read_text()))[:6]:
        assert _answers(prometheus, plain(expr)) != [], expr
    loaded = prometheus.get("/rules").json()["data"]["groups"][0]["rules"]
    assert len(loaded) == len(rules()) and all(rule["health"] in ("ok", "unknown") for rule in loaded)


def test_provisioning_names_what_the_compose_file_mounts() -> None:
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/spectral.yml").read_text())["providers"][0]
    compose = Path(ROOT / "docker-compose.yml").read_text()
    assert provider["options"]["path"] in compose

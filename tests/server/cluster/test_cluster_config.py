"""The section `cluster`, its documentation, and what a server without --cluster does not load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from server.config import Settings
from server.config_cluster import ClusterSettings, ReplicaSettings

ROOT = Path(__file__).resolve().parents[3]


def test_the_documented_configuration_is_valid() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    block = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    settings = Settings(**block)
    assert settings.cluster.node_resource == "spectral" and settings.cluster.replicas["chat"].max == 8


def test_replicas_need_an_order() -> None:
    with pytest.raises(ValidationError, match="min is 3 and max is 2"):
        ReplicaSettings(min=3, max=2)
    with pytest.raises(ValidationError):
        ClusterSettings(silence_seconds=0)
    with pytest.raises(ValidationError, match="ports must be"):
        ClusterSettings(ports=(7499, 7400))


def test_ray_is_loaded_only_when_asked_for() -> None:
    code = "import server.__main__, server.serving, server.cluster.gateway, sys; sys.exit('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_only_two_files_import_ray() -> None:
    files = [*ROOT.glob("server/**/*.py"), *ROOT.glob("spectral/**/*.py")]
    found = {p.name for p in files if re.search(r"^\s*(import ray\b|from ray\b)", p.read_text(), re.MULTILINE)}
    assert found == {"ray_backend.py", "join.py"}


def test_every_node_of_a_cluster_has_one_spare_worker_unless_something_else_is_said() -> None:
    pytest.importorskip("ray")
    from server.cluster.ray_backend import node_settings

    told = Settings(models=[{"name": "demo"}]).memory.model_dump(mode="json")
    assert told["spare_workers"] is None
    assert node_settings({"memory": told}).memory.spare_workers == 1
    assert node_settings({"memory": told | {"spare_workers": 0}}).memory.spare_workers == 0


def test_the_conductor_is_on_the_head_so_that_no_other_node_takes_it_along(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from server.cluster import ray_backend

    nodes = [{"NodeID": "aa" * 28, "Alive": True, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr(ray_backend.ray, "nodes", lambda: nodes)
    assert ray_backend.on_head() == {}, "a Ray that does not say which node is the head"
    nodes.append({"NodeID": "bb" * 28, "Alive": True, "Resources": {ray_backend.HEAD: 1.0}})
    assert ray_backend.on_head() == {"resources": {ray_backend.HEAD: 0.001}}

"""The files for several machines: linted, and every configuration in them is one that the server takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from server.config import Settings
from tests.tools.test_deploy import ROOT, program, run

FOLDER, MANIFEST = ROOT / "deploy/cluster", ROOT / "deploy/kubernetes/raycluster.yaml"


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def test_linters_have_nothing_to_say(tmp_path: Path) -> None:
    done = run(program("hadolint"), "--no-color", str(FOLDER / "Dockerfile"))
    assert done.returncode == 0, done.stdout
    compose = str(FOLDER / "docker-compose.yml")
    done = run(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", compose)
    assert done.returncode == 0, done.stdout
    known = [part for part in documents() if part["kind"] != "RayCluster"]
    (cluster,) = [part for part in documents() if part["kind"] == "RayCluster"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for number, group in enumerate(groups):  # KubeRay's own kind is not in the schemas; what it holds are pods
        template = group["template"]
        meta = {**template["metadata"], "name": f"pod-{number}"}
        known.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]})
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(known))
    done = run(program("kubernetes-validate"), "--strict", str(tmp_path / "all.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_configurations_are_valid_and_serve_from_marked_nodes() -> None:
    (config,) = [part for part in documents() if part["kind"] == "ConfigMap"]
    for text in (config["data"]["config.yaml"], (FOLDER / "config.yaml").read_text()):
        settings = Settings(**yaml.safe_load(text))
        assert settings.cluster.node_resource == "spectral"
        assert set(settings.cluster.replicas) <= {model.name for model in settings.models}


def test_compose_has_three_nodes_of_which_two_serve_and_none_is_public() -> None:
    services = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]
    commands = {name: " ".join(service["command"]) for name, service in services.items()}
    assert len(commands) == 3 and sum('"spectral":1' in text for text in commands.values()) == 2
    assert sum("spectral serve --cluster ray" in text for text in commands.values()) == 2
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())


def test_the_image_takes_what_the_extra_names() -> None:
    (wanted,) = re.findall(r"^ray = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    image = (FOLDER / "Dockerfile").read_text()
    assert '"ray>=' in wanted
    for requirement in wanted.split(", "):
        assert requirement in image
